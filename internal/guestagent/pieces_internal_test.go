package guestagent

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/agentproto"
)

func TestMain_NotFirst(t *testing.T) {
	if err := Main(Signals{}); err == nil {
		t.Error("it took this for a guest")
	}
}

func TestReadModuleList(t *testing.T) {
	got, err := readModuleList(strings.NewReader("/lib/a.ko\n\n/lib/b.ko"))
	if diff := cmp.Diff([]string{"/lib/a.ko", "/lib/b.ko"}, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	for name, text := range map[string]string{
		"relative": "lib/a.ko", "dots": "/lib/../a.ko", "NUL": "/lib/\x00", "long line": "/" + strings.Repeat("a", 1<<20),
		"long": strings.Repeat("/lib/a.ko\n", 1<<17),
	} {
		if got, err := readModuleList(strings.NewReader(text)); err == nil {
			t.Errorf("%s: got %.3q", name, got)
		}
	}
}

func FuzzModuleList(f *testing.F) {
	f.Add([]byte("/lib/modules/6.1/a.ko\n/lib/modules/6.1/b.ko\n"))
	f.Add([]byte("../x\n\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		paths, err := readModuleList(bytes.NewReader(data))
		for _, p := range paths {
			if err != nil || !filepath.IsAbs(p) || filepath.Clean(p) != p || strings.ContainsAny(p, "\x00\n") {
				t.Errorf("%q: %q, %v", data, p, err)
			}
		}
	})
}

// drives makes a machine's drives by name.
func drives(t *testing.T, contents map[string][]byte) (sys, dev string) {
	t.Helper()
	sys, dev = t.TempDir(), t.TempDir()
	for name, content := range contents {
		if err := errors.Join(
			os.Mkdir(filepath.Join(sys, name), 0o700),
			os.WriteFile(filepath.Join(sys, name, "size"), fmt.Appendln(nil, len(content)/sectorSize), 0o600),
			os.WriteFile(filepath.Join(dev, name), content, 0o600),
		); err != nil {
			t.Fatal(err)
		}
	}
	return sys, dev
}

func TestFindBoot(t *testing.T) {
	want := &agentproto.Boot{RootDevice: "/dev/vdb", RootType: agentproto.Ext4}
	block, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	large := append(bytes.Clone(block), make([]byte, agentproto.MaxSize)...)
	damaged := bytes.Replace(block, []byte("ext4"), []byte("ext5"), 1)
	for name, c := range map[string]struct {
		drives map[string][]byte
		want   error
		text   string
	}{
		"First":     {map[string][]byte{"vda": block, "vdb": large, "vdc": make([]byte, 4096)}, nil, ""},
		"Last":      {map[string][]byte{"vda": make([]byte, 512), "vdb": large, "vdzz": block}, nil, ""},
		"None":      {map[string][]byte{"vda": make([]byte, 4096), "vdb": nil}, errNotYet, ""},
		"OnlyLarge": {map[string][]byte{"vda": large}, agentproto.ErrNoBoot, ""},
		"OtherKind": {map[string][]byte{"sda": block}, errNotYet, ""},
		"Damaged":   {map[string][]byte{"vda": damaged}, agentproto.ErrInvalid, "drive vda"},
		"Two":       {map[string][]byte{"vda": block, "vdc": block}, nil, "drives vda and vdc both have one"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := findBoot(drives(t, c.drives))
			if c.want == nil && c.text == "" {
				if diff := cmp.Diff(want, got); err != nil || diff != "" {
					t.Error(err, diff)
				}
				return
			}
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v, %q", err, c.want, c.text)
			}
		})
	}
	sys, dev := drives(t, map[string][]byte{"vda": block})
	if err := os.Remove(filepath.Join(dev, "vda")); err != nil {
		t.Fatal(err)
	}
	if _, err := findBoot(sys, dev); !errors.Is(err, errNotYet) {
		t.Errorf("without its node: %v", err)
	}
}

const (
	testPasswd = "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:5:5\nweb:x:1000:1001::/home/web:/bin/sh\r\n2000:x:2001:7::relative:\n" +
		"short:x:3000\nbad:x:many:1:::\nover:x:4294967295:1:::\nnogroup:x:8:x:::\n"
	testGroup = "root:x:0:\nweb:x:1001:\nlogs:x:1002:other,web\nadm:x:4:web,\nodd:x:y:web\ntwo:x:22\n"
)

func TestResolve(t *testing.T) {
	passwd, group := parseAccounts([]byte(testPasswd)), parseAccounts([]byte(testGroup))
	for spec, want := range map[string]user{
		"":           {0, 0, nil, "/root"},
		"root":       {0, 0, nil, "/root"},
		"web":        {1000, 1001, []uint32{1002, 4}, "/home/web"},
		"1000":       {1000, 1001, []uint32{1002, 4}, "/home/web"},
		"web:logs":   {1000, 1002, nil, "/home/web"},
		"web:22":     {1000, 22, nil, "/home/web"},
		"12:13":      {12, 13, nil, "/"},
		"12":         {12, 0, nil, "/"},
		"2000":       {2001, 7, nil, "/"}, // a name first
		"short":      {3000, 0, nil, "/"},
		":web":       {0, 1001, nil, "/root"},
		"two:two":    {},
		"bad":        {},
		"over":       {},
		"nogroup":    {},
		"web:":       {},
		"web:odd":    {},
		"-1":         {},
		"web:-1":     {},
		"4294967295": {},
		"web:1:1":    {},
	} {
		got, err := resolve(spec, passwd, group)
		if (err != nil) != (want.home == "") {
			t.Errorf("%q: got error %v", spec, err)
		}
		if diff := cmp.Diff(want, got, cmp.AllowUnexported(user{})); diff != "" {
			t.Errorf("%q: %s", spec, diff)
		}
	}
	if got, err := resolve("", nil, nil); err != nil || got.home != "/" || got.uid != 0 {
		t.Errorf("without passwd: %+v, %v", got, err)
	}
}

func FuzzResolve(f *testing.F) {
	f.Add("web:logs", []byte(testPasswd), []byte(testGroup))
	f.Add("0", []byte("::::::\n"), []byte(":::\n"))
	f.Fuzz(func(t *testing.T, spec string, passwd, group []byte) {
		u, err := resolve(spec, parseAccounts(passwd), parseAccounts(group))
		if err == nil && (u.uid > maxID || u.gid > maxID || !filepath.IsAbs(u.home)) {
			t.Errorf("%q: %+v", spec, u)
		}
	})
}

func TestReadAccounts(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.WriteFile(at("passwd"), []byte(testPasswd), 0o600),
		os.WriteFile(at("huge"), nil, 0o600), os.Truncate(at("huge"), 1<<30),
		syscall.Mkfifo(at("fifo"), 0o600), os.Symlink("loop", at("loop")), os.Mkdir(at("dir"), 0o700),
		os.Symlink("/dev/zero", at("zero")),
	); err != nil {
		t.Fatal(err)
	}
	if got, err := readAccounts(at("missing")); got != nil || err != nil {
		t.Error(got, err)
	}
	if got, err := readAccounts(at("passwd")); len(got) != 7 || err != nil {
		t.Error(got, err)
	}
	for _, name := range []string{"huge", "fifo", "loop", "dir", "zero"} {
		if _, err := readAccounts(at(name)); err == nil {
			t.Errorf("%s was read", name)
		}
	}
}

func TestEnvironment(t *testing.T) {
	got := environment([]string{"A=1", "TERM=dumb", "B=", "A=2", "HOME=/x"}, "/home/web")
	want := []string{"PATH=" + defaultPath, "HOME=/x", "TERM=dumb", "A=2", "B="}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"a", "b/tool"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for path, mode := range map[string]fs.FileMode{"a/text": 0o600, "b/text": 0o700, "a/tool": 0o700} {
		if err := os.WriteFile(filepath.Join(dir, path), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"A=1", "PATH=" + dir + "/b:a"}
	for name, want := range map[string]string{
		"text": dir + "/b/text", "tool": dir + "/a/tool", "./x": dir + "/x", "/x/../y": "/x/../y", "none": "",
	} {
		got, err := lookPath(name, dir, env)
		if got != want || (want == "") != errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
}
