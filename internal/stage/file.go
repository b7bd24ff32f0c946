// Package stage brings files to where a VM can use them: copies of its own for drives that are
// thrown away, and entries in the directory, or the jail, that its VMM runs in.
package stage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/disklock"
)

// Methods by which a file was staged.
const (
	Reflink = "reflink"     // shares its blocks with the source until one of them is written
	Copy    = "sparse-copy" // data copied, holes kept
)

// File is a copy of a regular file or block device. The source is only read.
type File struct {
	Source string `json:"source"`
	Target string `json:"target"` // in a directory of ours, which exists
	UID    int    `json:"uid"`    // the owner it gets, with the group of the same number; -1: ours

	// Method is Reflink or Copy once applied.
	Method string `json:"-"`
	// Progress, if set, is told of bytes copied so far and in all.
	Progress func(done, total int64) `json:"-"`
}

// SpaceError refuses a copy before it would fill the target. It is unix.ENOSPC.
type SpaceError struct {
	Source     string
	Dir        string
	Need, Free int64 // bytes
}

func (e *SpaceError) Error() string {
	return fmt.Sprintf("copy %s to %s: needs %d MiB, %d MiB are free", e.Source, e.Dir, e.Need>>20, e.Free>>20)
}

func (e *SpaceError) Unwrap() error { return unix.ENOSPC }

// Apply makes the copy: by reflink where source and target share a file system that can, else block
// by block. Returns disklock.ErrBusy while the source is being changed.
func (f *File) Apply(ctx context.Context) error {
	src, err := f.open()
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(f.Target, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("stage file: %w", err)
	}
	return errors.Join(f.fill(ctx, dst, src), dst.Close())
}

// Into copies to dst, an empty file that is open for reading and writing, in place of Target.
func (f *File) Into(ctx context.Context, dst *os.File) error {
	src, err := f.open()
	if err != nil {
		return err
	}
	defer src.Close()
	return f.fill(ctx, dst, src)
}

// open opens the source, and keeps others from changing it meanwhile.
func (f *File) open() (*os.File, error) {
	src, err := os.Open(f.Source)
	if err != nil {
		return nil, fmt.Errorf("stage file: %w", err)
	}
	if err := disklock.Lock(src, true); err != nil {
		return nil, errors.Join(fmt.Errorf("stage file %s: %w", f.Source, err), src.Close())
	}
	return src, nil
}

func (f *File) fill(ctx context.Context, dst, src *os.File) error {
	f.Method = Reflink
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) != nil {
		f.Method = Copy
		if err := f.copy(ctx, dst, src); err != nil {
			return fmt.Errorf("stage file %s: %w", f.Source, err)
		}
	}
	if f.UID >= 0 {
		if err := dst.Chown(f.UID, f.UID); err != nil {
			return fmt.Errorf("stage file: %w", err)
		}
	}
	return nil
}

func (f *File) Revert(context.Context) error {
	if err := os.Remove(f.Target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unstage file: %w", err)
	}
	return nil
}

// Extent is a run of data in a file, in bytes.
type Extent struct{ Off, Len int64 }

func (f *File) copy(ctx context.Context, dst, src *os.File) error {
	size, err := src.Seek(0, io.SeekEnd) // a block device has no size of its own in stat
	if err != nil {
		return err
	}
	data, err := Extents(src, size)
	if err != nil {
		return err
	}
	var total int64
	for _, e := range data {
		total += e.Len
	}
	if err := CheckSpace(f.Source, dst, total); err != nil {
		return err
	}
	if err := dst.Truncate(size); err != nil {
		return err
	}
	var done int64
	for _, e := range data {
		for e.Len > 0 {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n := min(e.Len, copyChunk)
			if err := copyRange(dst, src, e.Off, n); err != nil {
				return err
			}
			e.Off, e.Len, done = e.Off+n, e.Len-n, done+n
			if f.Progress != nil {
				f.Progress(done, total)
			}
		}
	}
	return nil
}

// CheckSpace returns a *SpaceError if what is to be put into dst, a copy of source, does not fit
// there.
func CheckSpace(source string, dst *os.File, need int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dst.Fd()), &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; need > free {
		return &SpaceError{Source: source, Dir: dst.Name(), Need: need, Free: free}
	}
	return nil
}

// copyChunk bounds how long a copy goes on after its context's end.
const copyChunk = 8 << 20

// copyRange lets the kernel move the bytes where it can: os.File's ReadFrom calls copy_file_range.
func copyRange(dst, src *os.File, off, n int64) error {
	if _, err := src.Seek(off, io.SeekStart); err != nil {
		return err
	}
	if _, err := dst.Seek(off, io.SeekStart); err != nil {
		return err
	}
	_, err := io.CopyN(dst, src, n)
	return err
}

// Extents finds where a file's data is. A file system that cannot tell has it everywhere.
func Extents(f *os.File, size int64) ([]Extent, error) {
	var all []Extent
	for off := int64(0); off < size; {
		start, err := f.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return []Extent{{0, size}}, nil
		}
		if err != nil {
			return nil, err
		}
		end, err := f.Seek(start, unix.SEEK_HOLE)
		if err != nil {
			return nil, err
		}
		all = append(all, Extent{start, end - start})
		off = end
	}
	return all, nil
}

// CanReflink says whether a copy of source in dir, or in a directory below it that is not a mount
// of its own, would share its blocks. It leaves nothing behind.
func CanReflink(source, dir string) bool {
	src, err := os.Open(source)
	if err != nil {
		return false
	}
	defer src.Close()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.IoctlFileClone(fd, int(src.Fd())) == nil
}

// Wanted is the original's rule of who gets a copy, but that a device's own wish wins over the
// host's switch.
func Wanted(host, readOnly bool, own *bool) bool {
	if own != nil {
		return *own
	}
	return host && !readOnly
}
