package kernel

import (
	"encoding/binary"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// Offsets in a bzImage: Linux Documentation/arch/x86/boot.rst.
const (
	setupSectsAt    = 0x1f1 // u8: sectors of real mode code after the first; 0 means 4
	bootFlagAt      = 0x1fe // u16: 0xaa55
	headerMagicAt   = 0x202 // "HdrS"
	protocolAt      = 0x206 // u16: boot protocol, major and minor
	versionStringAt = 0x20e // u16: offset of a C string, less 0x200; 0 means none
	xloadflagsAt    = 0x236 // u16, protocol 2.12: bit 0 says 64-bit
	payloadOffsetAt = 0x248 // u32: from the end of the real mode code
	payloadLengthAt = 0x24c // u32
	setupHeaderEnd  = 0x250

	sector           = 512
	protocolPayload  = 0x0208 // first with the payload's place
	protocolXload    = 0x020c // first with xloadflags
	maxVersionString = 256
)

// releasePattern is what uname -r can be; the file is not trusted with more.
var releasePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]*$`)

// maxRelease is what the kernel has room for, in bytes. A bound in the pattern would cost every
// process memory.
const maxRelease = 64

func validRelease(s string) bool { return len(s) <= maxRelease && releasePattern.MatchString(s) }

func isBzImage(head []byte) bool {
	return len(head) == setupHeaderEnd &&
		binary.LittleEndian.Uint16(head[bootFlagAt:]) == 0xaa55 &&
		string(head[headerMagicAt:headerMagicAt+4]) == "HdrS"
}

// locatePayload reads a setup header. The compressed kernel lies within the
// protected mode code; its last four bytes are the uncompressed size. Those
// belong to a gzip stream and are appended to the others.
func locatePayload(head []byte, r io.ReaderAt, size int64) (located, error) {
	u16 := func(at int) int64 { return int64(binary.LittleEndian.Uint16(head[at:])) }
	u32 := func(at int) int64 { return int64(binary.LittleEndian.Uint32(head[at:])) }
	protocol := u16(protocolAt)
	if protocol < protocolPayload {
		return located{}, fmt.Errorf("%w: boot protocol %d.%02d is older than 2.08", ErrFormat, protocol>>8, protocol&0xff)
	}
	if protocol >= protocolXload && u16(xloadflagsAt)&1 == 0 {
		return located{}, fmt.Errorf("%w: the bzImage is 32-bit", ErrFormat)
	}
	sects := int64(head[setupSectsAt])
	if sects == 0 {
		sects = 4
	}
	setup := (sects + 1) * sector
	l := located{
		Info:   Info{Format: BzImage, Arch: "amd64", Packed: true},
		offset: setup + u32(payloadOffsetAt),
		length: u32(payloadLengthAt),
	}
	if l.length < 8 || l.offset+l.length > size {
		return located{}, fmt.Errorf("bzImage of %d bytes with its payload at %d to %d: %w",
			size, l.offset, l.offset+l.length, ErrCorrupt)
	}
	var magic [8]byte
	var last [4]byte
	if err := readAt(r, magic[:], l.offset); err != nil {
		return located{}, err
	}
	if err := readAt(r, last[:], l.offset+l.length-4); err != nil {
		return located{}, err
	}
	var err error
	if l.Compression, err = sniff(magic[:]); err != nil {
		return located{}, err
	}
	l.Size = int64(binary.LittleEndian.Uint32(last[:]))
	if l.Compression != "gzip" {
		l.length -= 4
	}
	if l.Size > MaxSize {
		return located{}, fmt.Errorf("kernel of %d bytes (at most %d): %w", l.Size, MaxSize, ErrTooLarge)
	}
	if at := u16(versionStringAt); at > 0 && at+sector < setup {
		l.Release = release(r, at+sector)
	}
	return l, nil
}

// release returns the first word of the version string at off, or "" if it is
// no kernel release: it is only information.
func release(r io.ReaderAt, off int64) string {
	buf := make([]byte, maxVersionString)
	n, _ := r.ReadAt(buf, off)
	text, _, _ := strings.Cut(string(buf[:n]), "\x00")
	word, _, _ := strings.Cut(text, " ")
	if !validRelease(word) {
		return ""
	}
	return word
}
