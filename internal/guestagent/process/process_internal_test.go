package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	testPasswd = "root:x:0:0:root:/root:/bin/sh\nbroken\n:x:5:5\nweb:x:1000:1001::/home/web:/bin/sh\r\n2000:x:2001:7::relative:\n" +
		"short:x:3000\nbad:x:many:1:::\nover:x:4294967295:1:::\nnogroup:x:8:x:::\n"
	testGroup = "root:x:0:\nweb:x:1001:\nlogs:x:1002:other,web\nadm:x:4:web,\nodd:x:y:web\ntwo:x:22\n"
)

// text are the accounts in a text.
func text(s string) accounts {
	return func(each func([]string) bool) error { return readAccounts(strings.NewReader(s), each) }
}

func TestResolve(t *testing.T) {
	passwd, group := text(testPasswd), text(testGroup)
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
		"root:":      {0, 0, nil, "/root"}, // an empty group is none
		":":          {0, 0, nil, "/root"},
		"web:":       {1000, 1001, []uint32{1002, 4}, "/home/web"},
		"12:":        {12, 0, nil, "/"},
		"two:two":    {},
		"bad":        {},
		"over":       {},
		"nogroup":    {},
		"nobody:":    {},
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
	if got, err := resolve("", text(""), text("")); err != nil || got.Home != "/" || got.UID != 0 {
		t.Errorf("without passwd: %+v, %v", got, err)
	}
}

func FuzzResolve(f *testing.F) {
	f.Add("web:logs", []byte(testPasswd), []byte(testGroup))
	f.Add("0", []byte("::::::\n"), []byte(":::\n"))
	f.Fuzz(func(t *testing.T, spec string, passwd, group []byte) {
		u, err := resolve(spec, text(string(passwd)), text(string(group)))
		if err == nil && (u.UID > maxID || u.GID > maxID || !filepath.IsAbs(u.Home)) {
			t.Errorf("%q: %+v", spec, u)
		}
	})
}

func TestAccounts(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	var long strings.Builder // over a megabyte, as of a large site
	for i := range 50_000 {
		fmt.Fprintf(&long, "user%d:x:%d:7:somebody:/home/user%d:/bin/sh\n", i, 10_000+i, i)
	}
	endless := strings.Repeat("x", maxLine+100)
	if err := errors.Join(
		os.WriteFile(at("passwd"), []byte(testPasswd), 0o600),
		os.WriteFile(at("long"), []byte(long.String()), 0o600),
		os.WriteFile(at("line"), []byte(endless+":x:1:1\nbehind:x:9:9:::\n"+endless), 0o600),
		os.WriteFile(at("huge"), nil, 0o600), os.Truncate(at("huge"), 1<<40),
		syscall.Mkfifo(at("fifo"), 0o600), os.Symlink("loop", at("loop")), os.Mkdir(at("dir"), 0o700),
		os.Symlink("/dev/zero", at("zero")),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int{"missing": 0, "passwd": 7, "long": 50_000, "line": 1} {
		got := 0
		if err := accountsOf(at(name))(func([]string) bool { got++; return true }); got != want || err != nil {
			t.Errorf("%s: %d entries, %v, want %d", name, got, err, want)
		}
	}
	found := map[string]User{
		"user49999": {59_999, 7, nil, "/home/user49999"},
		"59998":     {59_998, 7, nil, "/home/user49998"}, "0": {0, 0, nil, "/"},
	}
	for user, want := range found {
		got, err := resolve(user, accountsOf(at("long")), accountsOf(at("long")))
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%s of a long file: %v, %s", user, err, diff)
		}
	}
	// Who is a number needs none of what cannot be read.
	for _, name := range []string{"huge", "fifo", "loop", "dir", "zero"} {
		all := accountsOf(at(name))
		for user, want := range map[string]User{"": {Home: "/"}, "0": {Home: "/"}, "12:13": {12, 13, nil, "/"}} {
			if got, err := resolve(user, all, all); cmp.Diff(want, got) != "" || err != nil {
				t.Errorf("%q with %s: got %+v, %v", user, name, got, err)
			}
		}
		for _, user := range []string{"web", "0:web"} {
			if got, err := resolve(user, all, all); err == nil || strings.Contains(err.Error(), "has no") {
				t.Errorf("%q with %s: got %+v, %v, want what is wrong with the file", user, name, got, err)
			}
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
