package volume_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

func blank(t *testing.T, kind string, size int64) string {
	t.Helper()
	testenv.Fixture(t, map[string]fixtures.Name{"ext4": fixtures.MkfsExt4, "xfs": fixtures.MkfsXFS}[kind])
	path := filepath.Join(t.TempDir(), "disk")
	if err := volume.Blank(t.Context(), path, kind, size); err != nil {
		t.Fatal(err)
	}
	return path
}

// fsck fails the test where e2fsck finds anything wrong.
func fsck(t *testing.T, path string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "e2fsck", "-fn", path)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if cmd.Path == "e2fsck" {
		cmd.Path, cmd.Err = "/usr/sbin/e2fsck", nil
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("e2fsck %s: %v\n%s", path, err, out)
	}
}

func TestBlank(t *testing.T) {
	for kind, size := range map[string]int64{"ext4": 4 << 30, "xfs": 1 << 30} {
		t.Run(kind, func(t *testing.T) {
			path := blank(t, kind, size)
			fi, err := os.Stat(path)
			if err != nil || fi.Size() != size {
				t.Fatalf("%v, %v, want %d bytes", fi, err, size)
			}
			if got, err := volume.Detect(path); got != kind || err != nil {
				t.Errorf("it is %q, %v", got, err)
			}
			used := fi.Sys().(*syscall.Stat_t).Blocks * 512
			if used > size/8 {
				t.Errorf("it takes %d bytes", used)
			}
			if kind == "ext4" {
				if used > 1<<20 {
					t.Errorf("an empty ext4 takes %d bytes: each VM has one", used)
				}
				fsck(t, path)
			}
			if err := volume.Blank(t.Context(), path, kind, size); !errors.Is(err, fs.ErrExist) {
				t.Errorf("made twice: %v", err)
			}
			wantAlone(t, path)
		})
	}
}

// wantAlone fails the test where there is anything but path in its directory.
func wantAlone(t *testing.T, path string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 || entries[0].Name() != filepath.Base(path) {
		t.Errorf("there is %v, %v", entries, err)
	}
}

func TestBlank_Refused(t *testing.T) {
	dir := t.TempDir()
	for name, make := range map[string]func(string) error{
		"small":   func(p string) error { return volume.Blank(t.Context(), p, "ext4", 1) },
		"xfs":     func(p string) error { return volume.Blank(t.Context(), p, "xfs", 64<<20) },
		"huge":    func(p string) error { return volume.Blank(t.Context(), p, "ext4", volume.MaxSize+1) },
		"unknown": func(p string) error { return volume.Blank(t.Context(), p, "ntfs", 1<<30) },
	} {
		if err := make(filepath.Join(dir, name)); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%s: %v, want fs.ErrInvalid", name, err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestClone(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	content := append(make([]byte, 1<<20), []byte("end")...)
	if err := os.WriteFile(source, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := volume.Clone(t.Context(), source, target, volume.Options{}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(target)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("the clone differs: %v", err)
	}
	if err := volume.Clone(t.Context(), source, target, volume.Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file: %v", err)
	}
	if err := volume.Clone(t.Context(), filepath.Join(dir, "none"), filepath.Join(dir, "x"),
		volume.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestResize(t *testing.T) {
	path := blank(t, "ext4", 64<<20)
	for _, size := range []int64{256 << 20, 32 << 20} {
		if err := volume.Resize(t.Context(), path, size, volume.Options{}); err != nil {
			t.Fatalf("to %d: %v", size, err)
		}
		if fi, err := os.Stat(path); err != nil || fi.Size() != size {
			t.Errorf("it is %v, %v, want %d bytes", fi, err, size)
		}
		fsck(t, path)
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		blocks := int64(binary.LittleEndian.Uint32(data[1024+4:])) << (10 + binary.LittleEndian.Uint32(data[1024+0x18:]))
		if blocks != size {
			t.Errorf("the file system has %d bytes, want %d", blocks, size)
		}
	}
	if err := volume.Resize(t.Context(), path, 1<<20, volume.Options{}); err == nil ||
		!strings.Contains(err.Error(), "resize2fs") {
		t.Errorf("below what is in it: %v", err)
	}
	fsck(t, path)
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := volume.Resize(t.Context(), other, 2<<20, volume.Options{}); !errors.Is(err, volume.ErrFormat) {
		t.Errorf("of no file system: %v", err)
	}
}

// What was deleted on a disk takes nothing on the host any more, and what is there stays.
func TestTrim(t *testing.T) {
	path := blank(t, "ext4", 256<<20)
	content := bytes.Repeat([]byte("smartvm "), 8<<20)
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "big"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	const small = 1 << 20
	if got := allocated(t, path); got > small {
		t.Errorf("empty, it takes %d bytes", got)
	}
	debugfs(t, path, "write big kept")
	debugfs(t, path, "write big big")
	debugfs(t, path, "rm big")
	full := allocated(t, path)
	if full < 2*int64(len(content)) {
		t.Errorf("before, it takes %d bytes", full)
	}
	freed, err := volume.Trim(t.Context(), path, volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	got := allocated(t, path)
	if over := got - int64(len(content)); over < 0 || over > small || freed != full-got {
		t.Errorf("it takes %d bytes of %d, for a file of %d; freed %d", got, full, len(content), freed)
	}
	fsck(t, path)
	if out := debugfs(t, path, "cat kept"); !bytes.Contains(out, content) {
		t.Error("the file that was kept is another")
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, content, 0o600); err != nil {
		t.Fatal(err)
	}
	full = allocated(t, other)
	if _, err := volume.Trim(t.Context(), other, volume.Options{}); !errors.Is(err, volume.ErrFormat) ||
		allocated(t, other) != full {
		t.Errorf("of no file system: %v, it takes %d bytes of %d", err, allocated(t, other), full)
	}
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// debugfs changes an ext4 without mounting it.
func debugfs(t *testing.T, path, command string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "debugfs", "-w", "-R", command, filepath.Base(path))
	if cmd.Path == "debugfs" {
		cmd.Path, cmd.Err = "/usr/sbin/debugfs", nil
	}
	cmd.Dir = filepath.Dir(path) // its name may have blanks, which debugfs does not take
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v", command, err)
	}
	return out
}

func TestDetect_CutOff(t *testing.T) {
	path := blank(t, "ext4", 16<<20)
	if err := os.Truncate(path, 8<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := volume.Detect(path); !errors.Is(err, volume.ErrFormat) {
		t.Errorf("half an ext4: %v", err)
	}
}

// An ext4 is told from what only has its two bytes of magic where an ext4 has them, as each
// 65,536th compressed archive does.
func TestDetect(t *testing.T) {
	ext4, err := os.ReadFile(blank(t, "ext4", 16<<20))
	if err != nil {
		t.Fatal(err)
	}
	superblock := ext4[1024:2048]
	content := bytes.Repeat([]byte("smartvm "), 1<<10)
	copy(content[512:], superblock) // in a tar it comes after the header
	var archive, plain, zipped bytes.Buffer
	tw := tar.NewWriter(&archive)
	if err := errors.Join(tw.WriteHeader(&tar.Header{Name: "a", Size: int64(len(content)), Mode: 0o644}),
		second(tw.Write(content)), tw.Close()); err != nil {
		t.Fatal(err)
	}
	gz, err := gzip.NewWriterLevel(&zipped, gzip.NoCompression)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(second(gz.Write(ext4[:8<<10])), gz.Close()); err != nil {
		t.Fatal(err)
	}
	at := bytes.Index(zipped.Bytes(), superblock[:0x60])
	if at < 1024 {
		t.Fatalf("the superblock is at %d", at)
	}
	moved := append(bytes.Clone(zipped.Bytes()[:10]), zipped.Bytes()[10+at-1024:]...) // to where an ext4 has it
	plain.Write(bytes.Repeat([]byte{'x'}, 8<<10))
	copy(plain.Bytes()[1024+0x38:], "\x53\xef")
	with := func(begin string, data []byte) []byte { return append([]byte(begin), data[len(begin):]...) }
	field := func(offset int, value uint32) []byte {
		data := bytes.Clone(ext4)
		binary.LittleEndian.PutUint32(data[1024+offset:], value)
		return data
	}
	for name, tt := range map[string]struct {
		data []byte
		want string
	}{
		"ext4": {ext4, "ext4"}, "ext4 with a boot sector": {with("\xeb\x63\x90", ext4), "ext4"},
		"tar": {archive.Bytes(), ""}, "gzip": {moved, ""}, "text": {plain.Bytes(), ""},
		"zstd": {with("\x28\xb5\x2f\xfd", ext4), ""}, "zstd, skipped": {with("\x53\x2a\x4d\x18", ext4), ""},
		"xz": {with("\xfd7zXZ\x00", ext4), ""}, "bzip2": {with("BZh9", ext4), ""},
		"revision": {field(0x4c, 2), ""}, "features": {field(0x60, 1<<31), ""}, "blocks": {field(0x18, 7), ""},
		"groups": {field(0x20, 0), ""},
	} {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, tt.data, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := volume.Detect(path); got != tt.want || err != nil {
			t.Errorf("%s: %q, %v, want %q", name, got, err, tt.want)
		}
	}
}

func second(_ int, err error) error { return err }

func TestNeedsRecovery(t *testing.T) {
	path := blank(t, "ext4", 16<<20)
	if got, err := volume.NeedsRecovery(path); got || err != nil {
		t.Errorf("a new one: %v, %v", got, err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[1024+0x60] |= 0x4
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := volume.NeedsRecovery(path); !got || err != nil {
		t.Errorf("one whose journal is not replayed: %v, %v", got, err)
	}
}

func FuzzDetect(f *testing.F) {
	head := make([]byte, 66000)
	for at, magic := range map[int]string{
		0: "hsqs", 1024: "\xe2\xe1\xf5\xe0", 1024 + 0x38: "\x53\xef",
		65536 + 0x40: "_BHRfS_M",
	} {
		seed := bytes.Clone(head)
		copy(seed[at:], magic)
		f.Add(seed)
		f.Add(seed[:at+len(magic)])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		kind, err := volume.Detect(path)
		if err != nil && !errors.Is(err, volume.ErrFormat) || err != nil && kind != "" {
			t.Errorf("%q, %v", kind, err)
		}
	})
}

func TestStore(t *testing.T) {
	testenv.Fixture(t, fixtures.MkfsExt4)
	s, err := volume.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	// Several at once get the same.
	var wg sync.WaitGroup
	paths := make([]string, 8)
	for i := range paths {
		wg.Go(func() {
			path, err := s.Named(t.Context(), "db", 64<<20)
			if err != nil {
				t.Error(err)
			}
			if _, err := s.Blank(t.Context(), 32<<20); err != nil {
				t.Error(err)
			}
			paths[i] = path
		})
	}
	wg.Wait()
	for _, path := range paths {
		if path != paths[0] {
			t.Errorf("%q is not %q", path, paths[0])
		}
	}
	// One that is there is not made anew.
	if err := os.WriteFile(paths[0], []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if path, err := s.Named(t.Context(), "db", 64<<20); err != nil || path != paths[0] {
		t.Errorf("%q, %v", path, err)
	}
	all, err := s.List()
	if err != nil || len(all) != 1 || all[0].Name != "db" || all[0].Size != 4 {
		t.Errorf("%+v, %v, want db with what was written", all, err)
	}
	if err := s.Remove("db", volume.Options{}); err != nil {
		t.Error(err)
	}
	if err := s.Remove("db", volume.Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed twice: %v", err)
	}
	for _, name := range []string{"", "../x", "a/b", ".hidden", strings.Repeat("a", 65)} {
		if _, err := s.Named(t.Context(), name, 64<<20); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("a disk called %q: %v", name, err)
		}
	}
}
