// Package treetar turns trees of files into tar archives and back. Whoever made an archive need not
// be trusted: nothing is written outside the directory that it is unpacked in, and no devices are
// made.
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
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Options say how an archive is unpacked.
type Options struct {
	// Top is what the first part of each name becomes, whatever it is called; "" leaves names as they
	// are, "." drops it.
	Top string
	// NoLink refuses a symbolic link as Top itself.
	NoLink bool
	// NoFollow goes by no symbolic link below the directory that is unpacked in, as cp does: a link is
	// in the way of a directory.
	NoFollow bool
	// Owners are kept, and set-user-id bits. Otherwise everything is the caller's.
	Owners bool
	// MaxHoles is how many bytes of holes the files of an archive may have together, which cost its
	// sender nothing; 0 means DefaultMaxHoles.
	MaxHoles int64
	// Odd makes what is neither a file, a directory nor a link, before it gets its attributes. If nil,
	// that is ErrUnsafe.
	Odd func(h *tar.Header) error
	// Left is told of what is left out, and why; the rest is unpacked all the same. If nil, the first
	// ends it.
	Left func(name string, why error)
	// Progress is told how many bytes of files have been written.
	Progress func(int64)
}

// DefaultMaxHoles is read within half a minute.
const DefaultMaxHoles = 64 << 30

// Errors of unpacking.
var (
	// ErrUnsafe means that an archive has what is not unpacked.
	ErrUnsafe = errors.New("unsafe archive")
	// ErrInTheWay means that something else is where an entry belongs, and is not replaced by it.
	ErrInTheWay = errors.New("in the way")
	// ErrTopLink means that Top would have become a symbolic link.
	ErrTopLink = errors.New("is a symbolic link")
	// ErrEmpty means that nothing came that could have become Top.
	ErrEmpty = errors.New("empty archive")
)

const (
	maxPath = 4095 // bytes of a name
	// maxDirs bounds what is remembered of directories: the bytes of their names, and of what goes
	// with each.
	maxDirs, perDir = 256 << 20, 256
)

// Unpack unpacks an archive in root. Files and links that are there are replaced, directories
// filled, and nothing else is touched. Returns ErrUnsafe, ErrInTheWay, ErrTopLink, ErrEmpty, and
// what os.Root returns for names that lead out of it.
func Unpack(r io.Reader, root *os.Root, o Options) error {
	u := &unpacker{root: root, o: o, buf: make([]byte, bufferSize), in: &counter{r: r}, known: map[string]bool{".": true}}
	tr := tar.NewReader(u.in)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return u.finish()
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
		u.any = true
		named := h.Name
		if err := u.entry(h, tr); err != nil {
			if o.Left == nil || fatal(err) || h.Name == o.Top {
				return fmt.Errorf("unpack %q: %w", named, reason(err))
			}
			o.Left(named, reason(err))
		}
	}
}

// fatal says whether an error is not of one entry alone.
func fatal(err error) bool {
	return slices.ContainsFunc(
		[]error{
			errArchive, errTooMuch, ErrTopLink, unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.EIO, unix.EMFILE,
			unix.ENFILE, unix.ENOMEM,
		},
		func(e error) bool { return errors.Is(err, e) })
}

// errArchive is of the archive itself, errTooMuch of more than it may have.
var (
	errArchive = errors.New("read archive")
	errTooMuch = fmt.Errorf("%w: too much", ErrUnsafe)
)

const blockSize = 4096

type unpacker struct {
	root    *os.Root
	o       Options
	buf     []byte
	written int64
	in      *counter        // the archive; nil: it is bounded already
	holes   int64           // bytes of files that were not in it
	known   map[string]bool // directories that need no look
	names   int             // see maxDirs
	any     bool            // there was an entry
	dirs    []*tar.Header   // their modes and times, when all is in them
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
		return n, fmt.Errorf("%w: more than %d MiB of holes", errTooMuch, limit>>20)
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", errArchive, err)
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
	if !filepath.IsLocal(name) || len(name) > maxPath {
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
	if err := u.directory(path.Dir(name), 0o755); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		if err := u.remember(name); err != nil {
			return err
		}
		u.dirs = append(u.dirs,
			&tar.Header{Name: name, Typeflag: h.Typeflag, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime})
		return u.directory(name, 0o700)
	}
	if h.Typeflag == tar.TypeSymlink && u.o.NoLink && name == path.Clean(u.o.Top) {
		return fmt.Errorf("%w to %q", ErrTopLink, h.Linkname)
	}
	if err := u.clear(name); err != nil {
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
		if err == nil {
			err = u.directory(path.Dir(to), 0o755)
		}
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
		return fmt.Errorf("%w: %w", ErrUnsafe, errOdd)
	}
	return u.attributes(h)
}

func (u *unpacker) remember(dir string) error {
	if u.names += len(dir) + perDir; u.names > maxDirs {
		return fmt.Errorf("%w: too many directories", errTooMuch)
	}
	return nil
}

// directory makes a directory and those above it, where they are not there.
func (u *unpacker) directory(name string, mode fs.FileMode) error {
	if u.known[name] {
		return nil
	}
	if err := u.directory(path.Dir(name), 0o755); err != nil {
		return err
	}
	err := u.root.Mkdir(name, mode)
	if errors.Is(err, fs.ErrExist) {
		look := u.root.Stat
		if u.o.NoFollow {
			look = u.root.Lstat
		}
		var fi fs.FileInfo
		if fi, err = look(name); err == nil && !fi.IsDir() {
			err = inTheWay(fi.Mode(), name, "a directory")
		}
	}
	if err == nil {
		u.known[name] = true
		err = u.remember(name)
	}
	return err
}

// clear removes a file or a link, which something else is to replace.
func (u *unpacker) clear(name string) error {
	fi, err := u.root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case fi.Mode().IsRegular(), fi.Mode().Type() == fs.ModeSymlink:
		return u.root.Remove(name)
	}
	return inTheWay(fi.Mode(), name, "a file")
}

// inTheWay says why something of a mode is not replaced.
func inTheWay(mode fs.FileMode, name, by string) error {
	what := map[fs.FileMode]string{
		0: "a file", fs.ModeDir: "a directory", fs.ModeSymlink: "a symbolic link", fs.ModeNamedPipe: "a FIFO",
		fs.ModeSocket: "a socket",
		fs.ModeDevice: "a device", fs.ModeDevice | fs.ModeCharDevice: "a device",
	}[mode.Type()]
	return fmt.Errorf("%q is %s, which %s does not replace: %w", name, cmp.Or(what, "something else"), by, ErrInTheWay)
}

// WriteFile writes a new file of so many bytes, with mode 0600, and leaves holes where there are
// only zeros.
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
	if u.o.Top != "" && !u.any {
		return fmt.Errorf("unpack: %w", ErrEmpty)
	}
	for i := len(u.dirs) - 1; i >= 0; i-- {
		err := u.attributes(u.dirs[i])
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
		case u.o.Left == nil || fatal(err):
			return fmt.Errorf("unpack %q: %w", u.dirs[i].Name, reason(err))
		default:
			u.o.Left(u.dirs[i].Name, reason(err))
		}
	}
	return nil
}
