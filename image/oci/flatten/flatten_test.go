package flatten_test

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
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
	}{
		{
			"a file replaces a file",
			[][]ent{{file("a", "old"), file("b", "b")}, {file("a", "new")}},
			[]string{rootLine, `a 0 0644 0:0 "new"`, `b 0 0644 0:0 "b"`},
		},
		{
			"a whiteout removes a file and a tree, of lower layers only",
			[][]ent{
				{file("a", "a"), dir("d", 0o700), file("d/x", "x")},
				{file(".wh.a", ""), file(".wh.d", ""), file("d/y", "y"), file("e/.wh.never", "")},
			},
			[]string{rootLine, "d 5 0755 0:0", `d/y 0 0644 0:0 "y"`},
		},
		{
			"an opaque directory, marked last",
			[][]ent{
				{dir("d", 0o700), dir("d/s", 0o711), file("d/s/x", "x"), file("d/z", "")},
				{file("d/s/y", "y"), file("d/.wh..wh..opq", "")},
			},
			[]string{rootLine, "d 5 0700 0:0", "d/s 5 0755 0:0", `d/s/y 0 0644 0:0 "y"`},
		},
		{
			"the upmost metadata of a directory count, and what is below stays",
			[][]ent{{dir(".", 0o711), dir("d", 0o700), file("d/x", "x")}, {dir("d", 0o1777)}, {file("d/y", "y")}},
			[]string{". 5 0711 0:0", "d 5 1777 0:0", `d/x 0 0644 0:0 "x"`, `d/y 0 0644 0:0 "y"`},
		},
		{
			"a directory replaces a file and the other way round",
			[][]ent{{file("a", "a"), dir("b", 0o700), file("b/x", "x")}, {dir("a", 0o700), file("a/y", "y"), file("b", "b")}},
			[]string{rootLine, "a 5 0700 0:0", `a/y 0 0644 0:0 "y"`, `b 0 0644 0:0 "b"`},
		},
		{
			"what a file once hid stays hidden below a directory",
			[][]ent{{dir("a", 0o700), file("a/x", "x")}, {file("a", "a")}, {file("a/y", "y")}},
			[]string{rootLine, "a 5 0755 0:0", `a/y 0 0644 0:0 "y"`},
		},
		{
			"later entries of a layer override earlier ones",
			[][]ent{{
				file("a", "old"), file("a", "new"), file("b", "b"), dir("b", 0o700), dir("c", 0o700), file("c/x", ""),
				file("c", "c"),
			}},
			[]string{rootLine, `a 0 0644 0:0 "new"`, "b 5 0700 0:0", `c 0 0644 0:0 "c"`},
		},
		{
			"a file below a symbolic link of its layer goes where that leads, within the root",
			[][]ent{{
				dir("etc", 0o750), symlink("a", "etc"), file("a/x", "x"), symlink("b", "/etc"), file("b/c/y", "y"),
				symlink("out", "../../../etc/new"),
				file("out/z", "z"), symlink("gone", "no/../there"), file("gone/w", "w"),
			}},
			[]string{
				rootLine, "a 2 0777 0:0 -> etc", "b 2 0777 0:0 -> /etc", "etc 5 0750 0:0", "etc/c 5 0755 0:0",
				`etc/c/y 0 0644 0:0 "y"`, "etc/new 5 0755 0:0",
				`etc/new/z 0 0644 0:0 "z"`, `etc/x 0 0644 0:0 "x"`, "gone 2 0777 0:0 -> no/../there",
				"out 2 0777 0:0 -> ../../../etc/new", "there 5 0755 0:0",
				`there/w 0 0644 0:0 "w"`,
			},
		},
		{
			"a file below a symbolic link of a lower layer too: /lib of a merged /usr",
			[][]ent{
				{dir("usr", 0o755), dir("usr/lib", 0o755), file("usr/lib/ld.so", "ld"), symlink("lib", "usr/lib")},
				{file("lib/systemd/x", "x"), link("hard", "lib/ld.so"), link("lib/again", "lib/ld.so")},
				{file("usr/bin/y", "y")},
			},
			[]string{
				rootLine, `hard 0 0644 0:0 "ld"`, "lib 2 0777 0:0 -> usr/lib", "usr 5 0755 0:0", "usr/bin 5 0755 0:0",
				`usr/bin/y 0 0644 0:0 "y"`, "usr/lib 5 0755 0:0",
				"usr/lib/again = hard", "usr/lib/ld.so = hard", "usr/lib/systemd 5 0755 0:0", `usr/lib/systemd/x 0 0644 0:0 "x"`,
			},
		},
		{
			"whiteouts and opaque marks go through symbolic links",
			[][]ent{
				{file("d/a", "a"), file("d/b", "b"), file("e/a", "a"), symlink("s", "d"), symlink("t", "/e")},
				{file("s/.wh.a", ""), file("t/.wh..wh..opq", "")},
			},
			[]string{rootLine, "d 5 0755 0:0", `d/b 0 0644 0:0 "b"`, "e 5 0755 0:0", "s 2 0777 0:0 -> d", "t 2 0777 0:0 -> /e"},
		},
		{
			"a directory, a file and a whiteout take the place of a symbolic link",
			[][]ent{
				{file("d/a", "a"), symlink("s", "d"), symlink("t", "d"), symlink("u", "d"), symlink("v", "d"), link("w", "v")},
				{dir("s", 0o700), file("s/b", "b"), file("t", "t"), file(".wh.u", ""), file("w/c", "c")},
			},
			[]string{
				rootLine, "d 5 0755 0:0", `d/a 0 0644 0:0 "a"`, `d/c 0 0644 0:0 "c"`, "s 5 0700 0:0", `s/b 0 0644 0:0 "b"`,
				`t 0 0644 0:0 "t"`, "v 2 0777 0:0 -> d", "w = v",
			},
		},
		{
			"a whiteout that is a hard link, and hard links whose first name goes",
			[][]ent{
				{
					file("tmp/k", "k"), file("tmp/r", "r"), file("t1", "1"), link("t2", "t1"), link("t3", "t2"), file("u1", "u"),
					link("u2", "u1"),
				},
				{link("tmp/.wh.k", "tmp/r"), file("t1", "new"), file(".wh.u1", "")},
			},
			[]string{
				rootLine, `t1 0 0644 0:0 "new"`, `t2 0 0644 0:0 "1"`, "t3 = t2", "tmp 5 0755 0:0", `tmp/r 0 0644 0:0 "r"`,
				`u2 0 0644 0:0 "u"`,
			},
		},
		{
			"hard links within a layer",
			[][]ent{{file("a", "a"), link("b", "a"), link("d/c", "/b"), symlink("s", "x"), link("t", "s")}},
			[]string{rootLine, `a 0 0644 0:0 "a"`, "b = a", "d 5 0755 0:0", "d/c = a", "s 2 0777 0:0 -> x", "t = s"},
		},
		{
			"a hard link keeps what an upper layer shadows",
			[][]ent{{file("a", "kept"), link("b", "a"), link("c", "a")}, {file("a", "new")}},
			[]string{rootLine, `a 0 0644 0:0 "new"`, `b 0 0644 0:0 "kept"`, "c = b"},
		},
		{
			"a hard link into a lower layer, which goes",
			[][]ent{{file("a", "low")}, {link("b", "a"), file(".wh.a", "")}, {file("c", "")}},
			[]string{rootLine, `b 0 0644 0:0 "low"`, `c 0 0644 0:0 ""`},
		},
		{
			"names are relative to the root",
			[][]ent{{file("/a", "a"), file("./b//c", "c"), file("d/./e", "e")}},
			[]string{rootLine, `a 0 0644 0:0 "a"`, "b 5 0755 0:0", `b/c 0 0644 0:0 "c"`, "d 5 0755 0:0", `d/e 0 0644 0:0 "e"`},
		},
		{
			"marks of AUFS are no files, but hard links lead to what it kept for them",
			[][]ent{{
				file(".wh..wh.aufs", ""), dir(".wh..wh.plnk", 0o700), file(".wh..wh.plnk/1.2", "x"), file("a.wh.b", ""),
				link("b", ".wh..wh.plnk/1.2"),
				link("d/c", ".wh..wh.plnk/1.2"),
			}},
			[]string{rootLine, `a.wh.b 0 0644 0:0 ""`, `b 0 0644 0:0 "x"`, "d 5 0755 0:0", "d/c = b"},
		},
		{
			"a hard link takes the place of what it leads to, or stands below that",
			[][]ent{
				{file("a", "a"), file("b", "b"), file("c", "c"), link("d", "c")},
				{link("a", "a"), link("b/x", "b"), link("c", "d")},
			},
			[]string{rootLine, `a 0 0644 0:0 "a"`, "b 5 0755 0:0", `b/x 0 0644 0:0 "b"`, `c 0 0644 0:0 "c"`, "d = c"},
		},
		{
			"what AUFS kept outlives its first name, and only its layer's hard links lead to it",
			[][]ent{
				{
					file(".wh..wh.plnk/1", "old"), file(".wh..wh.plnk/1", "x"), link("a", ".wh..wh.plnk/1"), file("a", "a"),
					link("b", ".wh..wh.plnk/1"),
					file(".wh..wh.plnk/2", "unused"),
				},
				{file(".wh..wh.plnk/1", "y"), link("c", ".wh..wh.plnk/1")},
			},
			[]string{rootLine, `a 0 0644 0:0 "a"`, `b 0 0644 0:0 "x"`, `c 0 0644 0:0 "y"`},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := target(t)
			if _, err := flatten.Layers(t.Context(), layers(t, c.layers...), f, flatten.Options{}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, listing(t, f)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// What is overridden takes no room, whatever overrides it: another file, its whiteout, that of a
// directory above, an opaque mark, a directory.
func TestLayers_Overridden(t *testing.T) {
	large := func(name string) ent { return file(name, strings.Repeat(name, 4<<20/len(name))) }
	noted := func(name string) ent {
		d := dir(name, 0o755)
		d.PAXRecords = map[string]string{"SCHILY.xattr.user.note": strings.Repeat("x", 1000)} // in a block
		return d
	}
	f := target(t)
	_, err := flatten.Layers(t.Context(), layers(t, []ent{
		noted("."), noted("."), large("a"), large("a"), large("b"), noted("d"), large("d/c"), noted("e/h"), large("e/f"),
		large("g"), large("kept"),
	}, []ent{
		dir(".", 0o755), file("a", "a"), file(".wh.b", ""), file(".wh.d", ""), file("e/h/x", ""), file("e/.wh..wh..opq", ""),
		dir("g", 0o755),
		link("k", "kept"), file(".wh.kept", ""),
	}), f, flatten.Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		rootLine, `a 0 0644 0:0 "a"`, "e 5 0755 0:0", "e/h 5 0755 0:0", `e/h/x 0 0644 0:0 ""`, "g 5 0755 0:0",
		fmt.Sprintf(`k 0 0644 0:0 "%x"`, sha256.Sum256([]byte(large("kept").body))),
	}
	if diff := cmp.Diff(want, listing(t, f)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if used := blocks(fi) * 512; used > 5<<20 {
		t.Errorf("%d bytes on disk, of which one file has 4 MiB", used)
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
	if _, err := flatten.Layers(t.Context(), l, f, flatten.Options{}); err != nil {
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
	_, err := flatten.Layers(ctx, l, target(t), flatten.Options{Progress: func(int64) { cancel() }})
	if err == nil || ctx.Err() == nil {
		t.Errorf("%v, want the context's end", err)
	}
}

func TestLayers_Progress(t *testing.T) {
	l := layers(t, []ent{file("a", string(make([]byte, 1<<20)))}, []ent{file("b", "")})
	var size, last int64
	for _, l := range l {
		r, err := l.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, r)
		if err != nil {
			t.Fatal(err)
		}
		size += n
	}
	if _, err := flatten.Layers(t.Context(), l, target(t), flatten.Options{Progress: func(done int64) {
		last = done
	}}); err != nil || last != size {
		t.Errorf("%d of %d bytes: %v", last, size, err)
	}
}
