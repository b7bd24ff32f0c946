// Package treetar turns trees of files into tar archives and back. Whoever made an archive need not be trusted: nothing is
// written outside the directory that it is unpacked in, and no devices are made.
package treetar

import (
	"archive/tar"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Pack writes the file or tree at name, in root, as an archive whose entries are called top and what is below it; "." is the
// tree's contents. Sockets are left out.
func Pack(w io.Writer, name, top string) error {
	return pack(&packer{w: w}, name, top)
}

// PackSparse is Pack, but of large holes in files only their sizes are written, as GNU tar's format 1.0 has it, which not every tool reads.
func PackSparse(w io.Writer, name, top string) error {
	return pack(&packer{w: w, sparse: true}, name, top)
}

func pack(p *packer, name, top string) error {
	p.tw, p.links, p.buf = tar.NewWriter(p.w), map[[2]uint64]string{}, make([]byte, bufferSize)
	err := filepath.WalkDir(name, func(at string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(name, at)
		if err != nil {
			return err
		}
		as := path.Join(top, filepath.ToSlash(rel))
		if as == "." {
			return nil
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it was there a moment ago
		}
		if err != nil {
			return err
		}
		return p.pack(at, as, info)
	})
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	return p.tw.Close()
}

// Opaque is the record of a directory in a layer of overlayfs that hides what is below it.
const (
	Opaque        = "SCHILY.xattr." + overlayOpaque
	overlayOpaque = "trusted.overlay.opaque"
)

type packer struct {
	w      io.Writer
	tw     *tar.Writer          // to w
	links  map[[2]uint64]string // by device and inode: the first name
	buf    []byte
	sparse bool
}

// bufferSize is of pieces of files. They are large, so that buffers around us pass them on as they are.
const bufferSize = 256 << 10

func (p *packer) pack(at, as string, info fs.FileInfo) error {
	target := ""
	switch info.Mode().Type() {
	case fs.ModeSocket:
		return nil
	case fs.ModeSymlink:
		var err error
		if target, err = os.Readlink(at); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Format = as, tar.FormatPAX
	h.Uname, h.Gname = "", "" // names mean other users elsewhere
	if info.IsDir() {
		h.Name += "/"
		value := make([]byte, 1)
		if n, err := unix.Lgetxattr(at, overlayOpaque, value); err == nil && n == 1 && value[0] == 'y' {
			h.PAXRecords = map[string]string{Opaque: "y"}
		}
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if ok && st.Nlink > 1 && info.Mode().IsRegular() {
		id := [2]uint64{uint64(st.Dev), st.Ino} //nolint:unconvert // of another type elsewhere
		if first, seen := p.links[id]; seen {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			p.links[id] = as
		}
	}
	if h.Typeflag != tar.TypeReg {
		return p.tw.WriteHeader(h)
	}
	// Nonblocking: it may have become a FIFO.
	f, err := os.OpenFile(at, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if ok && p.sparse && h.Size-st.Blocks*512 > minHoles {
		return p.withHoles(f, h)
	}
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	return p.content(f, h)
}

func (p *packer) content(f io.Reader, h *tar.Header) error {
	n, err := io.CopyBuffer(p.tw, io.LimitReader(f, h.Size), p.buf)
	if err == nil && n < h.Size {
		_, err = io.CopyN(p.tw, zeros{}, h.Size-n) // it has been cut short meanwhile
	}
	return err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Options say how an archive is unpacked.
type Options struct {
	// Top is what the first part of each name becomes; "" leaves names as they are, "." drops it.
	Top string
	// Owners are kept, and set-user-id bits. Otherwise everything is the caller's.
	Owners bool
	// MaxHoles is how many bytes of holes the files of an archive may have together, which cost its sender nothing; 0 means DefaultMaxHoles.
	MaxHoles int64
	// Odd makes what is neither a file, a directory nor a link, before it gets its attributes. If nil, that is ErrUnsafe.
	Odd func(h *tar.Header) error
	// Progress is told how many bytes of files have been written.
	Progress func(int64)
}

// DefaultMaxHoles is read within half a minute.
const DefaultMaxHoles = 64 << 30

// ErrUnsafe means that an archive has what is not unpacked.
var ErrUnsafe = errors.New("unsafe archive")

// Unpack unpacks an archive in root. Files that are there are replaced, directories filled. Returns ErrUnsafe, and what
// os.Root returns for names that lead out of it.
func Unpack(r io.Reader, root *os.Root, o Options) error {
	u := &unpacker{root: root, o: o, buf: make([]byte, bufferSize), in: &counter{r: r}}
	tr := tar.NewReader(u.in)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return u.finish()
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
		if err := u.entry(h, tr); err != nil {
			return fmt.Errorf("unpack %q: %w", h.Name, err)
		}
	}
}

const blockSize = 4096

type unpacker struct {
	root    *os.Root
	o       Options
	buf     []byte
	written int64
	in      *counter      // the archive; nil: it is bounded already
	holes   int64         // bytes of files that were not in it
	dirs    []*tar.Header // their modes and times, when all is in them
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// read fills b with a file's content.
func (u *unpacker) read(r io.Reader, b []byte) (int, error) {
	if u.in == nil {
		return io.ReadFull(r, b)
	}
	was := u.in.n
	n, err := io.ReadFull(r, b)
	limit := cmp.Or(u.o.MaxHoles, DefaultMaxHoles)
	if u.holes += max(0, int64(n)-(u.in.n-was)); u.holes > limit {
		return n, fmt.Errorf("%w: more than %d MiB of holes", ErrUnsafe, limit>>20)
	}
	return n, err
}

// name is an entry's, in root; "" is to be left out.
func (u *unpacker) name(name string) (string, error) {
	name = path.Clean(strings.TrimPrefix(name, "/"))
	if u.o.Top != "" {
		_, rest, _ := strings.Cut(name, "/")
		name = path.Join(u.o.Top, rest)
	}
	if !filepath.IsLocal(name) {
		return "", ErrUnsafe
	}
	return name, nil
}

func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	name, err := u.name(h.Name)
	if err != nil {
		return err
	}
	if name == "." {
		return nil
	}
	h.Name = name
	if dir := path.Dir(name); dir != "." {
		if err := u.root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if h.Typeflag == tar.TypeDir {
		if err := u.root.Mkdir(name, 0o700); errors.Is(err, fs.ErrExist) {
			if fi, statErr := u.root.Stat(name); statErr == nil && fi.IsDir() {
				err = nil
			}
			if err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
		u.dirs = append(u.dirs, h)
		return nil
	}
	if err := u.root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg:
		if err := u.file(name, h.Size, r); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := u.root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		if u.o.Owners {
			return u.root.Lchown(name, h.Uid, h.Gid)
		}
		return nil
	case tar.TypeLink:
		to, err := u.name(h.Linkname)
		if err != nil {
			return err
		}
		return u.root.Link(to, name)
	default:
		if u.o.Odd != nil {
			if err := u.o.Odd(h); err != nil {
				return err
			}
			break
		}
		return fmt.Errorf("%w: neither file, directory nor link", ErrUnsafe)
	}
	return u.attributes(h)
}

// WriteFile writes a new file of so many bytes, with mode 0600, and leaves holes where there are only zeros.
func WriteFile(root *os.Root, name string, size int64, r io.Reader) error {
	u := &unpacker{root: root, buf: make([]byte, blockSize*16)}
	return u.file(name, size, r)
}

// file writes a file, and leaves holes where there are only zeros.
func (u *unpacker) file(name string, size int64, r io.Reader) (err error) {
	f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for at := int64(0); at < size; {
		n, err := u.read(r, u.buf[:min(int64(len(u.buf)), size-at)])
		if err != nil {
			return err
		}
		for b := u.buf[:n]; len(b) > 0; {
			block := b[:min(blockSize, len(b))]
			run := len(block)
			hole := bytes.Equal(block, zeroBlock[:len(block)])
			for !hole && run < len(b) {
				next := b[run:min(run+blockSize, len(b))]
				if bytes.Equal(next, zeroBlock[:len(next)]) {
					break
				}
				run += len(next)
			}
			if !hole {
				if _, err := f.WriteAt(b[:run], at); err != nil {
					return err
				}
			}
			b, at = b[run:], at+int64(run)
		}
		u.written += int64(n)
		if u.o.Progress != nil {
			u.o.Progress(u.written)
		}
	}
	return f.Truncate(size)
}

var zeroBlock = make([]byte, blockSize)

func (u *unpacker) attributes(h *tar.Header) error {
	mode := fs.FileMode(h.Mode & 0o777)
	if u.o.Owners {
		if err := u.root.Lchown(h.Name, h.Uid, h.Gid); err != nil {
			return err
		}
		mode = h.FileInfo().Mode() & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
	}
	return errors.Join(u.root.Chmod(h.Name, mode), u.root.Chtimes(h.Name, h.ModTime, h.ModTime))
}

// finish gives directories their modes, the innermost first: what is in them is there.
func (u *unpacker) finish() error {
	for i := len(u.dirs) - 1; i >= 0; i-- {
		if err := u.attributes(u.dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("unpack %q: %w", u.dirs[i].Name, err)
		}
	}
	return nil
}
