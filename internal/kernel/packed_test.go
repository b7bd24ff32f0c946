package kernel_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"push.rocks/smartvm/internal/kernel"
)

// arm64Image is what an arm64 kernel looks like, and says of itself.
func arm64Image() []byte {
	b := make([]byte, 9000)
	copy(b, "MZ@\xfa")
	copy(b[56:], "ARM\x64")
	copy(b[5000:], "Linux version 6.8.0-31-generic (buildd@bos03-arm64-054) (aarch64-linux-gnu-gcc-13")
	return b
}

// stream is data compressed, without the size that the Linux build puts behind it.
func stream(t testing.TB, name string, data []byte) []byte {
	b := compress(t, name, data)
	if name != "gzip" {
		b = b[:len(b)-4]
	}
	return b
}

// zboot wraps a payload as drivers/firmware/efi/libstub/zboot-header.S does.
func zboot(t testing.TB, name string, data []byte) []byte {
	payload := compress(t, name, data)
	b := make([]byte, 4096)
	copy(b, "MZ\x00\x00zimg")
	le.PutUint32(b[8:], 4096)
	le.PutUint32(b[12:], uint32(len(stream(t, name, data))))
	copy(b[24:], name)
	le.PutUint32(b[56:], 0x818223cd)
	le.PutUint32(b[60:], 64)
	return append(append(b, payload...), make([]byte, 500)...)
}

type section struct {
	name    string
	content []byte
}

// pe is an EFI image as ukify makes one: a stub with sections.
func pe(sections ...section) []byte {
	const header, optional, align = 0x80, 0xf0, 512
	b := make([]byte, 2048)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], header)
	copy(b[header:], "PE\x00\x00\x64\x86")
	le.PutUint16(b[header+6:], uint16(len(sections)))
	le.PutUint16(b[header+20:], optional)
	for i, s := range sections {
		h := b[header+24+optional+40*i:]
		copy(h[:8], s.name)
		le.PutUint32(h[8:], uint32(len(s.content)))
		le.PutUint32(h[16:], uint32((len(s.content)+align-1)&^(align-1)))
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, s.content...)
		b = append(b, make([]byte, -len(b)&(align-1))...)
	}
	return b
}

func uki(kernel []byte) []byte {
	return pe(section{".text", []byte("stub")}, section{".uname", []byte("6.1")}, section{".linux", kernel},
		section{".initrd", []byte("070701")})
}

// What distributions call a kernel, with something around it.
func TestExtract_packed(t *testing.T) {
	elf := append(vmlinux(), "Linux version 6.1.0-57-amd64 (debian-kernel@lists.debian.org) (gcc-12"...)
	arm := arm64Image()
	info := func(f kernel.Format, compression string) kernel.Info {
		i := kernel.Info{
			Format: f, Arch: "amd64", Compression: compression, Packed: true, Release: "6.1.0-57-amd64",
			Size: int64(len(elf)),
		}
		if f == kernel.Image {
			i.Arch, i.Release, i.Size = "arm64", "6.8.0-31-generic", int64(len(arm))
		}
		return i
	}
	for name, c := range map[string]struct {
		image []byte
		want  kernel.Info
	}{
		"vmlinux.gz":  {stream(t, "gzip", elf), info(kernel.ELF, "gzip")},
		"vmlinux.zst": {stream(t, "zstd", elf), info(kernel.ELF, "zstd")},
		"Image.gz":    {stream(t, "gzip", arm), info(kernel.Image, "gzip")},
		"Image.lz4":   {stream(t, "lz4", arm), info(kernel.Image, "lz4")},
		"zboot gzip":  {zboot(t, "gzip", arm), info(kernel.Image, "gzip")},
		"zboot zstd":  {zboot(t, "zstd", arm), info(kernel.Image, "zstd")},
		"zboot lz4":   {zboot(t, "lz4", arm), info(kernel.Image, "lz4")},
		"unified bzImage": {
			uki(bzImage(compress(t, "zstd", elf), "6.1.0-57-amd64 (x@y)")),
			info(kernel.BzImage, "zstd"),
		},
		"unified vmlinux":       {uki(elf), info(kernel.ELF, "none")},
		"unified Image":         {uki(arm), info(kernel.Image, "none")},
		"unified zboot":         {uki(zboot(t, "zstd", arm)), info(kernel.Image, "zstd")},
		"bzImage of no version": {bzImage(compress(t, "gzip", elf), ""), info(kernel.BzImage, "gzip")},
		"bzImage that is PE inside": {edit(bzImage(compress(t, "gzip", elf), ""), func(b []byte) {
			copy(b, "MZ")
		}), info(kernel.BzImage, "gzip")},
	} {
		t.Run(name, func(t *testing.T) {
			detected, err := kernel.Detect(bytes.NewReader(c.image), int64(len(c.image)))
			if err != nil || detected.Format != c.want.Format || detected.Arch != c.want.Arch || !detected.Packed {
				t.Errorf("Detect: got %+v, %v; want %+v", detected, err, c.want)
			}
			got, out, err := extract(c.image)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("info (-want +got):\n%s", diff)
			}
			want := elf
			if c.want.Format == kernel.Image {
				want = arm
			}
			if !bytes.Equal(out, want) {
				t.Error("the extracted kernel differs from the one that was packed")
			}
		})
	}
}

// A kernel says its release wherever that stands, be it across two reads; what only looks like one
// does not count.
func TestExtract_release(t *testing.T) {
	at := func(offset int, text string) []byte {
		b := append(vmlinux(), make([]byte, 3<<20)...)
		copy(b[1<<20:], "Linux version %s (%s@%s)")
		copy(b[offset:], text)
		return b
	}
	const text = "Linux version 6.1.0-57-cloud-amd64 (x@y)"
	for name, c := range map[string]struct {
		image []byte
		want  string
	}{
		"Middle":   {at(2<<20+300, text), "6.1.0-57-cloud-amd64"},
		"Across":   {at(2<<20-20, text), "6.1.0-57-cloud-amd64"},
		"Packed":   {stream(t, "gzip", at(2<<20-5, text)), "6.1.0-57-cloud-amd64"},
		"None":     {at(2<<20, "Linux versions"), ""},
		"Escapes":  {at(2<<20, "Linux version 6.1\x1b[2J (x@y)"), ""},
		"Too long": {at(2<<20, "Linux version "+string(bytes.Repeat([]byte("6"), 65))+" (x@y)"), ""},
	} {
		if info, _, err := extract(c.image); err != nil || info.Release != c.want {
			t.Errorf("%s: got release %q, %v; want %q", name, info.Release, err, c.want)
		}
	}
}

func TestDetect_refusesPacked(t *testing.T) {
	elf, arm := vmlinux(), arm64Image()
	z, u := zboot(t, "gzip", arm), uki(bzImage(compress(t, "gzip", elf), ""))
	linux := bytes.Index(u, []byte(".linux\x00"))
	for name, c := range map[string]struct {
		image []byte
		want  error
	}{
		"gzip of text":          {stream(t, "gzip", []byte("no kernel at all")), kernel.ErrFormat},
		"gzip of nothing":       {stream(t, "gzip", nil), kernel.ErrCorrupt},
		"gzip of gzip":          {stream(t, "gzip", stream(t, "gzip", elf)), kernel.ErrFormat},
		"gzip header alone":     {[]byte("\x1f\x8b\x08"), kernel.ErrCorrupt},
		"bzip2 of nonsense":     {[]byte("BZh91AY0000000000000"), kernel.ErrCorrupt},
		"ELF for arm64, packed": {stream(t, "gzip", edit(elf, func(b []byte) { b[18] = 183 })), kernel.ErrFormat},

		"zboot outside":    {edit(z, func(b []byte) { le.PutUint32(b[8:], 1<<32-1) }), kernel.ErrCorrupt},
		"zboot too long":   {edit(z, func(b []byte) { le.PutUint32(b[12:], 1<<32-1) }), kernel.ErrCorrupt},
		"zboot empty":      {edit(z, func(b []byte) { le.PutUint32(b[12:], 0) }), kernel.ErrCorrupt},
		"zboot of a byte":  {edit(z, func(b []byte) { le.PutUint32(b[12:], 1) }), &kernel.CompressionError{Name: "unknown"}},
		"zboot of text":    {zboot(t, "gzip", []byte("no kernel")), kernel.ErrFormat},
		"zboot of itself":  {edit(z, func(b []byte) { le.PutUint32(b[8:], 0) }), &kernel.CompressionError{Name: "unknown"}},
		"zboot cut":        {z[:len(z)-600], kernel.ErrCorrupt},
		"zboot header cut": {z[:12], kernel.ErrFormat},

		"EFI program":          {pe(section{".text", []byte("stub")}), kernel.ErrFormat},
		"EFI without sections": {pe(), kernel.ErrFormat},
		"EFI of too many":      {edit(u, func(b []byte) { le.PutUint16(b[0x86:], 65535) }), kernel.ErrCorrupt},
		"EFI table outside":    {edit(u, func(b []byte) { le.PutUint16(b[0x94:], 65535) }), kernel.ErrCorrupt},
		"EFI header outside":   {edit(u, func(b []byte) { le.PutUint32(b[0x3c:], 1<<32-1) }), kernel.ErrFormat},
		"EFI kernel outside":   {edit(u, func(b []byte) { le.PutUint32(b[linux+20:], 1<<32-1) }), kernel.ErrCorrupt},
		"EFI kernel too long": {edit(u, func(b []byte) {
			le.PutUint32(b[linux+8:], 1<<31)
			le.PutUint32(b[linux+16:], 1<<31)
		}), kernel.ErrCorrupt},
		"EFI kernel empty":        {edit(u, func(b []byte) { le.PutUint32(b[linux+8:], 0) }), kernel.ErrFormat},
		"EFI kernel is text":      {uki([]byte("no kernel")), kernel.ErrFormat},
		"unified image in itself": {uki(u), kernel.ErrFormat},
		"DOS program":             {append([]byte("MZ"), make([]byte, 100)...), kernel.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := kernel.Detect(bytes.NewReader(c.image), int64(len(c.image)))
			checkError(t, "Detect", err, c.want)
			_, out, err := extract(c.image)
			checkError(t, "Extract", err, c.want)
			if len(out) > 0 {
				t.Errorf("Extract wrote %d bytes", len(out))
			}
		})
	}
}

// What only unpacking all of it shows.
func TestExtract_corruptPacked(t *testing.T) {
	elf := append(vmlinux(), make([]byte, 1<<20)...)
	packed := stream(t, "gzip", elf)
	for name, image := range map[string][]byte{
		"cut":           packed[:len(packed)-20],
		"checksum":      edit(packed, func(b []byte) { b[len(b)-8] ^= 1 }),
		"garbage after": append(bytes.Clone(packed), "garbage"...),
		"segment outside": stream(t, "gzip", edit(elf, func(b []byte) {
			le.PutUint64(b[96:], uint64(len(elf)))
			le.PutUint64(b[104:], uint64(len(elf)))
		})),
	} {
		if _, err := kernel.Detect(bytes.NewReader(image), int64(len(image))); err != nil {
			t.Errorf("%s: Detect: %v", name, err)
		}
		_, _, err := extract(image)
		checkError(t, name, err, kernel.ErrCorrupt)
	}
	if _, out, err := extract(packed); err != nil || !bytes.Equal(out, elf) {
		t.Errorf("the same undamaged: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// A stream that says nothing of its size is not followed beyond MaxSize.
func TestExtract_packedBomb(t *testing.T) {
	var image bytes.Buffer
	z, err := zstd.NewWriter(&image, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(z,
		io.MultiReader(bytes.NewReader(arm64Image()), io.LimitReader(zeros{}, kernel.MaxSize))); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	var written count
	_, err = kernel.Extract(t.Context(), &written, bytes.NewReader(image.Bytes()), int64(image.Len()))
	checkError(t, "Extract", err, kernel.ErrTooLarge)
	if written > kernel.MaxSize {
		t.Errorf("wrote %d bytes", written)
	}
}

type count int64

func (c *count) Write(p []byte) (int, error) {
	*c += count(len(p))
	return len(p), nil
}
