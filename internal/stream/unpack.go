package stream

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"

	"push.rocks/smartvm/internal/hint"
)

// ErrPacking says that a stream is packed in a way that is not known here, or known and too
// demanding.
var ErrPacking = errors.New("cannot be unpacked here")

// maxWindow bounds the memory that a zstd or xz stream makes us take. The zstd program takes as
// much unless it is told more (https://github.com/facebook/zstd/blob/dev/programs/zstd.1.md,
// --memory), and "zstd --long" and "--ultra -22" ask for it.
const maxWindow = 128 << 20

// Unpack copies r to w, unpacked by what it begins with: gzip, zstd, xz, bzip2 or nothing known,
// which stays as it is. Packings that are known but not taken are ErrPacking.
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
	return tooDemanding(err)
}

// Unpacked lets f read what r holds, which is unpacked in a goroutine of its own.
func Unpacked(ctx context.Context, r io.Reader, f func(r io.Reader) error) error {
	p := NewPipe(ctx)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		p.Finish(Unpack(p, r))
	}()
	err := f(p)
	p.Stop(errStopped)
	<-finished
	return err
}

var errStopped = errors.New("nobody reads any more")

func unpacker(b *bufio.Reader) (io.Reader, error) {
	switch packing := Packing(b); packing {
	case "gzip":
		return gzip.NewReader(b)
	case "zstd":
		return zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow))
	case "xz":
		r, err := xz.NewReader(b, maxWindow)
		return r, tooDemanding(err)
	case "bzip2":
		return bzip2.NewReader(b), nil
	case "":
		return b, nil
	default:
		return nil, hint.Add(fmt.Errorf("%s: %w", packing, ErrPacking),
			"unpack it first, or pack it with gzip, zstd, xz or bzip2")
	}
}

// tooDemanding makes it plain that a stream wants more memory than it gets.
func tooDemanding(err error) error {
	switch {
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return hint.Add(fmt.Errorf("zstd: its window is larger than %d MiB: %w", maxWindow>>20, ErrPacking),
			"unpack it with zstd -d --long=31 first, or pack it with zstd --long=27")
	case errors.Is(err, xz.ErrMemlimit):
		return hint.Add(fmt.Errorf("xz: its dictionary is larger than %d MiB: %w", maxWindow>>20, ErrPacking),
			"unpack it with xz -d first")
	}
	return err
}

// packings are what streams begin with. Skippable frames are what pzstd writes first.
var packings = []struct{ name, magic string }{
	{"gzip", "\x1f\x8b"},
	{"zstd", "\x28\xb5\x2f\xfd"},
	{"xz", "\xfd7zXZ\x00"},
	{"bzip2", "BZh"},
	{"compress", "\x1f\x9d"},
	{"lz4", "\x04\x22\x4d\x18"},
	{"lzip", "LZIP"},
	{"lzop", "\x89LZO"},
	{"zip", "PK\x03\x04"},
	{"7z", "7z\xbc\xaf"},
	{"qcow2", "QFI\xfb"},
}

// Packing names what a stream is packed with, "gzip", "zstd", "xz" or "bzip2", or what Unpack does
// not take; "" is plain. It takes nothing off the stream.
func Packing(b *bufio.Reader) string {
	head, _ := b.Peek(262) // shorter ones are no tars
	if bytes.HasSuffix(head, []byte("ustar")) {
		return "" // its first file's name is whatever it is
	}
	for _, p := range packings {
		if bytes.HasPrefix(head, []byte(p.magic)) {
			return p.name
		}
	}
	if len(head) > 3 && head[0]&0xf0 == 0x50 && string(head[1:4]) == "\x2a\x4d\x18" {
		return "zstd"
	}
	return ""
}
