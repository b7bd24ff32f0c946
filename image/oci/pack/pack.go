// Package pack has images whose parts are files here, ready to leave: as an archive, or to a
// registry.
package pack

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"push.rocks/smartvm/image/internal/layers"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/internal/atomicfile"
)

// Image is all there is of an image.
type Image struct {
	Digest   string // the manifest's
	Type     string // the manifest's media type
	Manifest []byte
	Config   []byte
	Layers   []Layer // the lowest first

	config manifest.Descriptor
}

// Layer is one of an image's.
type Layer struct {
	manifest.Descriptor
	Path string
}

// maxDocument is how many bytes a manifest or a configuration may have.
const maxDocument = 4 << 20

// Keep writes an image's documents into a directory, as its layers are there: under their digests.
func Keep(dir string, documents ...[]byte) error {
	for _, text := range documents {
		path := layers.Path(dir, manifest.Digest(text))
		if _, err := os.Lstat(path); err == nil {
			continue
		}
		err := atomicfile.Fill(path, 0o600, func(f *os.File) error {
			_, err := f.Write(text)
			return err
		})
		if _, there := os.Lstat(path); err != nil && there != nil { // another process may have been first
			return fmt.Errorf("keep the image's documents: %w", err)
		}
	}
	return nil
}

// Kept reads an image whose documents and layers are in a directory. What is not there is
// fs.ErrNotExist. That layers are what their digests say is checked when they leave.
func Kept(dir, digest, id string) (*Image, error) {
	var texts [2][]byte
	for n, d := range []string{digest, manifest.Algorithm + id} {
		if err := manifest.ValidDigest(d); err != nil {
			return nil, err
		}
		var err error
		if texts[n], err = read(layers.Path(dir, d)); err != nil {
			return nil, err
		}
		if got := manifest.Digest(texts[n]); got != d {
			return nil, &flatten.DigestError{What: "manifest or configuration", Want: d, Got: got}
		}
	}
	return Of(texts[0], texts[1], dir)
}

func read(path string) (text []byte, err error) {
	text, err = atomicfile.Read(path, maxDocument)
	if err == nil && len(text) > maxDocument {
		err = &flatten.LimitError{What: "bytes of a manifest or configuration", Limit: maxDocument}
	}
	return text, err
}

// Of describes an image by its documents. Its layers are in a directory, or it is fs.ErrNotExist.
func Of(text, config []byte, dir string) (*Image, error) {
	d, err := manifest.Read(text, "")
	if err == nil && d.Index {
		err = errors.New("read manifest: it is an index")
	}
	if err == nil {
		err = d.Image()
	}
	if err != nil {
		return nil, err
	}
	if got := manifest.Digest(config); got != d.Config.Digest {
		return nil, &flatten.DigestError{What: "configuration", Want: d.Config.Digest, Got: got}
	}
	var own struct {
		Type string `json:"mediaType"`
	}
	if err := json.Unmarshal(text, &own); err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	i := &Image{Digest: manifest.Digest(text), Type: own.Type, Manifest: text, Config: config, config: d.Config}
	if i.Type == "" {
		i.Type = manifest.TypeManifest
	}
	i.config.Size = int64(len(config))
	i.config.MediaType = cmp.Or(i.config.MediaType, typeConfig)
	for _, l := range d.Layers {
		if err := manifest.ValidDigest(l.Digest); err != nil {
			return nil, err
		}
		path := layers.Path(dir, l.Digest)
		fi, err := os.Lstat(path)
		if err == nil && (!fi.Mode().IsRegular() || fi.Size() != l.Size) {
			err = fmt.Errorf("layer %s: has not %d bytes: %w", l.Digest, l.Size, fs.ErrNotExist)
		}
		if err != nil {
			return nil, err
		}
		i.Layers = append(i.Layers, Layer{l, path})
	}
	return i, nil
}

const (
	typeConfig = "application/vnd.oci.image.config.v1+json"
	typeLayer  = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// New makes the manifest of a configuration and layers.
func New(config []byte, layers []Layer) (*Image, error) {
	i := &Image{
		Type: manifest.TypeManifest, Config: config, Layers: layers,
		config: manifest.Descriptor{MediaType: typeConfig, Digest: manifest.Digest(config), Size: int64(len(config))},
	}
	blobs := []manifest.Descriptor{}
	for _, l := range layers {
		blobs = append(blobs, manifest.Descriptor{MediaType: cmp.Or(l.MediaType, typeLayer), Digest: l.Digest, Size: l.Size})
	}
	var err error
	i.Manifest, err = json.Marshal(
		map[string]any{"schemaVersion": 2, "mediaType": i.Type, "config": i.config, "layers": blobs})
	i.Digest = manifest.Digest(i.Manifest)
	return i, err
}

// Origin is where an image came from, and which it was.
type Origin struct {
	Reference  string
	Digest, ID string // as oci.Image has them
	Dir        string // for its layers
}

// Fetch brings the image again. If another is there now, that is an error.
func (from Origin) Fetch(ctx context.Context, o oci.Options, progress func(done, total int64)) (i *Image, err error) {
	found, err := oci.Resolve(ctx, from.Reference, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, found.Close()) }()
	if found.ID != from.ID || found.Digest != from.Digest {
		return nil, fmt.Errorf("%s is another image by now: %s", from.Reference, found.Digest)
	}
	dir := from.Dir
	if err := found.Copy(ctx, dir, progress); err != nil {
		return nil, err
	}
	if found.Documents[0] != nil {
		if err := Keep(dir, found.Documents[:]...); err != nil {
			return nil, err
		}
		return Of(found.Documents[0], found.Documents[1], dir)
	}
	var all []Layer
	for _, l := range found.Layers {
		kind := "application/vnd.oci.image.layer.v1.tar"
		path := layers.Path(dir, l.Digest)
		if l.Digest != l.DiffID {
			kind = typeLayer
		}
		all = append(all, Layer{manifest.Descriptor{MediaType: kind, Digest: l.Digest, Size: l.Size}, path})
	}
	return New(found.Documents[1], all)
}

// Size is how many bytes all layers have.
func (i *Image) Size() (n int64) {
	for _, l := range i.Layers {
		n += l.Size
	}
	return n
}

// verified copies a layer and makes sure that it is what its digest says.
func (l *Layer) verified(w io.Writer, r io.Reader) error {
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(w, h), r)
	if err != nil {
		return err
	}
	if got := manifest.DigestOf(h); got != l.Digest || n != l.Size {
		return &flatten.DigestError{What: "layer", Want: l.Digest, Got: got}
	}
	return nil
}
