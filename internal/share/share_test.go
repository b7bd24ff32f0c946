package share_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/spec"
)

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{"d/f": "f", "link": "-> d"})
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	given := []spec.Volume{
		{Source: "d", Target: "/a"},
		{Source: "link/f", Target: "/b", Sync: true},
		{Source: "none", Target: "/c"},
		{Source: "fifo", Target: "/d"},
	}
	s := &spec.Spec{Volumes: given}
	errs := share.Resolve(s)
	if len(errs) != 2 || errs[0].Error() != `volumes[2].source: no such file or directory (got "none")` ||
		!strings.HasPrefix(errs[1].Error(), "volumes[3].source: neither a directory nor a file") {
		t.Errorf("got %v", errs)
	}
	if given[0].Source != "d" {
		t.Error("the caller's volumes were changed")
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		t.Fatal(err)
	}
	if s.Volumes[0].Source != real+"/d" || s.Volumes[1].Source != real+"/d/f" {
		t.Errorf("got %+v", s.Volumes)
	}
	if diff := cmp.Diff([]guest.Volume{{Target: "/a"}, {Target: "/b", IsFile: true}},
		share.Guest(s.Volumes[:2])); diff != "" {
		t.Error(diff)
	}
	if !share.Synced(s.Volumes) || share.Synced(s.Volumes[:1]) {
		t.Error("what is copied back")
	}
}

// What does not fit is refused before anything is written.
func TestImage_Space(t *testing.T) {
	testenv.Require(t, testenv.Root)
	testenv.Turn(t) // others look at the mounts of this machine
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	put(t, dir, map[string]string{"a/f": strings.Repeat("x", 700<<10), "b/f": strings.Repeat("x", 700<<10)})
	i := &share.Image{
		Path:    small + "/volumes",
		Volumes: []spec.Volume{{Source: dir + "/a", Target: "/a"}, {Source: dir + "/b", Target: "/b"}},
	}
	if err := i.Apply(t.Context()); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "1 MiB") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(i.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was written: %v", err)
	}
}
