package volume

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// magics of file systems, by their place.
var magics = []struct {
	kind   string
	offset int
	magic  string
}{
	{"squashfs", 0, "hsqs"},
	{"xfs", 0, "XFSB"},
	{"ext4", superblock + 0x38, "\x53\xef"}, // ext2 and ext3 too, which ext4 mounts
	{"erofs", superblock, "\xe2\xe1\xf5\xe0"},
	{"btrfs", 65536 + 0x40, "_BHRfS_M"},
}

// superblock is where an ext4 or erofs has it, in bytes. What is before it is free for anything.
const superblock = 1024

// Detect says which file system a file holds: "ext4" (or ext2, ext3), "xfs", "btrfs", "squashfs",
// "erofs", or "" for anything else, which a tar archive is and what is compressed. Where the file
// is shorter than the file system says it is, that is ErrFormat.
func Detect(path string) (string, error) {
	kind, _, err := detect(path)
	return kind, err
}

// NeedsRecovery says whether the file at path holds an ext4 that was in use when it was copied, or
// was not unmounted: what its journal has is yet to be written, which e2fsck does.
func NeedsRecovery(path string) (bool, error) {
	kind, head, err := detect(path)
	return kind == "ext4" && binary.LittleEndian.Uint32(head[superblock+0x60:])&featureRecover != 0, err
}

// detect is Detect. It returns the beginning of the file as well.
func detect(path string) (kind string, head []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", nil, err
	}
	head = make([]byte, 65536+0x48)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", nil, fmt.Errorf("read %s: %w", path, err)
	}
	head = head[:n]
	if isArchive(head) {
		return "", head, nil
	}
	for _, m := range magics {
		if len(head) < m.offset+len(m.magic) || string(head[m.offset:m.offset+len(m.magic)]) != m.magic || m.kind == "ext4" &&
			!isExt4(head) {
			continue
		}
		if want := length(m.kind, head); want > uint64(fi.Size()) {
			return "", head,
				fmt.Errorf("%s: %w: it is cut off: %s of %d bytes in a file of %d", path, ErrFormat, m.kind, want, fi.Size())
		}
		return m.kind, head, nil
	}
	return "", head, nil
}

// isArchive says whether a file begins as a tar archive does, or a compressed one: such is no file
// system, whatever it has further on.
func isArchive(head []byte) bool {
	for _, magic := range []string{"\x1f\x8b\x08", "\x28\xb5\x2f\xfd", "\xfd7zXZ\x00", "BZh"} { // gzip, zstd, xz, bzip2
		if bytes.HasPrefix(head, []byte(magic)) {
			return true
		}
	}
	// a frame that zstd skips
	skippable := len(head) > 0 && head[0]&0xf0 == 0x50 && bytes.HasPrefix(head[1:], []byte("\x2a\x4d\x18"))
	return skippable || isTar(head)
}

// The place of a tar header's checksum: the sum of its bytes, in octal, for which the checksum
// itself counts as blanks.
const (
	tarHeader   = 512
	tarSum      = 148
	tarSumBytes = 8
)

func isTar(head []byte) bool {
	if len(head) < tarHeader {
		return false
	}
	want, err := strconv.ParseInt(strings.Trim(string(head[tarSum:tarSum+tarSumBytes]), " \x00"), 8, 64)
	if err != nil || want == 0 {
		return false
	}
	var unsigned, signed int64 // as old tars have it
	for i, b := range head[:tarHeader] {
		if i >= tarSum && i < tarSum+tarSumBytes {
			b = ' '
		}
		unsigned, signed = unsigned+int64(b), signed+int64(int8(b))
	}
	return want == unsigned || want == signed
}

// Bits of an ext4's features that not all may know who mount it.
const (
	featureRecover = 0x4
	feature64Bit   = 0x80
	featuresKnown  = 0x3f7df
)

// isExt4 says whether the superblock makes sense, besides its two bytes of magic, which any data
// may have.
func isExt4(head []byte) bool {
	if len(head) < 2*superblock {
		return false
	}
	le, sb := binary.LittleEndian, head[superblock:]
	shift, features, perGroup := le.Uint32(sb[0x18:]), le.Uint32(sb[0x60:]), le.Uint32(sb[0x20:])
	return le.Uint32(sb[0x4c:]) <= 1 && // s_rev_level
		features&^featuresKnown == 0 &&
		shift <= 6 && // no block is larger than 64 KiB
		le.Uint32(sb[0x14:]) <= 1 && // s_first_data_block
		le.Uint32(sb) > 0 && le.Uint32(sb[0x4:]) > 0 && // inodes, blocks
		perGroup > 0 && perGroup <= 8<<(10+shift) // a group's bitmap is a block
}

// length is a file system's in bytes, by its superblock; 0 if that does not tell.
func length(kind string, head []byte) uint64 {
	le := binary.LittleEndian
	switch {
	case kind == "squashfs" && len(head) >= 48:
		return le.Uint64(head[40:])
	case kind == "ext4":
		blocks := uint64(le.Uint32(head[superblock+0x4:]))
		if le.Uint32(head[superblock+0x60:])&feature64Bit != 0 {
			blocks |= uint64(le.Uint32(head[superblock+0x150:])) << 32
		}
		if blocks > MaxSize>>10 {
			return 1 << 63 // nonsense
		}
		return blocks << (10 + le.Uint32(head[superblock+0x18:]))
	case kind == "erofs" && len(head) >= superblock+128:
		shift := head[superblock+12]
		if shift > 16 {
			return 1 << 63
		}
		return uint64(le.Uint32(head[superblock+36:])) << shift
	}
	return 0
}
