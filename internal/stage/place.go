package stage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Item is a file of the host that the VMM is given under a name in its working directory.
type Item struct {
	Source   string // absolute
	Name     string // relative, "drives/rootfs"
	Writable bool   // the VMM's user owns Source then
	File     string // what Source must be, as store.DriveName tells; "": it is ours alone, or read-only
}

// Bind is a bind mount that an Item needs, made where only the VMM sees it.
type Bind struct {
	Source, Target string
	ReadOnly       bool
	File           string // what Target must be then: see Item
}

// Check returns ErrReplaced if a bind that has been made does not show the file that it should.
func (b *Bind) Check() error {
	f, _, err := openPath(b.Target, 0, b.File)
	if err != nil {
		return err
	}
	return f.Close()
}

// PlaceLinks gives a VMM that is not jailed its items: a symbolic link for each, below root.
func PlaceLinks(root string, items []Item) error {
	for _, it := range items {
		path := filepath.Join(root, it.Name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.Symlink(it.Source, path)); err != nil {
			return fmt.Errorf("place %s: %w", it.Source, err)
		}
	}
	return nil
}

// PlaceJailed gives a VMM that runs as uid its items below root, the jail: by hard link, or a
// device node; else by a bind mount, for which it returns the list and leaves an empty file to
// mount on; else, where the VMM's user may not read the file, by a copy. Returns ErrReplaced.
func PlaceJailed(ctx context.Context, root string, uid int, items []Item) ([]Bind, error) {
	var binds []Bind
	for _, it := range items {
		bind, err := placeJailed(ctx, root, uid, it)
		if err != nil {
			return nil, fmt.Errorf("place %s: %w", it.Source, err)
		}
		if bind {
			binds = append(binds,
				Bind{Source: it.Source, Target: filepath.Join(root, it.Name), ReadOnly: !it.Writable, File: it.File})
		}
	}
	return binds, nil
}

func placeJailed(ctx context.Context, root string, uid int, it Item) (bind bool, err error) {
	path := filepath.Join(root, it.Name)
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, err
	}
	// The VMM's user goes through it, whatever our umask is. The root itself the jailer gives to that
	// user.
	if dir != filepath.Clean(root) {
		if err := os.Chmod(dir, 0o755); err != nil {
			return false, err
		}
	}
	f, fi, err := openPath(it.Source, 0, it.File)
	if err != nil {
		return false, err
	}
	defer f.Close()
	if fi.Mode()&fs.ModeDevice != 0 {
		st := fi.Sys().(*syscall.Stat_t)
		return false, errors.Join(unix.Mknod(path, unix.S_IFBLK|0o600, int(st.Rdev)), os.Lchown(path, uid, uid))
	}
	if !it.Writable && fi.Mode().Perm()&0o004 == 0 {
		return false, (&File{Source: it.Source, Target: path, UID: uid}).Apply(ctx)
	}
	// A link to the file that was looked at, not to what may have taken its place.
	err = unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	switch {
	case err == nil:
		return false, nil
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EMLINK), errors.Is(err, unix.EPERM):
		return true, os.WriteFile(path, nil, 0o600)
	}
	return false, err
}
