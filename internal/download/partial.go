package download

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/lock"
)

// PartialSuffix ends the name of a file that is not whole yet.
const PartialSuffix = ".partial"

// OpenPartial makes or finds what there is of the file that is to be at path, and locks it, waiting
// as lock.Wait does. Another process may have put the whole into its place meanwhile.
func OpenPartial(ctx context.Context, path string, waiting func()) (*os.File, error) {
	name := path + PartialSuffix
	for {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if err != nil {
			return nil, err
		}
		err = lock.Wait(ctx, f, lock.Exclusive, waiting)
		if err == nil && lock.StillAt(f, name) {
			if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
				return nil, errors.Join(fmt.Errorf("%w: %s is no regular file", fs.ErrInvalid, name), err, f.Close())
			}
			return f, nil
		}
		// The process that had it has finished, and moved or removed it.
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
}
