package flatten_test

import (
	"archive/tar"
	"context"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/oci/flatten"
)

const rootLine = ". 5 0755 0:0"

func TestLayers_Semantics(t *testing.T) {
	for _, c := range []struct {
		name   string
		layers [][]ent // the lowest first
		want   []string
		passes int
	}{
		{
			"a file replaces a file",
			[][]ent{{file("a", "old"), file("b", "b")}, {file("a", "new")}},
			[]string{rootLine, `a 0 0644 0:0 "new"`, `b 0 0644 0:0 "b"`},
			1,
		},
		{
			"a whiteout removes a file and a tree, of lower layers only",
			[][]ent{
				{file("a", "a"), dir("d", 0o700), file("d/x", "x")},
				{file(".wh.a", ""), file(".wh.d", ""), file("d/y", "y"), file("e/.wh.never", "")},
			},
			[]string{rootLine, "d 5 0755 0:0", `d/y 0 0644 0:0 "y"`},
			1,
		},
		{
			"an opaque directory, marked last",
			[][]ent{
				{dir("d", 0o700), dir("d/s", 0o711), file("d/s/x", "x"), file("d/z", "")},
				{file("d/s/y", "y"), file("d/.wh..wh..opq", "")},
			},
			[]string{rootLine, "d 5 0700 0:0", "d/s 5 0755 0:0", `d/s/y 0 0644 0:0 "y"`},
			1,
		},
		{
			"the upmost metadata of a directory count, and what is below stays",
			[][]ent{{dir(".", 0o711), dir("d", 0o700), file("d/x", "x")}, {dir("d", 0o1777)}, {file("d/y", "y")}},
			[]string{". 5 0711 0:0", "d 5 1777 0:0", `d/x 0 0644 0:0 "x"`, `d/y 0 0644 0:0 "y"`},
			1,
		},
		{
			"a directory replaces a file and the other way round",
			[][]ent{{file("a", "a"), dir("b", 0o700), file("b/x", "x")}, {dir("a", 0o700), file("a/y", "y"), file("b", "b")}},
			[]string{rootLine, "a 5 0700 0:0", `a/y 0 0644 0:0 "y"`, `b 0 0644 0:0 "b"`},
			1,
		},
		{
			"what a file once hid stays hidden below a directory",
			[][]ent{{dir("a", 0o700), file("a/x", "x")}, {file("a", "a")}, {file("a/y", "y")}},
			[]string{rootLine, "a 5 0755 0:0", `a/y 0 0644 0:0 "y"`},
			1,
		},
		{
			"later entries of a layer override earlier ones",
			[][]ent{{file("a", "old"), file("a", "new"), file("b", "b"), dir("b", 0o700), dir("c", 0o700), file("c/x", ""), file("c", "c")}},
			[]string{rootLine, `a 0 0644 0:0 "new"`, "b 5 0700 0:0", `c 0 0644 0:0 "c"`},
			2,
		},
		{
			"nothing is written through a symbolic link of the same layer",
			[][]ent{{dir("etc", 0o755), symlink("a", "etc"), file("a/passwd", "evil"), symlink("b", "/etc"), file("b/c/passwd", "evil")}},
			[]string{
				rootLine, "a 5 0755 0:0", `a/passwd 0 0644 0:0 "evil"`, "b 5 0755 0:0", "b/c 5 0755 0:0", `b/c/passwd 0 0644 0:0 "evil"`, "etc 5 0755 0:0",
			},
			2,
		},
		{
			"nor of a lower one",
			[][]ent{{dir("etc", 0o755), symlink("a", "etc")}, {file("a/passwd", "evil")}},
			[]string{rootLine, "a 5 0755 0:0", `a/passwd 0 0644 0:0 "evil"`, "etc 5 0755 0:0"},
			1,
		},
		{
			"hard links within a layer",
			[][]ent{{file("a", "a"), link("b", "a"), link("d/c", "/b"), symlink("s", "x"), link("t", "s")}},
			[]string{rootLine, `a 0 0644 0:0 "a"`, "b = a", "d 5 0755 0:0", "d/c = a", "s 2 0777 0:0 -> x", "t = s"},
			1,
		},
		{
			"a hard link keeps what an upper layer shadows",
			[][]ent{{file("a", "kept"), link("b", "a"), link("c", "a")}, {file("a", "new")}},
			[]string{rootLine, `a 0 0644 0:0 "new"`, `b 0 0644 0:0 "kept"`, "c = b"},
			2,
		},
		{
			"a hard link into a lower layer, which goes",
			[][]ent{{file("a", "low")}, {link("b", "a"), file(".wh.a", "")}, {file("c", "")}},
			[]string{rootLine, `b 0 0644 0:0 "low"`, `c 0 0644 0:0 ""`},
			2,
		},
		{
			"names are relative to the root",
			[][]ent{{file("/a", "a"), file("./b//c", "c"), file("d/./e", "e")}},
			[]string{rootLine, `a 0 0644 0:0 "a"`, "b 5 0755 0:0", `b/c 0 0644 0:0 "c"`, "d 5 0755 0:0", `d/e 0 0644 0:0 "e"`},
			1,
		},
		{
			"marks of AUFS are no files",
			[][]ent{{file(".wh..wh.aufs", ""), dir(".wh..wh.plnk", 0o700), file(".wh..wh.plnk/1.2", "x"), file("a.wh.b", "")}},
			[]string{rootLine, `a.wh.b 0 0644 0:0 ""`},
			1,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := target(t)
			l := layers(t, c.layers...)
			stats, err := flatten.Layers(t.Context(), l, f, nil)
			if err != nil {
				t.Fatal(err)
			}
			if stats.Passes != c.passes {
				t.Errorf("%d passes, want %d", stats.Passes, c.passes)
			}
			if diff := cmp.Diff(c.want, listing(t, f)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if _, err := flatten.PlannedLayers(t.Context(), l, f); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, listing(t, f)); diff != "" {
				t.Errorf("by plan: -want +got:\n%s", diff)
			}
		})
	}
}

// Every kind of file and all that can be said of one.
func TestLayers_Files(t *testing.T) {
	long := "long"
	for range 12 {
		long += "/0123456789012345678901234567890123456789"
	}
	owned := file("suid", "x")
	owned.Mode, owned.Uid, owned.Gid = 0o4751, 100_000, 3_000_000_000
	capable := file("ping", "x")
	capable.PAXRecords = map[string]string{
		"SCHILY.xattr.security.capability":     "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"SCHILY.xattr.user.note":               "n\x00t=e",
		"SCHILY.xattr.trusted.overlay.opaque":  "y",
		"SCHILY.xattr.system.posix_acl_access": "whatever",
	}
	precise := file("precise", "")
	precise.ModTime, precise.Format = someTime.Add(123_456_789), tar.FormatPAX
	l := layers(t, []ent{
		owned, capable, precise, file(long, "deep"),
		{tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
		{tar.Header{Typeflag: tar.TypeBlock, Name: "dev/big", Mode: 0o600, Devmajor: 259, Devminor: 70_000}, ""},
		{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600}, ""},
		symlink("short", "a"), symlink("far", long), file("\xff\xfe", "not UTF-8"),
		{tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}}, ""},
	})
	f := target(t)
	if _, err := flatten.Layers(t.Context(), l, f, nil); err != nil {
		t.Fatal(err)
	}
	got := listing(t, f)
	want := []string{
		rootLine, "dev 5 0755 0:0", "dev/big 4 0600 0:0 259:70000", "dev/null 3 0666 0:0 1:3", "far 2 0777 0:0 -> " + long,
		"fifo 6 0600 0:0",
	}
	for i := range long {
		if long[i] == '/' {
			want = append(want, long[:i]+" 5 0755 0:0")
		}
	}
	want = append(want, long+` 0 0644 0:0 "deep"`,
		`ping 0 0644 0:0 "x" security.capability="\x01\x00\x00\x02\x00 \x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" user.note="n\x00t=e"`,
		`precise 0 0644 0:0 "" 2020-09-13T12:26:40.123456789Z`, "short 2 0777 0:0 -> a", `suid 0 4751 100000:3000000000 "x"`,
		"\xff\xfe 0 0644 0:0 \"not UTF-8\"")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestLayers_Cancel(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	l := layers(t, []ent{file("a", string(make([]byte, 8<<20)))})
	_, err := flatten.Layers(ctx, l, target(t), func(int64) { cancel() })
	if err == nil || ctx.Err() == nil {
		t.Errorf("%v, want the context's end", err)
	}
}

func TestLayers_Progress(t *testing.T) {
	l := layers(t, []ent{file("a", string(make([]byte, 1<<20)))}, []ent{file("b", "")})
	var size, last int64
	for _, l := range l {
		fi, err := os.Stat(l.Path)
		if err != nil {
			t.Fatal(err)
		}
		size += fi.Size()
	}
	if _, err := flatten.Layers(t.Context(), l, target(t), func(done int64) { last = done }); err != nil || last != size {
		t.Errorf("%d of %d bytes: %v", last, size, err)
	}
}
