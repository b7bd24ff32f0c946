package disklock_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/disklock"
)

func disk(t *testing.T) (path string, open func() *os.File) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, func() *os.File {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
}

func TestLock(t *testing.T) {
	path, open := disk(t)
	for _, tt := range []struct {
		name          string
		held, another bool // shared
		busy          bool
	}{
		{"copied by two", true, true, false},
		{"copied and changed", true, false, true},
		{"changed and copied", false, true, true},
		{"changed by two", false, false, true},
	} {
		held, another := open(), open()
		if err := disklock.Lock(held, tt.held); err != nil {
			t.Fatal(err)
		}
		if err := disklock.Lock(another, tt.another); errors.Is(err, disklock.ErrBusy) != tt.busy || err != nil && !tt.busy {
			t.Errorf("%s: %v, want busy: %v", tt.name, err, tt.busy)
		}
		if err := disklock.Free(path); !errors.Is(err, disklock.ErrBusy) {
			t.Errorf("%s: free: %v, want ErrBusy", tt.name, err)
		}
		if err := errors.Join(held.Close(), another.Close(), disklock.Free(path)); err != nil {
			t.Errorf("%s: afterwards: %v", tt.name, err)
		}
	}
	if f, err := os.Open("/dev/null"); err != nil || disklock.Lock(f, false) != nil || f.Close() != nil {
		t.Errorf("what is no regular file: %v", err)
	}
}

// A lock that is held for a moment, as Free has it, refuses no process.
func TestLock_AskedFor(t *testing.T) {
	_, open := disk(t)
	asks, locks := open(), open()
	defer asks.Close()
	defer locks.Close()
	// A processor may come too late to let it go in time.
	for try := 1; ; try++ {
		if err := unix.Flock(int(asks.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		released := make(chan error, 1)
		time.AfterFunc(2*time.Millisecond, func() { released <- unix.Flock(int(asks.Fd()), unix.LOCK_UN) })
		err := disklock.Lock(locks, false)
		if err := <-released; err != nil {
			t.Fatal(err)
		}
		if err == nil {
			return
		}
		if !errors.Is(err, disklock.ErrBusy) || try == 5 {
			t.Fatalf("refused: %v", err)
		}
	}
}
