package atomicfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ReservedSuffix ends the name of a file that Reserve makes.
const ReservedSuffix = ".reserved"

// Reserve has room for a file at path, of at most so many bytes, beside it, so that WriteReserved
// succeeds on a file system that is full by then. What is at path stays.
func Reserve(path string, size int64) error {
	f, err := os.OpenFile(path+ReservedSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("reserve room for %s: %w", path, err)
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		_, err = f.Write(make([]byte, size))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("reserve room for %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}

// WriteReserved is Write for a path for which Reserve has made room: it allocates nothing, and uses
// the room up. Where there is none, or too little, it is Write.
func WriteReserved(path string, data []byte) (err error) {
	f, err := os.OpenFile(path+ReservedSuffix, os.O_WRONLY, 0)
	if err != nil {
		return Write(path, data, 0o600)
	}
	fi, err := f.Stat()
	if err != nil || fi.Size() < int64(len(data)) {
		return errors.Join(err, f.Close(), os.Remove(f.Name()), Write(path, data, 0o600))
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Truncate(int64(len(data)))
	}
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return SyncDir(filepath.Dir(path))
}
