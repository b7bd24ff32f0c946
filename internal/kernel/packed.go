package kernel

import (
	"bufio"
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
)

const (
	// zbootOffsetAt and zbootLengthAt say where an EFI zboot image has its payload, both u32: Linux
	// drivers/firmware/efi/libstub/zboot-header.S. The length leaves out the size behind the streams
	// that do not end in it.
	zbootOffsetAt = 8
	zbootLengthAt = 12

	// A PE file: https://learn.microsoft.com/windows/win32/debug/pe-format.
	peHeaderAt       = 0x3c // u32
	peHeaderSize     = 24
	peSectionSize    = 40
	maxPESections    = 96 // what Windows allows
	linuxSectionName = ".linux\x00\x00"
)

func isZboot(head []byte) bool {
	return len(head) >= zbootLengthAt+4 && string(head[:2]) == "MZ" && string(head[4:8]) == "zimg"
}

func isPE(head []byte) bool { return len(head) >= peHeaderAt+4 && string(head[:2]) == "MZ" }

// locateZboot finds what an EFI zboot image unpacks, which is how arm64 distributions ship an
// Image.
func locateZboot(head []byte, r io.ReaderAt, size int64) (located, error) {
	offset := int64(binary.LittleEndian.Uint32(head[zbootOffsetAt:]))
	length := int64(binary.LittleEndian.Uint32(head[zbootLengthAt:]))
	if length == 0 || offset+length > size {
		return located{},
			fmt.Errorf("EFI zboot image of %d bytes with its payload at %d to %d: %w", size, offset, offset+length, ErrCorrupt)
	}
	magic := make([]byte, min(length, 8))
	if err := readAt(r, magic, offset); err != nil {
		return located{}, err
	}
	compression, err := sniff(magic)
	if err != nil {
		return located{}, fmt.Errorf("payload of EFI zboot image: %w", err)
	}
	l, err := locateStream(compression, io.NewSectionReader(r, offset, length), length)
	l.offset = offset
	if err != nil {
		return located{}, fmt.Errorf("payload of EFI zboot image: %w", err)
	}
	return l, nil
}

// locateLinuxSection finds the kernel in a unified kernel image: in the PE section of its name, a
// bzImage or whatever else is a kernel by itself
// (https://uapi-group.org/specifications/specs/unified_kernel_image/).
func locateLinuxSection(head []byte, r io.ReaderAt, size int64) (located, error) {
	at := int64(binary.LittleEndian.Uint32(head[peHeaderAt:]))
	pe := make([]byte, peHeaderSize)
	if at+peHeaderSize > size {
		return located{}, ErrFormat // a DOS program begins in the same way
	}
	if err := readAt(r, pe, at); err != nil {
		return located{}, err
	}
	if string(pe[:4]) != "PE\x00\x00" {
		return located{}, ErrFormat
	}
	count := int64(binary.LittleEndian.Uint16(pe[6:]))
	table := at + peHeaderSize + int64(binary.LittleEndian.Uint16(pe[20:]))
	if count > maxPESections || table+count*peSectionSize > size {
		return located{}, fmt.Errorf("EFI image of %d bytes with %d sections at %d: %w", size, count, table, ErrCorrupt)
	}
	sections := make([]byte, count*peSectionSize)
	if err := readAt(r, sections, table); err != nil {
		return located{}, err
	}
	for s := sections; len(s) > 0; s = s[peSectionSize:] {
		if string(s[:8]) != linuxSectionName {
			continue
		}
		u32 := func(at int) int64 { return int64(binary.LittleEndian.Uint32(s[at:])) }
		// In the file a section is padded; its size in memory is what it holds.
		offset, length := u32(20), min(u32(8), u32(16))
		if offset+length > size {
			return located{},
				fmt.Errorf("EFI image of %d bytes with its kernel at %d to %d: %w", size, offset, offset+length, ErrCorrupt)
		}
		kernel := io.NewSectionReader(r, offset, length)
		head, err := readHead(kernel, length)
		if err != nil {
			return located{}, err
		}
		l, err := locateDirect(head, kernel, length)
		if err != nil {
			return located{}, fmt.Errorf("kernel in EFI image: %w", err)
		}
		l.offset, l.Packed = l.offset+offset, true
		return l, nil
	}
	return located{}, fmt.Errorf("%w: an EFI image without a kernel in it", ErrFormat)
}

// locateStream looks at the beginning of what all of r unpacks to: a vmlinux or an Image.
func locateStream(compression string, r io.Reader, length int64) (located, error) {
	l := located{Info: Info{Compression: compression, Packed: true}, length: length, open: true}
	in := &source{r: r}
	payload, err := decompress(compression, in)
	if err != nil {
		return located{}, in.blame(err)
	}
	defer payload.Close()
	head, err := bufio.NewReaderSize(payload, headSize).Peek(headSize)
	if err != nil && err != io.EOF {
		return located{}, in.blame(err)
	}
	return l, l.identify(bytes.NewReader(head), head)
}

// identify tells from r, of which head is the beginning, which kernel is there uncompressed, and
// checks that. In a bzImage it is always a vmlinux.
func (l *located) identify(r io.ReaderAt, head []byte) error {
	switch {
	case len(head) == 0:
		return fmt.Errorf("nothing in it: %w", ErrCorrupt)
	case bytes.HasPrefix(head, []byte(elf.ELFMAG)):
		l.Format, l.Arch = cmp.Or(l.Format, ELF), "amd64"
		return checkELF(r, l.atMost())
	case isImage(head) && l.Format != BzImage:
		l.Format, l.Arch = Image, "arm64"
		return nil
	default:
		return ErrFormat
	}
}

// atMost is the largest size that the kernel can have.
func (l *located) atMost() int64 {
	if l.open {
		return MaxSize
	}
	return l.Size
}

// banner begins what a kernel says of itself when it boots; its release follows, and then " (".
const banner = "Linux version "

// bannerFinder looks for the release in a kernel that passes by.
type bannerFinder struct {
	release string
	tail    []byte // of what has passed, as long as a banner
}

func (f *bannerFinder) look(p []byte) {
	if f.release != "" {
		return
	}
	const longest = len(banner) + maxRelease + len(" (")
	data := append(f.tail, p...)
	for rest := data; ; {
		i := bytes.Index(rest, []byte(banner))
		if i < 0 {
			break
		}
		rest = rest[i+len(banner):]
		word, _, ok := bytes.Cut(rest[:min(len(rest), maxRelease+len(" ("))], []byte(" ("))
		if ok && validRelease(string(word)) {
			f.release = string(word)
			return
		}
	}
	f.tail = bytes.Clone(data[max(0, len(data)-longest):])
}
