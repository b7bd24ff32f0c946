package layers

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"

	"push.rocks/smartvm/internal/download"
)

// await waits until a condition is met, which is asked for under the lock.
func (t *transfer) await(ctx context.Context, met func() bool) error {
	for {
		t.mu.Lock()
		ok, news := met(), t.news
		t.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-news:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Open reads a layer while it arrives. Its end comes when it has been verified.
func (f *Fetch) Open(ctx context.Context, digest string) (*Arriving, error) {
	t := f.layers[digest]
	a := &Arriving{ctx: ctx, from: t}
	var ferr error
	err := t.await(ctx, func() bool {
		if !t.begun {
			return false
		}
		a.starts = t.starts
		if !t.ended {
			a.file, ferr = os.Open(t.path + download.PartialSuffix)
		}
		if t.ended || errors.Is(ferr, fs.ErrNotExist) { // it was moved just now
			a.file, ferr = os.Open(t.path)
		}
		return true
	})
	return a, errors.Join(err, ferr)
}

// Arriving is a layer that is read while it is fetched.
type Arriving struct {
	ctx    context.Context // of the reading, which lasts no longer
	from   *transfer
	file   *os.File
	off    int64
	starts int // of the download, when this began
}

func (a *Arriving) Read(p []byte) (int, error) {
	var have int64
	err := a.from.await(a.ctx, func() bool {
		have = a.from.have
		return a.from.ended || have > a.off || a.from.starts != a.starts
	})
	switch {
	case err != nil:
		return 0, err
	case have <= a.off: // at its end or thrown away, of which Replaced knows
		return 0, io.EOF
	}
	n, err := a.file.ReadAt(p[:min(int64(len(p)), have-a.off)], a.off)
	a.off += int64(n)
	return n, err
}

func (a *Arriving) Close() error { return a.file.Close() }

// Replaced waits until the layer is there, and says whether it was fetched anew since it was
// opened.
func (a *Arriving) Replaced(ctx context.Context) (yes bool) {
	err := a.from.await(ctx, func() bool {
		yes = a.from.starts != a.starts
		return a.from.ended
	})
	return yes && err == nil
}
