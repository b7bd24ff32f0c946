package process

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	testPasswd = "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:5:5\nweb:x:1000:1001::/home/web:/bin/sh\r\n2000:x:2001:7::relative:\n" +
		"short:x:3000\nbad:x:many:1:::\nover:x:4294967295:1:::\nnogroup:x:8:x:::\n"
	testGroup = "root:x:0:\nweb:x:1001:\nlogs:x:1002:other,web\nadm:x:4:web,\nodd:x:y:web\ntwo:x:22\n"
)

func TestResolve(t *testing.T) {
	passwd, group := parseAccounts([]byte(testPasswd)), parseAccounts([]byte(testGroup))
	for spec, want := range map[string]User{
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
		if (err != nil) != (want.Home == "") {
			t.Errorf("%q: got error %v", spec, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%q: %s", spec, diff)
		}
	}
	if got, err := resolve("", nil, nil); err != nil || got.Home != "/" || got.UID != 0 {
		t.Errorf("without passwd: %+v, %v", got, err)
	}
}

func FuzzResolve(f *testing.F) {
	f.Add("web:logs", []byte(testPasswd), []byte(testGroup))
	f.Add("0", []byte("::::::\n"), []byte(":::\n"))
	f.Fuzz(func(t *testing.T, spec string, passwd, group []byte) {
		u, err := resolve(spec, parseAccounts(passwd), parseAccounts(group))
		if err == nil && (u.UID > maxID || u.GID > maxID || !filepath.IsAbs(u.Home)) {
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
	got := Environment([]string{"A=1", "TERM=dumb", "B=", "A=2", "HOME=/x"}, "/home/web")
	want := []string{"PATH=" + DefaultPath, "HOME=/x", "TERM=dumb", "A=2", "B="}
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
		got, err := LookPath(name, dir, env)
		if got != want || (want == "") != errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
}
