package flatten_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/stream"
	"push.rocks/smartvm/internal/testenv"
)

func blocks(fi os.FileInfo) int64 { return fi.Sys().(*syscall.Stat_t).Blocks }

// A plain tar has no whiteouts.
func TestTarToExt4(t *testing.T) {
	f := target(t)
	plain := tarOf(t, true, dir(".", 0o755), dir(".", 0o711), file(".wh.a", "w"), file("a", "a"))
	for _, how := range []string{"", "gzip", "zstd"} {
		if err := flatten.TarToExt4(t.Context(), bytes.NewReader(pack(t, how, plain)), f, flatten.Limits{}); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{". 5 0711 0:0", `.wh.a 0 0644 0:0 "w"`, `a 0 0644 0:0 "a"`}, listing(t, f)); diff != "" {
			t.Errorf("%s: -want +got:\n%s", how, diff)
		}
	}
}

// A tar becomes what GNU tar makes of it. It is read once.
func TestTarToExt4_LikeTar(t *testing.T) {
	testenv.Require(t, testenv.Root)
	for name, entries := range map[string][]ent{
		"a file below a link to a directory": {
			dir("usr", 0o755), dir("usr/lib", 0o755), file("usr/lib/ld.so", "ld"), symlink("lib", "usr/lib"),
			dir("usr/lib/firmware", 0o755),
			file("lib/firmware/a", "a"), file("lib/b", "b"), link("hard", "lib/ld.so"),
		},
		"a name twice": {
			dir("d", 0o755), file("d/a", "old"), file("b", "old"), link("c", "b"), file("d/a", "new"), file("b", "new"),
			symlink("e", "b"), file("e", "file"),
		},
		"a directory in place of a link": {
			dir("d", 0o755), file("d/a", "a"), symlink("s", "d"), dir("s", 0o711),
			file("s/b", "b"),
		},
		"a type that nobody knows": {{tar.Header{Typeflag: 'Z', Name: "z", Mode: 0o644}, ""}, file("a", "a")},
		"whiteouts are files":      {file("a", "a"), file(".wh.a", "w"), dir(".wh..wh..opq", 0o755)},
	} {
		t.Run(name, func(t *testing.T) {
			all := append([]ent{dir(".", 0o755)}, entries...)
			tmp := t.TempDir()
			content := tarOf(t, true, all...)
			cmd := exec.CommandContext(t.Context(), "tar", "-x", "-p", "-C", tmp)
			cmd.Stdin = bytes.NewReader(content)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			out, err := exec.CommandContext(t.Context(), "tar", "--sort=name", "--numeric-owner", "-C", tmp, "-cf",
				"-", ".").Output()
			if err != nil {
				t.Fatal(err)
			}
			want := describe(t, bytes.NewReader(out))
			for i, line := range want { // tar has written into a directory after its entry
				want[i] = regexp.MustCompile(`^(\S+ 5 .*) \S+Z$`).ReplaceAllString(line, "$1")
			}
			f := target(t)
			if err := flatten.TarToExt4(t.Context(), io.MultiReader(bytes.NewReader(pack(t, "zstd", content))), f,
				flatten.Limits{}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, listing(t, f)); diff != "" {
				t.Errorf("-tar +ours:\n%s", diff)
			}
			if left, err := os.ReadDir(filepath.Dir(f.Name())); err != nil || len(left) != 1 {
				t.Errorf("%v is left: %v", left, err)
			}
		})
	}
}

// What is no whole tar is refused, and says what it is.
func TestTarToExt4_NoTar(t *testing.T) {
	whole := tarOf(t, true, file("a", "a"), file("b", ""), file("c", string(make([]byte, 1000))))
	iso := append(make([]byte, 32<<10), "\x01CD001"...)
	for _, c := range []struct {
		name    string
		content []byte
		want    error
	}{
		{"a whole one", whole, nil},
		{"with one block of its end", whole[:len(whole)-512], nil},
		{"empty", nil, flatten.ErrEmpty},
		{"no entries", tarOf(t, true), flatten.ErrEmpty},
		{"zeros", make([]byte, 1<<20), flatten.ErrEmpty},
		{"an ISO image", iso, flatten.ErrEmpty},
		{"packed nothing", pack(t, "gzip", nil), flatten.ErrEmpty},
		{"cut between entries", whole[:1024], flatten.ErrCut},
		{"cut after an empty file", whole[:1536], flatten.ErrCut},
		{"cut before its end", whole[:len(whole)-1024], flatten.ErrCut},
		{"cut in a header", whole[:1100], io.ErrUnexpectedEOF},
		{"cut in a file", whole[:len(whole)-1300], io.ErrUnexpectedEOF},
		{"text", []byte("no tar"), io.ErrUnexpectedEOF},
		{"more text", bytes.Repeat([]byte("no tar "), 1000), tar.ErrHeader},
		{"lz4", append([]byte("\x04\x22\x4d\x18"), whole...), stream.ErrPacking},
		{"qcow2", append([]byte("QFI\xfb"), whole...), stream.ErrPacking},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := flatten.TarToExt4(t.Context(), bytes.NewReader(c.content), target(t),
				flatten.Limits{}); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

// Every packing that people use, by the programs that make it.
func TestTarToExt4_Packed(t *testing.T) {
	random := make([]byte, 3<<20)
	if _, err := rand.NewChaCha8([32]byte{}).Read(random); err != nil {
		t.Fatal(err)
	}
	for _, tool := range []fixtures.Name{fixtures.Bzip2, fixtures.XZ, fixtures.Zstd} {
		testenv.Fixture(t, tool)
	}
	whole := tarOf(t, true, file("BZh91AY", "a name like a magic number"), file("a", string(random)))
	for _, c := range []struct {
		program string
		want    error
	}{
		{"cat", nil},
		{"gzip", nil},
		{"bzip2", nil},
		{"xz -9", nil},
		{"xz --lzma2=dict=128MiB", nil},
		{"xz --lzma2=dict=256MiB", stream.ErrPacking},
		{"zstd", nil},
		{"zstd --long", nil},
		{"zstd --ultra -22", nil},
		{"zstd --long=31", stream.ErrPacking},
		{`sh -c '{ printf "\120\052\115\030\002\000\000\000hi"; zstd; }'`, nil}, // a skippable frame, as of pzstd
	} {
		t.Run(c.program, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "sh", "-c", c.program)
			cmd.Stdin = io.MultiReader(bytes.NewReader(whole)) // a pipe: its size is not known
			packed, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			f := target(t)
			if err := flatten.TarToExt4(t.Context(), io.MultiReader(bytes.NewReader(packed)), f,
				flatten.Limits{}); !errors.Is(err, c.want) {
				t.Fatalf("%v, want %v", err, c.want)
			}
			if c.want == nil {
				fsck(t, f)
			}
		})
	}
}

// Files are one by device and inode: what is mounted over a file of the tree may have the inode
// number of another.
func TestDirToExt4_Mounted(t *testing.T) {
	testenv.Require(t, testenv.Root)
	if os.Getenv("FLATTEN_TREE") == "" {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-euc", `cd "$0"; mkdir A B; mount -t tmpfs a A; mount -t tmpfs b B
			echo one >A/m; echo two >B/two; echo three >B/three; touch A/x A/y; ln A/m A/z; ln B/two B/2
			test $(stat -c %i A/m) = $(stat -c %i B/two); mount --bind B/two A/x; mount --bind B/three A/y
			FLATTEN_TREE=$0/A exec "$1" -test.run '^TestDirToExt4_Mounted$' -test.v`, t.TempDir(), self)
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	root, err := os.OpenRoot(os.Getenv("FLATTEN_TREE"))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	f := target(t)
	if err := flatten.DirToExt4(t.Context(), root, f, flatten.Limits{}); err != nil {
		t.Fatal(err)
	}
	fsck(t, f)
	got := string(mounted(t, f, `cd "$1"; cat m x y z; stat -c %h x; test m -ef z; test ! m -ef x`))
	if want := "one\ntwo\nthree\none\n1\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// What ext4 cannot hold is refused with the path, the limit and what to do about it; what it can
// hold is not.
func TestTooMuchForExt4(t *testing.T) {
	many := func(first ent, n int, next func(name string) ent) []ent {
		all := []ent{dir("d", 0o755), first}
		for i := range n {
			all = append(all, next(fmt.Sprintf("d/%d", i)))
		}
		return all
	}
	xattr := func(size int) []ent {
		f := file("d/f", "")
		f.PAXRecords = map[string]string{"SCHILY.xattr.user.a": strings.Repeat("x", size)}
		return []ent{f}
	}
	for _, c := range []struct {
		name    string
		entries []ent
		want    string // of the error
	}{
		{"65,001 directories", many(file("d/f", ""), 65_001, func(name string) ent { return dir(name, 0o700) }), ""},
		{"65,000 links", many(file("d/f", ""), 64_999, func(name string) ent { return link(name, "d/f") }), ""},
		{"65,001 links", many(file("d/f", ""), 65_000, func(name string) ent {
			return link(name, "d/f")
		}), `"d/f": more than 65000 hard links`},
		{"4,000 bytes of attributes", xattr(4000), ""},
		{
			"5,000 bytes of attributes", xattr(5000),
			`"d/f": 5023 bytes of extended attributes, where ext4 can hold 4032: remove some`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := target(t)
			err := flatten.TarToExt4(t.Context(), bytes.NewReader(tarOf(t, true, c.entries...)), f, flatten.Limits{})
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				fsck(t, f)
				return
			}
			var wrong *flatten.EntryError
			if !errors.As(err, &wrong) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %s", err, c.want)
			}
		})
	}
}

// Of a directory the error has the file's own path.
func TestDirToExt4_NamesTheFile(t *testing.T) {
	tmp := t.TempDir()
	if err := os.WriteFile(tmp+"/lost+found", []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(tmp)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var wrong *flatten.EntryError
	if err := flatten.DirToExt4(t.Context(), root, target(t), flatten.Limits{}); !errors.As(err, &wrong) ||
		wrong.Name != tmp+"/lost+found" || !wrong.IsFile {
		t.Errorf("%v, want it to name %s", err, tmp+"/lost+found")
	}
	if err := os.Rename(tmp+"/lost+found", tmp+"/f"); err != nil {
		t.Fatal(err)
	}
	if err := flatten.DirToExt4(t.Context(), root, target(t), flatten.Limits{MaxBytes: 5}); err != nil {
		t.Error(err)
	}
	var over *flatten.LimitError
	if err := flatten.DirToExt4(t.Context(), root, target(t), flatten.Limits{MaxBytes: 4}); !errors.As(err, &over) ||
		over.Limit != 4 || over.Hint() == "" {
		t.Errorf("%v, want the limit of 4 bytes and how to raise it", err)
	}
}

// A directory tree and its image are the same to tar.
func TestDirToExt4(t *testing.T) {
	testenv.Require(t, testenv.Root)
	dir := t.TempDir()
	at := func(n string) string { return filepath.Join(dir, n) }
	l, err := net.Listen("unix", testenv.Socket(t, at("socket")))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = errors.Join(
		os.Mkdir(at("d"), 0o700), os.WriteFile(at("d/a"), []byte("a"), 0o600), os.Link(at("d/a"), at("b")),
		os.Symlink("/d/a", at("s")), unix.Mkfifo(at("fifo"), 0o640),
		unix.Mknod(at("dev"), unix.S_IFCHR|0o600, int(unix.Mkdev(10, 300))),
		os.Chown(at("b"), 5, 6), unix.Chmod(at("b"), 0o4755), unix.Chmod(at("d"), 0o1777), os.Lchown(at("s"), 7, 8),
		unix.Lsetxattr(at("s"), "trusted.note", []byte("link"), 0), unix.Setxattr(at("d"), "user.note", []byte("dir"), 0),
		unix.Setxattr(at("b"), "security.capability",
			[]byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
		os.WriteFile(at("sparse"), nil, 0o600), os.Truncate(at("sparse"), 3<<20),
	)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	f := target(t)
	if err := flatten.DirToExt4(t.Context(), root, f, flatten.Limits{}); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil { // takes the socket along
		t.Fatal(err)
	}
	packed, err := exec.CommandContext(t.Context(), "tar", "--xattrs", "--xattrs-include=*", "--sort=name",
		"--numeric-owner", "-C", dir, "-cf", "-", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	want, got := describe(t, bytes.NewReader(packed)), listing(t, f)
	// The root's time changed with the socket.
	if diff := cmp.Diff(want[1:], got[1:]); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if len(want) != 8 {
		t.Errorf("%d names: %q", len(want), want)
	}
}
