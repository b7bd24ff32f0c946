// Package disklock keeps the commands that change or copy a disk and the VMs that start with it
// apart.
//
// Which VM writes a disk is a lease, which outlives processes. What a command does to it lasts as
// long as its processes do, so that is a lock of the disk's own file (flock): a command takes the
// lock and then looks for a lease, a VM takes the lease and then looks for a lock. Whatever the
// order, one of the two sees the other.
package disklock

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/lock"
)

// ErrBusy means that another process copies or changes the disk.
var ErrBusy = errors.New("another process copies or changes it")

// Lock locks an open disk: shared for one that reads it, else alone, for which it must be open for
// writing. The lock lasts until f, and each duplicate of it in other processes, is closed. Returns
// ErrBusy. What is no regular file has no lock, nor has a file system that knows none.
func Lock(f *os.File, shared bool) error {
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return err
	}
	how := lock.Exclusive
	if shared {
		how = lock.Shared
	}
	err = lock.Try(f, how)
	for begun := time.Now(); errors.Is(err, lock.ErrHeld) && time.Since(begun) < maxAsk; err = lock.Try(f, how) {
		time.Sleep(askPause) // it may be Free that has it
	}
	switch {
	case errors.Is(err, lock.ErrHeld):
		return ErrBusy
	case errors.Is(err, unix.ENOLCK), errors.Is(err, unix.ENOTSUP), err == nil:
		return nil
	}
	return err
}

// Free finds out by taking the lock, since only so a shared one is seen, and has it for two system
// calls. A lock that is held for maxAsk is another command's.
const (
	maxAsk   = 50 * time.Millisecond
	askPause = time.Millisecond
)

// Free returns ErrBusy if the disk at path is locked. No process that locks it meanwhile is
// refused.
func Free(path string) error {
	fi, err := os.Stat(path)
	if err != nil || !fi.Mode().IsRegular() {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(Lock(f, false), f.Close())
}
