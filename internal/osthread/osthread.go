// Package osthread runs functions on threads of the operating system that nothing else runs on
// after them: namespaces are a thread's, not a goroutine's.
package osthread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Do runs f on a thread that ends with it, never the process's first one: that would stay, and is
// what /proc/self shows.
func Do(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			done <- Do(f)
			return
		}
		done <- f()
	}()
	return <-done
}
