package store_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
)

func TestMain(m *testing.M) {
	testenv.OthersOut()
	m.Run()
}

func open(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(filepath.Join(t.TempDir(), "runtime"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSecure(t *testing.T) {
	for _, tt := range []struct {
		name, text string // of the error, "" for none
		root       bool
		prepare    func(dir string) error
	}{
		{"not there", "", false, func(string) error { return nil }},
		{"there", "", false, func(dir string) error { return os.Mkdir(dir, 0o700) }},
		{"below sticky", "", false, func(dir string) error { return os.Chmod(filepath.Dir(dir), 0o777|fs.ModeSticky) }},
		{"below a group's", "", false, func(dir string) error { return os.Chmod(filepath.Dir(dir), 0o775) }},
		{"a symbolic link", "is a symbolic link", false, func(dir string) error {
			return os.Symlink(filepath.Dir(dir), dir)
		}},
		{"a symbolic link to nothing", "is a symbolic link", false, func(dir string) error {
			return os.Symlink("none", dir)
		}},
		{"a file", "is not a directory", false, func(dir string) error { return os.WriteFile(dir, nil, 0o700) }},
		{"readable to others", "has mode 0755", false, func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o755))
		}},
		{"another's", "belongs to user 65534", true, func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 65534, 65534))
		}},
		{"below another's", "above it, belongs to user 65534", true, func(dir string) error {
			return os.Chown(filepath.Dir(dir), 65534, 0)
		}},
		{"below another group's", "above it, can be written by group 12345", true, func(dir string) error {
			return errors.Join(os.Chown(filepath.Dir(dir), 0, 12345), os.Chmod(filepath.Dir(dir), 0o2775))
		}},
		{"below another group's that is sticky", "", true, func(dir string) error {
			return errors.Join(os.Chown(filepath.Dir(dir), 0, 12345), os.Chmod(filepath.Dir(dir), 0o775|fs.ModeSticky))
		}},
		{"below another group's that only it may read", "", true, func(dir string) error {
			return errors.Join(os.Chown(filepath.Dir(dir), 0, 12345), os.Chmod(filepath.Dir(dir), 0o755))
		}},
		{"below anybody's", "can be written by anybody", false, func(dir string) error {
			return os.Chmod(filepath.Dir(dir), 0o777)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.root {
				testenv.Require(t, testenv.Root)
			}
			dir := filepath.Join(t.TempDir(), "dir")
			if err := tt.prepare(dir); err != nil {
				t.Fatal(err)
			}
			err := store.Secure(dir)
			if tt.text == "" {
				if fi, statErr := os.Lstat(dir); err != nil || statErr != nil || fi.Mode() != 0o700|fs.ModeDir {
					t.Errorf("%v, %v, %v", err, fi, statErr)
				}
				return
			}
			if !errors.Is(err, store.ErrUnsafe) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%v, want ErrUnsafe, %q", err, tt.text)
			}
		})
	}
	t.Run("missing parents", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "a/b/c")
		if err := store.Secure(dir); err != nil {
			t.Fatal(err)
		}
		if fi, err := os.Stat(filepath.Dir(dir)); err != nil || fi.Mode().Perm() != 0o700 {
			t.Errorf("parent: %v, %v", fi.Mode(), err)
		}
	})
	t.Run("through a symbolic link above", func(t *testing.T) {
		real := t.TempDir()
		way := filepath.Join(t.TempDir(), "way")
		if err := errors.Join(os.Symlink(real, way), os.Chmod(real, 0o777)); err != nil {
			t.Fatal(err)
		}
		if err := store.Secure(filepath.Join(way, "dir")); !errors.Is(err, store.ErrUnsafe) {
			t.Errorf("%v, want ErrUnsafe: what the link leads to is anybody's", err)
		}
	})
}

func TestCreate(t *testing.T) {
	s := open(t)
	lock, err := s.Create("vm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create("vm"); !errors.Is(err, fs.ErrExist) {
		t.Errorf("again: %v, want fs.ErrExist", err)
	}
	if _, err := s.TryLock("vm"); !errors.Is(err, store.ErrLocked) {
		t.Errorf("lock: %v, want ErrLocked", err)
	}
	if err := os.WriteFile(filepath.Join(s.Path(), "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if ids, err := s.List(); err != nil || !slices.Equal(ids, []string{"vm"}) {
		t.Errorf("list: %q, %v", ids, err)
	}
	for range 2 {
		if err := lock.Unlock(); err != nil {
			t.Error(err)
		}
	}
	lock, err = s.TryLock("vm")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.Dir("vm"), "run/root"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("vm", lock); err != nil {
		t.Fatal(err)
	}
	if _, err := s.TryLock("vm"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("lock what is removed: %v, want fs.ErrNotExist", err)
	}
	if ids, err := s.List(); err != nil || len(ids) > 0 {
		t.Errorf("list: %q, %v", ids, err)
	}
}

func TestLock_Waits(t *testing.T) {
	s := open(t)
	first, err := s.Create("vm")
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if _, err := s.Lock(ctx, "vm"); !errors.Is(err, store.ErrLocked) || !errors.Is(err, gone) {
		t.Errorf("%v, want ErrLocked and the context's cause", err)
	}
	got := make(chan error)
	go func() {
		second, err := s.Lock(t.Context(), "vm")
		if err == nil {
			err = s.Remove("vm", second)
		}
		got <- err
	}()
	if err := first.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := <-got; err != nil {
		t.Error(err)
	}
	if _, err := s.Lock(t.Context(), "vm"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("lock what is removed: %v, want fs.ErrNotExist", err)
	}
}

// A VM whose lock cannot be made leaves nothing: its directory's path is as long as one may be.
func TestCreate_NothingLeft(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "runtime")
	const maxPath = unix.PathMax - 1
	for maxPath-len(dir) > 200 {
		dir = filepath.Join(dir, strings.Repeat("d", 50))
	}
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Create(strings.Repeat("v", maxPath-len(dir)-1)); !errors.Is(err, unix.ENAMETOOLONG) {
		t.Fatalf("%v, want ENAMETOOLONG", err)
	}
	if ids, err := s.List(); err != nil || len(ids) > 0 {
		t.Errorf("left: %q, %v", ids, err)
	}
}

// Whether a VM is locked can be asked at any time: no process that tries to lock it is refused, or
// kept waiting.
func TestLocked(t *testing.T) {
	s := open(t)
	lock, err := s.Create("vm")
	if err != nil {
		t.Fatal(err)
	}
	want := func(id string, want bool) {
		t.Helper()
		if got, err := s.Locked(id); err != nil || got != want {
			t.Errorf("locked: %v, %v, want %v", got, err, want)
		}
	}
	want("vm", true)
	want("none", false)
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	want("vm", false)
	// While another process asks.
	f, err := os.Open(filepath.Join(s.Dir("vm"), store.LockFile))
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_SH)
	}
	if err != nil {
		t.Fatal(err)
	}
	want("vm", false)
	f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	var asked atomic.Int32
	defer func() { cancel(); asking.Wait() }()
	for range 3 {
		asking.Go(func() {
			for ctx.Err() == nil {
				if _, err := s.Locked("vm"); err != nil {
					t.Error(err)
				}
				asked.Add(1)
			}
		})
	}
	for asked.Load() < 10_000 {
		lock, err := s.TryLock("vm")
		if err != nil {
			t.Fatalf("refused: %v", err)
		}
		if err := lock.Unlock(); err != nil {
			t.Fatal(err)
		}
	}
}

// A hold that a process is only making is not taken for an abandoned one.
func TestHold_Unnoted(t *testing.T) {
	s := open(t)
	lock, err := s.Create("vm")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	h, err := s.Hold("vm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Hold("vm"); !errors.Is(err, store.ErrLocked) {
		t.Errorf("held by two: %v, want ErrLocked", err)
	}
	if err := h.Abandon(); err != nil { // as far as making it goes before it is locked
		t.Fatal(err)
	}
	if _, err := s.Abandoned("vm"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a note: %v, want fs.ErrNotExist", err)
	}
	if h, err = s.Hold("vm"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(h.MustResume(), h.MustDeflate(7)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Abandoned("vm"); !errors.Is(err, store.ErrLocked) {
		t.Errorf("of a process that lives: %v, want ErrLocked", err)
	}
	if err := h.Abandon(); err != nil {
		t.Fatal(err)
	}
	other, err := s.Abandoned("vm")
	if err != nil {
		t.Fatal(err)
	}
	if mib, ok := other.Deflates(); !other.Resumes() || mib != 7 || !ok {
		t.Errorf("resumes %v, deflates %d, %v", other.Resumes(), mib, ok)
	}
	if err := other.Release(); err != nil {
		t.Error(err)
	}
}

// Everybody makes, locks, removes and reaps the same VM: never do two hold it, and a hold is on
// what is there.
func TestRaces(t *testing.T) {
	s := open(t)
	var holders, made, removed atomic.Int32
	hold := func(l *store.Lock, remove bool) error {
		if n := holders.Add(1); n != 1 {
			t.Errorf("%d hold the VM", n)
		}
		mark := filepath.Join(s.Dir("vm"), "mark")
		err := errors.Join(os.WriteFile(mark, nil, 0o600), os.Remove(mark))
		holders.Add(-1)
		if !remove {
			return errors.Join(err, l.Unlock())
		}
		removed.Add(1)
		return errors.Join(err, s.Remove("vm", l))
	}
	// Which of them comes to what is the scheduler's: they go on until each has been seen.
	deadline := time.Now().Add(testenv.Patience(10 * time.Second))
	enough := func() bool { return made.Load() >= 2 && removed.Load() >= 2 || time.Now().After(deadline) }
	var wg sync.WaitGroup
	for worker := range 6 {
		wg.Go(func() {
			for n := 0; n < 300 || !enough(); n++ {
				l, err := s.Create("vm")
				if err == nil {
					made.Add(1)
					err = hold(l, worker%3 == 0)
				}
				if err != nil && !errors.Is(err, fs.ErrExist) {
					t.Errorf("create: %v", err)
				}
				l, err = s.TryLock("vm")
				if err == nil {
					err = hold(l, worker%2 == 0)
				}
				if err != nil && !errors.Is(err, store.ErrLocked) && !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("lock: %v", err)
				}
				if err := s.Reap("vm"); err != nil {
					t.Errorf("reap: %v", err)
				}
			}
		})
	}
	wg.Wait()
	if made.Load() < 2 || removed.Load() < 2 {
		t.Errorf("made %d times, removed %d times: no race", made.Load(), removed.Load())
	}
}

func TestReap(t *testing.T) {
	s := open(t)
	if err := os.Mkdir(s.Dir("abandoned"), 0o700); err != nil {
		t.Fatal(err)
	}
	kept, err := s.Create("kept")
	if err != nil {
		t.Fatal(err)
	}
	if err := kept.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(s.Dir("abandoned later"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.Dir("abandoned later"), store.LockFile+".tmp"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"abandoned", "abandoned later", "kept", "none"} {
		if err := s.Reap(id); err != nil {
			t.Errorf("reap %s: %v", id, err)
		}
	}
	if ids, err := s.List(); err != nil || !slices.Equal(ids, []string{"kept"}) {
		t.Errorf("left: %q, %v", ids, err)
	}
}

func TestLease(t *testing.T) {
	s := open(t)
	ctx := t.Context()
	first := s.Lease("name", "web", "vm-1")
	if err := first.Apply(ctx); err != nil {
		t.Fatal(err)
	}
	var taken *store.TakenError
	err := s.Lease("name", "web", "vm-2").Apply(ctx)
	if !errors.As(err, &taken) || !errors.Is(err, fs.ErrExist) {
		t.Fatalf("%v, want *TakenError", err)
	}
	if diff := cmp.Diff(store.TakenError{Kind: "name", Name: "web", Owner: "vm-1"}, *taken); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if err := s.Lease("name", "web", "vm-1").Apply(ctx); !errors.Is(err, fs.ErrExist) {
		t.Errorf("by its own owner: %v, want fs.ErrExist", err)
	}
	if err := s.Lease("uid", "web", "vm-2").Apply(ctx); err != nil {
		t.Errorf("of another kind: %v", err)
	}
	if err := s.Lease("name", "web", "vm-2").Revert(ctx); err != nil {
		t.Error(err)
	}
	if got := s.Holder("name", "web"); got != "vm-1" {
		t.Errorf("given back by another: it is %q's now", got)
	}
	for range 2 {
		if err := first.Revert(ctx); err != nil {
			t.Error(err)
		}
		if got := s.Holder("name", "web"); got != "" {
			t.Errorf("given back, it is %q's", got)
		}
	}
}

// No two names share a lease, and none leaves its directory.
func TestLease_OddNames(t *testing.T) {
	s := open(t)
	names := []string{"a/b", "a_b", "a%2fb", "a%b", "a%25b", "../../vm", "..", ".", "%", "/", "a.b", "-", "é\n", "a%252fb"}
	for i, name := range names {
		if err := s.Lease("name", name, string(rune('a'+i))).Apply(t.Context()); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(s.Path(), store.LeaseDir))
	if err != nil || len(entries) != len(names) {
		t.Errorf("%d leases, %v, want %d", len(entries), err, len(names))
	}
	for i, name := range names {
		if got, want := s.Holder("name", name), string(rune('a'+i)); got != want {
			t.Errorf("%q is %q's, want %q's", name, got, want)
		}
		if err := s.Lease("name", name, string(rune('a'+i))).Revert(t.Context()); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	if entries, err := os.ReadDir(filepath.Join(s.Path(), store.LeaseDir)); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// A VM that is released is nobody's; if something is still to be done for it, others take that over
// with what is noted.
func TestHold_Keep(t *testing.T) {
	s := open(t)
	lock, err := s.Create("vm")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	for _, keep := range []bool{false, true} {
		h, err := s.Hold("vm")
		if err == nil {
			err = h.MustResume()
		}
		if err != nil {
			t.Fatal(err)
		}
		if keep {
			h.Keep()
		}
		if err := h.Release(); err != nil {
			t.Fatal(err)
		}
		other, err := s.Abandoned("vm")
		if !keep {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("released: %v", err)
			}
			continue
		}
		if err != nil || !other.Resumes() {
			t.Fatalf("to be taken over: %v", err)
		}
		if err := other.Release(); err != nil {
			t.Error(err)
		}
	}
}
