package vmm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/osthread"
)

// Share lets a VMM that runs find the directory dir, of any file system, under a name in its
// working directory root, until the function it returns is called: by a symbolic link, or in a jail
// by a mount in the VMM's own mount namespace, which the host does not see and which goes with the
// VMM. Needs Linux ≥ 5.2.
func (p *Process) Share(root, name, dir string, jailed bool) (unshare func() error, err error) {
	path := filepath.Join(root, name)
	if !jailed {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a process that died
			return nil, fmt.Errorf("share %s: %w", dir, err)
		}
		if err := os.Symlink(dir, path); err != nil {
			return nil, fmt.Errorf("share %s: %w", dir, err)
		}
		return func() error { return os.Remove(path) }, nil
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("share %s: %w", dir, err)
	}
	ns, err := p.mountNamespace(root)
	if err != nil {
		return nil, fmt.Errorf("share %s: %w", dir, err)
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("share %s: %w", dir, err), ns.Close())
	}
	defer unix.Close(tree)
	inside := "/" + name
	err = within(ns, func() error {
		_ = unix.Unmount(inside, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // what a process that died has left
		return unix.MoveMount(tree, "", unix.AT_FDCWD, inside, unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("share %s: %w", dir, err), ns.Close())
	}
	return func() error {
		err := within(ns, func() error { return unix.Unmount(inside, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) })
		if err == nil {
			err = os.Remove(path)
		}
		return errors.Join(err, ns.Close())
	}, nil
}

// mountNamespace opens that of the process whose root directory is root.
func (p *Process) mountNamespace(root string) (*os.File, error) {
	home, err := os.Stat(root)
	if err != nil {
		return nil, err
	}
	pids, err := p.PIDs()
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		proc := filepath.Join("/proc", strconv.Itoa(pid))
		ns, err := os.Open(filepath.Join(proc, "ns/mnt"))
		if err != nil {
			continue
		}
		// Looked at with its namespace open: the PID may have become another's before.
		if at, err := os.Stat(filepath.Join(proc, "root")); err == nil && os.SameFile(at, home) {
			return ns, nil
		}
		_ = ns.Close()
	}
	return nil, errEnded
}

// within runs f in a mount namespace, whose root directory is its root and working directory.
func within(ns *os.File, f func() error) error {
	return osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return err
		}
		runtime.KeepAlive(ns)
		return f()
	})
}
