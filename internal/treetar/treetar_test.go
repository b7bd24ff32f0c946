package treetar_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/treetar"
)

func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(h.Name))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, h.Name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644} }

// unpack unpacks in a directory beside a file that is not to be touched, and says whether it went
// well.
func unpack(t testing.TB, data []byte, o treetar.Options) (dir string, err error) {
	t.Helper()
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(outside, "in")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	err = treetar.Unpack(bytes.NewReader(data), root, o)
	if got, readErr := os.ReadFile(secret); readErr != nil || string(got) != "secret" {
		t.Errorf("outside: %q, %v", got, readErr)
	}
	fi, statErr := os.Stat(secret)
	if statErr != nil || fi.Mode() != 0o600 {
		t.Errorf("outside: %v, %v", fi, statErr)
	}
	if entries, readErr := os.ReadDir(outside); readErr != nil || len(entries) != 2 {
		t.Errorf("outside: %v, %v", entries, readErr)
	}
	return dir, err
}

// Whatever an archive says, nothing outside is written, linked to or changed.
func TestUnpack_Hostile(t *testing.T) {
	link := func(kind byte, name, to string) tar.Header {
		return tar.Header{Typeflag: kind, Name: name, Linkname: to, Mode: 0o777}
	}
	const escapes = "path escapes from parent"
	unsafe := treetar.ErrUnsafe.Error()
	for name, c := range map[string]struct {
		want    string // in the error
		headers []tar.Header
	}{
		"parent":             {unsafe, []tar.Header{file("../secret")}},
		"deep parent":        {unsafe, []tar.Header{file("a/../../secret")}},
		"link and through":   {escapes, []tar.Header{link(tar.TypeSymlink, "out", ".."), file("out/secret")}},
		"absolute link":      {escapes, []tar.Header{link(tar.TypeSymlink, "out", "/"), file("out/tmp/secret")}},
		"link in the middle": {escapes, []tar.Header{link(tar.TypeSymlink, "a", "../"), file("a/b/c")}},
		"hard link":          {unsafe, []tar.Header{link(tar.TypeLink, "mine", "../secret")}},
		"hard link by a link": {
			escapes,
			[]tar.Header{link(tar.TypeSymlink, "out", ".."), link(tar.TypeLink, "mine", "out/secret")},
		},
		"directory is a link": {
			escapes,
			[]tar.Header{link(tar.TypeSymlink, "out", ".."), {Typeflag: tar.TypeDir, Name: "out/", Mode: 0o777}},
		},
		"device": {
			unsafe,
			[]tar.Header{{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3, Mode: 0o666}},
		},
		"FIFO": {unsafe, []tar.Header{{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o666}}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := unpack(t, archive(t, c.headers...), treetar.Options{Owners: os.Getuid() == 0}); err == nil ||
				!strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
	// A link that was there may be replaced, but is not followed.
	dir, err := unpack(t, archive(t, link(tar.TypeSymlink, "f", "../secret"), file("f"), file("/absolute")),
		treetar.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"f", "absolute"} {
		if fi, err := os.Lstat(filepath.Join(dir, name)); err != nil || !fi.Mode().IsRegular() {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
	dir, err = unpack(t, archive(t, tar.Header{Typeflag: tar.TypeReg, Name: "s", Mode: 0o4755, Uid: 7, Gid: 7}),
		treetar.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "s")); err != nil || fi.Mode() != 0o755 {
		t.Errorf("a set-user-id bit was kept: %v, %v", fi, err)
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, file("a"), tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: ".."}, file("l/x")), "")
	f.Add(archive(f, tar.Header{Typeflag: tar.TypeDir, Name: "top/", Mode: 0o700}, file("top/x")), "new")
	f.Fuzz(func(t *testing.T, data []byte, top string) {
		if len(data) > 1<<16 {
			return
		}
		_, _ = unpack(t, data, treetar.Options{Top: top})
	})
}

// Holes take no room in an archive, and what is between them comes whole; more holes than anybody
// has are refused at once.
func TestPackSparse(t *testing.T) {
	for name, test := range map[string]struct {
		size   int64
		data   map[int64]string
		refuse bool
	}{
		"all a hole": {size: 5 << 20},
		"one byte":   {size: 5<<20 + 1, data: map[int64]string{5 << 20: "x"}},
		"pieces": {
			size: 40 << 20,
			data: map[int64]string{0: "begin", 10 << 20: strings.Repeat("middle", 10_000), 39 << 20: "end"},
		},
		"more than anyone": {size: 1 << 40, data: map[int64]string{0: "x"}, refuse: true},
	} {
		t.Run(name, func(t *testing.T) {
			from := t.TempDir()
			f, err := os.Create(filepath.Join(from, "f"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for at, text := range test.data {
				if _, err := f.WriteAt([]byte(text), at); err != nil {
					t.Fatal(err)
				}
			}
			when := time.Unix(1600000000, 123456789)
			if err := errors.Join(f.Truncate(test.size), os.WriteFile(filepath.Join(from, "z"), []byte("z"), 0o640),
				f.Chmod(0o604), os.Chtimes(f.Name(), when, when)); err != nil {
				t.Fatal(err)
			}
			var b bytes.Buffer
			if err := treetar.Pack(&b, from, ".", treetar.PackOptions{Sparse: true}); err != nil || b.Len() > 1<<20 {
				t.Fatalf("%d bytes, %v", b.Len(), err)
			}
			dir, err := unpack(t, b.Bytes(), treetar.Options{MaxHoles: 64 << 20})
			if test.refuse {
				if !errors.Is(err, treetar.ErrUnsafe) || !strings.Contains(err.Error(), "holes") {
					t.Errorf("got %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want, wantErr := os.ReadFile(f.Name())
			got, gotErr := os.ReadFile(filepath.Join(dir, "f"))
			z, zErr := os.ReadFile(filepath.Join(dir, "z"))
			if err := errors.Join(wantErr, gotErr, zErr); err != nil || !bytes.Equal(got, want) || string(z) != "z" {
				t.Errorf("%d bytes of %d, z is %q, %v", len(got), len(want), z, err)
			}
			if fi, err := os.Stat(filepath.Join(dir, "f")); err != nil || fi.Mode() != 0o604 || !fi.ModTime().Equal(when) {
				t.Errorf("%v, %v", fi, err)
			}
		})
	}
}

// onWrite calls do before the first write.
type onWrite struct {
	bytes.Buffer
	do func()
}

func (w *onWrite) Write(p []byte) (int, error) {
	if w.do != nil {
		w.do()
		w.do = nil
	}
	return w.Buffer.Write(p)
}

// What goes away or changes while it is packed does not spoil the archive.
func TestPack_Changes(t *testing.T) {
	dir := t.TempDir()
	large := bytes.Repeat([]byte("large"), 200_000)
	for name, data := range map[string][]byte{
		"a": []byte("first"), "cut": large, "gone": []byte("gone"),
		"grows": []byte("1"), "z": []byte("last"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Join(dir, "lost/below"), 0o700); err != nil {
		t.Fatal(err)
	}
	w := &onWrite{do: func() {
		err := errors.Join(os.Remove(filepath.Join(dir, "gone")), os.RemoveAll(filepath.Join(dir, "lost")),
			os.WriteFile(filepath.Join(dir, "grows"), []byte("123"), 0o600))
		if err != nil {
			t.Error(err)
		}
	}}
	var left treetar.LeftOut
	cut := 0
	o := treetar.PackOptions{Left: left.Add}
	r, pipe := io.Pipe()
	go func() {
		pipe.CloseWithError(treetar.Pack(io.MultiWriter(pipe, w), dir, ".", o))
	}()
	got := map[string]int{}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "cut" {
			if err := os.Truncate(filepath.Join(dir, "cut"), 600_000); err != nil {
				t.Fatal(err)
			}
			cut = int(h.Size)
		}
		n, err := io.Copy(io.Discard, tr)
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = int(n)
	}
	if diff := cmp.Diff(map[string]int{"a": 5, "cut": len(large), "grows": 3, "z": 4}, got); diff != "" ||
		cut != len(large) {
		t.Error(diff)
	}
	if err := left.Err(); err == nil ||
		err.Error() != `left out "cut": became shorter while it was read, and is filled up with zeros` {
		t.Errorf("got %v", err)
	}
}

// A directory is nobody else's before it has its mode.
func TestUnpack_Private(t *testing.T) {
	seen := fs.FileMode(0)
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	headers := []tar.Header{
		{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755},
		{Typeflag: tar.TypeFifo, Name: "d/f", Mode: 0o600},
	}
	err = treetar.Unpack(bytes.NewReader(archive(t, headers...)), root, treetar.Options{Odd: func(*tar.Header) error {
		fi, err := os.Stat(filepath.Join(dir, "d"))
		seen = fi.Mode().Perm()
		return errors.Join(err, syscall.Mkfifo(filepath.Join(dir, "d/f"), 0o600))
	}})
	if fi, statErr := os.Stat(filepath.Join(dir, "d")); err != nil || statErr != nil || fi.Mode().Perm() != 0o755 ||
		seen != 0o700 {
		t.Errorf("meanwhile %v, then %v, %v, %v", seen, fi, statErr, err)
	}
}
