package kernel

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
)

// Entry is a file, directory, symbolic link or device node of an [Archive].
type Entry struct {
	// Path is where it stands in the guest, slash-separated; a leading slash
	// makes no difference.
	Path string
	// Mode is the type (none for a regular file, fs.ModeDir, fs.ModeSymlink,
	// fs.ModeDevice, with fs.ModeCharDevice for a character device),
	// permissions, setuid, setgid and sticky. The permissions of a symbolic
	// link are always 0777.
	Mode fs.FileMode
	// UID and GID own it.
	UID, GID uint32
	// Content is what a regular file holds, unless HostPath says so. The
	// archive keeps the slice.
	Content []byte
	// HostPath is a file on the host, read when the archive is written.
	HostPath string
	// Target is what a symbolic link holds.
	Target string
	// Major (below 1<<12) and Minor (below 1<<20) number a device.
	Major, Minor uint32

	implied bool // a parent that nobody asked for yet
}

// Archive is an initramfs: a cpio archive in newc format. The same entries give
// the same bytes, in whatever order they were added. The zero value is empty
// and ready. It is not safe for concurrent use.
type Archive struct {
	entries map[string]Entry // by clean path without leading slash
}

const (
	maxPath     = 4095 // PATH_MAX, less its NUL
	trailerName = "TRAILER!!!"
)

// Add adds an entry, and those parents that are missing as root's directories
// of mode 0755; they may be added themselves later. It returns an error that
// matches fs.ErrExist when the path is taken, and fs.ErrInvalid when the entry
// makes no sense or stands below something that is no directory. HostPath is
// not looked at yet.
func (a *Archive) Add(e Entry) error {
	name, err := cleanPath(e.Path)
	if err != nil {
		return err
	}
	if err := e.validate(); err != nil {
		return fmt.Errorf("add %q to initramfs: %w: %w", e.Path, fs.ErrInvalid, err)
	}
	if old, ok := a.entries[name]; ok && !(old.implied && e.Mode.IsDir()) {
		return fmt.Errorf("add %q to initramfs: %w", e.Path, fs.ErrExist)
	}
	var missing []string
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		parent, ok := a.entries[dir]
		if ok && !parent.Mode.IsDir() {
			return fmt.Errorf("add %q to initramfs: %w: %q is not a directory", e.Path, fs.ErrInvalid, dir)
		}
		if !ok {
			missing = append(missing, dir)
		}
	}
	if a.entries == nil {
		a.entries = make(map[string]Entry)
	}
	for _, dir := range missing {
		a.entries[dir] = Entry{Mode: fs.ModeDir | 0o755, implied: true}
	}
	a.entries[name] = e
	return nil
}

// cleanPath returns p without leading slashes and redundant elements. It
// refuses ".." rather than guess what was meant.
func cleanPath(p string) (string, error) {
	name := strings.TrimPrefix(path.Clean("/"+p), "/")
	if name == "" || name == trailerName || len(name) > maxPath || strings.Contains(name, "\x00") ||
		slices.Contains(strings.Split(p, "/"), "..") {
		return "", fmt.Errorf("add %q to initramfs: %w path", p, fs.ErrInvalid)
	}
	return name, nil
}

const knownMode = fs.ModeType | fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky

func (e Entry) validate() error {
	regular, link, device := e.Mode.IsRegular(), e.Mode.Type() == fs.ModeSymlink, e.Mode&fs.ModeDevice != 0
	switch t := e.Mode.Type(); {
	case e.Mode&^knownMode != 0:
		return fmt.Errorf("mode %v", e.Mode)
	case !regular && !link && !device && t != fs.ModeDir:
		return fmt.Errorf("mode %v", e.Mode)
	case device && t&^fs.ModeCharDevice != fs.ModeDevice:
		return fmt.Errorf("mode %v", e.Mode)
	case !regular && (len(e.Content) > 0 || e.HostPath != ""):
		return errors.New("content of something else than a regular file")
	case len(e.Content) > 0 && e.HostPath != "":
		return errors.New("both content and a host path")
	case int64(len(e.Content)) > MaxSize:
		return ErrTooLarge
	case link != (e.Target != "") || len(e.Target) > maxPath || strings.Contains(e.Target, "\x00"):
		return fmt.Errorf("link target %q", e.Target)
	case !device && (e.Major != 0 || e.Minor != 0) || e.Major >= 1<<12 || e.Minor >= 1<<20:
		return fmt.Errorf("device number %d:%d", e.Major, e.Minor)
	}
	return nil
}

// Write writes the archive, uncompressed, sorted by path, dated 1970. The
// kernel takes it compressed too: give it a gzip.Writer for less disk space
// against a slower boot. It returns the errors of w and of reading host files.
func (a *Archive) Write(w io.Writer) error {
	c := &cpioWriter{w: bufio.NewWriterSize(w, 1<<20)}
	for _, name := range slices.Sorted(maps.Keys(a.entries)) {
		if err := c.add(name, a.entries[name]); err != nil {
			return fmt.Errorf("write initramfs: %q: %w", name, err)
		}
	}
	c.header(header{name: trailerName, nlink: 1})
	if err := c.w.Flush(); err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	return nil
}

// cpioWriter writes newc members: Linux
// Documentation/driver-api/early-userspace/buffer-format.rst. Write errors
// stick in w until its Flush. (cavaliergopher/cpio, with which the tests read
// the archive, cannot write device numbers.)
type cpioWriter struct {
	w     *bufio.Writer
	inode uint32
}

func (c *cpioWriter) add(name string, e Entry) error {
	c.inode++
	h := header{
		name: name, inode: c.inode, mode: unixMode(e.Mode), uid: e.UID, gid: e.GID, nlink: 1, major: e.Major,
		minor: e.Minor,
	}
	var content io.Reader = strings.NewReader(e.Target)
	h.size = int64(len(e.Target))
	switch {
	case e.Mode.IsDir():
		h.nlink = 2
	case e.HostPath != "":
		f, size, err := openRegular(e.HostPath)
		if err != nil {
			return err
		}
		defer f.Close()
		content, h.size = f, size
	case e.Mode.IsRegular():
		content, h.size = bytes.NewReader(e.Content), int64(len(e.Content))
	}
	c.header(h)
	if n, err := io.CopyN(c.w, content, h.size); err == io.EOF {
		return fmt.Errorf("read: %w after %d of %d bytes", io.ErrUnexpectedEOF, n, h.size)
	} else if err != nil {
		return err
	}
	c.pad(h.size)
	return nil
}

// header is what newc says of a member, all but the date and the checksum,
// which are 0.
type header struct {
	name                  string
	inode, mode, uid, gid uint32
	nlink                 uint32
	size                  int64 // at most MaxSize
	major, minor          uint32
}

func (c *cpioWriter) header(h header) {
	n, _ := fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		h.inode, h.mode, h.uid, h.gid, h.nlink, 0, h.size, 0, 0, h.major, h.minor, len(h.name)+1, 0, h.name)
	c.pad(int64(n))
}

// pad aligns what follows n bytes to four.
func (c *cpioWriter) pad(n int64) {
	_, _ = c.w.Write(make([]byte, -n&3))
}

// unixMode translates a mode that validate accepted.
func unixMode(m fs.FileMode) uint32 {
	bits := uint32(m.Perm())
	switch t := m.Type(); {
	case t == fs.ModeDir:
		bits |= syscall.S_IFDIR
	case t == fs.ModeSymlink:
		return syscall.S_IFLNK | 0o777
	case t == fs.ModeDevice:
		bits |= syscall.S_IFBLK
	case t&fs.ModeDevice != 0:
		bits |= syscall.S_IFCHR
	default:
		bits |= syscall.S_IFREG
	}
	if m&fs.ModeSetuid != 0 {
		bits |= syscall.S_ISUID
	}
	if m&fs.ModeSetgid != 0 {
		bits |= syscall.S_ISGID
	}
	if m&fs.ModeSticky != 0 {
		bits |= syscall.S_ISVTX
	}
	return bits
}

// openRegular opens a regular file of at most MaxSize bytes; it does not block
// on a FIFO. The caller closes it.
func openRegular(hostPath string) (*os.File, int64, error) {
	f, err := os.OpenFile(hostPath, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = fmt.Errorf("%q is not a regular file: %w", hostPath, fs.ErrInvalid)
	case st.Size() > MaxSize:
		err = fmt.Errorf("%q has %d bytes (at most %d): %w", hostPath, st.Size(), MaxSize, ErrTooLarge)
	default:
		return f, st.Size(), nil
	}
	return nil, 0, errors.Join(err, f.Close())
}
