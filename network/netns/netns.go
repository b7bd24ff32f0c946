// Package netns makes network namespaces and works in them.
package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/osthread"
)

// Namespace is a network. It is there as long as anybody has it open, or works in it, or it has a
// file, and so are the interfaces in it.
type Namespace struct{ file *os.File }

// New makes a network with nothing but its loopback, which is up. The caller closes it.
func New() (*Namespace, error) {
	n := new(Namespace)
	err := osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		if n.file, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		loopback, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(loopback)
	})
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	return n, nil
}

// Open opens a network by its file. The caller closes it.
func Open(path string) (*Namespace, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return &Namespace{f}, nil
}

// Keep gives the network a file, by which it is there until Drop. Returns an error that is
// fs.ErrExist where one is.
func (n *Namespace) Keep(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("keep network namespace: %w", err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", n.Fd()), path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("keep network namespace: %w", err)
	}
	return nil
}

// Drop removes a network's file. It is no error that there is none.
func Drop(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) &&
		!errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("drop network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("drop network namespace: %w", err)
	}
	return nil
}

// Close lets go of it.
func (n *Namespace) Close() error { return n.file.Close() }

// Fd is its descriptor, as setns(2) and netlink take it.
func (n *Namespace) Fd() uintptr { return n.file.Fd() }

// Do runs f in the namespace, and returns its error. Sockets that it opens stay there, and
// processes that it starts. Goroutines are elsewhere.
func (n *Namespace) Do(f func() error) error {
	return osthread.Do(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}
