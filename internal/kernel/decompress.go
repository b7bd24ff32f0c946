package kernel

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/therootcompany/xz"
)

// maxWindow is the most history a stream may ask the decompressor to keep:
// Linux uses 128 MiB with zstd, and up to that with xz.
const maxWindow = 128 << 20

// sniff names the compression that data is in by its first bytes, as Linux
// lib/decompress.c does.
func sniff(data []byte) (string, error) {
	for _, c := range []struct {
		magic, name string
		supported   bool
	}{
		{elf.ELFMAG, "none", true},
		{"\x1f\x8b", "gzip", true},
		{"\xfd7zXZ\x00", "xz", true},
		{"\x28\xb5\x2f\xfd", "zstd", true},
		{lz4LegacyMagic, "lz4", true},
		{"BZh", "bzip2", true},
		{"\x5d\x00\x00", "lzma", false},
		{"\x89LZO", "lzo", false},
	} {
		if bytes.HasPrefix(data, []byte(c.magic)) {
			if !c.supported {
				return "", &CompressionError{Name: c.name}
			}
			return c.name, nil
		}
	}
	return "", &CompressionError{Name: "unknown"}
}

// decompress reads data in a compression that sniff named. The caller closes
// the reader, which leaves r alone.
func decompress(compression string, r io.Reader) (io.ReadCloser, error) {
	switch compression {
	case "none":
		return io.NopCloser(r), nil
	case "gzip":
		return gzip.NewReader(r)
	case "bzip2":
		return io.NopCloser(bzip2.NewReader(r)), nil
	case "xz":
		z, err := xz.NewReader(r, maxWindow)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(z), nil
	case "zstd":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(MaxSize))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case "lz4":
		return io.NopCloser(&lz4Legacy{r: bufio.NewReader(r)}), nil
	default:
		return nil, &CompressionError{Name: compression}
	}
}

// lz4LegacyMagic begins a legacy frame; blocks follow, each with its length as
// a little-endian u32 before it, until the input ends or another frame begins.
const (
	lz4LegacyMagic = "\x02\x21\x4c\x18"
	lz4BlockSize   = 8 << 20 // uncompressed, all but the last
)

// lz4Legacy decompresses legacy frames. The frame reader of pierrec/lz4 knows
// them too, but recurses for each magic number it meets, so that enough of
// them exhaust the stack.
type lz4Legacy struct {
	r     io.Reader
	block []byte // one block, uncompressed
	rest  []byte // what of block is unread
	in    []byte // one block, compressed
}

func (z *lz4Legacy) Read(p []byte) (int, error) {
	for len(z.rest) == 0 {
		if err := z.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, z.rest)
	z.rest = z.rest[n:]
	return n, nil
}

// next reads a block, or nothing where a frame begins. It returns io.EOF at
// the end of the input.
func (z *lz4Legacy) next() error {
	var word [4]byte
	if _, err := io.ReadFull(z.r, word[:]); err != nil {
		return err
	}
	if string(word[:]) == lz4LegacyMagic {
		return nil
	}
	if z.block == nil {
		z.block = make([]byte, lz4BlockSize)
		z.in = make([]byte, lz4.CompressBlockBound(lz4BlockSize))
	}
	size := binary.LittleEndian.Uint32(word[:])
	if int64(size) > int64(len(z.in)) {
		return errors.New("lz4: block size out of range")
	}
	if _, err := io.ReadFull(z.r, z.in[:size]); err != nil {
		return io.ErrUnexpectedEOF
	}
	n, err := lz4.UncompressBlock(z.in[:size], z.block)
	if err != nil {
		return err
	}
	z.rest = z.block[:n]
	return nil
}
