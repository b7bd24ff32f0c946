package share_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/spec"
)

// copies are what a guest finds in the volume at source, by name, and what was said of it. It wants
// an image to be made of it, too.
func copies(t *testing.T, source string) (map[string]string, map[string]*tar.Header, string) {
	t.Helper()
	var archive, log bytes.Buffer
	i := &share.Image{
		Path: filepath.Join(t.TempDir(), "volumes"), Volumes: []spec.Volume{{Source: source, Target: "/d"}},
		Log: slog.New(slog.NewTextHandler(&log, nil)),
	}
	if err := i.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	said := log.String()
	if err := i.Archive(t.Context(), &archive); err != nil {
		t.Fatal(err)
	}
	files, headers := map[string]string{}, map[string]*tar.Header{}
	for r := tar.NewReader(&archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, headers, said
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(h.Name, "0/")
		switch headers[name] = h; h.Typeflag {
		case tar.TypeDir:
		case tar.TypeReg:
			files[name] = string(text)
		default:
			files[name] = string(h.Typeflag) + " " + strings.TrimPrefix(h.Linkname, "0/")
		}
	}
}

// says wants one line that has all of the texts.
func says(t *testing.T, got string, texts ...string) {
	t.Helper()
	if strings.Count(got, "\n") != 1 {
		t.Errorf("not one line: %s", got)
	}
	for _, text := range texts {
		if !strings.Contains(got, text) {
			t.Errorf("%q does not say %q", got, text)
		}
	}
}

// inMemory is a directory on tmpfs, if there is one.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "share")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// What an ordinary user cannot read below -v is left out, with one warning; the rest is copied.
func TestImage_Unreadable(t *testing.T) {
	top := asUser(t, func(string) {})
	if top == "" {
		return
	}
	put(t, top, map[string]string{"p/a": "a", "p/secret": "s", "p/pg/data": "d", "p/z": "z"})
	chmod(t, top, map[string]fs.FileMode{"p/secret": 0, "p/pg": 0})
	files, headers, said := copies(t, top+"/p")
	if diff := cmp.Diff(map[string]string{"a": "a", "z": "z"}, files); diff != "" {
		t.Error(diff)
	}
	if h := headers["pg/"]; h == nil || h.Mode != 0 {
		t.Errorf("the directory that cannot be read is %+v", h)
	}
	says(t, said, "-v "+top+"/p:/d", "pg: permission denied", "secret: permission denied", "count=2", "readable")
	chmod(t, top, map[string]fs.FileMode{"p/secret": 0o600, "p/pg": 0o700})
	files, _, said = copies(t, top+"/p")
	if diff := cmp.Diff(map[string]string{"a": "a", "z": "z", "secret": "s", "pg/data": "d"}, files); diff != "" ||
		said != "" {
		t.Error(diff, said)
	}
}

// Sockets, FIFOs and devices are left out.
func TestImage_Special(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{"a": "a", "l": "-> a", "n/z": "z"})
	if err := errors.Join(unix.Mknod(dir+"/socket", unix.S_IFSOCK|0o600, 0), unix.Mkfifo(dir+"/fifo", 0o600)); err != nil {
		t.Fatal(err)
	}
	want := []string{"fifo: neither", "socket: neither", "count=2", "-v " + dir + ":/d"}
	if os.Geteuid() == 0 {
		if err := unix.Mknod(dir+"/null", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
			t.Fatal(err)
		}
		want = append(want[:2], "null: neither", "count=3")
	}
	files, _, said := copies(t, dir)
	if diff := cmp.Diff(map[string]string{"a": "a", "l": "2 a", "n/z": "z"}, files); diff != "" {
		t.Error(diff)
	}
	says(t, said, want...)
}

// A file keeps those of its extended attributes that the copies can hold.
func TestImage_Attributes(t *testing.T) {
	dir := inMemory(t)
	put(t, dir, map[string]string{"f": "f"})
	for name, n := range map[string]int{"user.small": 10, "user.big": 3000, "user.big2": 3000} {
		if err := unix.Setxattr(dir+"/f", name, bytes.Repeat([]byte("x"), n), 0); errors.Is(err, unix.ENOTSUP) ||
			errors.Is(err, unix.ENOSPC) {
			t.Skipf("the file system of the test's directory has no such attributes: %v", err)
		} else if err != nil {
			t.Fatal(err)
		}
	}
	files, headers, said := copies(t, dir)
	records := headers["f"].PAXRecords
	if files["f"] != "f" || len(records["SCHILY.xattr.user.small"]) != 10 ||
		len(records["SCHILY.xattr.user.big"])+len(records["SCHILY.xattr.user.big2"]) != 3000 {
		t.Errorf("%q, %v", files, records)
	}
	says(t, said, "f: extended attributes (user.big", "more than", "setfattr")
}

// Mounted files are themselves, though their inode numbers are another file's; mounted directories
// are left out.
func TestImage_Mounts(t *testing.T) {
	testenv.Require(t, testenv.Root)
	testenv.Turn(t) // others look at the mounts of this machine
	top := t.TempDir()
	mount := func(from, to, kind string, flags uintptr) {
		t.Helper()
		if err := unix.Mount(from, to, kind, flags, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(to, 0); err != nil {
				t.Error(err)
			}
		})
	}
	put(t, top, map[string]string{"A/": "", "B/": ""})
	mount("tmpfs", top+"/A", "tmpfs", 0)
	mount("tmpfs", top+"/B", "tmpfs", 0)
	put(t, top, map[string]string{"A/m": "one"}) // the first of both have the same number
	put(t, top, map[string]string{"B/two": "two"})
	put(t, top, map[string]string{"A/x": "", "A/dir/": ""})
	if err := errors.Join(os.Link(top+"/A/m", top+"/A/z"), os.Link(top+"/B/two", top+"/B/two2")); err != nil {
		t.Fatal(err)
	}
	mount(top+"/B/two", top+"/A/x", "", unix.MS_BIND)
	mount(top+"/B", top+"/A/dir", "", unix.MS_BIND)
	files, headers, said := copies(t, top+"/A")
	want := map[string]string{"m": "one", "x": "two", "z": "1 m"}
	if files["z"] == "one" { // which came first
		want["m"], want["z"] = "1 z", "one"
	}
	if diff := cmp.Diff(want, files); diff != "" {
		t.Error(diff)
	}
	if headers["dir/"] == nil {
		t.Error("the place of the mount is not there")
	}
	says(t, said, "dir: another file system", "-v")
}

// What is too much is refused, and its volume is named.
func TestImage_TooMany(t *testing.T) {
	top := inMemory(t)
	files := map[string]string{"few/d/x/": ""}
	for i := range 200 {
		files[fmt.Sprintf("many/%d", i)] = ""
	}
	put(t, top, files)
	i := &share.Image{
		Path:    top + "/volumes",
		Volumes: []spec.Volume{{Source: top + "/few", Target: "/a"}, {Source: top + "/many", Target: "/b"}},
	}
	i.Limits.MaxEntries = 100
	if err := i.Apply(t.Context()); !errors.As(err, new(*flatten.LimitError)) ||
		!strings.Contains(err.Error(), "-v "+top+"/many:/b: ") {
		t.Errorf("%v, want a LimitError of the second volume", err)
	}
	if err := i.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	i.Limits.MaxEntries = 1000
	if err := i.Apply(t.Context()); err != nil {
		t.Error(err)
	}
}
