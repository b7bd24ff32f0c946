package flatten_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"push.rocks/smartvm/image/oci/flatten"
)

func TestLayers_Refused(t *testing.T) {
	xattr := func(name, value string) ent {
		f := file("a", "")
		f.PAXRecords = map[string]string{"SCHILY.xattr." + name: value}
		return f
	}
	for name, entries := range map[string][]ent{
		"a name with dots":           {file("a/../../etc/passwd", "")},
		"a hard link with dots":      {file("a", ""), link("b", "../a")},
		"a loop of symbolic links":   {symlink("a", "b"), symlink("b", "a"), file("a/x", "")},
		"41 symbolic links":          append(slices.Collect(chain(41)), file("s0/x", "")),
		"a hard link outside":        {link("a", "/etc/passwd")},
		"a hard link to a directory": {dir("d", 0o700), link("a", "d")},
		"a hard link to itself":      {link("a", "a")},
		"a part of 256 bytes":        {file(strings.Repeat("a", 256), "")},
		"a name of more than a path": {file(strings.Repeat("a/", 2100)+"b", "")},
		"a symbolic link to nothing": {{tar.Header{Typeflag: tar.TypeSymlink, Name: "a"}, ""}},
		"a root that is a file":      {file(".", "")},
		"lost+found, a file":         {file("lost+found", "")},
		"a device that cannot be":    {{tar.Header{Typeflag: tar.TypeChar, Name: "a", Devmajor: 4096}, ""}},
		"an owner below 0": {{
			tar.Header{Typeflag: tar.TypeFifo, Name: "a", Uid: -1, Format: tar.FormatGNU},
			"",
		}},
		"an unknown type":               {{tar.Header{Typeflag: 'Z', Name: "a"}, ""}},
		"a whiteout of nothing":         {file("a/.wh.", "")},
		"a whiteout of dots":            {file("a/.wh...", "")},
		"below a whiteout":              {file(".wh.a/b", "")},
		"an extended attribute too big": {xattr("user.a", strings.Repeat("x", 5000))},
		"one without a name":            {xattr("user.", "x")},
	} {
		t.Run(name, func(t *testing.T) {
			var wrong *flatten.EntryError
			if _, err := flatten.Layers(t.Context(), layers(t, entries), target(t), flatten.Options{}); !errors.As(err, &wrong) {
				t.Errorf("%v, want an EntryError", err)
			}
		})
	}
}

func TestLayers_WrongDigest(t *testing.T) {
	l := layers(t, []ent{file("a", "")}, []ent{file("b", "")})
	l[0].DiffID = l[1].DiffID
	var wrong *flatten.DigestError
	if _, err := flatten.Layers(t.Context(), l, target(t), flatten.Options{}); !errors.As(err, &wrong) ||
		wrong.Want != l[1].DiffID {
		t.Errorf("%v, want a DigestError", err)
	}
}

// chain is symbolic links that lead to each other, the last to d.
func chain(n int) iter.Seq[ent] {
	return func(yield func(ent) bool) {
		for i := range n {
			to := fmt.Sprintf("s%d", i+1)
			if i == n-1 {
				to = "d"
			}
			if !yield(symlink(fmt.Sprintf("s%d", i), to)) {
				return
			}
		}
	}
}

// Linux follows 40 symbolic links.
func TestLayers_FortyLinks(t *testing.T) {
	f := target(t)
	if _, err := flatten.Layers(t.Context(), layers(t, append(slices.Collect(chain(40)), file("s0/x", "x"))), f,
		flatten.Options{}); err != nil {
		t.Fatal(err)
	}
	if got := listing(t, f); !slices.Contains(got, `d/x 0 0644 0:0 "x"`) {
		t.Errorf("%q", got)
	}
}

func pack(t testing.TB, how string, content []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	var err error
	switch how {
	case "gzip":
		w := gzip.NewWriter(&buf)
		_, err = w.Write(content)
		err = errors.Join(err, w.Close())
	case "zstd":
		var w *zstd.Encoder
		if w, err = zstd.NewWriter(&buf); err == nil {
			_, err = w.Write(content)
			err = errors.Join(err, w.Close())
		}
	default:
		return content
	}
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestLayers_PackedAndTruncated(t *testing.T) {
	random := strings.Repeat("0123456789abcdef\x00\xff", 50_000)
	plain := tarOf(t, true, file("a", random), file("b", "b"))
	for _, how := range []string{"", "gzip", "zstd"} {
		t.Run(how, func(t *testing.T) {
			packed := pack(t, how, plain)
			f := target(t)
			if _, err := flatten.Layers(t.Context(), []flatten.Layer{layer(plain, packed)}, f, flatten.Options{}); err != nil {
				t.Fatal(err)
			}
			fsck(t, f)
			for _, size := range []int{0, 1, 7, len(packed) / 2, len(packed) - 1} {
				if _, err := flatten.Layers(t.Context(), []flatten.Layer{layer(plain, packed[:size])}, f,
					flatten.Options{}); err == nil {
					t.Errorf("%d of %d bytes were enough", size, len(packed))
				}
			}
		})
	}
}

func TestLayers_Limits(t *testing.T) {
	sparse := file("sparse", "")
	sparse.Size = 1 << 40
	var claim bytes.Buffer
	if err := tar.NewWriter(&claim).WriteHeader(&sparse.Header); err != nil {
		t.Fatal(err)
	}
	many := make([]ent, 11)
	for n := range many {
		many[n] = dir(fmt.Sprintf("d%d", n), 0o700)
	}
	bomb := tarOf(t, true, file("zeros", string(make([]byte, 4<<20))))
	for name, c := range map[string]struct {
		content []byte
		what    string
	}{
		"a file that claims a TiB": {claim.Bytes(), "bytes of files"},
		"a sparse one":             {gnuSparse(1 << 40), "bytes of files"},
		"a sparse one, small":      {gnuSparse(1<<20 + 1), "bytes of files"},
		"too many entries":         {tarOf(t, true, many...), "entries"},
		"a bomb":                   {pack(t, "gzip", bomb), "bytes of files"},
		"a bomb after the end":     {pack(t, "gzip", append(tarOf(t, true), bomb...)), "bytes unpacked"},
		"a bomb of zstd":           {pack(t, "zstd", append(tarOf(t, true), bomb...)), "bytes unpacked"},
	} {
		t.Run(name, func(t *testing.T) {
			f := target(t)
			_, err := flatten.Layers(t.Context(), []flatten.Layer{layer(c.content, c.content)}, f,
				flatten.Options{Limits: flatten.Limits{MaxBytes: 1 << 20, MaxEntries: 10}})
			var over *flatten.LimitError
			if !errors.As(err, &over) || over.What != c.what {
				t.Errorf("%v, want a limit of %s", err, c.what)
			}
			if fi, err := f.Stat(); err != nil || fi.Size() > 1<<20 {
				t.Errorf("wrote %d bytes: %v", fi.Size(), err)
			}
		})
	}
	t.Run("by default", func(t *testing.T) {
		var over *flatten.LimitError
		_, err := flatten.Layers(t.Context(), []flatten.Layer{layer(gnuSparse(1<<40), gnuSparse(1<<40))}, target(t),
			flatten.Options{})
		if !errors.As(err, &over) || over.Limit != flatten.MaxBytes {
			t.Errorf("%v, want a limit of %d", err, int64(flatten.MaxBytes))
		}
	})
}

// What takes memory besides entries is bounded too, and no mark has all names looked at again.
func TestLayers_Memory(t *testing.T) {
	deep := make([]ent, 10)
	for n := range deep {
		deep[n] = file(fmt.Sprint(n, strings.Repeat("/d", 20)), "")
	}
	far := make([]ent, 10)
	for n := range far {
		far[n] = symlink(fmt.Sprint(n), strings.Repeat("t", 4000))
	}
	for what, c := range map[string]struct {
		entries []ent
		least   int64
	}{
		"directories": {deep, 200},
		"times 256 bytes in the targets of symbolic links": {far, 157},
	} {
		l := flatten.Limits{MaxEntries: c.least - 1}
		var over *flatten.LimitError
		if _, err := flatten.Layers(t.Context(), layers(t, c.entries), target(t), flatten.Options{Limits: l}); !errors.As(err,
			&over) || over.What != what {
			t.Errorf("%v, want a limit of %s", err, what)
		}
		l.MaxEntries++
		if _, err := flatten.Layers(t.Context(), layers(t, c.entries), target(t), flatten.Options{Limits: l}); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	var many []ent
	for n := range 100_000 {
		many = append(many, file(fmt.Sprintf("d/%d", n), ""))
	}
	for range 100_000 {
		many = append(many, file(".wh..wh..opq", ""), file("d/.wh..wh..opq", ""))
	}
	if _, err := flatten.Layers(t.Context(), layers(t, many), target(t), flatten.Options{}); err != nil {
		t.Error(err)
	}
}

// gnuSparse is a tar of an old GNU sparse file of some size with "data" at its beginning and no
// more.
func gnuSparse(size int64) []byte {
	h := make([]byte, 1024)
	copy(h, "sparse")
	octal := func(at, digits int, v int64) { copy(h[at:], fmt.Sprintf("%0*o\x00", digits-1, v)) }
	octal(100, 8, 0o644)
	octal(108, 8, 0)
	octal(116, 8, 0)
	octal(124, 12, 4)
	octal(136, 12, someTime.Unix())
	h[156] = 'S'
	copy(h[257:], "ustar  \x00")
	octal(386, 12, 0)
	octal(398, 12, 4)
	if size > 0o77777777777 {
		h[483] = 0x80
		for i := range 11 {
			h[494-i] = byte(size >> (8 * i))
		}
	} else {
		octal(483, 12, size)
	}
	copy(h[148:], "        ")
	sum := 0
	for _, b := range h[:512] {
		sum += int(b)
	}
	copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
	copy(h[512:], "data")
	return append(h, make([]byte, 1024)...)
}

// Holes stay holes, in the image's file too.
func TestTarToExt4_Sparse(t *testing.T) {
	f := target(t)
	if err := flatten.TarToExt4(t.Context(), bytes.NewReader(gnuSparse(200<<20)), f, flatten.Limits{}); err != nil {
		t.Fatal(err)
	}
	fsck(t, f)
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if used := blocks(fi) * 512; fi.Size() > 1<<20 || used > 1<<20 {
		t.Errorf("%d bytes, %d of them on disk", fi.Size(), used)
	}
	if got, want := string(mounted(t, f, `stat -c %s "$1/sparse"; head -c 4 "$1/sparse"`)),
		"209715200\ndata"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestTarToExt4_FullDisk(t *testing.T) {
	f, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Skip("needs: /dev/full")
	}
	defer f.Close()
	if err := flatten.TarToExt4(t.Context(), bytes.NewReader(tarOf(t, true, file("a", "a"))), f,
		flatten.Limits{}); err == nil {
		t.Error("it was written")
	}
}

// Whatever a tar holds, it becomes a sound file system or an error.
func FuzzTarToExt4(f *testing.F) {
	f.Add(tarOf(f, true, file("a", "a"), dir("d", 0o700), symlink("d/s", "a"), link("b", "a")))
	f.Add(pack(f, "gzip", tarOf(f, false, file("/a/../b", ""), file("a", ""), file("a", "b"))))
	f.Add(pack(f, "zstd", tarOf(f, false, file("a", ""))))
	f.Add(gnuSparse(5000))
	f.Fuzz(func(t *testing.T, data []byte) {
		dst := target(t)
		if flatten.TarToExt4(t.Context(), bytes.NewReader(data), dst, flatten.Limits{}) == nil {
			if fi, err := dst.Stat(); err == nil && fi.Size() < 64<<20 {
				fsck(t, dst)
			}
		}
		_, err := flatten.Layers(t.Context(), []flatten.Layer{layer(data, data)}, dst, flatten.Options{})
		if err == nil {
			fsck(t, dst)
		}
	})
}
