package pack

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"push.rocks/smartvm/image/internal/layers"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/internal/ext4"
)

// Root is an ext4 file system, or a part of one.
type Root struct {
	Path string
	// Upper is the directory that was the upper one of an overlay, of which the layer is; empty: it is
	// of all. Leave says which names in Upper are left out.
	Upper string
	Leave func(name string) bool

	Limits   flatten.Limits
	Progress func(done int64) // is told how many bytes the layer has. It may be nil
}

// Flat makes an image of one layer, in a directory: what the file system has. What d says of the
// image stays, with its history as that of the layer. The same file system gives the same image.
func Flat(ctx context.Context, root Root, d config.Document, dir string) (i *Image, err error) {
	layer, diffID, err := root.Layer(ctx, dir)
	if err != nil {
		return nil, err
	}
	d.DiffIDs = []string{diffID}
	steps := append([]config.Step{}, d.About.History...)
	for n := range steps {
		steps[n].NoLayer = true
	}
	d.About.History = append(steps,
		config.Step{Created: d.About.Built, CreatedBy: "smartvm", Comment: "the whole root file system"})
	text, err := d.Text()
	if err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	return New(text, []Layer{layer})
}

// Layer makes a layer of it in a directory.
func (r Root) Layer(ctx context.Context, dir string) (l Layer, diffID string, err error) {
	f, err := os.Open(r.Path)
	if err != nil {
		return l, "", err
	}
	defer f.Close()
	fs, err := ext4.Open(f)
	if err != nil {
		return l, "", err
	}
	bounds := r.Limits.OrDefaults()
	limits := ext4.Limits{Bytes: bounds.MaxBytes, Entries: bounds.MaxEntries}
	return write(dir, r.Progress, func(w *tar.Writer) error {
		if r.Upper != "" {
			return fs.Layer(ctx, w, r.Upper, r.Leave, limits)
		}
		return fs.Tar(ctx, w, limits)
	})
}

// write makes a layer in a directory: a tar that fill writes, packed with gzip. After an error
// nothing is left of it. Progress, if not nil, is told how many bytes the tar has.
func write(dir string, progress func(done int64), fill func(w *tar.Writer) error) (l Layer, diffID string, err error) {
	f, err := os.CreateTemp(dir, "layer-")
	if err != nil {
		return Layer{}, "", err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	packed, plain := &sized{Hash: sha256.New()}, &sized{Hash: sha256.New(), tell: progress}
	z := gzip.NewWriter(io.MultiWriter(f, packed))
	t := tar.NewWriter(io.MultiWriter(z, plain))
	if err = fill(t); err == nil {
		err = t.Close()
	}
	if err = errors.Join(err, z.Close(), f.Sync(), f.Close()); err != nil {
		return Layer{}, "", fmt.Errorf("make layer: %w", err)
	}
	l = Layer{Descriptor: manifest.Descriptor{MediaType: typeLayer, Digest: manifest.DigestOf(packed), Size: packed.size}}
	l.Path = layers.Path(dir, l.Digest)
	return l, manifest.DigestOf(plain), os.Rename(f.Name(), l.Path)
}

// sized counts what is hashed.
type sized struct {
	hash.Hash
	size int64
	tell func(size int64)
}

func (s *sized) Write(p []byte) (int, error) {
	if s.size += int64(len(p)); s.tell != nil {
		s.tell(s.size)
	}
	return s.Hash.Write(p)
}
