package logfile_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/logfile"
)

func create(t *testing.T, path string, limit int64) *logfile.Writer {
	t.Helper()
	w, err := logfile.Create(path, limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func write(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if n, err := w.Write([]byte(text)); n != len(text) || err != nil {
		t.Fatalf("wrote %d of %d: %v", n, len(text), err)
	}
}

func TestWriter_Bounds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w := create(t, path, 1000)
	var all strings.Builder
	for i := range 500 {
		line := fmt.Sprintf("line %d\n", i)
		write(t, w, line)
		all.WriteString(line)
		var kept int64
		for _, name := range []string{path, path + logfile.Suffix} {
			if fi, err := os.Stat(name); err == nil {
				kept += fi.Size()
			}
		}
		if kept > 1000 {
			t.Fatalf("after line %d, %d bytes are kept", i, kept)
		}
		if min := min(490, all.Len()); int(kept) < min { // one half, to a line
			t.Fatalf("after line %d, only %d bytes are kept", i, kept)
		}
	}
	got := logfile.Tail(path, 10_000)
	if len(got) < 490 || !strings.HasSuffix(all.String(), got) {
		t.Errorf("kept is not the log's end: %q", got)
	}
}

func TestWriter_AppendsToWhatIsThere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for _, text := range []string{"first\n", "second\n"} {
		w := create(t, path, 20)
		write(t, w, text)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "second\n" { // 13 bytes are more than a half
		t.Errorf("%q, %v", got, err)
	}
	if got := logfile.Tail(path, 100); got != "first\nsecond\n" {
		t.Errorf("tail %q", got)
	}
}

func TestWriter_LongWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w := create(t, path, 20)
	write(t, w, strings.Repeat("x", 100))
	write(t, w, "y")
	if got := logfile.Tail(path, 1000); got != strings.Repeat("x", 100)+"y" {
		t.Errorf("tail %q", got)
	}
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if got := logfile.Tail(path, 10); got != "" {
		t.Errorf("of no log: %q", got)
	}
	w := create(t, path, 20)
	for _, text := range []string{"0123456789", "abcdef"} {
		write(t, w, text)
	}
	for n, want := range map[int64]string{
		0: "", 3: "def", 6: "abcdef", 8: "89abcdef", 16: "0123456789abcdef",
		99: "0123456789abcdef",
	} {
		if got := logfile.Tail(path, n); got != want {
			t.Errorf("last %d: %q, want %q", n, got, want)
		}
	}
}

func TestSymbolicLinksAreRefused(t *testing.T) {
	dir := t.TempDir()
	secret, path := filepath.Join(dir, "secret"), filepath.Join(dir, "log")
	if err := errors.Join(os.WriteFile(secret, []byte("secret"), 0o600), os.Symlink(secret, path),
		os.Symlink(secret, path+logfile.Suffix)); err != nil {
		t.Fatal(err)
	}
	if w, err := logfile.Create(path, 100); !errors.Is(err, unix.ELOOP) {
		t.Errorf("create: %v, %v, want ELOOP", w, err)
	}
	if got := logfile.Tail(path, 100); got != "" {
		t.Errorf("tail: %q", got)
	}
	r := logfile.Open(path)
	defer r.Close()
	if got, err := io.ReadAll(r); !errors.Is(err, unix.ELOOP) || len(got) > 0 {
		t.Errorf("read: %q, %v, want ELOOP", got, err)
	}
	if got, err := os.ReadFile(secret); err != nil || string(got) != "secret" {
		t.Errorf("the file is %q now: %v", got, err)
	}
}

func TestReader_ReadsOldAndNew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	r := logfile.Open(path)
	defer r.Close()
	next := func(want string) {
		t.Helper()
		if got, err := io.ReadAll(r); err != nil || string(got) != want {
			t.Errorf("read %q, %v, want %q", got, err, want)
		}
	}
	next("")
	w := create(t, path, 20)
	next("")
	write(t, w, "one\n")
	next("one\n")
	next("")
	write(t, w, "two\n")
	write(t, w, "three\n") // rotates
	next("two\nthree\n")
	write(t, w, "four\n")
	late := logfile.Open(path)
	defer late.Close()
	if got, err := io.ReadAll(late); err != nil || string(got) != "three\nfour\n" {
		t.Errorf("a late reader reads %q, %v", got, err)
	}
	next("four\n")
}

// A reader that keeps up with a concurrent writer gets every byte once, across many rotations.
func TestFollow(t *testing.T) {
	const half, total = 16 << 10, 1 << 20
	path := filepath.Join(t.TempDir(), "log")
	w := create(t, path, 2*half)
	dst := newSink(t)
	done := make(chan struct{})
	followed := make(chan error, 1)
	r := logfile.Open(path)
	defer r.Close()
	go func() { followed <- r.Follow(t.Context(), dst, done) }()
	var sent bytes.Buffer
	for i := 0; sent.Len() < total; i++ {
		line := fmt.Sprintf("line %d %s\n", i, strings.Repeat("x", i%997))
		dst.await(t, sent.Len()+len(line)-half/2)
		write(t, w, line)
		sent.WriteString(line)
	}
	close(done)
	if err := <-followed; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dst.buf.Bytes(), sent.Bytes()) {
		t.Errorf("sent %d bytes, got %d others", sent.Len(), dst.buf.Len())
	}
}

// sink tells how much it has got.
type sink struct {
	mu   sync.Mutex
	more sync.Cond
	buf  bytes.Buffer
	late bool
}

// newSink returns a sink that gives up when nothing good has come of it for a minute.
func newSink(t *testing.T) *sink {
	s := &sink{}
	s.more.L = &s.mu
	timer := time.AfterFunc(time.Minute, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.late = true
		s.more.Broadcast()
	})
	t.Cleanup(func() { timer.Stop() })
	return s
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.more.Broadcast()
	return s.buf.Write(p)
}

// await returns once n bytes have come.
func (s *sink) await(t *testing.T, n int) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.buf.Len() < n {
		if s.late {
			t.Fatalf("the follower stands still at %d bytes", s.buf.Len())
		}
		s.more.Wait()
	}
}

func TestFollow_Ends(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w := create(t, path, 1<<10)
	write(t, w, "all\n")
	done := make(chan struct{})
	close(done)
	var got bytes.Buffer
	r := logfile.Open(path)
	defer r.Close()
	if err := r.Follow(t.Context(), &got, done); err != nil || got.String() != "all\n" {
		t.Errorf("followed %q, %v", &got, err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if err := r.Follow(ctx, &got, nil); !errors.Is(err, gone) {
		t.Errorf("%v, want the context's cause", err)
	}
}
