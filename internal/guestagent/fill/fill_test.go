package fill_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/guestagent/fill"
	"push.rocks/smartvm/internal/testenv"
)

// listing is what a tree looks like: mode, owner, time, links and content by path.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(at string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(at)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		text := fmt.Sprintf("%v %d:%d", info.Mode(), st.Uid, st.Gid)
		switch info.Mode().Type() {
		case fs.ModeSymlink:
			target, err := os.Readlink(at)
			all[strings.TrimPrefix(at, dir)] = text + " -> " + target
			return err
		case 0:
			data, err := os.ReadFile(at)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %d %s", st.Nlink, data)
		}
		all[strings.TrimPrefix(at, dir)] = text + info.ModTime().UTC().Format(" 2006-01-02")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// tree makes a /run as images have it.
func tree(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "run")
	at := func(name string) string { return filepath.Join(dir, name) }
	when := time.Date(2020, 5, 17, 12, 0, 0, 0, time.UTC)
	err := errors.Join(
		os.MkdirAll(at("app/deep"), 0o755), os.Mkdir(at("empty"), 0o700), os.MkdirAll(at("systemd/system"), 0o755),
		os.WriteFile(at("app/file"), []byte("text"), 0o640), os.Link(at("app/file"), at("hard")),
		os.WriteFile(at("bad\xff"), nil, 0o600), os.Symlink("/nowhere", at("link")), os.Symlink("../..", at("app/up")),
		syscall.Mkfifo(at("fifo"), 0o600), os.Chown(at("app"), 999, 998), os.Lchown(at("link"), 7, 8),
		os.Chown(at("app/file"), 999, 0),
		os.Chmod(at("app"), 0o777|fs.ModeSticky), os.Chmod(at("app/file"), 0o750|fs.ModeSetgid), os.Chmod(dir, 0o711),
	)
	for _, name := range []string{"app/file", "bad\xff", "app/deep", "app", "empty", "systemd/system", "systemd", "."} {
		err = errors.Join(err, os.Chtimes(at(name), when, when))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func fillFrom(t *testing.T, dir string, o fill.Options) (map[string]string, error) {
	t.Helper()
	to := filepath.Join(t.TempDir(), "to")
	if err := os.Mkdir(to, 0o755); err != nil {
		t.Fatal(err)
	}
	from, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	into, err := os.OpenRoot(to)
	if err != nil {
		t.Fatal(err)
	}
	defer into.Close()
	err = fill.Copy(into, from, o)
	return listing(t, to), err
}

func TestCopy(t *testing.T) {
	testenv.Require(t, testenv.Root)
	dir := tree(t)
	want := listing(t, dir)
	delete(want, "/fifo")
	got, err := fillFrom(t, dir, fill.Options{})
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	for at := range want {
		if at != "" && !strings.HasPrefix(at, "/app") && at != "/empty" || at == "/app/file" || at == "/app/up" {
			delete(want, at)
		}
	}
	got, err = fillFrom(t, dir, fill.Options{Directories: true, Skip: []string{"systemd"}})
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("directories alone: %v, -want +got:\n%s", err, diff)
	}
}

// What there is too much of is left out, and the rest is there.
func TestCopy_Bounds(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.WriteFile(at("a"), make([]byte, 1<<20), 0o600), os.WriteFile(at("huge"), nil, 0o600),
		os.Truncate(at("huge"), 1<<40),
		os.Mkdir(at("z"), 0o755), os.WriteFile(at("z/z"), nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	got, err := fillFrom(t, dir, fill.Options{})
	if err == nil || !strings.Contains(err.Error(), "huge: more than 16777216 bytes of files") {
		t.Errorf("got %v", err)
	}
	for _, name := range []string{"/a", "/z", "/z/z"} {
		if got[name] == "" {
			t.Errorf("%s is missing", name)
		}
	}
	if got["/huge"] != "" {
		t.Error("a huge file was copied")
	}
	for i := range fill.MaxEntries {
		if err := os.WriteFile(at(fmt.Sprint("z/", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err = fillFrom(t, at("z"), fill.Options{})
	if err == nil || !strings.Contains(err.Error(), "more than 10000 entries") || len(got) != fill.MaxEntries+1 {
		t.Errorf("%d entries: %v", len(got), err)
	}
}
