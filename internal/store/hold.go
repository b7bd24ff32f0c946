package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"push.rocks/smartvm/internal/lock"
)

// Hold says that a process holds a VM still for a while. One that dies leaves its file, unlocked,
// for others to see.
type Hold struct {
	f    *os.File
	keep bool
}

// Hold marks a VM as held. Returns ErrLocked where another process holds it, fs.ErrNotExist without
// the VM.
func (s *Store) Hold(id string) (*Hold, error) { return s.hold(id, os.O_CREATE) }

// Abandoned takes over the hold of a process that has died. Returns fs.ErrNotExist where there is
// none of which anything is to be taken over, ErrLocked.
func (s *Store) Abandoned(id string) (*Hold, error) {
	// Between the making of the file and its locking a hold looks abandoned. Nothing is noted in it
	// then: left alone, its maker is not refused.
	fi, err := os.Stat(filepath.Join(s.Dir(id), HoldFile))
	if err == nil && fi.Size() == 0 {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, fmt.Errorf("hold VM: %w", err)
	}
	return s.hold(id, 0)
}

func (s *Store) hold(id string, create int) (*Hold, error) {
	path := filepath.Join(s.Dir(id), HoldFile)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|create, 0o600)
		if err != nil {
			return nil, fmt.Errorf("hold VM: %w", err)
		}
		if err := lock.Try(f, lock.Sole); err != nil {
			return nil, errors.Join(fmt.Errorf("hold VM: %w", err), f.Close())
		}
		// The process that had it may have released it in between, and its file is no longer the one that
		// others find.
		if lock.StillAt(f, path) {
			return &Hold{f: f}, nil
		}
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("hold VM: %w", err)
		}
	}
}

// MustResume notes that the VM ran before, so that it is to go on.
func (h *Hold) MustResume() error { return h.note(resume) }

// Resumes says whether that was noted.
func (h *Hold) Resumes() bool { return slices.Contains(h.notes(), resume) }

// MustDeflate notes how many MiB the VM's balloon is to have afterwards.
func (h *Hold) MustDeflate(mib uint32) error { return h.note(fmt.Sprint(deflate, mib)) }

// Deflates returns that, if it was noted.
func (h *Hold) Deflates() (mib uint32, noted bool) {
	for _, line := range h.notes() {
		if text, ok := strings.CutPrefix(line, deflate); ok {
			n, err := strconv.ParseUint(text, 10, 32)
			return uint32(n), err == nil
		}
	}
	return 0, false
}

const (
	resume  = "resume"
	deflate = "deflate "
)

// note adds a line, at once.
func (h *Hold) note(line string) error {
	_, err := h.f.WriteString(line + "\n")
	return err
}

// notes are the lines that are whole.
func (h *Hold) notes() []string {
	b := make([]byte, 256)
	n, _ := h.f.ReadAt(b, 0)
	lines := strings.Split(string(b[:n]), "\n")
	return lines[:len(lines)-1]
}

// Abandon lets others take over what is noted, as if this process had died.
func (h *Hold) Abandon() error { return h.f.Close() }

// Keep has Release abandon the VM: something of what is noted is still to be done.
func (h *Hold) Keep() { h.keep = true }

// Release takes the mark away. A VM that is gone meanwhile has none.
func (h *Hold) Release() error {
	if h.keep {
		return h.Abandon()
	}
	err := os.Remove(h.f.Name())
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, h.f.Close())
}
