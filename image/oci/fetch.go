package oci

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
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
)

const (
	atOnce        = 3       // layers
	progressBytes = 1 << 20 // that forgive a server what it dropped before
	lockPoll      = 20 * time.Millisecond
	partialSuffix = ".partial"
)

// Fetch brings the layers into dir, each as "sha256-" and its digest, and verifies them. Layers that are there already are
// not fetched again, and what an interruption left of one (its name ends in ".partial") is not either, if the registry can
// send the rest. Any number of processes may fetch into one directory. Progress, if not nil, is told of bytes that are
// there, by one goroutine at a time. Errors are *flatten.DigestError, ErrNotFound and those of registries and files.
func (i *Image) Fetch(ctx context.Context, dir string, progress func(done, total int64)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	var done int64
	count := func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		done += n
		if progress != nil {
			progress(done, i.Size)
		}
	}
	var wg sync.WaitGroup
	turn := make(chan struct{}, atOnce)
	seen := map[string]bool{}
	// Flatten wants the top ones first.
	for n := len(i.Layers) - 1; n >= 0; n-- {
		l := i.Layers[n]
		if seen[l.Digest] {
			count(l.Size)
			continue
		}
		seen[l.Digest] = true
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			d := &download{from: i.from, layer: l, path: filepath.Join(dir, fileName(l.Digest)), count: count}
			if err := d.run(ctx); err != nil {
				cancel(fmt.Errorf("fetch layer %s of %s: %w", l.Digest, i.Name, err))
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// download is a layer on its way to a file.
type download struct {
	from  source
	layer Layer
	path  string // of the finished file
	count func(n int64)

	file *os.File
	hash hash.Hash
	have int64
	full error // of writing
}

func (d *download) run(ctx context.Context) (err error) {
	if d.file, err = d.claim(ctx); err != nil || d.file == nil {
		return err
	}
	// The lock goes with it.
	defer func() { err = errors.Join(err, d.file.Close()) }()
	if err := d.resume(); err != nil {
		return err
	}
	err = d.anywhere(ctx)
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.As(err, new(*flatten.DigestError)):
		// It takes room that is wanted, or is worth nothing.
		return errors.Join(err, os.Remove(d.file.Name()))
	case err != nil:
		return err
	}
	if err := d.file.Sync(); err != nil {
		return err
	}
	if err := os.Rename(d.file.Name(), d.path); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(d.path))
}

// anywhere fetches what is missing, from the next place when one sends what it should not, or nothing.
func (d *download) anywhere(ctx context.Context) error {
	for {
		resumed := d.have > 0
		err := d.all(ctx)
		if resumed && errors.As(err, new(*flatten.DigestError)) {
			// What was there from before may be the culprit.
			if err = d.reset(); err == nil {
				err = d.all(ctx)
			}
		}
		if err == nil || ctx.Err() != nil || d.full != nil || !d.from.elsewhere(d.layer.Digest, err) {
			return err
		}
		if errors.As(err, new(*flatten.DigestError)) {
			if err := d.reset(); err != nil {
				return err
			}
		}
	}
}

// claim opens the partial file under a lock, and waits while another process has it. It returns nil when the layer is
// there.
func (d *download) claim(ctx context.Context) (*os.File, error) {
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		if fi, err := os.Stat(d.path); err == nil && fi.Size() == d.layer.Size {
			d.count(d.layer.Size)
			return nil, nil
		}
		f, err := os.OpenFile(d.path+partialSuffix, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && isAt(f, f.Name()) {
			return f, nil
		}
		if cerr := f.Close(); cerr != nil {
			return nil, cerr
		}
		if err == nil || errors.Is(err, unix.EINTR) {
			continue // another has just finished with it
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", d.path+partialSuffix, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// isAt says whether a file still has a name.
func isAt(f *os.File, name string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(name)
	return err == nil && os.SameFile(a, b)
}

// resume takes stock of what is there.
func (d *download) resume() error {
	d.hash = sha256.New()
	n, err := io.Copy(d.hash, io.LimitReader(d.file, d.layer.Size+1))
	if err != nil {
		return err
	}
	d.have = n
	d.count(n)
	if n > d.layer.Size {
		return d.reset()
	}
	return nil
}

// reset starts anew.
func (d *download) reset() error {
	d.count(-d.have)
	d.have = 0
	d.hash.Reset()
	if err := d.file.Truncate(0); err != nil {
		return err
	}
	_, err := d.file.Seek(0, io.SeekStart)
	return err
}

// all fetches what is missing and checks the whole. A connection that is dropped is made again, while that leads anywhere.
func (d *download) all(ctx context.Context) error {
	best := d.have
	for try := 0; d.have < d.layer.Size; try++ {
		err := d.more(ctx)
		if err != nil && !dropped(err) {
			return err
		}
		if d.have >= best+progressBytes {
			best, try = d.have, 0
		}
		if d.have == d.layer.Size {
			break
		}
		if try == tries-1 {
			return err
		}
		if err := sleep(ctx, firstPause<<try); err != nil {
			return err
		}
	}
	if got := manifest.Algorithm + hex.EncodeToString(d.hash.Sum(nil)); got != d.layer.Digest {
		return &flatten.DigestError{What: "layer", Want: d.layer.Digest, Got: got}
	}
	return nil
}

// more fetches until the connection ends; io.ErrUnexpectedEOF where that is too early.
func (d *download) more(ctx context.Context) (err error) {
	r, start, err := d.from.blob(ctx, d.layer.Digest, d.have)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if start != d.have {
		if err := d.reset(); err != nil {
			return err
		}
	}
	// One byte too many shows that the size is wrong.
	_, err = io.CopyBuffer(d, io.LimitReader(r, d.layer.Size-d.have+1), make([]byte, 128<<10))
	switch {
	case d.have > d.layer.Size:
		return &flatten.DigestError{What: "layer", Want: d.layer.Digest}
	case err == nil && d.have < d.layer.Size:
		return io.ErrUnexpectedEOF
	}
	return err
}

func (d *download) Write(p []byte) (int, error) {
	n, err := d.file.Write(p)
	d.hash.Write(p[:n])
	d.have += int64(n)
	d.count(int64(n))
	if err != nil {
		d.full = err
	}
	return n, err
}

// notExist is ErrNotFound for a missing file.
func notExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}
