package layers

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/download"
)

const (
	tries      = 6
	firstPause = 100 * time.Millisecond // doubled each time
	// progressBytes forgive a server what it dropped before.
	progressBytes = 1 << 20
)

// transfer is a layer on its way to a file.
type transfer struct {
	from  Source
	layer Layer
	path  string // of the finished file
	times int64  // that the image has the layer
	count func(n int64)

	file *os.File
	hash hash.Hash
	full error // of writing

	mu     sync.Mutex
	news   chan struct{} // closed when what follows changes, and replaced
	begun  bool          // there is a file
	ended  bool          // it is all there, and what it should be
	have   int64         // bytes of it
	starts int           // how often what was there was thrown away
}

// set changes what others may wait for.
func (t *transfer) set(change func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change()
	close(t.news)
	t.news = make(chan struct{})
}

// grow counts bytes that have come, or gone.
func (t *transfer) grow(n int64) {
	t.set(func() { t.have += n })
	t.count(n * t.times)
}

func (t *transfer) run(ctx context.Context) (err error) {
	if t.file, err = t.claim(ctx); err != nil || t.file == nil {
		return err
	}
	// The lock goes with it.
	defer func() { err = errors.Join(err, t.file.Close()) }()
	if err := t.resume(); err != nil {
		return err
	}
	err = t.anywhere(ctx)
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.As(err, new(*flatten.DigestError)):
		// It takes room that is wanted, or is worth nothing.
		return errors.Join(err, os.Remove(t.file.Name()))
	case err != nil:
		return err
	}
	if err := t.file.Sync(); err != nil {
		return err
	}
	t.set(func() {
		err = os.Rename(t.file.Name(), t.path)
		t.ended = err == nil
	})
	if err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(t.path))
}

// anywhere fetches what is missing, from the next place when one sends what it should not, or nothing.
func (t *transfer) anywhere(ctx context.Context) error {
	for {
		resumed := t.have > 0
		err := t.all(ctx)
		if resumed && errors.As(err, new(*flatten.DigestError)) {
			// What was there from before may be the culprit.
			if err = t.reset(); err == nil {
				err = t.all(ctx)
			}
		}
		if err == nil || ctx.Err() != nil || t.full != nil || !t.from.Elsewhere(t.layer.Digest, err) {
			return err
		}
		if errors.As(err, new(*flatten.DigestError)) {
			if err := t.reset(); err != nil {
				return err
			}
		}
	}
}

// claim opens the partial file, and waits while another process has it. It returns nil when the layer is there.
func (t *transfer) claim(ctx context.Context) (*os.File, error) {
	if there, err := t.there(); there || err != nil {
		return nil, err
	}
	f, err := download.OpenPartial(ctx, t.path, nil)
	if err != nil {
		return nil, err
	}
	there, err := t.there() // another may have brought it
	if !there && err == nil {
		return f, nil
	}
	return nil, errors.Join(err, os.Remove(f.Name()), f.Close())
}

// there says whether the whole layer is: one that has been damaged since is fetched again, and replaced.
func (t *transfer) there() (yes bool, err error) {
	f, err := os.Open(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(f, t.layer.Size+1))
	if err != nil || n != t.layer.Size || manifest.DigestOf(h) != t.layer.Digest {
		return false, err
	}
	t.set(func() { t.begun, t.ended, t.have = true, true, n })
	t.count(n * t.times)
	return true, nil
}

// resume takes stock of what is there.
func (t *transfer) resume() error {
	t.hash = sha256.New()
	n, err := io.Copy(t.hash, io.LimitReader(t.file, t.layer.Size+1))
	if err != nil {
		return err
	}
	t.set(func() { t.begun = true })
	t.grow(n)
	if n > t.layer.Size {
		return t.reset()
	}
	return nil
}

// reset starts anew.
func (t *transfer) reset() error {
	if t.have > 0 {
		t.set(func() { t.starts++ })
	}
	t.grow(-t.have)
	t.hash.Reset()
	if err := t.file.Truncate(0); err != nil {
		return err
	}
	_, err := t.file.Seek(0, io.SeekStart)
	return err
}

// all fetches what is missing and checks the whole. A connection that is dropped is made again, while that leads anywhere.
func (t *transfer) all(ctx context.Context) error {
	best := t.have
	for try := 0; t.have < t.layer.Size; try++ {
		err := t.more(ctx)
		if err != nil && !download.Dropped(err) {
			return err
		}
		if t.have >= best+progressBytes {
			best, try = t.have, 0
		}
		if t.have == t.layer.Size {
			break
		}
		if try == tries-1 {
			return err
		}
		if err := download.Sleep(ctx, firstPause<<try); err != nil {
			return err
		}
	}
	if got := manifest.DigestOf(t.hash); got != t.layer.Digest {
		return &flatten.DigestError{What: "layer", Want: t.layer.Digest, Got: got}
	}
	return nil
}

// more fetches until the connection ends; io.ErrUnexpectedEOF where that is too early.
func (t *transfer) more(ctx context.Context) (err error) {
	r, start, err := t.from.Blob(ctx, t.layer.Digest, t.have)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if start != t.have {
		if err := t.reset(); err != nil {
			return err
		}
	}
	// One byte too many shows that the size is wrong.
	_, err = io.CopyBuffer(t, io.LimitReader(r, t.layer.Size-t.have+1), make([]byte, 128<<10))
	switch {
	case t.have > t.layer.Size:
		return &flatten.DigestError{What: "layer", Want: t.layer.Digest}
	case err == nil && t.have < t.layer.Size:
		return io.ErrUnexpectedEOF
	}
	return err
}

func (t *transfer) Write(p []byte) (int, error) {
	n, err := t.file.Write(p)
	t.hash.Write(p[:n])
	t.grow(int64(n))
	if err != nil {
		t.full = err
	}
	return n, err
}
