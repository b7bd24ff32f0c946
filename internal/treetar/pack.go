package treetar

import (
	"archive/tar"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// PackOptions say how a tree becomes an archive.
type PackOptions struct {
	// Sparse has only the sizes of large holes written, as GNU tar's format 1.0 has it, which not
	// every tool reads.
	Sparse bool
	// Left is told of what is left out, and why: what is neither a file, a directory nor a link, and
	// what cannot be read. If nil, what cannot be read ends the archive, and of the others only
	// sockets are left out.
	Left func(name string, why error)
}

// Pack writes the file or tree at name as an archive whose entries are called top and what is below
// it; "." is the tree's contents. What goes away meanwhile is not in it.
func Pack(w io.Writer, name, top string, o PackOptions) error {
	p := &packer{w: w, o: o, tw: tar.NewWriter(w), links: map[[2]uint64]string{}, buf: make([]byte, bufferSize)}
	err := filepath.WalkDir(name, func(at string, d fs.DirEntry, err error) error {
		if err != nil && at == name {
			return err
		}
		rel, relErr := filepath.Rel(name, at)
		if relErr != nil {
			return relErr
		}
		as := path.Join(top, filepath.ToSlash(rel))
		switch {
		case err != nil:
			err = &unreadError{err} // a directory's list
		case as != ".":
			err = p.pack(at, as, d)
		}
		unread, ok := errors.AsType[*unreadError](err)
		switch {
		case !ok:
			return err
		case errors.Is(err, fs.ErrNotExist) && at != name:
			return nil // it was there a moment ago
		case o.Left == nil:
			return unread.err
		}
		o.Left(as, reason(unread.err))
		return nil
	})
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	return p.tw.Close()
}

// unreadError is why nothing of a file was written.
type unreadError struct{ err error }

func (e *unreadError) Error() string { return e.err.Error() }
func (e *unreadError) Unwrap() error { return e.err }

// reason is an error without the names that it repeats.
func reason(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	if e, ok := errors.AsType[*os.LinkError](err); ok {
		return e.Err
	}
	return err
}

// Opaque is the record of a directory in a layer of overlayfs that hides what is below it.
const (
	Opaque        = "SCHILY.xattr." + overlayOpaque
	overlayOpaque = "trusted.overlay.opaque"
)

type packer struct {
	w     io.Writer
	o     PackOptions
	tw    *tar.Writer          // to w
	links map[[2]uint64]string // by device and inode: the first name
	buf   []byte
}

const (
	// bufferSize is of pieces of files. They are large, so that buffers around us pass them on as they
	// are.
	bufferSize = 256 << 10
	// maxUnsized is how much is read of a file that says that it is empty, as those of /proc do.
	maxUnsized = 16 << 20
)

// What is left out.
var (
	errOdd     = errors.New("neither file, directory nor link")
	errShorter = errors.New("became shorter while it was read, and is filled up with zeros")
	errUnsized = fmt.Errorf("has no size, and more than %d MiB", maxUnsized>>20)
)

func (p *packer) pack(at, as string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return &unreadError{err}
	}
	target := ""
	switch kind := info.Mode().Type(); {
	case kind == fs.ModeSymlink:
		if target, err = os.Readlink(at); err != nil {
			return &unreadError{err}
		}
	case kind&^fs.ModeDir != 0 && p.o.Left != nil:
		return &unreadError{errOdd}
	case kind == fs.ModeSocket:
		return nil
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
	if h.Typeflag != tar.TypeReg {
		return p.tw.WriteHeader(h)
	}
	st := info.Sys().(*syscall.Stat_t)
	id := [2]uint64{uint64(st.Dev), st.Ino} //nolint:unconvert // of another type elsewhere
	if first, seen := p.links[id]; seen {
		h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		return p.tw.WriteHeader(h)
	}
	// Nonblocking: it may have become a FIFO.
	f, err := os.OpenFile(at, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return &unreadError{err}
	}
	defer f.Close()
	if p.o.Sparse && h.Size-st.Blocks*512 > minHoles {
		err = p.withHoles(f, h)
	} else {
		err = p.content(f, h)
	}
	if err == nil && st.Nlink > 1 {
		p.links[id] = as
	}
	return err
}

// content writes a file. How long a short one is, is what can be read of it: those of /proc and
// /sys say something else.
func (p *packer) content(f io.Reader, h *tar.Header) error {
	if h.Size < bufferSize {
		n, err := io.ReadFull(f, p.buf)
		data := p.buf[:n]
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		case err != nil:
			return &unreadError{err}
		case h.Size == 0:
			rest, err := io.ReadAll(io.LimitReader(f, maxUnsized-bufferSize+1))
			if data = append(slices.Clone(data), rest...); err == nil && len(data) > maxUnsized {
				err = errUnsized
			}
			if err != nil {
				return &unreadError{err}
			}
		default:
			data = data[:h.Size] // it grows
		}
		h.Size = int64(len(data))
		if err := p.tw.WriteHeader(h); err != nil {
			return err
		}
		_, err = p.tw.Write(data)
		return err
	}
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	return p.stream(f, h.Name, h.Size)
}

// stream writes so many bytes of a file, zeros where it has no more.
func (p *packer) stream(f io.Reader, name string, size int64) error {
	from := &source{r: f}
	n, err := io.CopyBuffer(p.tw, io.LimitReader(from, size), p.buf)
	if err != nil && from.err == nil || n == size {
		return err
	}
	if p.o.Left != nil {
		p.o.Left(name, cmp.Or(reason(from.err), errShorter))
	} else if from.err != nil {
		return from.err
	}
	_, err = io.CopyN(p.tw, zeros{}, size-n)
	return err
}

// source keeps the error of reading apart from those of writing.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
