package orphans

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
)

func TestMain(m *testing.M) {
	testenv.OthersOut()
	m.Run()
}

// seen is what a look has seen.
type seen struct {
	id   string
	held bool
}

// watched watches a store, and returns what looks see.
func watched(t *testing.T) (*store.Store, func(id string)) {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "runtime"))
	if err != nil {
		t.Fatal(err)
	}
	first, err := s.Create("first")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := first.Unlock(); err != nil {
			t.Error(err)
		}
	})
	looks := make(chan seen)
	gone := errors.New("gone")
	ctx, stop := context.WithCancelCause(context.WithoutCancel(t.Context())) // which ends before cleanups
	ended := make(chan error)
	go func() {
		ended <- Watch(ctx, s, func(ctx context.Context, id string) State {
			held, err := s.Locked(id)
			if err != nil {
				t.Error(err)
			}
			select {
			case looks <- seen{id, held}:
			case <-ctx.Done():
			}
			if held {
				return Locked
			}
			return Settled
		})
	}()
	t.Cleanup(func() {
		stop(gone)
		if err := <-ended; !errors.Is(err, gone) {
			t.Errorf("it ended with %v, want its context's cause", err)
		}
	})
	for got := range looks {
		if got == (seen{"first", true}) {
			break
		}
	}
	return s, func(id string) {
		t.Helper()
		for got := range looks {
			if got == (seen{id, false}) {
				return
			}
		}
	}
}

// A VM is looked at when its lock is released, whenever it was made, and made anew.
func TestWatch(t *testing.T) {
	s, released := watched(t)
	for range 2 {
		lock, err := s.Create("second")
		if err != nil {
			t.Fatal(err)
		}
		if err := lock.Unlock(); err != nil {
			t.Fatal(err)
		}
		released("second")
		for range 2 {
			if lock, err = s.Lock(t.Context(), "second"); err != nil {
				t.Fatal(err)
			}
			if err := lock.Unlock(); err != nil {
				t.Fatal(err)
			}
			released("second")
		}
		if lock, err = s.TryLock("second"); err != nil {
			t.Fatal(err)
		}
		if err := s.Remove("second", lock); err != nil {
			t.Fatal(err)
		}
	}
}

// What the process that made it has left half made is looked at, too: a directory without a lock.
func TestWatch_HalfMade(t *testing.T) {
	s, released := watched(t)
	if err := os.Mkdir(s.Dir("half"), 0o700); err != nil {
		t.Fatal(err)
	}
	released("half")
}

// Where the kernel has dropped events, all VMs are looked at. Where a look leaves something to be
// done, another follows.
func TestWatch_OverflowAndRetry(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "runtime"))
	if err != nil {
		t.Fatal(err)
	}
	lock, err := s.Create("vm")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	ctx, stop := context.WithCancelCause(context.WithoutCancel(t.Context())) // which ends before cleanups
	defer stop(nil)
	looks := 0
	w := &watcher{store: s, fd: fd, stop: stop, ids: map[int32]string{}, again: map[string]bool{}}
	w.look = func(context.Context, string) State {
		if looks++; looks < 2 {
			return Left
		}
		return Settled
	}
	event := make([]byte, unix.SizeofInotifyEvent)
	binary.NativeEndian.PutUint32(event, ^uint32(0))
	binary.NativeEndian.PutUint32(event[4:], unix.IN_Q_OVERFLOW)
	if err := w.handle(ctx, event); err != nil {
		t.Fatal(err)
	}
	w.looks.Wait()
	if looks != 2 {
		t.Errorf("%d looks, want one and another", looks)
	}
}
