package give_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/give"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/internal/ext4"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// scratch is the disk of a VM that has removed srv/file0, made srv/new and says who it is.
func scratch(t *testing.T) (read func(context.Context, func(string) error) error) {
	t.Helper()
	testenv.Require(t, testenv.Root) // whiteouts are devices
	mkfs := testenv.Fixture(t, fixtures.MkfsExt4)
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	upper := filepath.Join(root, "upper")
	err := errors.Join(os.MkdirAll(filepath.Join(upper, "srv"), 0o755), os.MkdirAll(filepath.Join(upper, "etc"), 0o755),
		os.MkdirAll(filepath.Join(root, "work"), 0o755),
		os.WriteFile(filepath.Join(upper, "srv/new"), []byte("new"), 0o644),
		os.WriteFile(filepath.Join(upper, "etc/hostname"), []byte("a VM's"), 0o644),
		os.WriteFile(filepath.Join(root, "work/none"), []byte("of the kernel"), 0o644),
		unix.Mknod(filepath.Join(upper, "srv/file0"), unix.S_IFCHR, 0),
		unix.Mknod(filepath.Join(upper, "lost+found"), unix.S_IFCHR, 0))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "scratch")
	if out, err := exec.CommandContext(t.Context(), mkfs, "-q", "-d", root, path, "16M").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return func(_ context.Context, read func(string) error) error { return read(path) }
}

// files are the names and contents of an image's root file system.
func files(t *testing.T, s *image.Store, i *image.Image) map[string]string {
	t.Helper()
	path, _, err := s.Root(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fs, err := ext4.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := errors.Join(fs.Tar(t.Context(), w, ext4.Limits{Bytes: 1 << 30, Entries: 1 << 20}), w.Close()); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for r := tar.NewReader(&out); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		text, readErr := io.ReadAll(r)
		if err != nil || readErr != nil {
			t.Fatal(err, readErr)
		}
		all[strings.TrimSuffix(h.Name, "/")] = string(text)
	}
}

// An image of a VM is that which the VM runs and what it has written, and can be pushed, pulled and
// run like any.
func TestCommit(t *testing.T) {
	r := serve(t, "")
	s := open(t)
	pull(t, s, layout(t, 2), "local")
	if _, err := give.Push(t.Context(), s, "local", r.host+"/app:1"); err != nil {
		t.Fatal(err)
	}
	base := pull(t, s, r.host+"/app:1", "app")
	root, _, err := s.Root(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	line := `["/srv/new"]`
	o := give.CommitOptions{
		Image: "app", Root: root, Name: "made:1", Read: scratch(t), Author: "me", Comment: "with new",
		Change: config.Change{Cmd: &line, Env: []string{"A=b"}},
	}
	made, err := give.Commit(t.Context(), s, o)
	if err != nil {
		t.Fatal(err)
	}
	want := files(t, s, base)
	delete(want, "srv/file0")
	want["srv/new"], want["etc"] = "new", ""
	want["srv/file0-link"] = "of layer 0\n" // was another name of what is gone
	if diff := cmp.Diff(want, files(t, s, made)); diff != "" {
		t.Error(diff)
	}
	last := made.About.History[len(made.About.History)-1]
	if made.Name != "made:1" || made.About.Author != "me" || last.Comment != "with new" || len(made.Layers) != 3 ||
		!cmp.Equal(made.Layers[:2], base.Layers) ||
		!cmp.Equal(made.Config.Cmd, []string{"/srv/new"}) || !cmp.Equal(made.Config.Env, append(base.Config.Env, "A=b")) {
		t.Errorf("%+v", made)
	}
	// The layers stay for as long as it does, whatever becomes of what it was made from.
	for _, name := range []string{"app", "local"} {
		if _, err := s.Remove(t.Context(), name, false); err != nil {
			t.Fatal(err)
		}
	}
	pushed, err := give.Push(t.Context(), s, "made:1", r.host+"/made:1")
	if err != nil || pushed.Digest != made.Digest {
		t.Fatalf("%+v, %v, want %s", pushed, err, made.Digest)
	}
	same(t, pull(t, open(t), r.host+"/made:1", ""), made)
	// What has no name any more is no image to build on.
	if _, err := give.Commit(t.Context(), s, o); !errors.Is(err, image.ErrNotFound) {
		t.Errorf("of an image that is gone: %v", err)
	}
	if _, err := s.Remove(t.Context(), "made:1", false); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(filepath.Dir(filepath.Dir(filepath.Dir(root))), "layers")); err != nil ||
		len(left) > 0 {
		t.Errorf("left of the layers: %v, %v", left, err)
	}
}

// An image that has no layers becomes one, and boots as before; one that has got another's name
// meanwhile is found by what it is.
func TestCommit_Imported(t *testing.T) {
	s := open(t)
	path, _, err := s.Root(t.Context(), pull(t, s, layout(t, 2), "local"))
	if err != nil {
		t.Fatal(err)
	}
	base, err := s.Import(t.Context(), image.ImportOptions{Name: "app", Rootfs: path, BootArgs: "quiet"})
	if err != nil {
		t.Fatal(err)
	}
	root, _, err := s.Root(t.Context(), base)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Tag(t.Context(), "app", "kept"); err != nil {
		t.Fatal(err)
	}
	pull(t, s, layout(t, 1), "app") // another has its name
	made, err := give.Commit(t.Context(), s, give.CommitOptions{Image: "app", Root: root, Name: "made", Read: scratch(t)})
	if err != nil {
		t.Fatal(err)
	}
	got := files(t, s, made)
	if len(made.Layers) != 2 || made.BootArgs != "quiet" || got["srv/new"] != "new" || got["srv/file1"] != "of layer 1\n" {
		t.Errorf("%+v: %v", made, got)
	}
	refused := errors.New("refused")
	_, err = give.Commit(t.Context(), s,
		give.CommitOptions{Image: "app", Root: root, Name: "none", Read: func(context.Context, func(string) error) error {
			return refused
		}})
	if _, found := s.Find("none"); !errors.Is(err, refused) || !errors.Is(found, image.ErrNotFound) {
		t.Errorf("%v, %v", err, found)
	}
	// What is wrong with what was asked for is said before the VM stands still.
	for name, o := range map[string]give.CommitOptions{
		"a name that is none": {Name: "No Name"}, "the host's": {Name: image.HostKernel},
		"a variable without a name": {Name: "fine", Change: config.Change{Env: []string{"=x"}}},
	} {
		o.Image, o.Root = "app", root
		o.Read = func(context.Context, func(string) error) error {
			t.Errorf("%s: the VM was stopped for it", name)
			return nil
		}
		if _, err := give.Commit(t.Context(), s, o); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
