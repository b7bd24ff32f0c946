package snapshot_test

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/snapshot"
)

func TestStore_Life(t *testing.T) {
	s := open(t)
	d := draft(t, s)
	wantIDs(t, s)
	sn, err := d.Commit(t.Context(), manifest("base"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if sn.ID != d.ID() || sn.Format != testFormat || sn.Arch != runtime.GOARCH || sn.Created.IsZero() ||
		len(sn.Files) != 3 {
		t.Errorf("committed as %+v", sn.Manifest)
	}
	for name, f := range sn.Files {
		if mode := modeOf(t, sn.Path(name)); mode != 0o444 || len(f.Digest) != 64 {
			t.Errorf("%s: mode %v, %+v", name, mode, f)
		}
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	again, err := openAt(t, filepath.Dir(sn.Dir())).Get("base")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sn.Manifest, again.Manifest); diff != "" {
		t.Errorf("-committed +read:\n%s", diff)
	}
	if err := again.Check(t.Context()); err != nil {
		t.Error(err)
	}
	for _, ref := range []string{sn.ID, sn.ID[:3], "base"} {
		if got, err := s.Get(ref); err != nil || got.ID != sn.ID {
			t.Errorf("%s: %v, %v", ref, got, err)
		}
	}
	for _, ref := range []string{"", "none", "../snapshots/" + sn.ID, kept.UsersDir, "."} {
		_, err := s.Get(ref)
		wantError(t, ref, err, snapshot.ErrNotFound)
	}
	wantIDs(t, s, sn.ID)
	if err := s.Remove(t.Context(), "base", false); err != nil {
		t.Error(err)
	}
	wantIDs(t, s)
	wantError(t, "removed", sn.Check(t.Context()), snapshot.ErrNotFound)
	wantError(t, "remove again", s.Remove(t.Context(), "base", false), snapshot.ErrNotFound)
	wantEmpty(t, filepath.Join(filepath.Dir(sn.Dir()), ".tmp"))
	if _, err := os.Lstat(sn.Dir()); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
}

func TestRemove_InUse(t *testing.T) {
	s := open(t)
	sn := commit(t, s, "base")
	vm := use(t, sn, "vm-1")
	var inUse *snapshot.InUseError
	err := s.Remove(t.Context(), "base", false)
	if !errors.As(err, &inUse) || !errors.Is(err, snapshot.ErrInUse) || !slices.Equal(inUse.By, []string{vm}) ||
		inUse.ID != sn.ID {
		t.Fatalf("remove: %v", err)
	}
	if users, err := sn.Users(); err != nil || !slices.Equal(users, []string{vm}) {
		t.Errorf("users %q, %v", users, err)
	}
	if removed, err := s.Prune(t.Context(), nil); err != nil || len(removed) > 0 {
		t.Errorf("pruned %q, %v", removed, err)
	}
	wantIDs(t, s, sn.ID)
	// The VM's directory is gone, its link is not: a crash.
	must(t, os.Remove(vm))
	if users, err := sn.Users(); err != nil || len(users) > 0 {
		t.Errorf("users %q, %v", users, err)
	}
	must(t, s.Remove(t.Context(), "base", false))
	wantIDs(t, s)

	sn = commit(t, s, "base")
	use(t, sn, "vm-1")
	must(t, s.Remove(t.Context(), "base", true))
	wantIDs(t, s)
}

func TestPrune_Keep(t *testing.T) {
	s := open(t)
	a, b, c := commit(t, s, "a"), commit(t, s, "b"), commit(t, s, "c")
	use(t, b, "vm")
	removed, err := s.Prune(t.Context(), func(sn *snapshot.Snapshot) bool { return sn.Name == "c" })
	if err != nil || !slices.Equal(removed, []string{a.ID}) {
		t.Errorf("pruned %q, %v", removed, err)
	}
	wantIDs(t, s, b.ID, c.ID)
}

// Ephemeral ones have no digests but of their state, are seen to change all the same, and go with
// their last user.
func TestSweep_Ephemeral(t *testing.T) {
	s := open(t)
	m := manifest("")
	m.Ephemeral = true
	d := draft(t, s)
	sn, err := d.Commit(t.Context(), m, nil)
	must(t, err)
	kept := commit(t, s, "")
	must(t, sn.Check(t.Context()))
	vm := use(t, sn, "vm")
	if removed, err := s.Sweep(t.Context()); err != nil || len(removed) > 0 {
		t.Errorf("swept %q, %v", removed, err)
	}
	rewrite(t, sn.Path(snapshot.MemoryFile), flip(0))
	wantDamage(t, "changed", sn.Check(t.Context()), snapshot.MemoryFile)
	must(t, os.Remove(vm))
	if removed, err := s.Sweep(t.Context()); err != nil || !slices.Equal(removed, []string{sn.ID}) {
		t.Errorf("swept %q, %v", removed, err)
	}
	wantIDs(t, s, kept.ID)
}

func TestCommit_Refused(t *testing.T) {
	s := open(t)
	taken := commit(t, s, "taken")
	for name, c := range map[string]struct {
		files    func(dir string) error
		manifest func(*snapshot.Manifest)
		want     error
	}{
		"NameTaken":    {nil, func(m *snapshot.Manifest) { m.Name = "taken" }, snapshot.ErrExists},
		"NameIsID":     {nil, func(m *snapshot.Manifest) { m.Name = taken.ID }, snapshot.ErrExists},
		"Name":         {nil, func(m *snapshot.Manifest) { m.Name = "../x" }, snapshot.ErrInvalid},
		"NoVersion":    {nil, func(m *snapshot.Manifest) { m.Firecracker = "" }, snapshot.ErrInvalid},
		"MoreMemory":   {nil, func(m *snapshot.Manifest) { m.MemSizeMiB++ }, snapshot.ErrInvalid},
		"NoMemorySize": {nil, func(m *snapshot.Manifest) { m.MemSizeMiB = 0 }, snapshot.ErrInvalid},
		"HugePages":    {nil, func(m *snapshot.Manifest) { m.HugePages = "1G" }, snapshot.ErrInvalid},
		"Machine":      {nil, func(m *snapshot.Manifest) { m.Machine = []byte("{") }, snapshot.ErrInvalid},
		"LargeMachine": {nil, func(m *snapshot.Manifest) {
			m.Machine = make([]byte, snapshot.MaxMachine+1)
		}, snapshot.ErrInvalid},
		"External": {nil, func(m *snapshot.Manifest) {
			m.External = []snapshot.External{{Device: "a", Path: "b"}}
		}, snapshot.ErrInvalid},
		"NoState": {func(dir string) error { return os.Remove(filepath.Join(dir, "state")) }, nil, snapshot.ErrInvalid},
		"NoMemory": {func(dir string) error {
			return os.Remove(filepath.Join(dir, "memory"))
		}, nil, snapshot.ErrInvalid},
		"ShortMemory": {func(dir string) error {
			return os.Truncate(filepath.Join(dir, "memory"), 4096)
		}, nil, snapshot.ErrInvalid},
		"EmptyState": {func(dir string) error {
			return os.Truncate(filepath.Join(dir, "state"), 0)
		}, nil, snapshot.ErrInvalid},
		"LargeState": {func(dir string) error {
			return os.Truncate(filepath.Join(dir, "state"), 64<<20+1)
		}, nil, snapshot.ErrInvalid},
		"Link": {func(dir string) error {
			return os.Symlink("state", filepath.Join(dir, "link"))
		}, nil, snapshot.ErrInvalid},
		"OurName": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "seen.json"), nil, 0o600)
		}, nil, snapshot.ErrInvalid},
		"HiddenFile": {func(dir string) error {
			return os.WriteFile(filepath.Join(dir, ".x"), nil, 0o600)
		}, nil, snapshot.ErrInvalid},
		"DriveFIFO": {func(dir string) error {
			return unix.Mkfifo(filepath.Join(dir, "drives", "f"), 0o600)
		}, nil, snapshot.ErrInvalid},
		"DeepDirectory": {func(dir string) error {
			return os.MkdirAll(filepath.Join(dir, "a/b/c/d/e"), 0o700)
		}, nil, snapshot.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			d := draft(t, s)
			if c.files != nil {
				must(t, c.files(d.Path()))
			}
			m := manifest("new")
			if c.manifest != nil {
				c.manifest(&m)
			}
			_, err := d.Commit(t.Context(), m, nil)
			wantError(t, "commit", err, c.want)
			wantIDs(t, s, taken.ID)
			if c.files == nil {
				if _, err := d.Commit(t.Context(), manifest(""), nil); err != nil {
					t.Errorf("put right: %v", err)
				}
				must(t, s.Remove(t.Context(), d.ID(), false))
			}
			must(t, d.Abort())
			must(t, d.Abort())
			wantEmpty(t, filepath.Join(filepath.Dir(taken.Dir()), ".tmp"))
		})
	}
}

// A draft that cannot get the name at the last moment is one still.
func TestCommit_ManyOfOneName(t *testing.T) {
	s := open(t)
	errs := make(chan error)
	for range 8 {
		d := draft(t, s)
		go func() {
			_, err := d.Commit(t.Context(), manifest("one"), nil)
			errs <- errors.Join(err, d.Abort())
		}()
	}
	won := 0
	for range 8 {
		if err := <-errs; err == nil {
			won++
		} else {
			wantError(t, "commit", err, snapshot.ErrExists)
		}
	}
	if won != 1 {
		t.Errorf("%d got the name", won)
	}
	all, err := s.List()
	if err != nil || len(all) != 1 || all[0].Name != "one" {
		t.Errorf("%v, %v", all, err)
	}
}

func TestOpen_Unsafe(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "snapshots")
	must(t, os.Mkdir(dir, 0o700))
	must(t, os.Chmod(dir, 0o755))
	_, err := snapshot.Open(dir)
	wantError(t, "open to others", err, store.ErrUnsafe)
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(dir, link))
	_, err = snapshot.Open(link)
	wantError(t, "a link", err, store.ErrUnsafe)
}
