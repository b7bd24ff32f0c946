// Package netns makes network namespaces and works in them.
//
// A thread of the operating system is in a namespace, not a goroutine: what works in one runs on a thread of its own that is
// thrown away.
package netns

import (
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Namespace is a network. It is there as long as anybody has it open, or works in it, and so are the interfaces in it.
type Namespace struct{ file *os.File }

// New makes a network with nothing but its loopback, which is up. The caller closes it.
func New() (*Namespace, error) {
	n := new(Namespace)
	err := onThread(func() error {
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

// Close lets go of it.
func (n *Namespace) Close() error { return n.file.Close() }

// Fd is its descriptor, as setns(2) and netlink take it.
func (n *Namespace) Fd() uintptr { return n.file.Fd() }

// Do runs f in the namespace, and returns its error. Sockets that it opens stay there. Goroutines that it starts are elsewhere.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// onThread runs f on a thread that is thrown away.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// But for the first thread, which would stay, and be what /proc/self shows.
			defer runtime.UnlockOSThread()
			done <- onThread(f)
			return
		}
		done <- f()
	}()
	return <-done
}
