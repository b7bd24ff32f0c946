package volume_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/disklock"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/killat"
)

const (
	childVariable = "SMARTVM_TEST_VOLUME"
	childDir      = "SMARTVM_TEST_VOLUME_DIR"
)

func TestMain(m *testing.M) {
	what := os.Getenv(childVariable)
	if what == "" {
		os.Exit(m.Run())
	}
	if err := operations[what](context.Background(), os.Getenv(childDir), volume.Options{}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

const small = 16 << 20 // bytes

// operations are what is done in a directory with a disk "disk" and a store "store", in which there
// is a disk "db".
var operations = map[string]func(context.Context, string, volume.Options) error{
	"create": func(ctx context.Context, dir string, _ volume.Options) error {
		return volume.Blank(ctx, filepath.Join(dir, "new"), "ext4", small)
	},
	"clone": func(ctx context.Context, dir string, o volume.Options) error {
		return volume.Clone(ctx, filepath.Join(dir, "disk"), filepath.Join(dir, "new"), o)
	},
	"resize": func(ctx context.Context, dir string, o volume.Options) error {
		return volume.Resize(ctx, filepath.Join(dir, "disk"), 2*small, o)
	},
	"trim": func(ctx context.Context, dir string, o volume.Options) error {
		_, err := volume.Trim(ctx, filepath.Join(dir, "disk"), o)
		return err
	},
	"remove": func(_ context.Context, dir string, o volume.Options) error {
		s, err := volume.Open(filepath.Join(dir, "store"))
		if err != nil {
			return err
		}
		return s.Remove("db", o)
	},
	"named": func(ctx context.Context, dir string, _ volume.Options) error {
		s, err := volume.Open(filepath.Join(dir, "store"))
		if err == nil {
			_, err = s.Named(ctx, "new", small)
		}
		return err
	},
}

// disks makes the directory. It returns the disk that an operation is about, if there is one before
// it.
func disks(t *testing.T, what string) (dir, disk string) {
	t.Helper()
	testenv.Fixture(t, fixtures.MkfsExt4)
	dir = t.TempDir()
	disk = filepath.Join(dir, "disk")
	s, err := volume.Open(filepath.Join(dir, "store"))
	if err == nil {
		err = volume.Blank(t.Context(), disk, "ext4", small)
	}
	db := ""
	if err == nil {
		db, err = s.Named(t.Context(), "db", small)
	}
	if err != nil {
		t.Fatal(err)
	}
	if what == "remove" {
		disk = db
	}
	return dir, disk
}

func sizeOf(t *testing.T, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}

// Whoever is first, a VM's lease or a command: the other is refused, and can go on once the first
// is done.
func TestLocks(t *testing.T) {
	inUse := errors.New("in use")
	for _, what := range []string{"clone", "resize", "trim", "remove"} {
		t.Run(what, func(t *testing.T) {
			dir, disk := disks(t, what)
			vms, err := store.Open(filepath.Join(t.TempDir(), "vms"))
			if err != nil {
				t.Fatal(err)
			}
			lease := vms.Drive(disk, "1:2", "vm")
			err = operations[what](t.Context(), dir, volume.Options{InUse: func(path string) error {
				if path != disk {
					t.Errorf("asked about %s, not %s", path, disk)
				}
				if err := lease.Apply(t.Context()); !errors.Is(err, disklock.ErrBusy) {
					t.Errorf("a VM starts meanwhile: %v", err)
				}
				return inUse
			}})
			if !errors.Is(err, inUse) {
				t.Errorf("%v, want %v", err, inUse)
			}
			if got := sizeOf(t, disk); got != small {
				t.Errorf("it has %d bytes, and was refused", got)
			}
			if owner := vms.Holder("drive", "1:2"); owner != "" {
				t.Errorf("the lease is %q's, who was refused", owner)
			}
			if err := lease.Apply(t.Context()); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			if err := operations[what](t.Context(), dir, volume.Options{InUse: func(string) error { return nil }}); err != nil {
				t.Errorf("of a disk that nobody uses: %v", err)
			}
		})
	}
}

// Of two commands one is refused. What only reads a disk does not mind another that does.
func TestLocks_Commands(t *testing.T) {
	for _, tt := range []struct {
		first, then string
		busy        bool
	}{
		{"resize", "resize", true},
		{"resize", "trim", true},
		{"trim", "clone", true},
		{"resize", "clone", true},
		{"clone", "resize", true},
		{"clone", "clone", false},
	} {
		dir, _ := disks(t, "")
		var then error
		if err := operations[tt.first](t.Context(), dir, volume.Options{InUse: func(string) error {
			then = operations[tt.then](t.Context(), dir, volume.Options{})
			return errors.New("enough")
		}}); err == nil {
			t.Error("it went on")
		}
		if errors.Is(then, disklock.ErrBusy) != tt.busy || !tt.busy && then != nil {
			t.Errorf("%s during %s: %v", tt.then, tt.first, then)
		}
	}
}

// Killed between any two changes of the file system, a command leaves what there was or what there
// is to be, and nothing else.
func TestKilled(t *testing.T) {
	binary := testenv.PlainBinary(t)
	for _, what := range []string{"create", "clone", "named", "remove", "resize"} {
		t.Run(what, func(t *testing.T) {
			before, after := 0, 0
			for step, ended := 1, false; !ended; step++ {
				dir, disk := disks(t, what)
				cmd := exec.Command(binary) //nolint:noctx // killed by what runs it
				cmd.Env = append(os.Environ(), childVariable+"="+what, childDir+"="+dir, "GORACE=atexit_sleep_ms=0")
				cmd.Stderr = os.Stderr
				var err error
				if ended, err = killat.Run(cmd, step); err != nil {
					t.Fatal(err)
				}
				awaitFree(t, disk)
				all := treeOf(t, dir)
				made := map[string]string{"create": "new", "clone": "new", "named": "store/named/new.ext4"}[what]
				want := map[string]bool{"disk": true, "store/named/db.ext4": true}
				switch {
				case all[made]:
					want[made] = true
					fsck(t, filepath.Join(dir, made))
					after++
				case what == "remove" && !all["store/named/db.ext4"]:
					delete(want, "store/named/db.ext4")
					after++
				case what == "resize" && sizeOf(t, disk) == 2*small:
					after++
				default:
					before++
				}
				for path := range all {
					if !want[path] {
						t.Errorf("step %d: %s is left", step, path)
					}
				}
				for path := range want {
					if !all[path] {
						t.Errorf("step %d: %s is gone", step, path)
					}
				}
				if what == "resize" {
					if err := volume.Resize(t.Context(), disk, 3*small, volume.Options{}); err != nil {
						t.Errorf("step %d: the next: %v", step, err)
					}
					fsck(t, disk)
				}
			}
			if before == 0 || after == 0 {
				t.Errorf("%d times nothing was done, and %d times all", before, after)
			}
			t.Logf("killed at %d steps: %d left it as it was, %d did all", before+after-1, before, after-1)
		})
	}
}

// awaitFree waits for a tool that a killed process has left to itself: it has the disk's lock.
func awaitFree(t *testing.T, path string) {
	t.Helper()
	err := disklock.Free(path)
	for ; errors.Is(err, disklock.ErrBusy) && t.Context().Err() == nil; err = disklock.Free(path) {
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

func treeOf(t *testing.T, dir string) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(dir, path)
			all[rel] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// Where a file cannot be without a name, one that a killed process has left is the next one's.
func TestBuildNamed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), ".disk.tmp"), []byte("left by another"), 0o600); err != nil {
		t.Fatal(err)
	}
	err := volume.BuildNamed(path, func(f *os.File) error {
		if err := volume.BuildNamed(path, func(*os.File) error { return nil }); !errors.Is(err, disklock.ErrBusy) {
			t.Errorf("two at once: %v", err)
		}
		_, err := f.WriteString("ours")
		return err
	})
	if got, readErr := os.ReadFile(path); err != nil || readErr != nil || string(got) != "ours" {
		t.Errorf("%q, %v, %v", got, err, readErr)
	}
	wantAlone(t, path)
	full := errors.New("full")
	if err := volume.BuildNamed(path+"2", func(*os.File) error { return full }); !errors.Is(err, full) {
		t.Errorf("%v, want %v", err, full)
	}
	wantAlone(t, path)
}
