package share_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/spec"
)

// put makes files: a name that ends with a slash is a directory, a text that begins with "-> " a
// link.
func put(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		to, isLink := strings.CutPrefix(text, "-> ")
		switch {
		case err != nil:
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(path, 0o755)
		case isLink:
			err = os.Symlink(to, path)
		default:
			err = errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// tree tells what put would make again.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(at string, d fs.DirEntry, err error) error {
		if err != nil || at == dir {
			return err
		}
		name := strings.TrimPrefix(at, dir+"/")
		switch {
		case d.IsDir():
			all[name+"/"] = ""
		case d.Type()&fs.ModeSymlink != 0:
			to, err := os.Readlink(at)
			all[name] = "-> " + to
			return err
		default:
			data, err := os.ReadFile(at)
			all[name] = string(data)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// archive is what a guest sends.
func archive(t *testing.T, headers ...any) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range headers {
		switch e := e.(type) {
		case tar.Header:
			if e.Mode == 0 {
				e.Mode = 0o644
			}
			if err := w.WriteHeader(&e); err != nil {
				t.Fatal(err)
			}
		case string: // of the header before
			if _, err := w.Write([]byte(e)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

var when = time.Unix(1600000000, 0)

// file, dir, white, opaque and others make the entries of volume 0.
func file(name, text string) []any {
	return []any{tar.Header{Typeflag: tar.TypeReg, Name: "0/upper/" + name, Size: int64(len(text)), ModTime: when}, text}
}

func dir(name string, records map[string]string) tar.Header {
	return tar.Header{
		Typeflag: tar.TypeDir, Name: "0/upper/" + name + "/", Mode: 0o755, PAXRecords: records,
		Format: tar.FormatPAX,
	}
}

func white(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeChar, Name: "0/upper/" + name}
}

var opaque = map[string]string{"SCHILY.xattr.trusted.overlay.opaque": "y"}

func volumes(source string) []spec.Volume {
	return []spec.Volume{{Source: source, Target: "/x", Sync: true}}
}

// taken copies source, and returns where it is noted what was copied.
func taken(t *testing.T, source string) string {
	t.Helper()
	dir := t.TempDir()
	i := &share.Image{Path: dir + "/volumes", Copied: dir + "/copied", Volumes: volumes(source)}
	if err := i.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	return i.Copied
}

// apply copies back entries from a guest that had what copied notes.
func apply(t *testing.T, source, copied string, entries ...any) (share.Report, error) {
	t.Helper()
	all := volumes(source)
	return share.Merge{
		Volumes: all, Told: share.Guest(all), Copied: copied, Suffix: ".guest-vm", MaxBytes: 1 << 20,
	}.Apply(t.Context(), archive(t, entries...))
}

var before = map[string]string{
	"a": "a", "changed": "old", "gone": "x", "dir/x": "x", "dir/sub/y": "y", "whole/1": "1", "whole/2": "2",
	"link": "-> a", "wasdir/f": "f", "wasfile": "f", "theirs": "old", "theirs too": "old",
}

func TestMerge(t *testing.T) {
	source := filepath.Join(t.TempDir(), "source")
	put(t, source, before)
	if err := errors.Join(os.Chmod(source+"/changed", 0o600), os.Chmod(source+"/a", 0o600)); err != nil {
		t.Fatal(err)
	}
	copied := taken(t, source)
	put(t, source,
		map[string]string{"theirs": "host's", "theirs too": "the same", "dir/new": "host's", "whole/3": "host's"})
	entries := slices.Concat(
		[]any{tar.Header{Typeflag: tar.TypeDir, Name: "0/upper/"}}, file("changed", "new"), []any{white("gone")},
		file("made", "made"), []any{dir("new", nil)}, file("new/deep", "deep"),
		[]any{white("dir")}, []any{dir("whole", opaque)}, file("whole/1", "again"),
		[]any{tar.Header{Typeflag: tar.TypeSymlink, Name: "0/upper/link", Linkname: "/etc/passwd"}},
		file("wasdir", "file now"),
		[]any{dir("wasfile", nil)}, file("wasfile/f", "dir now"), file("theirs", "guest's"), file("theirs too", "the same"),
		file("a", "a"),
		[]any{tar.Header{Typeflag: tar.TypeLink, Name: "0/upper/hard", Linkname: "0/upper/made"}},
		[]any{
			tar.Header{Typeflag: tar.TypeFifo, Name: "0/upper/fifo"},
			tar.Header{Typeflag: tar.TypeBlock, Name: "0/upper/disk", Devmajor: 8},
			tar.Header{Typeflag: tar.TypeChar, Name: "0/upper/null", Devmajor: 1, Devminor: 3},
		},
		[]any{tar.Header{Typeflag: tar.TypeReg, Name: "0/upper/suid", Mode: 0o6755}},
		[]any{
			tar.Header{Typeflag: tar.TypeReg, Name: "0/work/no"},
			tar.Header{Typeflag: tar.TypeReg, Name: "1/upper/no"},
			tar.Header{Typeflag: tar.TypeDir, Name: "lost+found/"},
		},
	)
	want := map[string]string{
		"a": "a", "changed": "new", "made": "made", "new/": "", "new/deep": "deep", "dir/": "", "dir/new": "host's",
		"whole/": "", "whole/1": "again",
		"whole/3": "host's", "link": "-> /etc/passwd", "wasdir": "file now", "wasfile/": "", "wasfile/f": "dir now",
		"theirs":          "host's",
		"theirs.guest-vm": "guest's", "theirs too": "the same", "hard": "made", "suid": "",
	}
	for try := range 2 { // the second time there is nothing to do
		report, err := apply(t, source, copied, entries...)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, tree(t, source)); diff != "" {
			t.Fatalf("try %d: %s", try, diff)
		}
		if report.Left != 3 || try == 1 && report.Removed > 0 {
			t.Errorf("try %d: %+v", try, report)
		}
		if n := slices.Index(report.Conflicts, source+"/theirs"); n < 0 || try == 0 && len(report.Conflicts) != 3 {
			t.Errorf("try %d: conflicts %q", try, report.Conflicts)
		}
	}
	for name, mode := range map[string]fs.FileMode{"suid": 0o755, "changed": 0o644, "a": 0o644, "theirs": 0o644} {
		if fi, err := os.Lstat(filepath.Join(source, name)); err != nil || fi.Mode() != mode {
			t.Errorf("%s has %v, %v", name, fi.Mode(), err)
		}
	}
	if fi, err := os.Stat(source + "/changed"); err != nil || !fi.ModTime().Equal(when) {
		t.Errorf("time of %v, %v", fi, err)
	}
}

// Who owns what on the host is not the guest's to say.
func TestMerge_Owners(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("not root: there is one owner")
	}
	source := filepath.Join(t.TempDir(), "source")
	put(t, source, map[string]string{"old": "old"})
	if err := errors.Join(os.Lchown(source, 1234, 1235), os.Lchown(source+"/old", 1236, 1237)); err != nil {
		t.Fatal(err)
	}
	copied := taken(t, source)
	entries := []any{}
	for _, e := range slices.Concat(file("old", "new"), file("new", "new"), []any{dir("d", nil)}, file("d/f", "")) {
		if h, ok := e.(tar.Header); ok {
			h.Uid, h.Gid = 0, 4321
			e = h
		}
		entries = append(entries, e)
	}
	if _, err := apply(t, source, copied, entries...); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"old": "1236:1237", "new": "1234:1235", "d": "1234:1235",
		"d/f": "1234:1235",
	} {
		fi, err := os.Lstat(filepath.Join(source, name))
		if err != nil {
			t.Fatal(err)
		}
		st := fi.Sys().(*syscall.Stat_t)
		if got := fmt.Sprintf("%d:%d", st.Uid, st.Gid); got != want {
			t.Errorf("%s is %s's, want %s", name, got, want)
		}
	}
}

// A hostile guest writes nothing outside, and goes through no link.
func TestMerge_Hostile(t *testing.T) {
	for name, entries := range map[string][]any{
		"up":       file("../escaped", "x"),
		"deep up":  file("a/../../escaped", "x"),
		"absolute": {tar.Header{Typeflag: tar.TypeReg, Name: "0/upper//etc/escaped"}},
		"dot":      file("./a", "x"),
		"by a link of theirs": append([]any{tar.Header{Typeflag: tar.TypeSymlink, Name: "0/upper/l", Linkname: ".."}},
			file("l/escaped", "x")...),
		"by a link of ours":   file("out/escaped", "x"),
		"by one within":       file("in/escaped", "x"),
		"removal by a link":   {white("out/keep")},
		"removal of all":      {white("..")},
		"directory by a link": {dir("out/d", nil)},
		"hard link out":       {tar.Header{Typeflag: tar.TypeLink, Name: "0/upper/h", Linkname: "0/upper/../keep"}},
		"hard link by a link": {tar.Header{Typeflag: tar.TypeLink, Name: "0/upper/h", Linkname: "0/upper/out/keep"}},
		"hard link elsewhere": {tar.Header{Typeflag: tar.TypeLink, Name: "0/upper/h", Linkname: "/etc/passwd"}},
		"hard link to a link": {tar.Header{Typeflag: tar.TypeLink, Name: "0/upper/h", Linkname: "0/upper/out"}},
		"too much": {
			tar.Header{Typeflag: tar.TypeReg, Name: "0/upper/large", Size: 2 << 20},
			strings.Repeat("x", 2<<20),
		},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			source := filepath.Join(top, "source")
			put(t, top, map[string]string{"keep": "keep", "source/out": "-> ..", "source/real/": "", "source/in": "-> real"})
			want := tree(t, top)
			entries = slices.Concat(entries, file("after", "after"))
			report, err := apply(t, source, taken(t, source), entries...)
			if err != nil || report.Failures != 1 || len(report.Failed) != 1 {
				t.Errorf("not told that one is left: %+v, %v", report, err)
			}
			want["source/after"] = "after"
			got := tree(t, top)
			delete(got, "source/l")
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Of a single file nothing else in its directory is touched.
func TestMerge_File(t *testing.T) {
	top := t.TempDir()
	put(t, top, map[string]string{"conf": "old", "other": "other"})
	copied := taken(t, top+"/conf")
	entries := slices.Concat(file("file", "new"), file("other", "bad"),
		[]any{white("other"), dir("d", nil), tar.Header{Typeflag: tar.TypeSymlink, Name: "0/upper/file", Linkname: "x"}})
	report, err := apply(t, top+"/conf", copied, entries...)
	if err != nil || report.Written != 1 {
		t.Errorf("%+v, %v", report, err)
	}
	if diff := cmp.Diff(map[string]string{"conf": "new", "other": "other"}, tree(t, top)); diff != "" {
		t.Error(diff)
	}
}

// An archive that ends early is an error, and leaves no rubbish.
func TestMerge_Short(t *testing.T) {
	source := filepath.Join(t.TempDir(), "source")
	put(t, source, map[string]string{"a": "old"})
	whole := archive(t, file("a", strings.Repeat("new", 1000))...).Bytes()
	_, err := share.Merge{
		Volumes: []spec.Volume{{Source: source, Sync: true}}, Told: make([]guest.Volume, 1),
		Copied: taken(t, source), MaxBytes: 1 << 20,
	}.Apply(t.Context(), bytes.NewReader(whole[:1000]))
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff(map[string]string{"a": "old"}, tree(t, source)); diff != "" {
		t.Error(diff)
	}
}

func FuzzMerge(f *testing.F) {
	f.Add([]byte("0/upper/a"), []byte("b"), byte('0'))
	f.Fuzz(func(t *testing.T, name, link []byte, kind byte) {
		top := t.TempDir()
		put(t, top, map[string]string{"keep": "keep", "source/out": "-> ..", "source/d/f": "f"})
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, n := range []string{string(name), "0/upper/" + string(name), "0/upper/out/" + string(name)} {
			_ = w.WriteHeader(&tar.Header{Typeflag: kind, Name: n, Linkname: string(link)})
			_ = w.Flush()
		}
		_ = w.Close()
		_, _ = share.Merge{
			Volumes: []spec.Volume{{Source: top + "/source", Sync: true}}, Told: make([]guest.Volume, 1),
			MaxBytes: 1 << 10,
		}.Apply(t.Context(), &b)
		entries, err := os.ReadDir(top)
		if err != nil || len(entries) != 2 {
			t.Errorf("outside: %v, %v", entries, err)
		}
	})
}
