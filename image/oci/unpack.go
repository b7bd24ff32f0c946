package oci

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"

	"push.rocks/smartvm/image/internal/layers"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
)

// Fetch brings the layers into dir: see layers.Fetch. Those of layouts and archives stay where they
// are. Progress, if not nil, is told of bytes that are there, by one goroutine at a time. Errors
// are *flatten.DigestError, ErrNotFound and those of registries and files.
func (i *Image) Fetch(ctx context.Context, dir string, progress func(done, total int64)) error {
	if _, here := i.from.(*local); here {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f := i.fetch(dir, func(done int64) {
		if progress != nil {
			progress(done, i.Size)
		}
	})
	f.Start(ctx, cancel)
	f.Wait()
	return context.Cause(ctx)
}

func (i *Image) fetch(dir string, progress func(done int64)) *layers.Fetch {
	return &layers.Fetch{
		From: layers.Source{Blob: i.from.blob, Elsewhere: i.from.elsewhere}, Layers: i.Layers, Dir: dir,
		Progress: progress,
	}
}

// Flatten makes one file system of the layers: see flatten.Layers for dst. It brings those of
// registries into dir, as Fetch does, and unpacks them while they arrive; those of layouts and
// archives it reads where they are. Progress, if not nil, is told how many of their bytes have come
// ("fetch") and, once all are there and verified, how many are done ("unpack"), by one goroutine at
// a time. Errors are those of both.
func (i *Image) Flatten(ctx context.Context, dir string, dst *os.File,
	progress func(step string, done, total int64),
) (flatten.Stats, error) {
	if progress == nil {
		progress = func(string, int64, int64) {}
	}
	if from, here := i.from.(*local); here {
		return i.flatten(ctx, from.layer, dst, func(done int64) { progress("unpack", done, i.Size) })
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	f := i.fetch(dir, func(done int64) {
		mu.Lock()
		defer mu.Unlock()
		progress("fetch", done, i.Size)
	})
	f.Start(ctx, cancel)
	stats, err := i.arriving(ctx, f, dst, func(done int64) {
		if !f.Whole() {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		progress("unpack", done, i.Size)
	})
	if err != nil {
		cancel(err)
	}
	f.Wait()
	return stats, context.Cause(ctx)
}

// arriving flattens what is fetched, and begins anew where what has been read of a layer was thrown
// away.
func (i *Image) arriving(ctx context.Context, f *layers.Fetch, dst *os.File,
	progress func(done int64),
) (flatten.Stats, error) {
	for {
		var last *layers.Arriving
		stats, err := i.flatten(ctx, func(ctx context.Context, l Layer) (r io.ReadCloser, err error) {
			last, err = f.Open(ctx, l.Digest)
			return last, err
		}, dst, progress)
		if err == nil || last == nil || !last.Replaced(ctx) {
			return stats, err
		}
	}
}

func (i *Image) flatten(
	ctx context.Context, open func(ctx context.Context, l Layer) (io.ReadCloser, error), dst *os.File,
	progress func(done int64),
) (flatten.Stats, error) {
	all := make([]flatten.Layer, len(i.Layers))
	for n, l := range i.Layers {
		all[n] = flatten.Layer{DiffID: l.DiffID, Open: func(ctx context.Context) (io.ReadCloser, error) {
			return open(ctx, l)
		}}
	}
	stats, err := flatten.Layers(ctx, all, dst, flatten.Options{Limits: i.limits, Progress: progress})
	if err != nil {
		err = fmt.Errorf("flatten %s: %w", i.Name, err)
	}
	return stats, err
}

// layer reads one where it is. What it comes to is compared with its digest at its end.
func (l *local) layer(ctx context.Context, layer Layer) (io.ReadCloser, error) {
	r, err := l.blob(ctx, layer.Digest, 0)
	if err != nil {
		return nil, err
	}
	return &checked{r, layer, sha256.New(), 0}, nil
}

type checked struct {
	io.ReadCloser
	layer Layer
	hash  hash.Hash
	size  int64
}

func (c *checked) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.hash.Write(p[:n])
	c.size += int64(n)
	end := errors.Is(err, io.EOF)
	if c.size > c.layer.Size || end && c.size < c.layer.Size {
		return 0, &flatten.DigestError{What: "layer", Want: c.layer.Digest}
	}
	if end {
		if got := manifest.DigestOf(c.hash); got != c.layer.Digest {
			return 0, &flatten.DigestError{What: "layer", Want: c.layer.Digest, Got: got}
		}
	}
	return n, err
}
