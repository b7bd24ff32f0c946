// Package logfile keeps the newest part of an endless stream in two files, so that a guest that
// writes without end cannot fill the host's disk or memory, and follows such a stream from another
// process.
package logfile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Suffix is added to a log's name for its older half.
const Suffix = ".1"

// Writer appends to a file and, whenever that is full, moves it aside to path+Suffix, replacing
// what was there.
type Writer struct {
	path string
	half int64
	f    *os.File
	n    int64

	times *times // nil: nobody asks for them
}

// CreateTimed is Create of a log for OpenSince.
func CreateTimed(path string, limit int64) (*Writer, error) {
	w, err := Create(path, limit)
	if err != nil {
		return nil, err
	}
	w.times = &times{path: path}
	return w, nil
}

// Create opens the log at path for appending and keeps at most limit bytes, in two halves. What is
// there already is a file or a character device, as /dev/null, which is never moved aside.
func Create(path string, limit int64) (*Writer, error) {
	w := &Writer{path: path, half: limit / 2}
	return w, w.open()
}

func (w *Writer) open() error {
	// O_NONBLOCK: a FIFO would keep us waiting for a reader.
	f, err := os.OpenFile(w.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	fi, err := f.Stat()
	if err != nil {
		return errors.Join(fmt.Errorf("open log: %w", err), f.Close())
	}
	switch {
	case fi.Mode()&fs.ModeCharDevice != 0:
		w.half = math.MaxInt64
	case !fi.Mode().IsRegular():
		return errors.Join(fmt.Errorf("open log: %s is neither a file nor a character device", w.path), f.Close())
	}
	w.f, w.n = f, fi.Size()
	return nil
}

// Write appends p whole. A p longer than half the limit makes the file that much longer.
func (w *Writer) Write(p []byte) (int, error) {
	if w.n > 0 && w.n+int64(len(p)) > w.half {
		if err := errors.Join(os.Rename(w.path, w.path+Suffix), w.f.Close(), w.open()); err != nil {
			return 0, fmt.Errorf("rotate log: %w", err)
		}
		if w.times != nil {
			if err := w.times.rotate(); err != nil {
				return 0, fmt.Errorf("rotate log: %w", err)
			}
		}
	}
	if w.times != nil {
		if err := w.times.note(w.n); err != nil {
			return 0, fmt.Errorf("write log: %w", err)
		}
	}
	n, err := w.f.Write(p)
	w.n += int64(n)
	return n, err
}

func (w *Writer) Close() error {
	if w.times != nil {
		return errors.Join(w.f.Close(), w.times.close())
	}
	return w.f.Close()
}

// Tail returns the last n bytes at most of the log at path, "" if there is none.
func Tail(path string, n int64) string {
	text := tail(path, n)
	if missing := n - int64(len(text)); missing > 0 {
		text = tail(path+Suffix, missing) + text
	}
	return text
}

func tail(path string, n int64) string {
	f, err := open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, n))
	return string(b)
}

func open(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

// Reader reads a log from its oldest byte kept, across rotations.
type Reader struct {
	path  string
	older *os.File // the older half, nil once it is read
	f     *os.File // the newer half, nil while it is not there
}

// Open returns a reader of the log at path; one that is not there yet is empty. The caller closes
// it.
func Open(path string) *Reader {
	r := &Reader{path: path}
	// The newer half first: if it becomes the older one meanwhile, it is only there twice.
	r.f, _ = open(path)
	r.older, _ = open(path + Suffix)
	if r.f != nil && r.older != nil && same(r.f, r.older) {
		r.older.Close()
		r.older = nil
	}
	return r
}

func same(a, b *os.File) bool {
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// Read returns io.EOF at the log's present end; later calls see what was written since.
func (r *Reader) Read(p []byte) (int, error) {
	if r.older != nil {
		n, err := r.older.Read(p)
		if n > 0 || err != io.EOF {
			return n, err
		}
		if err := r.older.Close(); err != nil {
			return 0, err
		}
		r.older = nil
	}
	for {
		if r.f == nil {
			f, err := open(r.path)
			if errors.Is(err, fs.ErrNotExist) {
				return 0, io.EOF
			}
			if err != nil {
				return 0, fmt.Errorf("read log: %w", err)
			}
			r.f = f
		}
		// Asked before the read: what is written to this file until it is rotated is then read too.
		rotated := r.rotated()
		n, err := r.f.Read(p)
		if n > 0 || err != io.EOF || !rotated {
			return n, err
		}
		if err := r.f.Close(); err != nil {
			return 0, err
		}
		r.f = nil
	}
}

// rotated says whether path is another file by now.
func (r *Reader) rotated() bool {
	now, err1 := os.Lstat(r.path)
	mine, err2 := r.f.Stat()
	return err1 == nil && err2 == nil && !os.SameFile(now, mine)
}

func (r *Reader) Close() error {
	var errs []error
	for _, f := range []**os.File{&r.older, &r.f} {
		if *f != nil {
			errs = append(errs, (*f).Close())
			*f = nil
		}
	}
	return errors.Join(errs...)
}

// followPoll is how often Follow looks for more. A notification descriptor would cost its closing
// 15-23 ms.
const followPoll = 20 * time.Millisecond

// Follow copies the log to w until done is closed and all that was written before is copied, or the
// context ends, which is its error.
func (r *Reader) Follow(ctx context.Context, w io.Writer, done <-chan struct{}) error {
	tick := time.NewTicker(followPoll)
	defer tick.Stop()
	for last := false; ; {
		if _, err := io.Copy(w, r); err != nil {
			return err
		}
		if last {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-done:
			last = true
		case <-tick.C:
		}
	}
}
