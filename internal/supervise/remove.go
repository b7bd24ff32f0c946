package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/lock"
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

// holdTimeout is how long Remove waits for a Hold.
const holdTimeout = 10 * time.Second

// Hold keeps Remove waiting for a moment after m has ended, so that the caller can read how.
// Release lets go.
func Hold(m *smartvm.Machine) (release func(), err error) {
	f, err := os.Open(machineFile(m))
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", m.ID(), err)
	}
	if err := lock.Block(f, lock.Shared); err != nil { // Remove has it for a moment
		return nil, errors.Join(fmt.Errorf("VM %s: %w", m.ID(), err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// Remove removes m, but not before those who hold it have seen how it ended. That it is gone is
// success.
func Remove(ctx context.Context, m *smartvm.Machine) error {
	patience, cancel := context.WithTimeout(ctx, holdTimeout)
	defer cancel()
	if release, err := lock.Path(patience, machineFile(m), lock.Exclusive, nil); err == nil {
		_ = release()
	}
	if err := m.Remove(ctx); !errors.Is(err, smartvm.ErrNotFound) {
		return err
	}
	return nil
}

// machineFile is what Hold and Remove lock.
func machineFile(m *smartvm.Machine) string { return filepath.Join(m.RuntimeDir(), store.MachineFile) }
