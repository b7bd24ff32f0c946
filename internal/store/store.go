// Package store keeps a directory for each VM, says which process supervises it (a lock), and hands
// out names that must be unique (leases). Many processes share one store.
package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/lock"
)

// A Store is a directory with a directory for each VM. Safe for concurrent use.
type Store struct {
	dir string
}

// Errors of this package. fs.ErrNotExist and fs.ErrExist tell of VM directories that are not there
// or are.
var (
	ErrUnsafe = errors.New("unsafe directory")
	ErrLocked = lock.ErrHeld
)

// Open makes dir if need be and checks that nobody but us can have prepared it, as Secure does.
func Open(dir string) (*Store, error) {
	for _, d := range []string{dir, filepath.Join(dir, LeaseDir)} {
		if err := Secure(d); err != nil {
			return nil, err
		}
	}
	return &Store{dir: dir}, nil
}

// Secure makes dir, and the parents it lacks, with mode 0700, and checks that it is ours alone: not
// a symbolic link, our own, mode 0700, and that nobody but us and root can put another in its
// place: every parent is ours or root's, and one that others may write is sticky, as /tmp is.
// Root's own group, and for another user than root the primary group, which is often the user's
// alone, are not others. Errors of those checks are ErrUnsafe.
func Secure(dir string) error {
	err := os.Mkdir(dir, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
			return fmt.Errorf("make directory: %w", err)
		}
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make directory: %w", err)
	}
	fi, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("check directory: %w", err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		return fmt.Errorf("%w: %s is a symbolic link", ErrUnsafe, dir)
	case !fi.IsDir():
		return fmt.Errorf("%w: %s is not a directory", ErrUnsafe, dir)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%w: %s belongs to user %d, not to user %d", ErrUnsafe, dir, st.Uid, os.Geteuid())
	case fi.Mode().Perm() != 0o700:
		return fmt.Errorf("%w: %s has mode %04o, not 0700", ErrUnsafe, dir, fi.Mode().Perm())
	}
	return secureParents(filepath.Dir(dir))
}

func secureParents(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fmt.Errorf("check directory: %w", err)
	}
	for ; ; dir = filepath.Dir(dir) {
		fi, err := os.Lstat(dir)
		if err != nil {
			return fmt.Errorf("check directory: %w", err)
		}
		st := fi.Sys().(*syscall.Stat_t)
		if uid := int(st.Uid); uid != os.Geteuid() && uid != 0 {
			return fmt.Errorf("%w: %s, above it, belongs to user %d", ErrUnsafe, dir, uid)
		}
		sticky := fi.Mode()&fs.ModeSticky != 0
		if fi.Mode().Perm()&0o002 != 0 && !sticky {
			return fmt.Errorf("%w: %s, above it, can be written by anybody", ErrUnsafe, dir)
		}
		own := int(st.Gid) == 0 || os.Geteuid() != 0 && int(st.Gid) == os.Getegid()
		if fi.Mode().Perm()&0o020 != 0 && !sticky && !own {
			return fmt.Errorf("%w: %s, above it, can be written by group %d", ErrUnsafe, dir, st.Gid)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

// Path is the store's own directory.
func (s *Store) Path() string { return s.dir }

// List returns the ids that have a directory, sorted. Some may be half made or half removed.
func (s *Store) List() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list VMs: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// Dir is where a VM's files are, whether or not they are there.
func (s *Store) Dir(id string) string { return filepath.Join(s.dir, id) }

// Lock is the right to supervise one VM. It goes with the process that holds it, but a child
// process that was forked and has not yet called exec keeps it too, so whoever gets a lock finds no
// half-started VMM.
type Lock struct {
	f *os.File
}

// Create makes a VM's directory and takes its lock. Returns fs.ErrExist when there is one.
func (s *Store) Create(id string) (*Lock, error) {
	// Between mkdir and the lock the directory looks abandoned; Reap waits for this shared lock.
	root, err := s.lockRoot(lock.Shared)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	if err := os.Mkdir(s.Dir(id), 0o700); err != nil {
		return nil, fmt.Errorf("create VM directory: %w", err)
	}
	// Locked before it gets its name: a process that finds it unlocked takes the VM for a dead
	// maker's.
	path := filepath.Join(s.Dir(id), LockFile)
	temp := path + atomicfile.TempSuffix
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		if err = errors.Join(lock.Try(f, lock.Sole), os.Rename(temp, path)); err == nil {
			return &Lock{f}, nil
		}
		err = errors.Join(err, os.Remove(temp), f.Close())
	}
	return nil, errors.Join(fmt.Errorf("lock VM: %w", err), os.Remove(s.Dir(id)))
}

// TryLock takes a VM's lock, or returns ErrLocked at once. Returns fs.ErrNotExist when the VM is
// gone.
func (s *Store) TryLock(id string) (*Lock, error) {
	f, path, err := s.openLock(id, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	return s.locked(f, path, lock.Try(f, lock.Sole))
}

// locked completes the locking of f, opened at path, which had the outcome err.
func (s *Store) locked(f *os.File, path string, err error) (*Lock, error) {
	// The last holder may have removed the VM, and another may have made it anew.
	if err == nil && !lock.StillAt(f, path) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock VM: %w", err), f.Close())
	}
	return &Lock{f}, nil
}

// Lock waits for a VM's lock. Returns fs.ErrNotExist when the VM is gone, ErrLocked with the
// context's cause when ctx ends.
func (s *Store) Lock(ctx context.Context, id string) (*Lock, error) {
	f, path, err := s.openLock(id, os.O_RDWR)
	if err != nil {
		return nil, err
	}
	return s.locked(f, path, lock.Wait(ctx, f, lock.Sole, nil))
}

// openLock opens a VM's lock file: for writing where the lock is to be taken, so that package
// orphans learns of its end, and of that alone.
func (s *Store) openLock(id string, how int) (f *os.File, path string, err error) {
	path = filepath.Join(s.Dir(id), LockFile)
	if f, err = os.OpenFile(path, how|unix.O_NOFOLLOW, 0); err != nil {
		err = fmt.Errorf("lock VM: %w", err)
	}
	return f, path, err
}

// Locked says whether a process holds a VM's lock, and leaves the lock alone. A VM that is gone has
// none.
func (s *Store) Locked(id string) (bool, error) {
	f, _, err := s.openLock(id, os.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	held, err := lock.Held(f)
	return held, errors.Join(err, f.Close())
}

// Unlock lets another process supervise the VM. It is idempotent.
func (l *Lock) Unlock() error {
	if err := l.f.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
		return fmt.Errorf("unlock VM: %w", err)
	}
	return nil
}

// Remove deletes a VM's directory, whose lock the caller holds and then has no more use for.
func (s *Store) Remove(id string, l *Lock) error {
	// The lock file goes last: while it is there nobody else begins.
	entries, err := os.ReadDir(s.Dir(id))
	if err != nil {
		return errors.Join(fmt.Errorf("remove VM directory: %w", err), l.Unlock())
	}
	var errs []error
	for _, e := range entries {
		if e.Name() != LockFile {
			errs = append(errs, os.RemoveAll(filepath.Join(s.Dir(id), e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return errors.Join(fmt.Errorf("remove VM directory: %w", err), l.Unlock())
	}
	// Between the lock file's end and the directory's, another could reap that and make a new one.
	root, err := s.lockRoot(lock.Exclusive)
	if err != nil {
		return errors.Join(err, l.Unlock())
	}
	defer root.Close()
	return errors.Join(os.RemoveAll(s.Dir(id)), l.Unlock())
}

// Reap removes a VM's directory if it has no lock file: its maker or remover died between two
// calls. Where there is a lock file, it does nothing.
func (s *Store) Reap(id string) error {
	root, err := s.lockRoot(lock.Exclusive)
	if err != nil {
		return err
	}
	defer root.Close()
	// Nobody is making a VM now: this is of one who died.
	if err := os.Remove(filepath.Join(s.Dir(id), LockFile+atomicfile.TempSuffix)); err != nil &&
		!errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove VM directory %s: %w", id, err)
	}
	// Fails on any directory that is not empty, which is what we want.
	if err := unix.Rmdir(s.Dir(id)); err != nil && err != unix.ENOTEMPTY && err != unix.ENOENT {
		return fmt.Errorf("remove VM directory %s: %w", id, err)
	}
	return nil
}

func (s *Store) lockRoot(m lock.Mode) (*os.File, error) {
	f, err := os.Open(s.dir)
	if err != nil {
		return nil, fmt.Errorf("lock runtime directory: %w", err)
	}
	if err := lock.Block(f, m); err != nil {
		return nil, errors.Join(fmt.Errorf("lock runtime directory: %w", err), f.Close())
	}
	return f, nil
}
