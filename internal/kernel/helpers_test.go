package kernel_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

var le = binary.LittleEndian

// vmlinux returns a 64-bit ELF with one segment that holds calls to one function, which is what the
// x86 filter of xz rewrites. testdata/vmlinux.xz is this, through xz --check=crc32 --x86
// --lzma2=dict=32MiB, and vmlinux.bz2 through bzip2 -9.
func vmlinux() []byte {
	const segment = 120
	b := make([]byte, segment, 16<<10)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 2)  // ET_EXEC
	le.PutUint16(b[18:], 62) // x86-64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[24:], 16<<20) // entry
	le.PutUint64(b[32:], 64)     // program headers
	le.PutUint16(b[52:], 64)
	le.PutUint16(b[54:], 56)
	le.PutUint16(b[56:], 1)
	le.PutUint32(b[64:], 1) // PT_LOAD
	le.PutUint64(b[72:], segment)
	for i := 0; len(b)+16 <= cap(b); i++ {
		b = append(b, 0xe8)
		b = le.AppendUint32(b, uint32(-len(b)-4))
		b = append(b, 0x48, 0x89, 0xc7, 0x90)
		b = le.AppendUint32(b, uint32(i*i))
	}
	le.PutUint64(b[96:], uint64(len(b)-segment))
	le.PutUint64(b[104:], uint64(len(b)-segment))
	return b
}

// compress makes a payload as the Linux build does: the size follows all
// streams but gzip's, which end in it.
func compress(t testing.TB, name string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	var w io.WriteCloser
	switch name {
	case "none":
		b.Write(data)
	case "gzip":
		w = gzip.NewWriter(&b)
	case "zstd":
		z, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		w = z
	case "lz4":
		z := lz4.NewWriter(&b)
		if err := z.Apply(lz4.LegacyOption(true)); err != nil {
			t.Fatal(err)
		}
		w = z
	case "xz", "bzip2": // no encoder is at hand, or none with the filter
		if !bytes.Equal(data, vmlinux()) {
			t.Fatal("only vmlinux() is there compressed with " + name)
		}
		fixture, err := os.ReadFile("testdata/vmlinux." + strings.Replace(name, "bzip2", "bz2", 1))
		if err != nil {
			t.Fatal(err)
		}
		b.Write(fixture)
	}
	if w != nil {
		if err := write(w, data); err != nil {
			t.Fatal(err)
		}
	}
	if name == "gzip" {
		return b.Bytes()
	}
	return le.AppendUint32(b.Bytes(), uint32(len(data)))
}

// write writes all of data and closes w.
func write(w io.WriteCloser, data []byte) error {
	_, err := w.Write(data)
	return errors.Join(err, w.Close())
}

const (
	sects     = 2
	offset    = 700
	payloadAt = (sects+1)*512 + offset
)

// bzImage wraps a payload with the given version string; 100 bytes follow it.
func bzImage(payload []byte, version string) []byte {
	b := make([]byte, payloadAt)
	b[0x1f1] = sects
	le.PutUint16(b[0x1fe:], 0xaa55)
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x020f)
	if version != "" {
		le.PutUint16(b[0x20e:], 0x300-0x200)
		copy(b[0x300:], version)
	}
	le.PutUint16(b[0x236:], 1)
	le.PutUint32(b[0x248:], offset)
	le.PutUint32(b[0x24c:], uint32(len(payload)))
	b = append(b, payload...)
	return append(b, make([]byte, 100)...)
}
