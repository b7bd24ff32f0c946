package flatten_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/testenv"
)

func blocks(fi os.FileInfo) int64 { return fi.Sys().(*syscall.Stat_t).Blocks }

// A plain tar has no whiteouts.
func TestTarToExt4(t *testing.T) {
	f := target(t)
	plain := tarOf(t, true, dir(".", 0o755), dir(".", 0o711), file(".wh.a", "w"), file("a", "a"))
	for _, how := range []string{"", "gzip", "zstd"} {
		if err := flatten.TarToExt4(t.Context(), bytes.NewReader(pack(t, how, plain)), f); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{". 5 0711 0:0", `.wh.a 0 0644 0:0 "w"`, `a 0 0644 0:0 "a"`}, listing(t, f)); diff != "" {
			t.Errorf("%s: -want +got:\n%s", how, diff)
		}
	}
	var wrong *flatten.EntryError
	if err := flatten.TarToExt4(t.Context(), io.MultiReader(bytes.NewReader(plain)), f); !errors.As(err, &wrong) {
		t.Errorf("%v of what cannot be read twice, want an EntryError", err)
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
		os.Symlink("/d/a", at("s")), unix.Mkfifo(at("fifo"), 0o640), unix.Mknod(at("dev"), unix.S_IFCHR|0o600, int(unix.Mkdev(10, 300))),
		os.Chown(at("b"), 5, 6), unix.Chmod(at("b"), 0o4755), unix.Chmod(at("d"), 0o1777), os.Lchown(at("s"), 7, 8),
		unix.Lsetxattr(at("s"), "trusted.note", []byte("link"), 0), unix.Setxattr(at("d"), "user.note", []byte("dir"), 0),
		unix.Setxattr(at("b"), "security.capability", []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
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
	if err := flatten.DirToExt4(t.Context(), root, f); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil { // takes the socket along
		t.Fatal(err)
	}
	packed, err := exec.CommandContext(t.Context(), "tar", "--xattrs", "--xattrs-include=*", "--sort=name", "--numeric-owner", "-C", dir, "-cf", "-", ".").Output()
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

// Several trees, and single files, stand in one image, each in a directory of its own with what is to be mounted in it.
func TestTreesToExt4(t *testing.T) {
	testenv.Require(t, testenv.Root)
	var trees []flatten.Tree
	for i := range 2 {
		dir := t.TempDir()
		at := func(n string) string { return filepath.Join(dir, n) }
		if err := errors.Join(
			os.Mkdir(at("d"), 0o700), os.Chmod(at("d"), 0o750), os.WriteFile(at("d/a"), fmt.Append(nil, i), 0o600), os.Link(at("d/a"), at("b")), os.Chown(at("d"), 5, 6),
			os.Chtimes(at("d/a"), someTime, someTime), os.Chtimes(at("d"), someTime, someTime), os.Chtimes(dir, someTime, someTime), os.Chmod(dir, 0o711),
		); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		trees = append(trees, flatten.Tree{Root: root, As: fmt.Sprint(i), Live: true})
	}
	trees[0].Dirs = []string{"d/deep/er", "d/deep", "d", "other", "b"}
	trees = append(trees, flatten.Tree{Root: trees[0].Root, As: "2", File: "b", Name: "file"})
	f := target(t)
	if err := flatten.TreesToExt4(t.Context(), trees, f); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"0 5 0711 0:0", "0/b 0 0600 0:0 \"0\"", "0/d 5 0750 5:6", "0/d/a = 0/b", "0/d/deep 5 0755 0:0", "0/d/deep/er 5 0755 0:0", "0/other 5 0755 0:0",
		"1 5 0711 0:0", "1/b 0 0600 0:0 \"1\"", "1/d 5 0750 5:6", "1/d/a = 1/b", "2 5 0755 0:0", "2/file 0 0600 0:0 \"0\"",
	}
	got := slices.DeleteFunc(listing(t, f), func(line string) bool { return strings.HasPrefix(line, ". ") })
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	trees[1].File = "none"
	if err := flatten.TreesToExt4(t.Context(), trees, f); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
