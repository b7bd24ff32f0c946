package lock_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/internal/testenv"
)

// file makes one to be locked, and returns a function that opens it once more: descriptors that are
// opened apart exclude each other in one process as in two.
func file(t *testing.T) (again func() *os.File) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return func() *os.File {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
}

func take(t *testing.T, f *os.File, m lock.Mode) *os.File {
	t.Helper()
	if err := lock.Try(f, m); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestTry(t *testing.T) {
	for _, tt := range []struct {
		name        string
		held, tried lock.Mode
		refused     bool
	}{
		{"shared by two", lock.Shared, lock.Shared, false},
		{"exclusive of a shared one", lock.Shared, lock.Exclusive, true},
		{"shared of an exclusive one", lock.Exclusive, lock.Shared, true},
		{"two exclusive", lock.Exclusive, lock.Exclusive, true},
		{"two sole", lock.Sole, lock.Sole, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			open := file(t)
			held, tried := take(t, open(), tt.held), open()
			if err := lock.Try(tried, tt.tried); errors.Is(err, lock.ErrHeld) != tt.refused || err != nil && !tt.refused {
				t.Errorf("%v, want refused: %v", err, tt.refused)
			}
			if err := held.Close(); err != nil {
				t.Fatal(err)
			}
			take(t, tried, tt.tried)
		})
	}
	t.Run("a directory", func(t *testing.T) {
		dir, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		take(t, dir, lock.Exclusive)
	})
}

// A supervisor of an older build holds plain flock locks, and tries for them once.
func TestTry_OlderBuild(t *testing.T) {
	open := file(t)
	older, ours := open(), open()
	if err := unix.Flock(int(older.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatal(err)
	}
	if err := lock.Try(ours, lock.Sole); !errors.Is(err, lock.ErrHeld) {
		t.Errorf("try: %v, want ErrHeld", err)
	}
	if held, err := lock.Held(ours); err != nil || !held {
		t.Errorf("held: %v, %v, want true", held, err)
	}
	if err := older.Close(); err != nil {
		t.Fatal(err)
	}
	take(t, ours, lock.Sole)
	if err := unix.Flock(int(open().Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the older build's try: %v, want EWOULDBLOCK", err)
	}
}

// askers ask for a lock until the test's end.
func askers(t *testing.T, open func() *os.File) {
	files := []*os.File{open(), open(), open()} // closed after the askers have ended
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	for _, f := range files {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := lock.Held(f); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
}

// However many ask whether a lock is held, none that takes it is refused, though two of them
// exclude each other.
func TestHeld_RefusesNone(t *testing.T) {
	open := file(t)
	askers(t, open)
	// The control: a lock taken as if others could share it is refused, so they are in the way here.
	refused := 0
	for deadline := time.Now().Add(testenv.Patience(10 * time.Second)); refused == 0 && time.Now().Before(deadline); {
		f := open()
		if err := lock.Try(f, lock.Exclusive); errors.Is(err, lock.ErrHeld) {
			refused++
		}
		f.Close()
	}
	if refused == 0 {
		t.Fatal("none that asked was in the way")
	}
	for range 2000 {
		f := open()
		if err := lock.Try(f, lock.Sole); err != nil {
			t.Fatalf("refused by those that ask: %v", err)
		}
		if held, err := lock.Held(open()); err != nil || !held {
			t.Fatalf("taken, it is held: %v, %v", held, err)
		}
		f.Close()
	}
}

// Those that take it exclude each other while others ask, and one of them always goes on.
func TestTry_SoleAmongAskers(t *testing.T) {
	open := file(t)
	askers(t, open)
	var holders, taken atomic.Int32
	var wg sync.WaitGroup
	for range 3 {
		f := open()
		wg.Go(func() {
			for range 200 {
				err := lock.Try(f, lock.Sole)
				if errors.Is(err, lock.ErrHeld) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				taken.Add(1)
				if n := holders.Add(1); n != 1 {
					t.Errorf("%d hold it", n)
				}
				holders.Add(-1)
				if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if taken.Load() == 0 {
		t.Error("none of them got it")
	}
}

func TestWait(t *testing.T) {
	open := file(t)
	held, waits := take(t, open(), lock.Exclusive), open()
	told := 0
	err := lock.Wait(t.Context(), waits, lock.Exclusive, func() {
		told++
		if err := held.Close(); err != nil {
			t.Error(err)
		}
	})
	if err != nil || told != 1 {
		t.Errorf("%v, told %d times that it waits, want 1", err, told)
	}
	if err := lock.Try(open(), lock.Shared); !errors.Is(err, lock.ErrHeld) {
		t.Errorf("waited for, it is not held: %v", err)
	}
}

// A wait ends with its context, not at its next look.
func TestWait_EndsWithItsContext(t *testing.T) {
	for _, m := range []lock.Mode{lock.Shared, lock.Exclusive, lock.Sole} {
		open := file(t)
		take(t, open(), lock.Exclusive)
		waits := open()
		synctest.Test(t, func(t *testing.T) {
			cause := errors.New("enough")
			const patience = 1234567 * time.Microsecond
			ctx, cancel := context.WithTimeoutCause(t.Context(), patience, cause)
			defer cancel()
			begun := time.Now()
			if err := lock.Wait(ctx, waits, m, nil); !errors.Is(err, cause) || !errors.Is(err, lock.ErrHeld) {
				t.Errorf("mode %d: %v, want ErrHeld and the context's cause", m, err)
			}
			if got := time.Since(begun); got != patience {
				t.Errorf("mode %d: it waited %s, want %s", m, got, patience)
			}
		})
	}
}

func TestBlock(t *testing.T) {
	open := file(t)
	held, waits := take(t, open(), lock.Exclusive), open()
	taken := make(chan error, 1)
	go func() { taken <- lock.Block(waits, lock.Exclusive) }()
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-taken; err != nil {
		t.Error(err)
	}
	if err := lock.Try(open(), lock.Shared); !errors.Is(err, lock.ErrHeld) {
		t.Errorf("%v, want ErrHeld", err)
	}
}

func TestPath(t *testing.T) {
	dir := t.TempDir()
	release, err := lock.Path(t.Context(), dir, lock.Exclusive, nil)
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lock.Path(gone, dir, lock.Shared, nil); !errors.Is(err, lock.ErrHeld) {
		t.Errorf("%v, want ErrHeld", err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if release, err = lock.Path(gone, dir, lock.Shared, nil); err != nil {
		t.Fatalf("released: %v", err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
	if _, err := lock.Path(t.Context(), filepath.Join(dir, "none"), lock.Shared, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want fs.ErrNotExist", err)
	}
}

func TestStillAt(t *testing.T) {
	f := file(t)()
	if !lock.StillAt(f, f.Name()) {
		t.Error("it has not moved")
	}
	if err := os.Rename(f.Name(), f.Name()+"2"); err != nil {
		t.Fatal(err)
	}
	if lock.StillAt(f, f.Name()) {
		t.Error("it has moved")
	}
	if err := os.WriteFile(f.Name(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if lock.StillAt(f, f.Name()) {
		t.Error("another is there")
	}
	if !lock.StillAt(f, f.Name()+"2") {
		t.Error("it is there")
	}
}
