package oci

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"push.rocks/smartvm/image/internal/layers"
	"push.rocks/smartvm/image/registries"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
)

// Target is where an image is pushed to. Mirrors are not.
type Target struct {
	Reference name.Reference
	Transport http.RoundTripper // as patient and as careful as pulls are; it knows no passwords
	Close     func()
}

// Target finds out where a reference of a registry leads those who push there. Nothing is asked
// yet. The caller closes it.
func (o Options) Target(ref string) (*Target, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if Local(ref) {
		return nil, hint.Add(errors.New("it is no reference of a registry"),
			"smartvm image save IMAGE -o FILE writes an archive")
	}
	_, to, conf, err := parse(strings.TrimPrefix(ref, dockerTransport), o)
	if err != nil {
		return nil, err
	}
	if _, pinned := to.(name.Digest); pinned {
		return nil, hint.Add(errors.New("it has a digest, and that is the image's own"),
			"give a name and a tag: HOST/NAME:TAG")
	}
	places, err := conf.Places(to)
	if err != nil {
		return nil, err
	}
	own := places[len(places)-1]
	var insecure []name.Option
	if own.Insecure {
		insecure = append(insecure, name.Insecure)
	}
	// What is pulled from another location is pushed to where the name says, as podman does.
	tag, err := name.NewTag(to.Name(), insecure...)
	if err != nil {
		return nil, err
	}
	t, idle, err := o.transport(conf, registries.Place{Repository: tag.Repository, Insecure: own.Insecure})
	if err != nil {
		return nil, err
	}
	return &Target{Reference: tag, Transport: t, Close: idle}, nil
}

// Explain makes an error of the registry one that people can do something about.
func (t *Target) Explain(err error) error {
	var status *transport.Error
	if errors.As(err, &status) &&
		(status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden) {
		return hint.Add(err, "it wants a login of somebody who may push there: docker login %s",
			t.Reference.Context().RegistryStr())
	}
	return explain(err, t.Reference.Context(), "")
}

// Copy brings the layers into dir as Fetch does, and those of layouts and archives too.
func (i *Image) Copy(ctx context.Context, dir string, progress func(done, total int64)) error {
	from, here := i.from.(*local)
	if !here {
		return i.Fetch(ctx, dir, progress)
	}
	for _, l := range i.Layers {
		r, err := from.blob(ctx, l.Digest, 0)
		if err != nil {
			return err
		}
		err = atomicfile.Fill(layers.Path(dir, l.Digest), 0o600, func(f *os.File) error {
			_, err := io.Copy(f, io.LimitReader(r, l.Size+1)) // it is compared with its digest when it leaves
			return err
		})
		if err = errors.Join(err, r.Close(), context.Cause(ctx)); err != nil {
			return err
		}
	}
	return nil
}
