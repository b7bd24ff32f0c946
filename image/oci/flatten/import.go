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
)

// TarToExt4 makes dst an ext4 image, to be mounted read-only, of a root file system's tar: plain or packed with gzip, zstd
// or xz. It is checked as a layer is, but nothing in it is a whiteout. Where names in it override each other, r must be an
// io.Seeker; *EntryError otherwise. See Layers for more errors.
func TarToExt4(ctx context.Context, r io.Reader, dst *os.File) error {
	pass := func(v visitor) error {
		l := limits{maxBytes: MaxBytes, maxEntries: MaxEntries}
		if err := v.begin(1); err != nil {
			return err
		}
		return unpacked(ctx, r, func(r io.Reader) error {
			limited := &io.LimitedReader{R: r, N: MaxBytes + 1}
			err := readTar(limited, false, &l, v.entry)
			if limited.N == 0 {
				err = &LimitError{"bytes unpacked", MaxBytes}
			}
			return err
		})
	}
	write := func(visit func(w *writer) visitor) error {
		w, err := newWriter(ctx, dst)
		if err != nil {
			return err
		}
		return w.close(pass(visit(w)))
	}
	err := write(func(w *writer) visitor { return newShadow(w) })
	if errors.Is(err, errPlan) {
		err = &EntryError{Name: ".", Reason: "one of the tar's entries overrides another"}
		if seeker, ok := r.(io.Seeker); ok {
			p := newPlan()
			if _, err = seeker.Seek(0, io.SeekStart); err == nil {
				err = pass(p)
			}
			if err == nil {
				p.finish()
				_, err = seeker.Seek(0, io.SeekStart)
			}
			if err == nil {
				err = write(func(w *writer) visitor { return &planned{plan: p, writer: w} })
			}
		}
	}
	if err != nil {
		return fmt.Errorf("make ext4 of a tar: %w", err)
	}
	return nil
}

// unpacked lets f read what r holds, which is unpacked in a goroutine of its own.
func unpacked(ctx context.Context, r io.Reader, f func(r io.Reader) error) error {
	p := newPipe(ctx)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		p.finish(Unpack(p, r))
	}()
	err := f(p)
	p.stop(errStopped)
	<-finished
	return err
}

var errStopped = errors.New("nobody reads any more")

// DirToExt4 makes dst an ext4 image, to be mounted read-only, of a directory tree with its owners, modes, times, devices,
// hard links and extended attributes. Sockets are left out, and so is what is mounted below root. The tree must not
// change meanwhile. See Layers for errors.
func DirToExt4(ctx context.Context, root *os.Root, dst *os.File) error {
	return TreesToExt4(ctx, []Tree{{Root: root}}, dst)
}

// Tree is a part of an image.
type Tree struct {
	Root *os.Root
	As   string // the directory of the image in which it is; "": the image's root
	File string // of Root that is all there is of it, if not ""
	Name string // of File, in the image
	// Live says that the tree may change meanwhile: what goes is left out, what gets shorter is filled up with zeros.
	Live bool
	Dirs []string // directories that are made in it if they are not there, slash-separated and local
}

// TreesToExt4 is DirToExt4 of several trees.
func TreesToExt4(ctx context.Context, trees []Tree, dst *os.File) error {
	w, err := newWriter(ctx, dst)
	if err != nil {
		return err
	}
	used := limits{maxBytes: MaxBytes, maxEntries: MaxEntries}
	for _, part := range trees {
		t := &tree{ctx: ctx, Tree: part, root: part.Root, w: w, used: &used, links: map[uint64]string{}}
		if err = t.write(); err != nil {
			err = fmt.Errorf("make ext4 of %s: %w", part.Root.Name(), err)
			break
		}
	}
	if closeErr := w.close(err); err == nil && closeErr != nil {
		err = fmt.Errorf("make ext4: %w", closeErr)
	}
	return err
}

func (t *tree) write() error {
	fi, err := t.root.Lstat(".")
	if err != nil {
		return err
	}
	t.dev = fi.Sys().(*syscall.Stat_t).Dev
	if t.File == "" {
		if err := t.add("", fi); err != nil {
			return err
		}
		return t.extra()
	}
	if fi, err = t.root.Lstat(t.File); err != nil {
		return err
	}
	if err := t.put(&tar.Header{Typeflag: tar.TypeDir, Name: t.As, Mode: 0o755, ModTime: fi.ModTime()}, nil); err != nil {
		return err
	}
	return t.add(t.File, fi)
}

// extra makes the directories that others are to be mounted on.
func (t *tree) extra() error {
	made := map[string]bool{}
	for _, dir := range t.Dirs {
		for i := range len(dir) + 1 {
			part := dir[:i]
			if i < len(dir) && dir[i] != '/' || made[part] {
				continue
			}
			if _, err := t.root.Lstat(part); !errors.Is(err, fs.ErrNotExist) {
				continue // what is there may do, or the guest says so
			}
			if err := t.put(&tar.Header{Typeflag: tar.TypeDir, Name: path.Join(t.As, part), Mode: 0o755}, nil); err != nil {
				return err
			}
			made[part] = true
		}
	}
	return nil
}

// tree is a directory tree that goes into an image.
type tree struct {
	Tree
	ctx   context.Context
	root  *os.Root
	w     *writer
	dev   uint64 // the file system that we stay on
	used  *limits
	links map[uint64]string // by inode, the first name of a file that has several
}

func (t *tree) add(name string, fi fs.FileInfo) error {
	if t.ctx.Err() != nil {
		return context.Cause(t.ctx)
	}
	st := fi.Sys().(*syscall.Stat_t)
	if fi.Mode()&fs.ModeSocket != 0 {
		return nil
	}
	h := &tar.Header{Name: t.as(name), Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: fi.ModTime()}
	if first := t.links[st.Ino]; first != "" {
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return t.put(h, nil)
	}
	if st.Nlink > 1 && !fi.IsDir() {
		t.links[st.Ino] = h.Name
	}
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

// as is a file's name in the image.
func (t *tree) as(name string) string {
	if t.File != "" {
		name = t.Name
	}
	return path.Join(t.As, name)
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
	content := io.Reader(f)
	if t.Live {
		content = io.MultiReader(f, endless{})
	}
	return t.put(h, io.LimitReader(content, h.Size))
}

// endless is zeros.
type endless struct{}

func (endless) Read(p []byte) (int, error) { clear(p); return len(p), nil }

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
		if t.Live && errors.Is(err, fs.ErrNotExist) {
			continue // it has gone, or what was in it
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
