package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Fill replaces path with what fill writes, which may be large. It is on disk when Fill returns.
// Until all is there it has no name, where the file system can do that: a process that is killed
// leaves nothing, or for a moment, where path was there before, a file that the next Fill removes.
// A device or FIFO is written to as it is.
func Fill(path string, perm fs.FileMode, fill func(f *os.File) error) error {
	err := replace(path, perm, fill)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

func replace(path string, perm fs.FileMode, fill func(f *os.File) error) (err error) {
	if fi, err := os.Stat(path); err == nil && !fi.Mode().IsRegular() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		return errors.Join(fill(f), f.Close())
	}
	if to, err := filepath.EvalSymlinks(path); err == nil {
		path = to
	}
	dir := filepath.Dir(path)
	f, err := os.OpenFile(dir, os.O_WRONLY|unix.O_TMPFILE, perm)
	named := errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EINVAL)
	if named {
		f, err = os.CreateTemp(dir, filepath.Base(path)+"-*"+TempSuffix)
	}
	if err != nil {
		return err
	}
	temp := f.Name()
	defer func() {
		if named && err != nil {
			err = errors.Join(err, os.Remove(temp))
		}
	}()
	if err = errors.Join(fill(f), f.Sync()); err != nil {
		return errors.Join(err, f.Close())
	}
	if !named {
		temp = filepath.Join(dir, "."+filepath.Base(path)+TempSuffix)
		self := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
		if err = unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err == nil {
			return errors.Join(f.Close(), SyncDir(dir))
		}
		if errors.Is(err, fs.ErrExist) {
			if err = os.Remove(temp); err == nil || errors.Is(err, fs.ErrNotExist) { // of a process that was killed here
				err = unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, temp, unix.AT_SYMLINK_FOLLOW)
			}
		}
		if err != nil {
			return errors.Join(fmt.Errorf("name what was written: %w", err), f.Close())
		}
		named = true
	}
	if err = errors.Join(f.Close(), os.Rename(temp, path)); err != nil {
		return err
	}
	return SyncDir(dir)
}
