package ext4_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/ext4"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

var plenty = ext4.Limits{Bytes: 1 << 30, Entries: 1 << 20}

// archive reads a file system.
func archive(t testing.TB, r io.ReaderAt) ([]byte, error) {
	t.Helper()
	f, err := ext4.Open(r)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	err = errors.Join(f.Tar(t.Context(), w, plenty), w.Close())
	return out.Bytes(), err
}

// described is what is compared of a file.
func described(h *tar.Header, content []byte) string {
	attributes := map[string]string{}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			attributes[name] = v
		}
	}
	return fmt.Sprintf("%c %o %d:%d %d %s %d:%d %v %d %x", h.Typeflag, h.Mode, h.Uid, h.Gid, h.ModTime.Unix(), h.Linkname,
		h.Devmajor, h.Devminor, attributes, len(content), sum(content))
}

func sum(content []byte) (n uint64) {
	for _, b := range content {
		n = n*31 + uint64(b)
	}
	return n
}

func inTar(t testing.TB, text []byte) map[string]string {
	t.Helper()
	all := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(text)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimSuffix(h.Name, "/")] = described(h, content)
	}
}

// inDir describes a directory as an archive of it would.
func inDir(t testing.TB, dir string) map[string]string {
	t.Helper()
	all, first := map[string]string{}, map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		h := &tar.Header{
			Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid), ModTime: fi.ModTime(),
			PAXRecords: map[string]string{},
		}
		var content []byte
		kinds := map[fs.FileMode]byte{
			0: tar.TypeReg, fs.ModeDir: tar.TypeDir, fs.ModeSymlink: tar.TypeSymlink, fs.ModeNamedPipe: tar.TypeFifo,
			fs.ModeDevice: tar.TypeBlock, fs.ModeDevice | fs.ModeCharDevice: tar.TypeChar,
		}
		h.Typeflag = kinds[fi.Mode().Type()]
		switch h.Typeflag {
		case tar.TypeReg:
			content, err = os.ReadFile(path)
		case tar.TypeSymlink:
			h.Linkname, err = os.Readlink(path)
		case tar.TypeBlock, tar.TypeChar:
			h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		}
		if err != nil {
			return err
		}
		if to := first[st.Ino]; to != "" && !d.IsDir() {
			h.Typeflag, h.Linkname, content = tar.TypeLink, to, nil
		} else {
			buf := make([]byte, 8192)
			for _, attr := range []string{"user.a", "user.b", "security.capability"} {
				if n, err := unix.Lgetxattr(path, attr, buf); err == nil {
					h.PAXRecords["SCHILY.xattr."+attr] = string(buf[:n])
				}
			}
		}
		first[st.Ino] = name
		all[name] = described(h, content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// sample fills a directory with what file systems store in different ways.
func sample(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "sample")
	put := func(name string, content []byte) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755),
			os.WriteFile(filepath.Join(dir, name), content, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	put("empty", nil)
	put("small", []byte("small"))
	put("large", bytes.Repeat([]byte("0123456789abcdef"), 300<<10/16))
	put("a/b/c/deep", []byte("deep"))
	put("setuid", []byte("s"))
	for n := range 300 {
		put(fmt.Sprintf("many/%0100d", n), fmt.Append(nil, n))
	}
	f, err := os.Create(filepath.Join(dir, "holes"))
	if err != nil {
		t.Fatal(err)
	}
	for n := range int64(40) { // more pieces than an inode has room for
		_, werr := f.WriteAt([]byte("piece"), n*100<<10)
		err = errors.Join(err, werr)
	}
	err = errors.Join(err, f.Truncate(5<<20), f.Close(),
		os.Link(filepath.Join(dir, "small"), filepath.Join(dir, "z-small")),
		os.Symlink("small", filepath.Join(dir, "short")),
		os.Symlink(strings.Repeat("long/", 100), filepath.Join(dir, "long")),
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600),
		os.Chmod(filepath.Join(dir, "setuid"), 0o755|fs.ModeSetuid|fs.ModeSticky),
		os.Chtimes(filepath.Join(dir, "small"), time.Time{}, time.Unix(5_000_000_000, 0)))
	if err == nil && os.Geteuid() == 0 {
		err = errors.Join(unix.Mknod(filepath.Join(dir, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
			unix.Mknod(filepath.Join(dir, "disk"), unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))),
			os.Lchown(filepath.Join(dir, "long"), 70000, 80000))
	}
	if err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		capability := append([]byte{1, 0, 0, 2, 0, 4}, make([]byte, 14)...) // CAP_NET_BIND_SERVICE
		if err := unix.Setxattr(filepath.Join(dir, "setuid"), "security.capability", capability, 0); err != nil &&
			!errors.Is(err, unix.ENOTSUP) {
			t.Fatal(err)
		}
	}
	for name, size := range map[string]int{"user.a": 10, "user.b": 300} {
		if err := unix.Setxattr(filepath.Join(dir, "large"), name, bytes.Repeat([]byte("x"), size), 0); err != nil &&
			!errors.Is(err, unix.ENOTSUP) {
			t.Fatal(err)
		}
	}
	return dir
}

func TestTar(t *testing.T) {
	dir := sample(t)
	want := inDir(t, dir)
	delete(want, ".") // mkfs.ext4 has its own idea of the root's time
	for name, text := range want {
		want[name] = strings.ReplaceAll(text, " 5000000000 ", " 705032704 ") // mkfs.ext4 -d has 32 bits for it
	}
	for _, options := range []string{
		"", "-b 1024", "-b 65536", "-I 128", "-O ^extent,^64bit,^huge_file",
		"-O ^extent,^64bit -b 1024", "-O ^filetype", "-O ^metadata_csum,^dir_index",
	} {
		image := filepath.Join(t.TempDir(), "image")
		args := append(strings.Fields(options), "-q", "-F", "-d", dir, image, "64M")
		if out, err := exec.CommandContext(t.Context(), testenv.Fixture(t, fixtures.MkfsExt4),
			args...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", options, err, out)
			continue
		}
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		text, err := archive(t, f)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Errorf("%s: %v", options, err)
			continue
		}
		got := inTar(t, text)
		delete(got, ".")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s:\n%s", options, diff)
		}
	}
}

// Room that a file has and that was never written reads as zeros, whatever is on the disk there.
func TestTar_Unwritten(t *testing.T) {
	dir := sample(t)
	want := inDir(t, dir)["holes"]
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, bytes.Repeat([]byte{0xff}, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	mkfs := testenv.Fixture(t, fixtures.MkfsExt4)
	if out, err := exec.CommandContext(t.Context(), mkfs, "-q", "-F", "-E", "nodiscard", "-d", dir,
		image).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(filepath.Dir(mkfs), "debugfs"), "-w", "-R",
		"fallocate holes 0 1279", "image")
	cmd.Dir = filepath.Dir(image)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	text, err := archive(t, f)
	if err != nil {
		t.Fatal(err)
	}
	if got := inTar(t, text)["holes"]; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// What images are made of comes back as it was, and the second time to the byte.
func TestTar_Own(t *testing.T) {
	make := func(from io.Reader) *os.File {
		t.Helper()
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		if err := flatten.TarToExt4(t.Context(), from, f, flatten.Limits{}); err != nil {
			t.Fatal(err)
		}
		return f
	}
	dir := sample(t)
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := flatten.DirToExt4(t.Context(), root, f, flatten.Limits{}); err != nil {
		t.Fatal(err)
	}
	first, err := archive(t, f)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(inDir(t, dir), inTar(t, first)); diff != "" {
		t.Error(diff)
	}
	second, err := archive(t, make(bytes.NewReader(first)))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Errorf("the second archive differs:\n%s", cmp.Diff(inTar(t, first), inTar(t, second)))
	}
}

func TestTar_Refused(t *testing.T) {
	var image bytes.Buffer
	w := tar.NewWriter(&image)
	for _, name := range []string{"a", "b", "c"} {
		if err := errors.Join(w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: 1000}),
			ignore(w.Write(make([]byte, 1000)))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := flatten.TarToExt4(t.Context(), &image, f, flatten.Limits{}); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	set := func(at int, values ...byte) []byte {
		changed := bytes.Clone(whole)
		copy(changed[at:], values)
		return changed
	}
	for name, c := range map[string]struct {
		image []byte
		want  error
	}{
		"nothing":     {nil, io.EOF},
		"no magic":    {set(1024+0x38, 0), ext4.ErrFormat},
		"a feature":   {set(1024+0x61, 0xff), ext4.ErrFormat},
		"no replay":   {set(1024+0x60, whole[1024+0x60]|4), ext4.ErrFormat},
		"huge blocks": {set(1024+0x18, 200), ext4.ErrFormat},
		"no inodes":   {set(1024+0x28, 0, 0, 0, 0), ext4.ErrFormat},
		"cut off":     {whole[:8192], io.EOF},
	} {
		if _, err := archive(t, bytes.NewReader(c.image)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	fs, err := ext4.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []ext4.Limits{{Bytes: 2999, Entries: 4}, {Bytes: 3000, Entries: 3}} {
		if err := fs.Tar(t.Context(), tar.NewWriter(io.Discard), l); !errors.Is(err, ext4.ErrTooLarge) {
			t.Errorf("%+v: %v", l, err)
		}
	}
	if err := fs.Tar(t.Context(), tar.NewWriter(io.Discard), ext4.Limits{Bytes: 3000, Entries: 4}); err != nil {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := fs.Tar(ended, tar.NewWriter(io.Discard), plenty); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func ignore(_ int, err error) error { return err }

// Whatever is in a file system, reading it ends, with bounds.
func FuzzTar(f *testing.F) {
	dir := f.TempDir()
	for n, options := range []string{"", "-b 1024 -O ^extent,^64bit"} {
		image := filepath.Join(dir, fmt.Sprint(n))
		src := filepath.Join(dir, fmt.Sprint("src", n))
		if err := errors.Join(os.MkdirAll(filepath.Join(src, "d"), 0o755),
			os.WriteFile(filepath.Join(src, "d/f"), make([]byte, 50000), 0o600),
			os.Symlink("f", filepath.Join(src, "d/l"))); err != nil {
			f.Fatal(err)
		}
		args := append(strings.Fields(options), "-q", "-F", "-N", "32", "-O", "^has_journal,^resize_inode", "-d", src,
			image, "256k")
		if out, err := exec.Command(testenv.Fixture(f, fixtures.MkfsExt4), args...).CombinedOutput(); err != nil {
			f.Fatalf("%v\n%s", err, out)
		}
		text, err := os.ReadFile(image)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		if r, err := ext4.Open(bytes.NewReader(image)); err == nil {
			_ = r.Tar(t.Context(), tar.NewWriter(io.Discard), ext4.Limits{Bytes: 1 << 20, Entries: 100})
		}
	})
}
