package flatten

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/stream"
)

// TarToExt4 makes dst an ext4 image, to be mounted read-only, of a root file system's tar: plain or
// packed with gzip, zstd, xz or bzip2. It becomes what GNU tar makes of it: nothing in it is a
// whiteout, the last entry of a name wins, and what is below a symbolic link goes where that leads.
// Errors are ErrEmpty, ErrCut, stream.ErrPacking, and those of Layers.
func TarToExt4(ctx context.Context, r io.Reader, dst *os.File, l Limits) error {
	err := tarToExt4(ctx, r, dst, newLimits(l))
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrEmpty):
		err = hint.Add(err,
			"see whether the program that makes the tar went well; a disk with partitions or an ISO image is no root file system")
	case errors.Is(err, ErrCut), errors.Is(err, io.ErrUnexpectedEOF):
		err = hint.Add(err, "it is cut off, or no tar: see whether the program that makes it went well")
	case errors.Is(err, tar.ErrHeader):
		err = hint.Add(err, "it is neither a tar nor an ext4, squashfs or erofs image")
	}
	return fmt.Errorf("make ext4 of a tar: %w", err)
}

func tarToExt4(ctx context.Context, r io.Reader, dst *os.File, l limits) error {
	t, err := newTree(dst, l)
	if err != nil {
		return err
	}
	t.begin()
	err = stream.Unpacked(ctx, r, func(r io.Reader) error {
		limited := &bounded{r, l.maxBytes, bytesLimit("bytes unpacked", l.maxBytes)}
		return readTar(limited, false, &l, func(e entry, content io.Reader) error { return t.entry(ctx, e, content) })
	})
	if err != nil {
		return err
	}
	return t.finish()
}

// bounded ends with an error after so many bytes.
type bounded struct {
	r    io.Reader
	left int64
	err  error
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, b.err
	}
	return n, err
}

// DirToExt4 makes dst an ext4 image, to be mounted read-only, of a directory tree with its owners,
// modes, times, devices, hard links and extended attributes. Sockets are left out, and so is what
// is mounted below root. The tree must not change meanwhile. Errors are ErrEmpty and those of
// Layers.
func DirToExt4(ctx context.Context, root *os.Root, dst *os.File, l Limits) error {
	err := dirToExt4(ctx, root, dst, newLimits(l))
	if wrong := (*EntryError)(nil); errors.As(err, &wrong) {
		err = &EntryError{Name: path.Join(root.Name(), wrong.Name), Reason: wrong.Reason, IsFile: true}
	}
	if err != nil {
		return fmt.Errorf("make ext4 of %s: %w", root.Name(), err)
	}
	return nil
}

func dirToExt4(ctx context.Context, root *os.Root, dst *os.File, l limits) error {
	fi, err := root.Lstat(".")
	if err != nil {
		return err
	}
	t, err := newTree(dst, l)
	if err != nil {
		return err
	}
	t.begin()
	d := &directory{
		root: root, tree: t, dev: fi.Sys().(*syscall.Stat_t).Dev, used: &l, buf: make([]byte, maxXattrs),
		links: map[[2]uint64]string{},
	}
	if err := d.add(ctx, "", fi); err != nil {
		return err
	}
	if l.entries == 1 {
		return hint.Add(ErrEmpty, "see whether it is the right directory, and what should be in it is mounted")
	}
	return t.finish()
}

// directory is a directory that goes into an image.
type directory struct {
	root  *os.Root
	tree  *tree
	dev   uint64 // the file system that we stay on
	used  *limits
	buf   []byte               // for extended attributes
	links map[[2]uint64]string // by device and inode, the first name of a file that has several
}

func (d *directory) add(ctx context.Context, name string, fi fs.FileInfo) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	st := fi.Sys().(*syscall.Stat_t)
	if fi.Mode()&fs.ModeSocket != 0 {
		return nil
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: fi.ModTime()}
	if st.Nlink < 2 || fi.IsDir() {
		return d.entry(ctx, h, name, fi)
	}
	file := [2]uint64{st.Dev, st.Ino} // what is mounted below may have the same numbers
	if first := d.links[file]; first != "" {
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return d.put(ctx, h, nil)
	}
	err := d.entry(ctx, h, name, fi)
	d.links[file] = h.Name
	return err
}

// entry writes the first or only name of a file, and what is in it.
func (d *directory) entry(ctx context.Context, h *tar.Header, name string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	here := path.Join(".", name)
	var err error
	switch fi.Mode().Type() {
	case 0:
		return d.file(ctx, h, here)
	case fs.ModeSymlink:
		h.Typeflag = tar.TypeSymlink
		h.Linkname, err = d.root.Readlink(here)
	case fs.ModeNamedPipe:
		h.Typeflag = tar.TypeFifo
	case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
		h.Typeflag = tar.TypeBlock
		if fi.Mode()&fs.ModeCharDevice != 0 {
			h.Typeflag = tar.TypeChar
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case fs.ModeDir:
		h.Typeflag = tar.TypeDir
	default:
		return entryError(h, "type "+fi.Mode().Type().String())
	}
	if err == nil {
		err = d.xattrs(h, here)
	}
	if err == nil {
		err = d.put(ctx, h, nil)
	}
	if err == nil && fi.IsDir() && st.Dev == d.dev {
		err = d.children(ctx, name, here)
	}
	return err
}

func (d *directory) file(ctx context.Context, h *tar.Header, here string) (err error) {
	// Should the name have become a FIFO's, that must not stop us.
	f, err := d.root.OpenFile(here, unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return entryError(h, "was a file a moment ago")
	}
	h.Typeflag, h.Size = tar.TypeReg, fi.Size()
	if err := d.xattrs(h, here); err != nil {
		return err
	}
	return d.put(ctx, h, io.LimitReader(f, h.Size))
}

func (d *directory) put(ctx context.Context, h *tar.Header, content io.Reader) error {
	if err := d.used.add(h.Size); err != nil {
		return err
	}
	e, err := clean(h, false)
	if err != nil {
		return err
	}
	return d.tree.entry(ctx, e, content)
}

func (d *directory) children(ctx context.Context, name, here string) error {
	f, err := d.root.Open(here)
	if err != nil {
		return err
	}
	entries, err := f.ReadDir(-1)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	for _, e := range entries {
		child := path.Join(name, e.Name())
		fi, err := d.root.Lstat(child)
		if err == nil {
			err = d.add(ctx, child, fi)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// maxXattrs bounds what Linux lists of a file's extended attributes, and the value of one.
const maxXattrs = 64 << 10

// xattrs reads a file's extended attributes. Only names serve for all kinds of files: a symbolic
// link cannot be opened, and a device should not be.
func (d *directory) xattrs(h *tar.Header, here string) (err error) {
	dir, err := d.root.Open(path.Dir(here))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	name := "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + path.Base(here)
	n, err := unix.Llistxattr(name, d.buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list extended attributes of %s: %w", here, err)
	}
	h.PAXRecords = map[string]string{}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(d.buf[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(name, attr, d.buf)
		if err != nil {
			return fmt.Errorf("read extended attribute %s of %s: %w", attr, here, err)
		}
		h.PAXRecords[xattrRecord+attr] = string(d.buf[:n])
	}
	return nil
}
