package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/layers"
)

// Fetch brings the layers into dir: see layers.Fetch. Progress, if not nil, is told of bytes that are there, by one goroutine at a
// time. Errors are *flatten.DigestError, ErrNotFound and those of registries and files.
func (i *Image) Fetch(ctx context.Context, dir string, progress func(done, total int64)) error {
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
	return &layers.Fetch{From: layers.Source{Blob: i.from.blob, Elsewhere: i.from.elsewhere}, Layers: i.Layers, Dir: dir, Progress: progress}
}

// Flatten brings the layers into dir, as Fetch does, and makes one file system of them while they arrive: see flatten.Layers for dst.
// Progress, if not nil, is told how many of the layers' bytes have come ("fetch") and, once they all have, how many are done
// ("unpack"), by one goroutine at a time. Errors are those of both.
func (i *Image) Flatten(ctx context.Context, dir string, dst *os.File, progress func(step string, done, total int64)) (flatten.Stats, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	var come int64
	tell := func(step string, done int64) {
		mu.Lock()
		defer mu.Unlock()
		if step == "fetch" {
			come = done
		} else if come < i.Size {
			return
		}
		if progress != nil {
			progress(step, done, i.Size)
		}
	}
	f := i.fetch(dir, func(done int64) { tell("fetch", done) })
	f.Start(ctx, cancel)
	stats, err := i.flatten(ctx, f, dst, func(done int64) { tell("unpack", done) })
	if err != nil {
		cancel(fmt.Errorf("flatten %s: %w", i.Name, err))
	}
	f.Wait()
	var wrong *flatten.DigestError
	for _, l := range i.Layers {
		if errors.As(err, &wrong) && l.DiffID == wrong.Want { // the next pull brings it anew
			err = errors.Join(err, os.Remove(layers.Path(dir, l.Digest)))
		}
	}
	return stats, context.Cause(ctx)
}

// flatten begins anew where what has been read of a layer was thrown away.
func (i *Image) flatten(ctx context.Context, f *layers.Fetch, dst *os.File, progress func(done int64)) (flatten.Stats, error) {
	var last *layers.Arriving
	all := make([]flatten.Layer, len(i.Layers))
	for n, l := range i.Layers {
		all[n] = flatten.Layer{DiffID: l.DiffID, Open: func(ctx context.Context) (r io.ReadCloser, err error) {
			last, err = f.Open(ctx, l.Digest)
			return last, err
		}}
	}
	for {
		stats, err := flatten.Layers(ctx, all, dst, flatten.Options{Limits: i.limits, Progress: progress})
		if err == nil || last == nil || !last.Replaced(ctx) {
			return stats, err
		}
		last = nil
	}
}
