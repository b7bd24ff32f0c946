package share

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/spec"
)

// copier makes a tar of volumes.
type copier struct {
	ctx    context.Context
	trees  []*tree
	tw     *tar.Writer
	at     int // the volume that is being copied
	stamps *stampWriter
}

// tree is a volume's source.
type tree struct {
	n      int
	root   *os.Root
	file   string   // all there is of it, if not ""
	sync   bool     // what is copied is noted
	inside []string // directories that are made in it if they are not there
	dev    uint64   // the file system that we stay on
	links  map[[2]uint64]*linked
	out    leftOut
}

// linked is a file that has several names.
type linked struct {
	first string // its first name in the archive
	names int
}

// maxLinks is how many names ext4 gives a file.
const maxLinks = 65000

// maxPath is of a name in the archive, in bytes.
const maxPath = 4095

func openTree(n int, v spec.Volume, inside []string) (*tree, error) {
	t := &tree{n: n, sync: v.Sync, inside: inside, links: map[[2]uint64]*linked{}}
	fi, err := os.Stat(v.Source)
	if err != nil {
		return nil, err
	}
	dir := v.Source
	if !fi.IsDir() {
		dir, t.file = filepath.Split(v.Source)
	}
	t.dev = fi.Sys().(*syscall.Stat_t).Dev
	t.root, err = os.OpenRoot(dir)
	return t, err
}

// size is how many bytes the files take. What cannot be looked at is not counted.
func (c *copier) size() (need int64, err error) {
	for _, t := range c.trees {
		top := "."
		if t.file != "" {
			top = t.file
		}
		_ = fs.WalkDir(t.root.FS(), top, func(_ string, d fs.DirEntry, walkErr error) error {
			if err = context.Cause(c.ctx); err != nil {
				return fs.SkipAll
			}
			if walkErr != nil {
				return nil
			}
			fi, infoErr := d.Info()
			switch {
			case infoErr != nil:
			case d.IsDir() && fi.Sys().(*syscall.Stat_t).Dev != t.dev:
				return fs.SkipDir
			case d.Type().IsRegular():
				need += fi.Sys().(*syscall.Stat_t).Blocks * 512
			}
			return nil
		})
	}
	return need, err
}

func (c *copier) close() {
	for _, t := range c.trees {
		_ = t.root.Close() // nothing was written
	}
}

// write writes the archive.
func (c *copier) write(w io.Writer) error {
	c.tw = tar.NewWriter(w)
	for n, t := range c.trees {
		c.at = n
		if err := c.tree(t); err != nil {
			return err
		}
	}
	return c.tw.Close()
}

func (c *copier) tree(t *tree) error {
	name := "."
	if t.file != "" {
		name = t.file
	}
	fi, err := t.root.Lstat(name)
	if err != nil {
		return err
	}
	if t.file != "" {
		h := &tar.Header{Typeflag: tar.TypeDir, Name: strconv.Itoa(t.n) + "/", Mode: 0o755, ModTime: fi.ModTime()}
		if err := c.tw.WriteHeader(h); err != nil {
			return err
		}
		return c.add(t, name, fi)
	}
	if err := c.add(t, name, fi); err != nil {
		return err
	}
	made := map[string]bool{}
	for _, dir := range t.inside {
		for i := range len(dir) + 1 {
			part := dir[:i]
			if i < len(dir) && dir[i] != '/' || made[part] {
				continue
			}
			if _, err := t.root.Lstat(part); !errors.Is(err, fs.ErrNotExist) {
				continue // what is there may do, or the guest says so
			}
			made[part] = true
			if err := c.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: t.as(part) + "/", Mode: 0o755}); err != nil {
				return err
			}
		}
	}
	return nil
}

// as is a file's name in the archive.
func (t *tree) as(name string) string {
	if t.file != "" {
		name = guest.VolumeFile
	}
	return path.Join(strconv.Itoa(t.n), name)
}

// add writes a file, or a directory and what is in it. Errors are the archive's: what cannot be
// read is left out.
func (c *copier) add(t *tree, name string, fi fs.FileInfo) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	st := fi.Sys().(*syscall.Stat_t)
	h := &tar.Header{
		Format: tar.FormatPAX, Name: t.as(name), Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid),
		Gid: int(st.Gid), ModTime: fi.ModTime(),
	}
	if len(h.Name) > maxPath {
		t.out.add(name, unix.ENAMETOOLONG)
		return nil
	}
	switch fi.Mode().Type() {
	case 0:
		return c.file(t, name, h)
	case fs.ModeSymlink:
		to, err := t.root.Readlink(name)
		if err != nil {
			t.out.add(name, err)
			return nil
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, to
		t.xattrs(name, h)
		return errors.Join(c.tw.WriteHeader(h), c.note(t, name, fi))
	case fs.ModeDir:
		h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		t.xattrs(name, h)
		if err := c.tw.WriteHeader(h); err != nil {
			return err
		}
		if st.Dev != t.dev {
			t.out.add(name, errOther)
			return nil
		}
		return c.children(t, name)
	}
	t.out.add(name, errSpecial)
	return nil
}

func (c *copier) note(t *tree, name string, fi fs.FileInfo) error {
	if c.stamps == nil || !t.sync {
		return nil
	}
	return c.stamps.note(t.n, name, fi)
}

func (c *copier) children(t *tree, name string) error {
	d, err := t.root.Open(name)
	if err != nil {
		t.out.add(name, err)
		return nil
	}
	entries, err := d.ReadDir(-1)
	_ = d.Close()
	if err != nil {
		t.out.add(name, err)
	}
	for _, e := range entries {
		child := path.Join(name, e.Name())
		fi, err := t.root.Lstat(child)
		if err != nil {
			t.out.add(child, err)
			continue
		}
		if err := c.add(t, child, fi); err != nil {
			return err
		}
	}
	return nil
}

// file writes a regular file as it is now. It may have become something else, or change while it is
// read.
func (c *copier) file(t *tree, name string, h *tar.Header) error {
	// Nonblocking: it may have become a FIFO.
	f, err := t.root.OpenFile(name, unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		t.out.add(name, err)
		return nil
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = errSpecial
	}
	if err != nil {
		t.out.add(name, err)
		return nil
	}
	st := fi.Sys().(*syscall.Stat_t)
	if st.Nlink > 1 {
		id := [2]uint64{st.Dev, st.Ino}
		l := t.links[id]
		if l != nil && l.names < maxLinks {
			l.names++
			h.Typeflag, h.Linkname = tar.TypeLink, l.first
			return errors.Join(c.tw.WriteHeader(h), c.note(t, name, fi))
		}
		t.links[id] = &linked{h.Name, 1} // from the 65,001st name on it is another file
	}
	h.Typeflag, h.Size = tar.TypeReg, fi.Size()
	t.xattrs(name, h)
	if err := c.tw.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.Copy(c.tw, onlyReader{io.LimitReader(f, h.Size)})
	if n < h.Size {
		if errors.Is(err, errStopped) || c.ctx.Err() != nil {
			return errors.Join(err, context.Cause(c.ctx))
		}
		if err != nil {
			t.out.add(name, err) // zeros in its place: its size is written already
		}
		_, err = io.CopyN(c.tw, zeros{}, h.Size-n)
	}
	if err != nil {
		return err
	}
	if now, err := f.Stat(); err != nil || stampOf(now) != stampOf(fi) {
		return nil // the copy is of no one state: it is the host's own since
	}
	return c.note(t, name, fi)
}

type onlyReader struct{ io.Reader }

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Bounds of extended attributes: what Linux lists of a file's, and what ext4 holds, which has a
// block for them.
const (
	maxXattrs  = 64 << 10
	xattrBlock = 4096 - 64
	xattrHead  = 16 + 6
)

// xattrs adds a file's extended attributes. Only names serve for all kinds of files: a symbolic
// link cannot be opened.
func (t *tree) xattrs(name string, h *tar.Header) {
	dir, err := t.root.Open(path.Dir(name))
	if err != nil {
		t.out.attribute(name, "", err)
		return
	}
	defer dir.Close()
	at := "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + path.Base(name)
	buf := make([]byte, maxXattrs)
	n, err := unix.Llistxattr(at, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return
	}
	if err != nil {
		t.out.attribute(name, "", err)
		return
	}
	room := xattrBlock
	for attr := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		space, rest, _ := strings.Cut(attr, ".")
		if space != "user" && space != "trusted" && space != "security" {
			continue
		}
		n, err := unix.Lgetxattr(at, attr, buf)
		if strings.Contains(rest, "=") {
			err = errName
		} else if err == nil && xattrHead+len(rest)+n > room {
			err = errAttributes
		}
		if err != nil {
			t.out.attribute(name, attr, err)
			continue
		}
		room -= xattrHead + len(rest) + n
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+attr] = string(buf[:n])
	}
}
