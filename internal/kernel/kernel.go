// Package kernel makes what Firecracker boots out of what distributions ship:
// an uncompressed kernel from a bzImage, an EFI image or a compressed file
// ([Extract]), and an initramfs that carries files and the modules a
// distribution kernel needs ([Archive]).
//
// Images and module trees are foreign bytes: every size is bounded, and
// damaged input gives an error that matches [ErrCorrupt].
package kernel

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// MaxSize is the largest kernel, compressed or not, and the largest file in an
// initramfs, in bytes.
const MaxSize = 1 << 30

var (
	// ErrFormat says that a file is no kernel image that Firecracker boots or
	// Extract can turn into one.
	ErrFormat = errors.New(
		"not a 64-bit x86 ELF vmlinux, a bzImage or an arm64 Image, nor one of them compressed or in an EFI image")
	// ErrCorrupt says that a file begins as it should and contradicts itself later.
	ErrCorrupt = errors.New("corrupt data")
	// ErrTooLarge says that a file exceeds a limit of this package.
	ErrTooLarge = errors.New("too large")
)

// CompressionError says that a kernel is compressed in a way that Extract does
// not undo.
type CompressionError struct {
	Name string // as Linux spells it: "lzma", "lzo" or "unknown"
}

func (e *CompressionError) Error() string {
	return fmt.Sprintf("unsupported kernel compression %s (supported: gzip, xz, zstd, lz4, bzip2, none)", e.Name)
}

// Format is a kind of kernel image.
type Format int

const (
	// ELF is an uncompressed x86-64 vmlinux. Firecracker boots it.
	ELF Format = iota + 1
	// BzImage is a compressed x86-64 kernel with a real mode header. It needs
	// Extract: Firecracker up to 1.16 does not boot it.
	BzImage
	// Image is an uncompressed arm64 kernel. Firecracker boots it.
	Image
)

// String returns the file's usual name: "vmlinux", "bzImage" or "Image".
func (f Format) String() string {
	switch f {
	case ELF:
		return "vmlinux"
	case BzImage:
		return "bzImage"
	case Image:
		return "Image"
	default:
		return fmt.Sprintf("Format(%d)", int(f))
	}
}

// Info is what a kernel image says about itself.
type Info struct {
	Format      Format
	Arch        string // "amd64" or "arm64"
	Compression string // "none", "gzip", "xz", "zstd", "lz4" or "bzip2"
	// Packed says that the kernel is only within the file: it needs Extract.
	Packed bool
	// Release is as uname -r prints it, or empty: before Extract it is known of a
	// bzImage alone, and a kernel that is not Linux has none.
	Release string
	// Size is how many bytes Extract writes; 0: that shows when it does.
	Size int64
}

// located is an image and where in it the kernel is.
type located struct {
	Info
	offset, length int64
	open           bool // Size shows when it is unpacked
}

// Check detects the kernel image in a file as [Detect] does. Besides its
// errors there are those of opening the file; anything but a regular file is
// fs.ErrInvalid.
func Check(path string) (Info, error) {
	f, size, err := openRegular(path)
	if err != nil {
		return Info{}, fmt.Errorf("check kernel: %w", err)
	}
	defer f.Close()
	info, err := Detect(f, size)
	if err != nil {
		return Info{}, fmt.Errorf("check kernel %q: %w", path, err)
	}
	return info, nil
}

// Detect says which kind of kernel image the size bytes of r are. It reads and
// unpacks little, wherever the headers lead, so it cannot vouch for all of the
// kernel. Errors match ErrFormat, ErrCorrupt, ErrTooLarge or
// *CompressionError, or are those of r.
func Detect(r io.ReaderAt, size int64) (Info, error) {
	l, err := locate(r, size)
	if err != nil {
		return Info{}, err
	}
	return l.Info, nil
}

func locate(r io.ReaderAt, size int64) (located, error) {
	head, err := readHead(r, size)
	switch {
	case err != nil:
		return located{}, err
	case isPE(head) && !isBzImage(head) && !isImage(head) && !isZboot(head): // which can be booted by EFI too
		return locateLinuxSection(head, r, size)
	default:
		return locateDirect(head, r, size)
	}
}

func readHead(r io.ReaderAt, size int64) ([]byte, error) {
	if size > MaxSize {
		return nil, fmt.Errorf("kernel image of %d bytes (at most %d): %w", size, MaxSize, ErrTooLarge)
	}
	head := make([]byte, setupHeaderEnd)
	n, err := r.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return nil, fmt.Errorf("read kernel image: %w", err)
	}
	return head[:n], nil
}

// locateDirect finds the kernel in the size bytes of r, which begin with head,
// unless something else that can be booted is around it.
func locateDirect(head []byte, r io.ReaderAt, size int64) (located, error) {
	whole := located{Info: Info{Compression: "none", Size: size}, length: size}
	switch {
	case isBzImage(head):
		return locatePayload(head, r, size)
	case isZboot(head):
		return locateZboot(head, r, size)
	case bytes.HasPrefix(head, []byte(elf.ELFMAG)) || isImage(head):
		err := whole.identify(r, head)
		return whole, err
	}
	compression, err := sniff(head)
	if unknown, ok := errors.AsType[*CompressionError](err); ok && unknown.Name == "unknown" {
		return located{}, ErrFormat
	}
	if err != nil {
		return located{}, err
	}
	return locateStream(compression, io.NewSectionReader(r, 0, size), size)
}

// readAt fills p from offset off on; a shorter file is ErrCorrupt.
func readAt(r io.ReaderAt, p []byte, off int64) error {
	switch n, err := r.ReadAt(p, off); {
	case n == len(p):
		return nil
	case err == io.EOF:
		return fmt.Errorf("kernel image cut short: %w", ErrCorrupt)
	default:
		return fmt.Errorf("read kernel image: %w", err)
	}
}

// isImage knows an arm64 Image by its magic number: Linux
// Documentation/arch/arm64/booting.rst.
func isImage(head []byte) bool {
	return len(head) >= 64 && string(head[56:60]) == "ARM\x64"
}

// headSize bounds how far into a payload its ELF program headers may be;
// Linux has them right behind the ELF header.
const headSize = 64 << 10

// Extract writes the uncompressed kernel in the size bytes of src to dst: what
// Detect finds in it, which must be a sound ELF or an arm64 Image, or the file as
// it is. Errors are those of Detect, of src, of dst and of ctx; after any of them
// what dst got is of no use.
func Extract(ctx context.Context, dst io.Writer, src io.ReaderAt, size int64) (Info, error) {
	l, err := locate(src, size)
	if err != nil {
		return Info{}, err
	}
	in := &source{r: io.NewSectionReader(src, l.offset, l.length)}
	payload, err := decompress(l.Compression, in)
	if err != nil {
		return Info{}, in.blame(err)
	}
	defer payload.Close()
	r := bufio.NewReaderSize(payload, headSize)
	head, err := r.Peek(headSize)
	if err != nil && err != io.EOF {
		return Info{}, in.blame(err)
	}
	head = bytes.Clone(head)
	if l.Packed {
		if err := l.identify(bytes.NewReader(head), head); err != nil {
			return Info{}, fmt.Errorf("payload of %s: %w", l.Format, err)
		}
	}
	var linux bannerFinder
	written, err := l.copy(ctx, dst, r, &linux)
	switch {
	case err == nil:
	case errors.As(err, new(*payloadError)):
		return Info{}, in.blame(err)
	default:
		return Info{}, err
	}
	if l.open {
		// Only now it is known whether its segments lie within it.
		l.Size, l.open = written, false
		if err := l.identify(bytes.NewReader(head), head); err != nil {
			return Info{}, fmt.Errorf("payload of %s: %w", l.Format, err)
		}
	}
	l.Release = cmp.Or(l.Release, linux.release)
	return l.Info, nil
}

// payloadError is one of what is decompressed, or of its source.
type payloadError struct{ error }

func (e *payloadError) Unwrap() error { return e.error }

// copy copies all of r: Size bytes, or as many as there are.
func (l *located) copy(ctx context.Context, dst io.Writer, r io.Reader, linux *bannerFinder) (done int64, err error) {
	buf := make([]byte, 1<<20)
	for {
		if err := ctx.Err(); err != nil {
			return done, fmt.Errorf("extract kernel: %w", err)
		}
		n, err := r.Read(buf)
		if n > 0 && int64(n) > l.atMost()-done {
			if l.open {
				return done, fmt.Errorf("kernel of more than %d bytes: %w", MaxSize, ErrTooLarge)
			}
			return done, &payloadError{errors.New("longer than it says")}
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return done, fmt.Errorf("write kernel: %w", err)
		}
		linux.look(buf[:n])
		done += int64(n)
		// Reading the end has made decompressors verify their checksums.
		if err == io.EOF && (l.open || done == l.Size) {
			return done, nil
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return done, &payloadError{err}
		}
	}
}

// source remembers whether reading failed, which a decompressor's error does
// not tell from damaged data.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// blame attributes a decompressor's error to the source or to its data.
func (s *source) blame(err error) error {
	if s.err != nil {
		return fmt.Errorf("read kernel image: %w", s.err)
	}
	return fmt.Errorf("decompress kernel: %w: %w", ErrCorrupt, err)
}

// readFile reads a regular file of at most limit bytes.
func readFile(tree fs.FS, name string, limit int64) ([]byte, error) {
	// Opening a FIFO would block, so look first.
	st, err := fs.Stat(tree, name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("read %q: %w: not a regular file", name, ErrCorrupt)
	}
	f, err := tree.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := readAtMost(f, limit)
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", name, err)
	}
	return data, nil
}

// readAtMost reads all of r, and refuses more than limit bytes.
func readAtMost(r io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("more than %d bytes: %w", limit, ErrTooLarge)
	}
	return data, nil
}
