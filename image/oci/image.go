package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"

	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/image/registries"
	"push.rocks/smartvm/image/trust"
	"push.rocks/smartvm/internal/download"
)

// Options say where images come from. The zero value is fit for public registries.
type Options struct {
	// Arch is what images are chosen for, as Go spells it: "amd64" (default) or "arm64". The system is
	// Linux. A variant may follow, "amd64/v3"; without one, images are chosen that any processor of
	// the architecture runs.
	Arch string
	// Keychain knows the registries' passwords, a login.Keychain those of docker and podman. Nil:
	// none.
	Keychain authn.Keychain
	// Login is for the registry itself that a reference leads to, in place of what Keychain knows.
	// Mirrors are not told it.
	Login authn.Authenticator
	// Mirrors are hosts, as in "mirror.example:5000", that are asked for Docker Hub's images first, in
	// this order.
	Mirrors []string
	// Registries reads what is said of registries: mirrors, places, blocked and insecure ones. It is
	// called for references of registries only. Nil: nothing is.
	Registries func() (*registries.Config, error)
	// Trust reads the policy that images are checked against before Resolve returns them; see package
	// trust for which are. Nil: all are allowed.
	Trust func() (*trust.Policy, error)
	// Transport is for HTTP, of an *http.Transport a copy. Nil: http.DefaultTransport.
	Transport http.RoundTripper
	// Unless is what a registry's tag led to before, an Image's Index, or its Digest if it has none.
	// While it does, Resolve returns ErrUnchanged: registries do not count being asked for that as a
	// pull.
	Unless  string
	Limits  flatten.Limits
	Stdin   io.Reader // of the reference "-"
	TempDir string    // for archives that have to be unpacked; empty: os.TempDir
	Log     *slog.Logger
}

// Config is what an image wants to be run as, Healthcheck a part of it.
type (
	Config      = config.Config
	Healthcheck = config.Healthcheck
)

// Layer is one of an image's, a tar.
type Layer = manifest.Layer

// Image is one image that was found. It is safe for concurrent use until it is closed.
type Image struct {
	// Name is how people call it: Docker Hub's host and "library/" are left out, a tag is added.
	Name string
	// ID is the configuration's SHA-256, in hexadecimal: what docker calls an image's id.
	ID string
	// Digest is the manifest's, or the configuration's for an archive of docker's that has no
	// manifest.
	Digest string
	// Index is the digest of the index that has the manifest, if it was found by one that has a digest
	// itself.
	Index string
	// Chain names the root file system that the layers make, in 64 hexadecimal digits: the chain ID of
	// the OCI image specification.
	Chain  string
	Config Config
	About  config.About
	Layers []Layer // the lowest first
	Size   int64   // bytes of all layers, as they are fetched
	// Documents are the texts of the manifest and of the configuration. An archive of docker's has no
	// manifest: nil.
	Documents [2][]byte

	limits flatten.Limits
	from   source
}

// source is where the parts of an image come from. It is safe for concurrent use.
type source interface {
	// manifest returns up to maxManifest bytes, which nobody has checked. Errors are ErrNotFound among
	// others.
	manifest(ctx context.Context, digest string) ([]byte, error)
	// blob reads from offset on or, where that is not possible, from the start on.
	blob(ctx context.Context, digest string, offset int64) (*download.Body, error)
	// elsewhere says that what came of a blob was of no use. It returns whether there is another place
	// that will be asked.
	elsewhere(digest string, err error) bool
	Close() error
}

// Close lets go of connections and temporary files.
func (i *Image) Close() error { return i.from.Close() }

// Resolve finds an image and reads its manifest and configuration, of a registry's image nothing
// more. The caller closes it. References are:
//
//	debian:12, localhost:5000/a/b@sha256:…   in a registry
//	docker://debian:12                       the same, as skopeo writes it
//	oci:DIR, oci:DIR:TAG                     in an OCI layout
//	docker-archive:FILE[:REF]                in what docker save wrote, or an OCI layout's tar, packed or not
//	oci-archive:FILE[:REF]                   the same
//	dir:DIR                                  in a directory that skopeo copied an image to
//	-                                        an archive, from Options.Stdin
//
// An image without a name is called after its file or directory, as far as that gives a name.
//
// Errors are ErrNotFound, ErrUnchanged, ErrPlainHTTP, *UnreachableError, *manifest.PlatformError,
// *manifest.NotImageError, *flatten.DigestError, *flatten.LimitError, *trust.RejectedError,
// *transport.Error of go-containerregistry for what a registry says, and those of files.
func Resolve(ctx context.Context, ref string, o Options) (*Image, error) {
	if o.Arch == "" {
		o.Arch = "amd64"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	var policy *trust.Policy
	var err error
	if o.Trust != nil {
		policy, err = o.Trust()
	}
	var f found
	if err == nil {
		f, err = find(ctx, ref, o, policy)
	}
	if err != nil {
		return nil, fmt.Errorf("resolve image %.300q: %w", ref, err)
	}
	i, err := f.image(ctx, o.Arch)
	if f.instead != nil && (errors.Is(err, ErrNotFound) || errors.Is(err, errLayers)) {
		if other, oerr := f.instead(); oerr == nil {
			if found, oerr := other.image(ctx, o.Arch); oerr == nil {
				i, err = found, nil
			}
		}
	}
	if err == nil {
		f.subject.Manifests = slices.DeleteFunc([]string{i.Digest, i.Index}, func(d string) bool { return d == "" })
		err = policy.Check(ctx, f.subject)
	}
	if limit := o.Limits.OrDefaults().MaxBytes; err == nil && i.Size > limit {
		err = &flatten.LimitError{What: "bytes of layers", Limit: limit, Option: "MaxBytes"}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("resolve image %.300q: %w", ref, err), f.from.Close())
	}
	i.limits = o.Limits
	return i, nil
}

// found is where a reference leads.
type found struct {
	from   source
	name   string
	text   []byte // of a manifest or an index
	kind   string // media type that whoever led here gives it; empty: none
	digest string // that text must have; empty: any
	id     string // the image's, if text is not its own
	// subject is what a policy is asked about.
	subject trust.Subject
	// instead describes the same in another way, for when this one leads nowhere. It may be nil.
	instead func() (found, error)
}

// errLayers says that a manifest and a configuration are not of one image.
var errLayers = errors.New("numbers of layers differ")

// maxNesting is how deep an index may hold an index.
const maxNesting = 3

func (f *found) image(ctx context.Context, arch string) (*Image, error) {
	want, index := manifest.Linux(arch), ""
	_, made := f.from.(*local) // its first document is made of what was chosen
	for range maxNesting {
		got := manifest.Digest(f.text)
		if f.digest != "" && got != f.digest {
			return nil, &flatten.DigestError{What: "manifest", Want: f.digest, Got: got}
		}
		d, err := manifest.Read(f.text, f.kind)
		if err != nil {
			return nil, err
		}
		if !d.Index {
			i, err := f.manifest(ctx, want, got, d)
			if err == nil {
				i.Index = index
			}
			return i, err
		}
		if index == "" && (!made || f.digest != "") {
			index = got
		}
		next, err := manifest.Pick(d.Manifests, want)
		if err != nil {
			return nil, err
		}
		if f.text, err = f.from.manifest(ctx, next.Digest); err != nil {
			return nil, err
		}
		f.digest, f.kind = next.Digest, next.MediaType
	}
	return nil, errors.New("read manifest: indexes within indexes")
}

func (f *found) manifest(ctx context.Context, want manifest.Platform, digest string,
	d manifest.Document,
) (*Image, error) {
	if err := d.Image(); err != nil {
		return nil, err
	}
	i := &Image{
		Name: f.name, ID: strings.TrimPrefix(d.Config.Digest, manifest.Algorithm),
		Digest: cmp.Or(f.id, digest), from: f.from,
	}
	if err := manifest.ValidDigest(d.Config.Digest); err != nil {
		return nil, err
	}
	if len(d.Layers) > maxLayers {
		return nil, &flatten.LimitError{What: "layers", Limit: maxLayers}
	}
	text, err := readBlob(ctx, f.from, d.Config.Digest)
	if err != nil {
		return nil, err
	}
	diffIDs, err := i.configure(text, want)
	if err != nil {
		return nil, err
	}
	if len(diffIDs) != len(d.Layers) {
		return nil, fmt.Errorf("read manifest: %w: %d, and %d in the configuration", errLayers, len(d.Layers), len(diffIDs))
	}
	for n, l := range d.Layers {
		if err := errors.Join(manifest.ValidDigest(l.Digest), manifest.ValidDigest(diffIDs[n])); err != nil {
			return nil, err
		}
		if l.Size < 0 {
			return nil, fmt.Errorf("read manifest: a layer of %d bytes", l.Size)
		}
		if l.Size > math.MaxInt64-i.Size {
			return nil, &flatten.LimitError{What: "bytes of layers", Limit: math.MaxInt64}
		}
		i.Size += l.Size
		i.Layers = append(i.Layers, Layer{Digest: l.Digest, DiffID: diffIDs[n], Size: l.Size})
	}
	i.Chain = Chain(diffIDs)
	if i.Documents[1] = text; f.id == "" {
		i.Documents[0] = f.text
	}
	sizes := make([]int64, len(i.Layers))
	for n, l := range i.Layers {
		sizes[n] = l.Size
	}
	i.About.Sizes(sizes)
	return i, nil
}

// configure reads an image's configuration.
func (i *Image) configure(text []byte, want manifest.Platform) (diffIDs []string, err error) {
	c, err := config.Parse(text)
	if err != nil {
		return nil, err
	}
	// Old images, and those built without, say nothing. The variant is left to whoever asked for this
	// very image.
	if c.OS != "" && c.OS != want.OS || c.Architecture != "" && c.Architecture != want.Architecture {
		have := manifest.Platform{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant}
		return nil, &manifest.PlatformError{Want: want.String(), Have: []string{have.String()}}
	}
	i.Config, i.About = c.Config, c.About
	return c.DiffIDs, nil
}

// Chain is the chain ID of layers, by their DiffIDs:
// https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid
func Chain(diffIDs []string) string {
	var id string
	for n, d := range diffIDs {
		if n == 0 {
			id = d
		} else {
			id = manifest.Digest([]byte(id + " " + d))
		}
	}
	if id == "" {
		id = manifest.Digest(nil)
	}
	return strings.TrimPrefix(id, manifest.Algorithm)
}

// readBlob reads a small one.
func readBlob(ctx context.Context, from source, digest string) (text []byte, err error) {
	r, err := from.blob(ctx, digest, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if text, err = readSmall(r); err != nil {
		return nil, err
	}
	if got := manifest.Digest(text); got != digest {
		return nil, &flatten.DigestError{What: "configuration", Want: digest, Got: got}
	}
	return text, nil
}

func readSmall(r io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err == nil && len(text) > maxManifest {
		err = &flatten.LimitError{What: "bytes of a manifest or configuration", Limit: maxManifest}
	}
	return text, err
}
