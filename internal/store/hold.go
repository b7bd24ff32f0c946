package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Hold says that a process holds a VM still for a while. One that dies leaves its file, unlocked, for others to see.
type Hold struct{ f *os.File }

// Hold marks a VM as held. Returns ErrLocked where another process holds it, fs.ErrNotExist without the VM.
func (s *Store) Hold(id string) (*Hold, error) {
	return s.hold(id, os.O_CREATE)
}

// Abandoned takes over the hold of a process that has died. Returns fs.ErrNotExist where there is none, ErrLocked.
func (s *Store) Abandoned(id string) (*Hold, error) {
	return s.hold(id, 0)
}

func (s *Store) hold(id string, create int) (*Hold, error) {
	path := filepath.Join(s.Dir(id), HoldFile)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|create, 0o600)
		if err != nil {
			return nil, fmt.Errorf("hold VM: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(ErrLocked, f.Close())
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("hold VM: %w", err), f.Close())
		}
		// Whoever had it may have let go in between, and its file is no longer the one that others find.
		ours, err := f.Stat()
		there, statErr := os.Stat(path)
		if err == nil && statErr == nil && os.SameFile(ours, there) {
			return &Hold{f}, nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("hold VM: %w", err)
		}
	}
}

// MustResume notes that the VM ran before, so that it is to go on.
func (h *Hold) MustResume() error {
	_, err := h.f.WriteString(resume)
	return err
}

// Resumes says whether that was noted.
func (h *Hold) Resumes() bool {
	b := make([]byte, len(resume))
	n, _ := h.f.ReadAt(b, 0)
	return string(b[:n]) == resume
}

const resume = "resume\n"

// Release takes the mark away. A VM that is gone meanwhile has none.
func (h *Hold) Release() error {
	err := os.Remove(h.f.Name())
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, h.f.Close())
}
