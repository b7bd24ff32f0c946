package flatten

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"
)

// maxWindow bounds the memory that a zstd or xz stream makes us take.
const maxWindow = 64 << 20

// Unpack copies r to w, unpacked by what it begins with: gzip, zstd, xz or nothing known, which stays as it is.
func Unpack(w io.Writer, r io.Reader) error {
	b := bufio.NewReaderSize(r, 128<<10)
	u, err := unpacker(b)
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	if z, ok := u.(*zstd.Decoder); ok {
		defer z.Close()
	}
	_, err = io.Copy(w, u)
	return err
}

func unpacker(b *bufio.Reader) (io.Reader, error) {
	switch Packing(b) {
	case "gzip":
		return gzip.NewReader(b)
	case "zstd":
		return zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	case "xz":
		return xz.NewReader(b, maxWindow)
	}
	return b, nil
}

// Packing names what a stream is packed with, "gzip", "zstd" or "xz"; "" is plain. It takes nothing off the stream.
func Packing(b *bufio.Reader) string {
	head, _ := b.Peek(6) // shorter ones are plain
	for name, magic := range map[string]string{"gzip": "\x1f\x8b", "zstd": "\x28\xb5\x2f\xfd", "xz": "\xfd7zXZ\x00"} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return name
		}
	}
	return ""
}
