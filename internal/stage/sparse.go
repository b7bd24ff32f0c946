package stage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// sparseBlock is the least that becomes a hole, in bytes.
const sparseBlock = 64 << 10

// Sparse makes holes of what is zero in a file of ours: its contents stay as they are, and it takes
// less of its disk. A file system without holes is left alone.
func Sparse(ctx context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("make holes: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("make holes: %w", err)
	}
	data, err := Extents(f, fi.Size())
	if err != nil {
		return fmt.Errorf("make holes: %w", err)
	}
	buf, zeros := make([]byte, sparseBlock), make([]byte, sparseBlock)
	for _, e := range data {
		var zero Extent // not yet a hole
		punch := func() error {
			if zero.Len == 0 {
				return nil
			}
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, zero.Off, zero.Len)
		}
		for off, end := e.Off, e.Off+e.Len; off < end; off += sparseBlock {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(sparseBlock, end-off)
			if _, err := f.ReadAt(buf[:n], off); err != nil {
				return fmt.Errorf("make holes: %w", err)
			}
			if bytes.Equal(buf[:n], zeros[:n]) {
				if zero.Len == 0 {
					zero.Off = off
				}
				zero.Len = off + n - zero.Off
				continue
			}
			err = punch()
			if zero = (Extent{}); err != nil {
				break
			}
		}
		if err == nil {
			err = punch()
		}
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("make holes: %w", err)
		}
	}
	return nil
}
