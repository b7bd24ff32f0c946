package download

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a lock is looked at again: flock cannot wait under a context.
const lockPoll = 20 * time.Millisecond

// Lock takes a lock on a file or directory, how being unix.LOCK_SH or unix.LOCK_EX. It lasts until f is closed or the
// process dies. If another has it, waiting is called once, unless it is nil, and the lock is waited for.
func Lock(ctx context.Context, f *os.File, how int, waiting func()) error {
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lock %s: %w", f.Name(), context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// StillAt says whether path leads to f, which may have been moved or removed since it was opened.
func StillAt(f *os.File, path string) bool {
	was, err := f.Stat()
	is, lerr := os.Lstat(path)
	return err == nil && lerr == nil && os.SameFile(was, is)
}
