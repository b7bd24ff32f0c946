package agent_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/treetar"
)

// world is made before each row of TestCopy_Rules.
const world = `
mkdir -p rel/42 there/file there/tree odd tree way2
echo x >rel/42/f; ln -s rel/42 current; ln -s nowhere dangling
echo new >file; echo old >real; ln real twin; chmod 600 real; ln -s real conf; ln -s there way
mkfifo pipe odd/b; echo 1 >odd/a; echo 2 >odd/c
mkdir -p lib there/usr/lib; echo l >lib/l; ln -s usr/lib there/lib
mkdir outside; ln -s ../outside there/tree/sub; mkdir tree/sub; echo y >tree/sub/g; echo z >tree/h
`

// shape says what there is below a directory, by name.
func shape(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(at string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, at)
		switch kind := d.Type(); {
		case kind.IsRegular():
			data, err := os.ReadFile(at)
			all[name] = strings.TrimSpace(string(data))
			return err
		case kind == fs.ModeSymlink:
			to, err := os.Readlink(at)
			all[name] = "-> " + to
			return err
		default:
			all[name] = kind.String()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// What docs/copy.md says: its rows, both ways where they do not differ.
func TestCopy_Rules(t *testing.T) {
	_, c := newServer(t, nil)
	type changes = map[string]string // by name: what is there then; "": nothing
	const dir = "d---------"
	for name, tt := range map[string]struct {
		from, to string
		way      string // "to" or "from"; "": both
		follow   bool
		want     changes
		err      string
	}{
		"contents of a link to a directory": {from: "current/.", to: "there", want: changes{"there/f": "x"}},
		"a link and a slash, into": {
			from: "current/", to: "there",
			want: changes{"there/current": dir, "there/current/f": "x"},
		},
		"a link and a slash, new": {from: "current/", to: "out", want: changes{"out": dir, "out/f": "x"}},
		"a link, into": {
			from: "current", to: "there",
			want: changes{"there/current": "-> rel/42"},
		},
		"a link, new": {
			from: "current", to: "out", way: "to",
			want: changes{"out": "-> rel/42"},
		},
		"a link of a guest, new": {
			from: "current", to: "out", way: "from",
			err: `is a symbolic link to "rel/42"`,
		},
		"what a link leads to": {
			from: "current", to: "out", follow: true,
			want: changes{"out": dir, "out/f": "x"},
		},
		"what a link leads to, into": {
			from: "current", to: "there", follow: true,
			want: changes{"there/current": dir, "there/current/f": "x"},
		},
		"a link that leads nowhere, followed": {from: "dangling", to: "out", follow: true, err: "no such file"},
		"a file and a slash":                  {from: "file/", to: "out", err: "not a directory"},
		"contents of a file":                  {from: "file/.", to: "out", err: "not a directory"},
		"onto a file":                         {from: "file", to: "real", want: changes{"real": "new"}},
		"onto a link to a file":               {from: "file", to: "conf", want: changes{"real": "new"}},
		"onto a link to a directory": {
			from: "file", to: "way", way: "to",
			err: `"file" is a directory, which a file does not replace`,
		},
		"through a link to a directory":  {from: "real", to: "way", want: changes{"there/real": "old"}},
		"onto a link that leads nowhere": {from: "file", to: "dangling", err: "leads nowhere"},
		"onto a FIFO":                    {from: "file", to: "pipe", err: "neither a file nor a directory"},
		"onto an empty directory of its name": {
			from: "file", to: "there",
			err: `"file" is a directory, which a file does not replace`,
		},
		"a directory onto a file": {
			from: "rel", to: "real",
			err: `"real" is a file, which a directory does not replace`,
		},
		"contents onto a file":          {from: "rel/.", to: "real", err: "real"},
		"to below what is no directory": {from: "file", to: "real/new", err: "not a directory"},
		"a tree with a FIFO": {
			from: "odd", to: "out",
			want: changes{"out": dir, "out/a": "1", "out/c": "2"}, err: `b": neither file, directory nor link`,
		},
		"contents with a FIFO": {
			from: "odd/.", to: "there",
			want: changes{"there/a": "1", "there/c": "2"}, err: `b": neither file, directory nor link`,
		},
		"a FIFO": {
			from: "pipe", to: "there",
			err: `left out "pipe": neither file, directory nor link`,
		},
		"a tree over a link, out of a guest": {
			from: "tree", to: "there", way: "from",
			want: changes{"there/tree/h": "z"}, err: `"tree/sub" is a symbolic link, which a directory does not replace`,
		},
		"a tree over a link, into a guest": {
			from: "tree/sub", to: "there/tree", way: "to", want: changes{},
			err: "escapes",
		},
		"by way of a link, into a guest": {
			from: "lib", to: "there", way: "to",
			want: changes{"there/usr/lib/l": "l"},
		},
		"by way of a link, out of a guest": {
			from: "lib", to: "there", way: "from",
			err: `"lib" is a symbolic link, which a directory does not replace`,
		},
		"what is not there":      {from: "none", to: "out", err: "no such file"},
		"into what is not there": {from: "file", to: "out/", err: "no such directory"},
		"a tree beside a link that is in its way": {
			from: "tree", to: "way2",
			want: changes{"way2/tree": dir, "way2/tree/h": "z", "way2/tree/sub": dir, "way2/tree/sub/g": "y"},
		},
		"a file by way of \"..\"": {from: "tree/../file", to: "out", want: changes{"out": "new"}},
		"a directory by way of \".\", under its name": {
			from: "rel/./42", to: "there",
			want: changes{"there/42": dir, "there/42/f": "x"},
		},
	} {
		for way, do := range map[string]func(from, to string, o guest.CopyOptions) error{
			"to":   func(from, to string, o guest.CopyOptions) error { return c.CopyTo(t.Context(), from, to, nil, o) },
			"from": func(from, to string, o guest.CopyOptions) error { return c.CopyFrom(t.Context(), from, to, nil, o) },
		} {
			if tt.way != "" && tt.way != way {
				continue
			}
			t.Run(name+" "+way, func(t *testing.T) {
				at := t.TempDir()
				if exit, out, errs := run(t, c, guest.Cmd{Args: []string{"sh", "-euc", world}, Dir: at}); exit.Code != 0 {
					t.Fatal(exit, out, errs)
				}
				want := shape(t, at)
				for name, what := range tt.want {
					want[name] = what
				}
				maps.DeleteFunc(want, func(_, what string) bool { return what == "" })
				err := do(at+"/"+tt.from, at+"/"+tt.to, guest.CopyOptions{FollowLink: tt.follow})
				if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
					t.Errorf("got error %v, want %q", err, tt.err)
				}
				if diff := cmp.Diff(want, shape(t, at)); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}

// Files of /proc say that they are empty.
func TestCopy_Proc(t *testing.T) {
	_, c := newServer(t, nil)
	to := filepath.Join(t.TempDir(), "version")
	want, err := os.ReadFile("/proc/version")
	if err != nil {
		t.Fatal(err)
	}
	for way, do := range map[string]func() error{
		"to":   func() error { return c.CopyTo(t.Context(), "/proc/version", to, nil, guest.CopyOptions{}) },
		"from": func() error { return c.CopyFrom(t.Context(), "/proc/version", to, nil, guest.CopyOptions{}) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %q, %v", way, got, err)
		}
		if err := os.Remove(to); err != nil {
			t.Fatal(err)
		}
	}
	// What cannot be read is named.
	if err := c.CopyTo(t.Context(), "/proc/self/mem", to, nil, guest.CopyOptions{}); err == nil ||
		!strings.Contains(err.Error(), `left out "top": `) {
		t.Errorf("got %v", err)
	}
}

// guestSends is a guest that answers each copy with the next of some archives.
func guestSends(t *testing.T, archives ...[]tar.Header) *agent.Client {
	t.Helper()
	l, c := listen(t)
	go func() {
		for _, headers := range archives {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, h := range headers {
				if h.Mode = 0o644; h.Typeflag == tar.TypeReg {
					h.Size = int64(len("guest"))
				}
				err = errors.Join(err, w.WriteHeader(&h))
				if h.Size > 0 {
					_, werr := w.Write([]byte("guest"))
					err = errors.Join(err, werr)
				}
			}
			if err := errors.Join(err, w.Close()); err != nil {
				t.Error(err)
			}
			_, _ = conn.Write(frame(agentproto.KindReply, []byte("{}")))
			for part := range slices.Chunk(b.Bytes(), agentproto.MaxData) {
				_, _ = conn.Write(frame(agentproto.KindStdout, part))
			}
			_, _ = conn.Write(append(frame(agentproto.KindStdout, nil), frame(agentproto.KindExit, []byte("{}"))...))
			t.Cleanup(func() { conn.Close() })
		}
	}()
	return c
}

// A guest that answers with another archive than was asked for writes nothing else, and what it has
// planted is not gone by.
func TestCopyFrom_Hostile(t *testing.T) {
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
	dir := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name + "/"} }
	link := func(name, to string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	hard := func(name, to string) tar.Header { return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to} }
	odd := tar.Header{Typeflag: tar.TypeChar, Name: "data/null", Devmajor: 1, Devminor: 3}
	type archive = []tar.Header
	for name, tt := range map[string]struct {
		archives []archive
		from, to string
		want     map[string]string // of the home directory, below which all is
		err      string            // of the last copy
	}{
		"what was asked for": {
			archives: []archive{{file("data")}}, from: "/etc/data", to: "home",
			want: map[string]string{"home/data": "guest"},
		},
		"other names": {
			archives: []archive{{file(".bashrc"), file(".ssh/authorized_keys")}}, from: "/etc/data",
			to: "home", want: map[string]string{"home/data": "guest"}, err: "is a file, which a directory does not replace",
		},
		"a parent": {
			archives: []archive{{file("../.bashrc"), file("data/../../x"), file("data")}}, from: "/data", to: "home",
			want: map[string]string{"home/data": "d---------", "home/data/.bashrc": "guest", "home/data/x": "guest"},
			err:  "is a directory, which a file does not replace",
		},
		"nothing": {archives: []archive{{}}, from: "/data", to: "home", err: "empty archive"},
		"a link where the copy goes": {
			archives: []archive{
				{link("data", "home/.ssh")},
				{dir("data"), file("data/authorized_keys")},
			}, from: "/data", to: "data",
			want: map[string]string{"data": "d---------", "data/authorized_keys": "guest"},
		},
		"a link to a file where the copy goes": {
			archives: []archive{{link("data", "home/.bashrc")}, {file("data")}},
			from:     "/data", to: "data", want: map[string]string{"data": "guest"},
		},
		"a link in a directory": {
			archives: []archive{{link("data", ".ssh")}, {dir("data"), file("data/authorized_keys")}}, from: "/data", to: "home",
			want: map[string]string{"home/data": "-> .ssh"}, err: "is a symbolic link, which a directory does not replace",
		},
		"a link below": {
			archives: []archive{
				{dir("data"), link("data/x", "../.ssh")},
				{dir("data"), dir("data/x"), file("data/x/authorized_keys")},
			}, from: "/data", to: "home",
			want: map[string]string{"home/data": "d---------", "home/data/x": "-> ../.ssh"},
			err:  "is a symbolic link, which a directory does not replace",
		},
		"a link of the same archive": {
			archives: []archive{{dir("data"), link("data/x", "../.ssh"), file("data/x/authorized_keys")}},
			from:     "/data", to: "home",
			want: map[string]string{"home/data": "d---------", "home/data/x": "-> ../.ssh"},
			err:  "is a symbolic link, which a directory does not replace",
		},
		"a hard link by a link": {
			archives: []archive{{dir("data"), link("data/x", ".."), hard("data/y", "data/x/.bashrc")}},
			from:     "/data", to: "home",
			want: map[string]string{"home/data": "d---------", "home/data/x": "-> .."},
			err:  "is a symbolic link, which a directory does not replace",
		},
		"a device": {
			archives: []archive{{dir("data"), odd, file("data/f")}}, from: "/data", to: "home",
			want: map[string]string{"home/data": "d---------", "home/data/f": "guest"},
			err:  `left out "data/null": unsafe archive`,
		},
		"escapes": {
			archives: []archive{{dir("data"), file("data/a\x1b]0;x\n"), file("data/a\x1b]0;x\n/b")}}, from: "/data",
			to: "home", want: map[string]string{"home/data": "d---------", "home/data/a\x1b]0;x\n": "guest"},
			err: `left out "data/a\x1b]0;x\n/b"`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			at := t.TempDir()
			if err := errors.Join(os.MkdirAll(at+"/home/.ssh", 0o700),
				os.WriteFile(at+"/home/.ssh/authorized_keys", []byte("mine"), 0o600),
				os.WriteFile(at+"/home/.bashrc", []byte("mine"), 0o600)); err != nil {
				t.Fatal(err)
			}
			want := shape(t, at)
			maps.Copy(want, tt.want)
			c := guestSends(t, tt.archives...)
			var err error
			for range tt.archives {
				err = c.CopyFrom(t.Context(), tt.from, filepath.Join(at, tt.to), nil, guest.CopyOptions{Owners: os.Getuid() == 0})
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("got error %v, want %q", err, tt.err)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\x1b") {
				t.Errorf("the guest writes to the terminal: %q", err)
			}
			if diff := cmp.Diff(want, shape(t, at)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// Of much that is left out some is named, and the rest counted.
func TestCopyFrom_LeftOut(t *testing.T) {
	headers := []tar.Header{{Typeflag: tar.TypeDir, Name: "data/"}}
	for i := range 1000 {
		headers = append(headers, tar.Header{Typeflag: tar.TypeFifo, Name: fmt.Sprint("data/", i)})
	}
	err := guestSends(t, headers).CopyFrom(t.Context(), "/data", t.TempDir(), nil, guest.CopyOptions{})
	if !errors.Is(err, treetar.ErrUnsafe) || !strings.Contains(err.Error(), `left out "data/0": `) ||
		!strings.Contains(err.Error(), "left out 990 more") || len(err.Error()) > 2000 {
		t.Errorf("got %v", err)
	}
}
