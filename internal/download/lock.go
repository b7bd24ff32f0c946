package download

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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

// PartialSuffix ends the name of a file that is not whole yet.
const PartialSuffix = ".partial"

// OpenPartial makes or finds what there is of the file that is to be at path, and locks it: see Lock. Another may have put the whole
// into its place meanwhile.
func OpenPartial(ctx context.Context, path string, waiting func()) (*os.File, error) {
	name := path + PartialSuffix
	for {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, err
		}
		err = Lock(ctx, f, unix.LOCK_EX, waiting)
		if err == nil && StillAt(f, name) {
			if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
				return nil, errors.Join(fmt.Errorf("%w: %s is no regular file", fs.ErrInvalid, name), err, f.Close())
			}
			return f, nil
		}
		// Who had it has finished, and moved or removed it.
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
}
