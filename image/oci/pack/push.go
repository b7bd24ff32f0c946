package pack

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"push.rocks/smartvm/image/oci"
)

// Pushed is what a registry has.
type Pushed struct {
	Reference string `json:"reference"` // in full, with its tag
	Digest    string `json:"digest"`    // the manifest's
}

// Push sends the image to a registry, under a reference. What the registry has is not sent; what it
// has in the repository that the image came from, which may be empty, it is asked to take from
// there. Errors are those of oci.Options.Target, of files and of registries.
func (i *Image) Push(ctx context.Context, to, from string, o oci.Options,
	progress func(done, total int64),
) (*Pushed, error) {
	target, err := o.Target(to)
	if err != nil {
		return nil, err
	}
	defer target.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	total := i.Size() + int64(len(i.Config)+len(i.Manifest))
	updates := make(chan v1.Update, 64)
	told := make(chan struct{})
	go func() {
		defer close(told)
		for u := range updates {
			if u.Error == nil && progress != nil {
				progress(u.Complete, total)
			}
		}
	}()
	options := []remote.Option{
		remote.WithContext(ctx), remote.WithTransport(target.Transport), remote.WithProgress(updates),
		remote.WithJobs(atOnce), remote.WithNondistributable,
	}
	if o.Login != nil {
		options = append(options, remote.WithAuth(o.Login))
	} else if o.Keychain != nil {
		options = append(options, remote.WithAuthFromKeychain(o.Keychain))
	}
	whole, err := i.outgoing(target.Reference, from)
	if err != nil {
		close(updates)
	} else {
		err = remote.Write(target.Reference, whole, options...) // it closes updates
	}
	<-told
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, target.Explain(err)
	}
	return &Pushed{target.Reference.Name(), i.Digest}, nil
}

const atOnce = 3 // layers

// outgoing is the image as go-containerregistry has it, with layers that may be taken from another
// repository of the same registry.
func (i *Image) outgoing(to name.Reference, from string) (v1.Image, error) {
	whole, err := partial.CompressedToImage(core{i})
	if err != nil {
		return nil, err
	}
	ref, err := name.ParseReference(from)
	if err != nil || ref.Context().RegistryStr() != to.Context().RegistryStr() || ref.Context() == to.Context() {
		return whole, nil
	}
	return &mountable{whole, ref}, nil
}

type mountable struct {
	v1.Image
	from name.Reference
}

func (m *mountable) Layers() ([]v1.Layer, error) {
	all, err := m.Image.Layers()
	for n, l := range all {
		all[n] = &remote.MountableLayer{Layer: l, Reference: m.from}
	}
	return all, err
}

type core struct{ *Image }

func (c core) RawManifest() ([]byte, error)        { return c.Manifest, nil }
func (c core) RawConfigFile() ([]byte, error)      { return c.Config, nil }
func (c core) MediaType() (types.MediaType, error) { return types.MediaType(c.Type), nil }

func (c core) LayerByDigest(d v1.Hash) (partial.CompressedLayer, error) {
	if d.String() == c.config.Digest {
		return partial.ConfigLayer(c)
	}
	for n := range c.Layers {
		if c.Layers[n].Digest == d.String() {
			return leaving{&c.Layers[n]}, nil
		}
	}
	return nil, fmt.Errorf("the manifest has no layer %s", d)
}

type leaving struct{ *Layer }

func (l leaving) Digest() (v1.Hash, error) { return v1.NewHash(l.Descriptor.Digest) }
func (l leaving) Size() (int64, error)     { return l.Descriptor.Size, nil }
func (l leaving) MediaType() (types.MediaType, error) {
	return types.MediaType(l.Descriptor.MediaType), nil
}
func (l leaving) Compressed() (io.ReadCloser, error) { return os.Open(l.Path) }
