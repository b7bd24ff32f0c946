// Package kernel makes what Firecracker boots out of what distributions ship:
// an uncompressed kernel from a bzImage ([Extract]), and an initramfs that
// carries files and the modules a distribution kernel needs ([Archive]).
//
// Images and module trees are foreign bytes: every size is bounded, and
// damaged input gives an error that matches [ErrCorrupt].
package kernel

import (
	"bufio"
	"bytes"
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
	ErrFormat = errors.New("not a 64-bit x86 ELF vmlinux, a bzImage or an arm64 Image")
	// ErrCorrupt says that a file begins as it should and contradicts itself later.
	ErrCorrupt = errors.New("corrupt data")
	// ErrTooLarge says that a file exceeds a limit of this package.
	ErrTooLarge = errors.New("too large")
)

// CompressionError says that a kernel is compressed in a way that Extract does
// not undo.
type CompressionError struct {
	Name string // as Linux spells it: "bzip2", "lzma", "lzo" or "unknown"
}

func (e *CompressionError) Error() string {
	return fmt.Sprintf("unsupported kernel compression %s (supported: gzip, xz, zstd, lz4, none)", e.Name)
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
	Compression string // "none", "gzip", "xz", "zstd" or "lz4"
	Release     string // as uname -r prints it; empty unless a bzImage says so
	Size        int64  // bytes Extract writes
}

// located is an image and where in it the kernel is.
type located struct {
	Info
	offset, length int64
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

// Detect says which kind of kernel image the size bytes of r are. It reads a
// few KiB wherever the headers lead, so it cannot vouch for a bzImage's
// payload. Errors match ErrFormat, ErrCorrupt, ErrTooLarge or
// *CompressionError, or are those of r.
func Detect(r io.ReaderAt, size int64) (Info, error) {
	l, err := locate(r, size)
	if err != nil {
		return Info{}, err
	}
	return l.Info, nil
}

func locate(r io.ReaderAt, size int64) (located, error) {
	if size > MaxSize {
		return located{}, fmt.Errorf("kernel image of %d bytes (at most %d): %w", size, MaxSize, ErrTooLarge)
	}
	head := make([]byte, setupHeaderEnd)
	n, err := r.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return located{}, fmt.Errorf("read kernel image: %w", err)
	}
	head = head[:n]
	whole := located{Info: Info{Compression: "none", Size: size}, length: size}
	switch {
	case isBzImage(head):
		return locatePayload(head, r, size)
	case bytes.HasPrefix(head, []byte(elf.ELFMAG)):
		whole.Format, whole.Arch = ELF, "amd64"
		return whole, checkELF(r, size)
	case isImage(head):
		whole.Format, whole.Arch = Image, "arm64"
		return whole, nil
	default:
		return located{}, ErrFormat
	}
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

// Extract writes the uncompressed kernel in the size bytes of src to dst: the
// payload of a bzImage, which must be a sound ELF, and anything else that
// Detect accepts as it is. Errors are those of Detect, of src, of dst and of
// ctx; after any of them what dst got is of no use.
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
	if l.Format == BzImage {
		head, err := r.Peek(headSize)
		if err != nil && err != io.EOF {
			return Info{}, in.blame(err)
		}
		if err := checkELF(bytes.NewReader(head), l.Size); err != nil {
			return Info{}, fmt.Errorf("payload of bzImage: %w", err)
		}
	}
	if err := copyExactly(ctx, dst, r, l.Size, in); err != nil {
		return Info{}, err
	}
	return l.Info, nil
}

// copyExactly copies n bytes, after which r must end.
func copyExactly(ctx context.Context, dst io.Writer, r io.Reader, n int64, in *source) error {
	buf := make([]byte, min(n, 1<<20))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("extract kernel: %w", err)
		}
		chunk := buf[:min(n, int64(len(buf)))]
		if _, err := io.ReadFull(r, chunk); err != nil {
			return in.blame(err)
		}
		if _, err := dst.Write(chunk); err != nil {
			return fmt.Errorf("write kernel: %w", err)
		}
		n -= int64(len(chunk))
	}
	// Reading the end makes decompressors verify their checksums.
	var b [1]byte
	switch _, err := io.ReadFull(r, b[:]); err {
	case io.EOF:
		return nil
	case nil:
		return in.blame(errors.New("longer than it says"))
	default:
		return in.blame(err)
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
