package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"push.rocks/smartvm/internal/disklock"
)

// Lease is the claim of one VM to a name that may be used once: a VM's second name, a user id, a
// drive that is written in place. It is a symbolic link whose target is the owner's id: made whole
// by one call, or not.
type Lease struct {
	Dir   string `json:"dir"`
	Kind  string `json:"kind"` // "name", "uid", "drive"
	Name  string `json:"name"`
	Owner string `json:"owner"`
	Path  string `json:"path,omitempty"` // of a drive: the disk, which nobody may be copying or changing
}

// DriveName is the name of a drive's lease: whatever paths lead to a file, it is one.
func DriveName(fi fs.FileInfo) string {
	st := fi.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%x:%x", st.Dev, st.Ino)
}

// Lease describes a lease of this store. It is not taken until Apply.
func (s *Store) Lease(kind, name, owner string) *Lease {
	return &Lease{Dir: filepath.Join(s.dir, LeaseDir), Kind: kind, Name: name, Owner: owner}
}

// Drive describes the lease of the disk at path, called name by DriveName.
func (s *Store) Drive(path, name, owner string) *Lease {
	l := s.Lease("drive", name, owner)
	l.Path = path
	return l
}

// TakenError says whose lease is in the way. It is fs.ErrExist.
type TakenError struct {
	Kind, Name, Owner string
	Path              string // of a drive: as it was given
}

func (e *TakenError) Error() string {
	return fmt.Sprintf("%s %q is taken by VM %s", e.Kind, cmp.Or(e.Path, e.Name), e.Owner)
}

func (e *TakenError) Unwrap() error { return fs.ErrExist }

// Apply takes the lease. Returns *TakenError if it is taken, be it by the owner itself, and
// disklock.ErrBusy.
func (l *Lease) Apply(ctx context.Context) error {
	err := os.Symlink(l.Owner, l.path())
	if errors.Is(err, fs.ErrExist) {
		return &TakenError{Kind: l.Kind, Name: l.Name, Owner: l.holder(), Path: l.Path}
	}
	if err != nil {
		return fmt.Errorf("take lease: %w", err)
	}
	if l.Path == "" {
		return nil
	}
	if err := disklock.Free(l.Path); err != nil {
		return errors.Join(fmt.Errorf("drive %s: %w", l.Path, err), l.Revert(ctx))
	}
	return nil
}

// Revert gives the lease back, if it is still the owner's.
func (l *Lease) Revert(context.Context) error {
	if l.holder() != l.Owner {
		return nil
	}
	if err := os.Remove(l.path()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release lease: %w", err)
	}
	return nil
}

// path is one file for each kind and name: neither can bring in a separator.
func (l *Lease) path() string {
	return filepath.Join(l.Dir, l.Kind+"."+strings.NewReplacer("%", "%25", "/", "%2f").Replace(l.Name))
}

func (l *Lease) holder() string {
	owner, _ := os.Readlink(l.path())
	return owner
}

// Holder returns the VM that has a name, "" if none has.
func (s *Store) Holder(kind, name string) string { return s.Lease(kind, name, "").holder() }

// Leases are all of a kind: the owner of each name.
func (s *Store) Leases(kind string) map[string]string {
	entries, _ := os.ReadDir(filepath.Join(s.dir, LeaseDir))
	all := map[string]string{}
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), kind+".")
		if !ok {
			continue
		}
		name = strings.NewReplacer("%2f", "/", "%25", "%").Replace(name)
		if owner := s.Holder(kind, name); owner != "" {
			all[name] = owner
		}
	}
	return all
}
