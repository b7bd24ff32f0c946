package share_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/share"
)

func chmod(t *testing.T, dir string, modes map[string]fs.FileMode) {
	t.Helper()
	for name, mode := range modes {
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
}

func modes(t *testing.T, dir string, want map[string]fs.FileMode) {
	t.Helper()
	for name, mode := range want {
		if fi, err := os.Lstat(filepath.Join(dir, name)); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want mode %v", name, fi.Mode(), err, mode)
		}
	}
}

func readOnly(h tar.Header) tar.Header { h.Mode = 0o555; return h }

// What a guest changes in directories that their owner may not write comes back, and they stay so,
// however often it is interrupted.
func TestMerge_ReadOnlyDirectories(t *testing.T) {
	top := asUser(t, func(string) {})
	if top == "" {
		return
	}
	entries := slices.Concat(
		[]any{readOnly(dir("m", nil)), white("m/f")}, file("m/g", "2"), []any{readOnly(dir("m/deep", nil))},
		file("m/deep/x", "new"),
		[]any{readOnly(dir("n", nil))}, file("n/h", "3"), []any{readOnly(dir("n/o", nil))}, file("n/o/p", "4"),
		[]any{white("gone"), readOnly(dir("hidden", opaque))}, file("hidden/1", "again"), file("z", "z"),
	)
	want := map[string]string{
		"m/": "", "m/g": "2", "m/kept": "1", "m/deep/": "", "m/deep/x": "new", "n/": "", "n/h": "3", "n/o/": "", "n/o/p": "4",
		"hidden/": "", "hidden/1": "again", "z": "z",
	}
	whole := archive(t, entries...).Bytes()
	for cut := 0; cut <= len(whole); cut += 512 {
		source := filepath.Join(t.TempDir(), "s")
		put(t, source, map[string]string{
			"m/f": "1", "m/kept": "1", "m/deep/x": "old", "gone/a/b": "1", "hidden/1": "1", "hidden/2": "2", "hidden/sub/3": "3",
		})
		chmod(t, source, map[string]fs.FileMode{
			"m/f": 0o444, "m/deep": 0o555, "m": 0o555, "gone/a": 0o555, "gone": 0o500, "hidden/sub": 0o555, "hidden": 0o555,
		})
		copied := taken(t, source)
		all := volumes(source)
		merge := share.Merge{Volumes: all, Told: share.Guest(all), Copied: copied, MaxBytes: 1 << 20}
		broken := io.MultiReader(bytes.NewReader(whole[:cut]), iotest.ErrReader(io.ErrUnexpectedEOF))
		if _, err := merge.Apply(t.Context(), broken); err == nil && cut < len(whole)-1024 {
			t.Fatalf("%d bytes are no error", cut)
		}
		chmod(t, source, map[string]fs.FileMode{"hidden": 0o755}) // of the host's user, meanwhile
		report, err := merge.Apply(t.Context(), bytes.NewReader(whole))
		if err != nil || report.Failures > 0 || len(report.Conflicts) > 0 {
			t.Fatalf("after %d bytes: %+v, %v", cut, report, err)
		}
		if diff := cmp.Diff(want, tree(t, source)); diff != "" {
			t.Fatalf("after %d bytes: %s", cut, diff)
		}
		modes(t, source,
			map[string]fs.FileMode{"m": 0o555, "m/deep": 0o555, "n": 0o555, "n/o": 0o555, "hidden": 0o555, "m/kept": 0o644})
		for _, name := range []string{"m/deep", "m", "n/o", "n", "hidden"} { // so that it can be removed
			chmod(t, source, map[string]fs.FileMode{name: 0o755})
		}
	}
}

// A directory of another user's keeps what is in it; all else comes.
func TestMerge_OthersDirectory(t *testing.T) {
	if os.Geteuid() != 0 && os.Getenv(asUserDir) == "" {
		t.Skip("not root: there are no others")
	}
	top := asUser(t, func(dir string) {
		put(t, dir, map[string]string{"s/foreign/f": "1", "s/a": "old"})
		if err := errors.Join(os.Chown(dir+"/s", nobody, nobody), os.Chown(dir+"/s/a", nobody, nobody),
			os.Chmod(dir+"/s/foreign", 0o755), os.Chmod(dir+"/s/foreign/f", 0o644)); err != nil {
			t.Fatal(err)
		}
	})
	if top == "" {
		return
	}
	source := top + "/s"
	entries := slices.Concat([]any{dir("foreign", nil)}, file("foreign/f", "2"), file("foreign/g", "2"),
		[]any{white("foreign/h")}, file("a", "new"), file("z", "z"))
	report, err := apply(t, source, taken(t, source), entries...)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range report.Failed {
		names = append(names, f.Path)
		if !errors.Is(f.Err, fs.ErrPermission) {
			t.Errorf("%s: %v", f.Path, f.Err)
		}
	}
	if diff := cmp.Diff([]string{source + "/foreign/f", source + "/foreign/g"}, names); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(map[string]string{"foreign/": "", "foreign/f": "1", "a": "new", "z": "z"},
		tree(t, source)); diff != "" {
		t.Error(diff)
	}
}

// Nothing is lost where the volume itself cannot be written any more: that is an error, and may be
// mended.
func TestMerge_SourceGone(t *testing.T) {
	source := filepath.Join(t.TempDir(), "s")
	put(t, source, map[string]string{"a": "old"})
	copied := taken(t, source)
	if err := os.Rename(source, source+".away"); err != nil {
		t.Fatal(err)
	}
	if report, err := apply(t, source, copied, file("a", "new")...); !errors.Is(err, fs.ErrNotExist) ||
		report.Failures > 0 {
		t.Errorf("%+v, %v", report, err)
	}
	if err := os.Rename(source+".away", source); err != nil {
		t.Fatal(err)
	}
	if report, err := apply(t, source, copied, file("a", "new")...); err != nil || report.Written != 1 ||
		len(report.Conflicts) > 0 {
		t.Errorf("%+v, %v", report, err)
	}
}

// Names that are too long with what is added to them in a conflict are cut, and stay different and
// the same each time.
func TestMerge_LongNames(t *testing.T) {
	source := filepath.Join(t.TempDir(), "s")
	long, dirName := strings.Repeat("x", 240), strings.Repeat("é", 124)
	put(t, source, map[string]string{long + "1": "old", long + "2": "old", dirName: "old", "after": "old"})
	copied := taken(t, source)
	put(t, source, map[string]string{long + "1": "host's", long + "2": "host's", dirName: "host's"})
	entries := slices.Concat(file(long+"1", "guest's 1"), file(long+"2", "guest's 2"), []any{dir(dirName, nil)},
		file(dirName+"/f", "deep"), file("after", "new"))
	var first map[string]string
	for try := range 2 {
		report, err := apply(t, source, copied, entries...)
		if err != nil || report.Failures > 0 || len(report.Conflicts) != 3 {
			t.Fatalf("%+v, %v", report, err)
		}
		got := tree(t, source)
		if try == 0 {
			first = got
		} else if diff := cmp.Diff(first, got); diff != "" {
			t.Errorf("the second time: %s", diff)
		}
	}
	var texts []string
	for name, text := range first {
		texts = append(texts, text)
		if !strings.HasSuffix(strings.TrimSuffix(name, "/"), ".guest-vm") && strings.HasPrefix(text, "guest's") {
			t.Errorf("%q has %q", name, text)
		}
	}
	slices.Sort(texts)
	if diff := cmp.Diff([]string{"", "deep", "guest's 1", "guest's 2", "host's", "host's", "host's", "new"},
		texts); diff != "" {
		t.Error(diff)
	}
}

// Who changed a file is not asked of clocks: what the host puts in a file's place is its own,
// however old.
func TestMerge_OlderFiles(t *testing.T) {
	source := filepath.Join(t.TempDir(), "s")
	put(t, source, map[string]string{"d/f": "one", "d/gone": "one", "other/f": "two", "other/gone": "two"})
	copied := taken(t, source)
	for _, names := range [][2]string{{"d", "x"}, {"other", "d"}, {"x", "other"}} { // no file's times change by it
		if err := os.Rename(filepath.Join(source, names[0]), filepath.Join(source, names[1])); err != nil {
			t.Fatal(err)
		}
	}
	report, err := apply(t, source, copied,
		slices.Concat([]any{dir("d", nil)}, file("d/f", "new"), []any{white("d/gone")})...)
	if err != nil || len(report.Conflicts) != 2 {
		t.Errorf("%+v, %v", report, err)
	}
	want := map[string]string{
		"d/": "", "d/f": "two", "d/f.guest-vm": "new", "d/gone": "two", "other/": "",
		"other/f": "one", "other/gone": "one",
	}
	if diff := cmp.Diff(want, tree(t, source)); diff != "" {
		t.Error(diff)
	}
}

// To remove or replace one name of a file is no change of the host's in its others.
func TestMerge_HardLinks(t *testing.T) {
	source := filepath.Join(t.TempDir(), "s")
	put(t, source, map[string]string{"a": "old", "theirs": "old"})
	for _, names := range [][2]string{{"a", "b"}, {"a", "c"}, {"a", "d"}, {"theirs", "theirs too"}} {
		if err := os.Link(filepath.Join(source, names[0]), filepath.Join(source, names[1])); err != nil {
			t.Fatal(err)
		}
	}
	copied := taken(t, source)
	put(t, source, map[string]string{"theirs": "host's"})
	entries := slices.Concat([]any{white("a")}, file("b", "new"), []any{
		tar.Header{Typeflag: tar.TypeLink, Name: "0/upper/c", Linkname: "0/upper/b"}, white("d"), white("theirs too"),
	})
	report, err := apply(t, source, copied, entries...)
	if err != nil || len(report.Conflicts) != 1 || report.Failures > 0 {
		t.Errorf("%+v, %v", report, err)
	}
	if diff := cmp.Diff(map[string]string{"b": "new", "c": "new", "theirs": "host's", "theirs too": "host's"},
		tree(t, source)); diff != "" {
		t.Error(diff)
	}
	b, bErr := os.Stat(source + "/b")
	c, cErr := os.Stat(source + "/c")
	if err := errors.Join(bErr, cErr); err != nil || !os.SameFile(b, c) || b.Sys().(*syscall.Stat_t).Nlink != 2 {
		t.Errorf("b and c are not one file: %v", err)
	}
}
