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
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/stream"
)

// TarOptions say how a tar is made a file system. Zero values stand for defaults.
type TarOptions struct {
	Limits Limits
	// Once says that one pass will do, as no name comes twice or goes through a symbolic link: no copy is made. Where that is
	// wrong, the error is an *EntryError.
	Once bool
}

// TarToExt4 makes dst an ext4 image, to be mounted read-only, of a root file system's tar: plain or packed with gzip, zstd,
// xz or bzip2. It becomes what GNU tar makes of it: nothing in it is a whiteout, the last entry of a name wins, and what is
// below a symbolic link goes where that leads. Where that takes a second pass and r is no io.Seeker that can seek, it is read
// from a copy in dst's directory, which goes with the process. Errors are ErrEmpty, ErrCut, stream.ErrPacking, and those of Layers.
func TarToExt4(ctx context.Context, r io.Reader, dst *os.File, o TarOptions) error {
	t := &archive{r: r, max: newLimits(o.Limits), once: o.Once}
	err := t.flatten(ctx, dst)
	if t.copy != nil {
		err = errors.Join(err, t.copy.Close())
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrEmpty):
		err = hint.Add(err, "see whether the program that makes the tar went well; a disk with partitions or an ISO image is no root file system")
	case errors.Is(err, ErrCut), errors.Is(err, io.ErrUnexpectedEOF):
		err = hint.Add(err, "it is cut off, or no tar: see whether the program that makes it went well")
	case errors.Is(err, tar.ErrHeader):
		err = hint.Add(err, "it is neither a tar nor an ext4, squashfs or erofs image")
	}
	return fmt.Errorf("make ext4 of a tar: %w", err)
}

// archive is a tar to flatten.
type archive struct {
	r    io.Reader
	max  limits
	once bool
	copy *os.File // of what was read, if r cannot seek
}

func (t *archive) flatten(ctx context.Context, dst *os.File) error {
	again, err := t.repeatable(dst)
	if err != nil {
		return err
	}
	err = t.write(ctx, dst, func(w *writer) visitor { return newShadow(w) })
	if errors.Is(err, errPlan) && t.once {
		return &EntryError{Name: ".", Reason: "one of the tar's entries overrides another"}
	}
	if !errors.Is(err, errPlan) {
		return err
	}
	if t.copy != nil {
		// The first pass need not have come to the end.
		if _, err := io.Copy(io.Discard, t.r); err != nil {
			return err
		}
	}
	p := newPlan()
	if err := again(); err != nil {
		return err
	}
	if err := t.pass(ctx, p); err != nil {
		return err
	}
	p.finish()
	if err := again(); err != nil {
		return err
	}
	return t.write(ctx, dst, func(w *writer) visitor { return &planned{plan: p, writer: w} })
}

// repeatable returns what makes r begin again.
func (t *archive) repeatable(dst *os.File) (again func() error, err error) {
	if seeker, ok := t.r.(io.Seeker); ok {
		if start, err := seeker.Seek(0, io.SeekCurrent); err == nil {
			return func() error { _, err := seeker.Seek(start, io.SeekStart); return err }, nil
		}
	}
	if t.once {
		return nil, nil
	}
	if t.copy, err = os.CreateTemp(filepath.Dir(dst.Name()), ".tar-"); err != nil {
		return nil, err
	}
	if err := os.Remove(t.copy.Name()); err != nil {
		return nil, err
	}
	// Packed it is smaller than what comes of it, but for what unpacks to nothing.
	t.r = io.TeeReader(&bounded{r: t.r, left: t.max.maxBytes, err: bytesLimit("bytes of a tar", t.max.maxBytes)}, t.copy)
	return func() error {
		t.r = t.copy
		_, err := t.copy.Seek(0, io.SeekStart)
		return err
	}, nil
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

func (t *archive) write(ctx context.Context, dst *os.File, visit func(w *writer) visitor) error {
	w, err := newWriter(ctx, dst, t.max)
	if err != nil {
		return err
	}
	return w.close(t.pass(ctx, visit(w)))
}

// pass goes through the tar once.
func (t *archive) pass(ctx context.Context, v visitor) error {
	l := limits{maxBytes: t.max.maxBytes, maxEntries: t.max.maxEntries}
	if err := v.begin(1); err != nil {
		return err
	}
	return stream.Unpacked(ctx, t.r, func(r io.Reader) error {
		return readTar(&bounded{r, l.maxBytes, bytesLimit("bytes unpacked", l.maxBytes)}, false, &l, v.entry)
	})
}

// DirToExt4 makes dst an ext4 image, to be mounted read-only, of a directory tree with its owners, modes, times, devices,
// hard links and extended attributes. Sockets are left out, and so is what is mounted below root. The tree must not
// change meanwhile. Errors are ErrEmpty and those of Layers.
func DirToExt4(ctx context.Context, root *os.Root, dst *os.File, l Limits) error {
	used := newLimits(l)
	fi, err := root.Lstat(".")
	if err != nil {
		return fmt.Errorf("make ext4 of %s: %w", root.Name(), err)
	}
	w, err := newWriter(ctx, dst, used)
	if err != nil {
		return err
	}
	t := &tree{ctx: ctx, root: root, w: w, dev: fi.Sys().(*syscall.Stat_t).Dev, used: &used, links: map[[2]uint64]string{}}
	if err = t.add("", fi); err == nil && used.entries == 1 {
		err = hint.Add(ErrEmpty, "see whether it is the right directory, and what should be in it is mounted")
	}
	if wrong := (*EntryError)(nil); errors.As(err, &wrong) {
		err = &EntryError{Name: path.Join(root.Name(), wrong.Name), Reason: wrong.Reason, IsFile: true}
	}
	if err = w.close(err); err != nil {
		return fmt.Errorf("make ext4 of %s: %w", root.Name(), err)
	}
	return nil
}

// tree is a directory tree that goes into an image.
type tree struct {
	ctx   context.Context
	root  *os.Root
	w     *writer
	dev   uint64 // the file system that we stay on
	used  *limits
	links map[[2]uint64]string // by device and inode, the first name of a file that has several
}

func (t *tree) add(name string, fi fs.FileInfo) error {
	if t.ctx.Err() != nil {
		return context.Cause(t.ctx)
	}
	st := fi.Sys().(*syscall.Stat_t)
	if fi.Mode()&fs.ModeSocket != 0 {
		return nil
	}
	h := &tar.Header{Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: fi.ModTime()}
	if st.Nlink < 2 || fi.IsDir() {
		return t.entry(h, name, fi)
	}
	file := [2]uint64{st.Dev, st.Ino} // what is mounted below may have the same numbers
	if first := t.links[file]; first != "" {
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return t.put(h, nil)
	}
	err := t.entry(h, name, fi)
	t.links[file] = h.Name
	return err
}

// entry writes the first or only name of a file, and what is in it.
func (t *tree) entry(h *tar.Header, name string, fi fs.FileInfo) error {
	st := fi.Sys().(*syscall.Stat_t)
	here := path.Join(".", name)
	var err error
	switch fi.Mode().Type() {
	case 0:
		return t.file(h, here)
	case fs.ModeSymlink:
		h.Typeflag = tar.TypeSymlink
		h.Linkname, err = t.root.Readlink(here)
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
		err = t.xattrs(h, here)
	}
	if err == nil {
		err = t.put(h, nil)
	}
	if err == nil && fi.IsDir() && st.Dev == t.dev {
		err = t.children(name, here)
	}
	return err
}

func (t *tree) file(h *tar.Header, here string) (err error) {
	// Should the name have become a FIFO's, that must not stop us.
	f, err := t.root.OpenFile(here, unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
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
	if err := t.xattrs(h, here); err != nil {
		return err
	}
	return t.put(h, io.LimitReader(f, h.Size))
}

func (t *tree) put(h *tar.Header, content io.Reader) error {
	if err := t.used.add(h.Size); err != nil {
		return err
	}
	e, err := clean(h, false)
	if err != nil {
		return err
	}
	if e.kind == kindLink {
		return t.w.link(e.name, e.target)
	}
	return t.w.put(e.header, content)
}

func (t *tree) children(name, here string) error {
	d, err := t.root.Open(here)
	if err != nil {
		return err
	}
	entries, err := d.ReadDir(-1)
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	for _, e := range entries {
		child := path.Join(name, e.Name())
		fi, err := t.root.Lstat(child)
		if err == nil {
			err = t.add(child, fi)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// maxXattrs bounds what Linux lists of a file's extended attributes, and the value of one.
const maxXattrs = 64 << 10

// xattrs reads a file's extended attributes. Only names serve for all kinds of files: a symbolic link cannot be opened,
// and a device should not be.
func (t *tree) xattrs(h *tar.Header, here string) (err error) {
	dir, err := t.root.Open(path.Dir(here))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	name := "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + path.Base(here)
	buf := make([]byte, maxXattrs)
	n, err := unix.Llistxattr(name, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list extended attributes of %s: %w", here, err)
	}
	h.PAXRecords = map[string]string{}
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(name, attr, buf)
		if err != nil {
			return fmt.Errorf("read extended attribute %s of %s: %w", attr, here, err)
		}
		h.PAXRecords[xattrRecord+attr] = string(buf[:n])
	}
	return nil
}
