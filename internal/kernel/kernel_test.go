package kernel_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/tinyguest"
)

var compressions = []string{"none", "gzip", "xz", "zstd", "lz4", "bzip2"}

func extract(image []byte) (kernel.Info, []byte, error) {
	var out bytes.Buffer
	info, err := kernel.Extract(context.Background(), &out, bytes.NewReader(image), int64(len(image)))
	return info, out.Bytes(), err
}

func TestExtract_bzImage(t *testing.T) {
	elf := vmlinux()
	for _, name := range compressions {
		t.Run(name, func(t *testing.T) {
			image := bzImage(compress(t, name, elf), "6.1.0-13-amd64 (someone@somewhere) #1 SMP")
			want := kernel.Info{
				Format: kernel.BzImage, Arch: "amd64", Compression: name, Packed: true,
				Release: "6.1.0-13-amd64", Size: int64(len(elf)),
			}
			info, out, err := extract(image)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, info); diff != "" {
				t.Errorf("info (-want +got):\n%s", diff)
			}
			if !bytes.Equal(out, elf) {
				t.Error("the extracted kernel differs from the one compressed")
			}
			detected, err := kernel.Detect(bytes.NewReader(image), int64(len(image)))
			if err != nil || detected != info {
				t.Errorf("Detect: got %+v, %v; want %+v", detected, err, info)
			}
		})
	}
}

// No number of setup sectors means four of them.
func TestExtract_defaultSetup(t *testing.T) {
	image := bzImage(compress(t, "gzip", vmlinux()), "")
	image[0x1f1] = 0
	_, out, err := extract(slices.Insert(image, 0x300, make([]byte, (4-sects)*512)...))
	if err != nil || !bytes.Equal(out, vmlinux()) {
		t.Errorf("got %d bytes, %v; want the kernel", len(out), err)
	}
}

// A payload of several blocks and of more than one read.
func TestExtract_large(t *testing.T) {
	elf := append(vmlinux(), make([]byte, 9<<20)...)
	copy(elf[8<<20:], "unusual")
	for _, name := range []string{"gzip", "zstd", "lz4"} {
		if _, out, err := extract(bzImage(compress(t, name, elf), "")); err != nil || !bytes.Equal(out, elf) {
			t.Errorf("%s: got %d bytes, %v; want the %d compressed", name, len(out), err, len(elf))
		}
	}
}

func TestExtract_asIs(t *testing.T) {
	arm := make([]byte, 5000)
	copy(arm, "MZ")
	copy(arm[56:], "ARM\x64")
	guest := tinyguest.Image(tinyguest.Guest{})
	for name, c := range map[string]struct {
		image []byte
		want  kernel.Info
	}{
		"vmlinux": {
			vmlinux(),
			kernel.Info{Format: kernel.ELF, Arch: "amd64", Compression: "none", Size: int64(len(vmlinux()))},
		},
		"tiny guest": {guest, kernel.Info{Format: kernel.ELF, Arch: "amd64", Compression: "none", Size: int64(len(guest))}},
		"arm64":      {arm, kernel.Info{Format: kernel.Image, Arch: "arm64", Compression: "none", Size: 5000}},
	} {
		info, out, err := extract(c.image)
		if err != nil || info != c.want || !bytes.Equal(out, c.image) {
			t.Errorf("%s: got %+v, %d bytes, %v; want %+v", name, info, len(out), err, c.want)
		}
	}
}

// edit returns a copy of b that f has changed.
func edit(b []byte, f func(b []byte)) []byte {
	b = bytes.Clone(b)
	f(b)
	return b
}

func TestDetect_refuses(t *testing.T) {
	elf := vmlinux()
	image := bzImage(compress(t, "gzip", elf), "")
	magic := func(s string) []byte { return bzImage(append([]byte(s), make([]byte, 64)...), "") }
	for name, c := range map[string]struct {
		image []byte
		want  error
	}{
		"empty":            {nil, kernel.ErrFormat},
		"script":           {[]byte("#!/bin/sh\nexit 0\n"), kernel.ErrFormat},
		"long garbage":     {bytes.Repeat([]byte("kernel? "), 1000), kernel.ErrFormat},
		"no boot flag":     {edit(image, func(b []byte) { b[0x1fe] = 0 }), kernel.ErrFormat},
		"no HdrS":          {edit(image, func(b []byte) { b[0x202] = 'h' }), kernel.ErrFormat},
		"protocol 2.07":    {edit(image, func(b []byte) { b[0x206] = 7 }), kernel.ErrFormat},
		"32-bit bzImage":   {edit(image, func(b []byte) { b[0x236] = 0 }), kernel.ErrFormat},
		"setup only":       {image[:0x250], kernel.ErrCorrupt},
		"cut in payload":   {image[:len(image)-101], kernel.ErrCorrupt},
		"no payload":       {edit(image, func(b []byte) { le.PutUint32(b[0x24c:], 0) }), kernel.ErrCorrupt},
		"payload outside":  {edit(image, func(b []byte) { le.PutUint32(b[0x248:], 1<<32-1) }), kernel.ErrCorrupt},
		"payload too long": {edit(image, func(b []byte) { le.PutUint32(b[0x24c:], 1<<32-1) }), kernel.ErrCorrupt},
		"says 2 GiB":       {edit(image, func(b []byte) { le.PutUint32(b[len(b)-104:], 2<<30) }), kernel.ErrTooLarge},
		"lzma":             {magic("\x5d\x00\x00\x00\x04"), &kernel.CompressionError{Name: "lzma"}},
		"lzo":              {magic("\x89LZO\x00"), &kernel.CompressionError{Name: "lzo"}},
		"unknown payload":  {magic("whatever"), &kernel.CompressionError{Name: "unknown"}},

		"ELF header cut":      {elf[:63], kernel.ErrCorrupt},
		"ELF 32-bit":          {edit(elf, func(b []byte) { b[4] = 1 }), kernel.ErrFormat},
		"ELF big endian":      {edit(elf, func(b []byte) { b[5] = 2 }), kernel.ErrFormat},
		"ELF arm64":           {edit(elf, func(b []byte) { b[18] = 183 }), kernel.ErrFormat},
		"ELF object":          {edit(elf, func(b []byte) { b[16] = 1 }), kernel.ErrFormat},
		"ELF entry size":      {edit(elf, func(b []byte) { b[54] = 32 }), kernel.ErrCorrupt},
		"ELF no segment":      {edit(elf, func(b []byte) { b[56] = 0 }), kernel.ErrCorrupt},
		"ELF nothing to load": {edit(elf, func(b []byte) { b[64] = 4 }), kernel.ErrCorrupt},
		"ELF 65535 segments":  {edit(elf, func(b []byte) { le.PutUint16(b[56:], 65535) }), kernel.ErrCorrupt},
		"ELF 1000 segments": {edit(append(vmlinux(), make([]byte, 1<<20)...), func(b []byte) {
			le.PutUint64(b[32:], 1<<19)
			le.PutUint16(b[56:], 1000)
			copy(b[1<<19:], elf[64:120])
		}), kernel.ErrCorrupt},
		"ELF table outside":    {edit(elf, func(b []byte) { le.PutUint64(b[32:], 1<<64-8) }), kernel.ErrCorrupt},
		"ELF table at the end": {edit(elf, func(b []byte) { le.PutUint64(b[32:], uint64(len(b)-55)) }), kernel.ErrCorrupt},
		"ELF segment outside":  {edit(elf, func(b []byte) { le.PutUint64(b[72:], 1<<64-1) }), kernel.ErrCorrupt},
		"ELF segment too long": {edit(elf, func(b []byte) {
			le.PutUint64(b[96:], uint64(len(b)))
			le.PutUint64(b[104:], uint64(len(b)))
		}), kernel.ErrCorrupt},
		"ELF bigger than memory": {edit(elf, func(b []byte) {
			le.PutUint64(b[104:], le.Uint64(b[96:])-1)
		}), kernel.ErrCorrupt},
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

// checkError wants an error that matches want, or is a CompressionError that
// equals it.
func checkError(t *testing.T, what string, err, want error) {
	t.Helper()
	var got, unsupported *kernel.CompressionError
	if errors.As(want, &unsupported) {
		if !errors.As(err, &got) || *got != *unsupported {
			t.Errorf("%s: got error %v, want %v", what, err, want)
		}
	} else if !errors.Is(err, want) {
		t.Errorf("%s: got error %v, want %v", what, err, want)
	}
}

func TestDetect_tooLarge(t *testing.T) {
	_, err := kernel.Detect(bytes.NewReader(nil), kernel.MaxSize+1)
	checkError(t, "Detect", err, kernel.ErrTooLarge)
}

// What only decompressing shows.
func TestExtract_corruptPayload(t *testing.T) {
	elf := vmlinux()
	for _, name := range compressions {
		payload := compress(t, name, elf)
		size := len(payload) - 4 // where the uncompressed size is
		damaged := map[string][]byte{
			"says less": edit(payload, func(b []byte) { le.PutUint32(b[size:], uint32(len(elf)-1)) }),
			"says more": edit(payload, func(b []byte) { le.PutUint32(b[size:], uint32(len(elf)+1)) }),
			"cut":       append(bytes.Clone(payload[:size-size/3]), payload[size:]...),
			"far table": compress(t, "zstd", edit(append(vmlinux(), make([]byte, 1<<20)...), func(b []byte) {
				copy(b[1<<19:], b[64:120])
				le.PutUint64(b[32:], 1<<19)
			})),
			"no ELF": compress(t, "zstd", bytes.Repeat([]byte("nothing "), 1000)),
		}
		if name != "none" && name != "lz4" { // which have no checksum
			damaged["bit flipped"] = edit(payload, func(b []byte) { b[size/2] ^= 0x10 })
		}
		if name == "lz4" {
			damaged["no block"] = edit(payload, func(b []byte) { le.PutUint32(b[4:], 0) })
			damaged["huge block"] = edit(payload, func(b []byte) { le.PutUint32(b[4:], 1<<32-1) })
			damaged["odd block"] = edit(payload, func(b []byte) { copy(b[8:], make([]byte, 100)) })
		}
		for how, payload := range damaged {
			t.Run(name+"/"+how, func(t *testing.T) {
				_, _, err := extract(bzImage(payload, ""))
				want := kernel.ErrCorrupt
				if how == "no ELF" {
					want = kernel.ErrFormat
				}
				checkError(t, "Extract", err, want)
			})
		}
	}
}

// Payloads that are out to exhaust the reader: far more data than announced,
// and frames in endless succession.
func TestExtract_bombs(t *testing.T) {
	elf := vmlinux()
	bomb := append(bytes.Clone(elf), make([]byte, 12<<20)...)
	for _, name := range []string{"gzip", "zstd", "lz4"} {
		payload := compress(t, name, bomb)
		le.PutUint32(payload[len(payload)-4:], uint32(len(elf)))
		_, out, err := extract(bzImage(payload, ""))
		checkError(t, name, err, kernel.ErrCorrupt)
		if len(out) > len(elf) {
			t.Errorf("%s: wrote %d bytes of %d", name, len(out), len(elf))
		}
	}
	frames := bytes.Repeat([]byte("\x02\x21\x4c\x18"), 8<<20)
	_, _, err := extract(bzImage(frames, ""))
	checkError(t, "lz4 frames", err, kernel.ErrCorrupt)
}

var errBroken = errors.New("broken")

// broken fails to read the byte at an offset.
type broken struct {
	io.ReaderAt
	at int64
}

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	if off <= b.at && b.at < off+int64(len(p)) {
		return 0, errBroken
	}
	return b.ReaderAt.ReadAt(p, off)
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

// An input or output error is not taken for a corrupt kernel.
func TestExtract_brokenEnds(t *testing.T) {
	for _, name := range compressions {
		image := bzImage(compress(t, name, vmlinux()), "")
		size := int64(len(image))
		// In the setup header, the payload's magic, its middle, its size.
		for _, at := range []int64{0, payloadAt, (payloadAt + size) / 2, size - 101} {
			_, err := kernel.Extract(t.Context(), io.Discard, broken{bytes.NewReader(image), at}, size)
			if !errors.Is(err, errBroken) || errors.Is(err, kernel.ErrCorrupt) {
				t.Errorf("%s: source broken at %d: got %v", name, at, err)
			}
		}
		_, err := kernel.Extract(t.Context(), brokenWriter{}, bytes.NewReader(image), size)
		if !errors.Is(err, errBroken) || errors.Is(err, kernel.ErrCorrupt) {
			t.Errorf("%s: broken destination: got %v", name, err)
		}
	}
}

func TestExtract_canceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	image := vmlinux()
	_, err := kernel.Extract(ctx, io.Discard, bytes.NewReader(image), int64(len(image)))
	checkError(t, "Extract", err, context.Canceled)
}

func TestFormat_String(t *testing.T) {
	got := fmt.Sprint(kernel.ELF, kernel.BzImage, kernel.Image, kernel.Format(0))
	if want := "vmlinux bzImage Image Format(0)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDetect_release(t *testing.T) {
	for version, want := range map[string]string{
		"6.1.0-13-cloud-amd64 (x@y) #1":        "6.1.0-13-cloud-amd64",
		"6.8.0+":                               "6.8.0+",
		"":                                     "",
		" 6.1":                                 "",
		"../../etc":                            "",
		"6.1\x1b[2J":                           "",
		string(bytes.Repeat([]byte("6"), 65)):  "",
		string(bytes.Repeat([]byte("6"), 400)): "",
	} {
		image := bzImage(compress(t, "gzip", vmlinux()), version)
		info, err := kernel.Detect(bytes.NewReader(image), int64(len(image)))
		if err != nil || info.Release != want {
			t.Errorf("version %q: got release %q, %v; want %q", version, info.Release, err, want)
		}
	}
}

// counting counts the bytes read.
type counting struct {
	io.ReaderAt
	n *int
}

func (c counting) ReadAt(p []byte, off int64) (int, error) {
	*c.n += len(p)
	return c.ReaderAt.ReadAt(p, off)
}

func TestDetect_readsLittle(t *testing.T) {
	large := append(vmlinux(), make([]byte, 4<<20)...)
	for name, image := range map[string][]byte{"vmlinux": large, "bzImage": bzImage(compress(t, "none", large), "6.1")} {
		n := 0
		if _, err := kernel.Detect(counting{bytes.NewReader(image), &n}, int64(len(image))); err != nil {
			t.Fatal(err)
		}
		if n > 4<<10 {
			t.Errorf("%s: read %d bytes", name, n)
		}
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(path("good"), vmlinux(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path("bad"), []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{
		"good": nil, "bad": kernel.ErrFormat, "missing": fs.ErrNotExist, "fifo": fs.ErrInvalid, ".": fs.ErrInvalid,
	} {
		info, err := kernel.Check(path(name))
		if !errors.Is(err, want) {
			t.Errorf("%s: got error %v, want %v", name, err, want)
		}
		if want == nil && info.Format != kernel.ELF {
			t.Errorf("%s: got %+v", name, info)
		}
	}
}

// TestExtract_real extracts the kernels in SMARTVM_TEST_BZIMAGE, a list of
// paths like PATH.
func TestExtract_real(t *testing.T) {
	list := filepath.SplitList(os.Getenv("SMARTVM_TEST_BZIMAGE"))
	if len(list) == 0 {
		t.Skip("needs kernels: SMARTVM_TEST_BZIMAGE lists none")
	}
	for _, path := range list {
		checked, err := kernel.Check(path)
		if err != nil {
			t.Fatal(err)
		}
		image, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		info, out, err := extract(image)
		if err != nil || info != checked || checked.Format != kernel.BzImage || checked.Release == "" {
			t.Fatalf("%s: got %+v, %v; Check said %+v", path, info, err, checked)
		}
		again, err := kernel.Detect(bytes.NewReader(out), int64(len(out)))
		if err != nil || again.Format != kernel.ELF || !bytes.Contains(out, []byte("Linux version "+info.Release)) {
			t.Errorf("%s: extracted %+v, %v; want the vmlinux of %s", path, again, err, info.Release)
		}
	}
}

func FuzzExtract(f *testing.F) {
	for _, name := range compressions {
		f.Add(bzImage(compress(f, name, vmlinux()), "6.1"))
	}
	f.Add(vmlinux())
	f.Add(stream(f, "gzip", vmlinux()))
	f.Add(zboot(f, "zstd", arm64Image()))
	f.Add(uki(bzImage(compress(f, "gzip", vmlinux()), "6.1")))
	f.Add(tinyguest.Image(tinyguest.Guest{}))
	f.Fuzz(func(t *testing.T, image []byte) {
		info, out, err := extract(image)
		if err == nil && info.Size != int64(len(out)) {
			t.Errorf("wrote %d bytes, says %d", len(out), info.Size)
		}
		if err != nil && info != (kernel.Info{}) {
			t.Errorf("info %+v with error %v", info, err)
		}
	})
}
