package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/store"
)

// RemoveAtEnd has m removed when it ends, by whichever process supervises it then.
func RemoveAtEnd(m *smartvm.Machine) error {
	if err := os.WriteFile(marker(m), nil, 0o600); err != nil {
		return fmt.Errorf("VM %s: %w", m.ID(), err)
	}
	return nil
}

func marker(m *smartvm.Machine) string { return filepath.Join(m.RuntimeDir(), store.AutoRemove) }

// RemoveEnded removes m if it has ended and RemoveAtEnd was called.
func RemoveEnded(ctx context.Context, m *smartvm.Machine) error {
	if _, err := os.Lstat(marker(m)); err != nil {
		return nil
	}
	if _, err := m.Exit(); errors.Is(err, smartvm.ErrState) {
		return nil
	} else if err != nil {
		return err
	}
	return Remove(ctx, m)
}

// Sweep is RemoveEnded for all VMs whose supervisor died before it came to that.
func Sweep(ctx context.Context, h *smartvm.Host) error {
	marked, err := filepath.Glob(filepath.Join(h.RuntimeDir(), "*", store.AutoRemove))
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range marked {
		m, err := h.Machine(ctx, filepath.Base(filepath.Dir(path)))
		if err == nil {
			err = RemoveEnded(ctx, m)
		}
		if !errors.Is(err, smartvm.ErrNotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

const (
	holdTimeout = 10 * time.Second // how long Remove waits for a Hold
	holdPoll    = 5 * time.Millisecond
)

// Hold keeps Remove waiting for a moment after m has ended, so that the caller can read how. Release lets go.
func Hold(m *smartvm.Machine) (release func(), err error) {
	f, err := lock(m, unix.LOCK_SH)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", m.ID(), err)
	}
	return func() { _ = f.Close() }, nil
}

// Remove removes m, but not before those who hold it have seen how it ended. That it is gone is success.
func Remove(ctx context.Context, m *smartvm.Machine) error {
	for deadline := time.Now().Add(holdTimeout); time.Now().Before(deadline) && ctx.Err() == nil; time.Sleep(holdPoll) {
		f, err := lock(m, unix.LOCK_EX)
		if err == nil {
			f.Close()
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
	}
	if err := m.Remove(ctx); !errors.Is(err, smartvm.ErrNotFound) {
		return err
	}
	return nil
}

// lock locks the one file of a VM that never changes.
func lock(m *smartvm.Machine, how int) (*os.File, error) {
	f, err := os.Open(filepath.Join(m.RuntimeDir(), store.MachineFile))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
