// Package lock keeps processes out of each other's way by locks on files and directories, which end
// with the processes that hold them.
//
// The locks are those of flock(2), not the open file description locks of fcntl(2), which can be
// asked about without being taken. Three things speak for flock. A VM lives through an upgrade, and
// with it a supervisor of the older build, which holds flock locks: the two kinds do not see each
// other, so flock would have to be tried all the same, and asked about by taking it. An exclusive
// description lock needs a descriptor that is open for writing, and most of what is locked here is
// a directory. And /proc/locks, which shows both kinds, leaves out what was locked by a process
// that has ended and is held by its child.
//
// So that asking does no harm, a lock that no process shares has a mode of its own, Sole. Held asks
// about it by sharing it for a moment, and a process that takes it knows such a share from a lock:
// it is never refused because of it.
package lock

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Mode is how a lock is held.
type Mode int

const (
	// Shared is held by any number of processes at a time.
	Shared Mode = iota
	// Exclusive is held by one process, while none has it Shared.
	Exclusive
	// Sole is Exclusive, of a lock that is never taken as Shared. Such a lock can be asked about by
	// Held.
	Sole
)

// ErrHeld says that another process holds a lock, or this one by another descriptor.
var ErrHeld = errors.New("locked by another process")

// Try takes a lock of f, which lasts until f and each descriptor that a child process has inherited
// of it is closed. Returns ErrHeld at once where it is held.
func Try(f *os.File, m Mode) error {
	err := try(f, m)
	if err != nil && !errors.Is(err, ErrHeld) {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return err
}

// Bounds of how long Held has a lock, which takes two system calls, and how soon Try looks again
// meanwhile. Only a process that is stopped between the two has it longer; it counts as a holder
// then.
const (
	maxAsk   = 5 * time.Second
	askPause = 50 * time.Microsecond
)

func try(f *os.File, m Mode) error {
	switch m {
	case Shared:
		return flock(f, unix.LOCK_SH|unix.LOCK_NB)
	case Exclusive:
		return flock(f, unix.LOCK_EX|unix.LOCK_NB)
	}
	for deadline := time.Now().Add(maxAsk); ; {
		err := flock(f, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, ErrHeld) {
			return err
		}
		// It can be shared only while no process holds it: what is in the way asks, or tries as we do.
		if err := flock(f, unix.LOCK_SH|unix.LOCK_NB); err != nil {
			return err
		}
		if err := flock(f, unix.LOCK_UN); err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return ErrHeld
		}
		time.Sleep(rand.N(askPause)) // two that try in step would always see each other
	}
}

// flock is flock(2) on f. A lock that is held is ErrHeld.
func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		switch {
		case errors.Is(err, unix.EWOULDBLOCK):
			return ErrHeld
		case !errors.Is(err, unix.EINTR):
			return err
		}
	}
}

// Held says whether a lock, which must be one that is only taken as Sole, is held. No process that
// tries to take it meanwhile is refused.
func Held(f *os.File) (bool, error) {
	err := flock(f, unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, ErrHeld) {
		return true, nil
	}
	if err == nil {
		err = flock(f, unix.LOCK_UN)
	}
	if err != nil {
		return false, fmt.Errorf("ask for lock of %s: %w", f.Name(), err)
	}
	return false, nil
}

// flock cannot wait under a context, so Wait looks again: after minPause, or an eighth of the time
// that it has waited, but after maxPause at most.
const (
	minPause = 500 * time.Microsecond
	maxPause = 10 * time.Millisecond
)

// Wait takes a lock as Try does, and waits for it. If it is held, waiting is called once, unless it
// is nil. Returns ErrHeld with the context's cause as soon as ctx ends.
func Wait(ctx context.Context, f *os.File, m Mode, waiting func()) error {
	err := Try(f, m)
	if errors.Is(err, ErrHeld) && waiting != nil {
		waiting()
	}
	timer := time.NewTimer(minPause)
	defer timer.Stop()
	for begun := time.Now(); errors.Is(err, ErrHeld); err = Try(f, m) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("lock %s: %w: %w", f.Name(), ErrHeld, context.Cause(ctx))
		case <-timer.C:
			timer.Reset(min(max(minPause, time.Since(begun)/8), maxPause))
		}
	}
	return err
}

// Block takes a lock and waits in the kernel's queue, where no process is passed over, for as long
// as that takes. It is for locks that are held for a moment each. Mode is not Sole.
func Block(f *os.File, m Mode) error {
	how := unix.LOCK_SH
	if m == Exclusive {
		how = unix.LOCK_EX
	}
	if err := flock(f, how); err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}

// Path opens the file or directory at path, which must be there, and takes its lock: see Wait.
func Path(ctx context.Context, path string, m Mode, waiting func()) (release func() error, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := Wait(ctx, f, m, waiting); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

// StillAt says whether path leads to f. A file that was opened and then locked may have been moved
// or removed before it was locked, by the process that held the lock.
func StillAt(f *os.File, path string) bool {
	was, err := f.Stat()
	is, lerr := os.Lstat(path)
	return err == nil && lerr == nil && os.SameFile(was, is)
}
