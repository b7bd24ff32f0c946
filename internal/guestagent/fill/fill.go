// Package fill copies what an image has in a directory into the file system that is mounted over
// it.
package fill

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// Bounds of what is copied: it takes the guest's memory.
const (
	MaxBytes   = 16 << 20 // of files
	MaxEntries = 10_000
)

// Options say what is copied.
type Options struct {
	// Directories says that nothing but directories is.
	Directories bool
	// Skip are names in the top directory that are left out.
	Skip []string
}

// Copy copies what is in from to to, with owners, modes, times and hard links, and gives to the
// owner and mode of from. What is no directory, file or link is left out, and so is what there is
// no room for. The error is that of the first thing that was left out; what comes behind it is
// copied all the same, until MaxEntries.
func Copy(to, from *os.Root, o Options) error {
	c := &copier{to: to, from: from, o: o, bytes: MaxBytes, entries: MaxEntries, links: map[[2]uint64]string{}}
	c.directory(".")
	info, err := from.Lstat(".")
	if err == nil {
		err = c.same(".", info)
	}
	c.note(err)
	return c.err
}

type copier struct {
	to, from *os.Root
	o        Options
	bytes    int64                // that may still be copied
	entries  int                  // likewise
	links    map[[2]uint64]string // by device and inode: the first name
	err      error                // the first
}

func (c *copier) note(err error) {
	if c.err == nil {
		c.err = err
	}
}

// directory copies what is in a directory.
func (c *copier) directory(name string) {
	dir, err := c.from.Open(name)
	if err != nil {
		c.note(err)
		return
	}
	defer dir.Close()
	for {
		some, err := dir.ReadDir(256)
		for _, e := range some {
			if c.entries == 0 {
				c.note(fmt.Errorf("more than %d entries", MaxEntries))
				return
			}
			if err := c.entry(filepath.Join(name, e.Name())); err != nil {
				c.note(err)
			}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				c.note(err)
			}
			return
		}
	}
}

func (c *copier) entry(at string) error {
	info, err := c.from.Lstat(at)
	if err != nil || slices.Contains(c.o.Skip, at) || c.o.Directories && !info.IsDir() {
		return err
	}
	c.entries--
	switch info.Mode().Type() {
	case fs.ModeDir:
		if err := c.to.Mkdir(at, 0o700); err != nil {
			return err
		}
		c.directory(at)
	case fs.ModeSymlink:
		target, err := c.from.Readlink(at)
		if err != nil {
			return err
		}
		if err := c.to.Symlink(target, at); err != nil {
			return err
		}
	case 0:
		if linked, err := c.file(at, info); err != nil || linked {
			return err
		}
	default:
		return nil // of a process that is no more
	}
	return c.same(at, info)
}

// file says whether it has linked the file to one that is there already.
func (c *copier) file(at string, info fs.FileInfo) (linked bool, err error) {
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
		id := [2]uint64{uint64(st.Dev), st.Ino} //nolint:unconvert // of another type elsewhere
		if first, seen := c.links[id]; seen {
			return true, c.to.Link(first, at)
		}
		defer func() {
			if err == nil {
				c.links[id] = at
			}
		}()
	}
	if info.Size() > c.bytes {
		return false, fmt.Errorf("%s: more than %d bytes of files", at, int64(MaxBytes))
	}
	in, err := c.from.Open(at)
	if err != nil {
		return false, err
	}
	defer in.Close()
	out, err := c.to.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return false, err
	}
	n, err := io.Copy(out, io.LimitReader(in, info.Size()))
	c.bytes -= n
	if err = errors.Join(err, out.Close()); err != nil {
		return false, errors.Join(err, c.to.Remove(at)) // no half of a file
	}
	return false, nil
}

// same gives what is at a name the owner, mode and time that it has in the image.
func (c *copier) same(at string, info fs.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Uid > math.MaxInt32 || st.Gid > math.MaxInt32 {
		return fmt.Errorf("%s: its owner cannot be told", at)
	}
	if err := c.to.Lchown(at, int(st.Uid), int(st.Gid)); err != nil || info.Mode().Type() == fs.ModeSymlink {
		return err
	}
	const bits = fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	return errors.Join(c.to.Chmod(at, info.Mode()&bits), c.to.Chtimes(at, info.ModTime(), info.ModTime()))
}
