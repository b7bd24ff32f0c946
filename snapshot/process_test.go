package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/killat"
	"push.rocks/smartvm/snapshot"
)

// childVariable makes the test program do what its value says in the directory of childDir.
const (
	childVariable = "SMARTVM_TEST_SNAPSHOT"
	childDir      = "SMARTVM_TEST_SNAPSHOT_DIR"
)

func TestMain(m *testing.M) {
	testenv.OthersOut()
	what := os.Getenv(childVariable)
	if what == "" {
		os.Exit(m.Run())
	}
	if err := childMain(what, os.Getenv(childDir)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func childMain(what, dir string) error {
	ctx := context.Background()
	s, err := snapshot.Open(dir)
	if err != nil {
		return err
	}
	switch what {
	case "commit":
		d, err := s.Begin(ctx)
		if err == nil {
			err = fill(d.Path())
		}
		if err == nil {
			_, err = d.Commit(ctx, manifest("new"), nil)
		}
		return err
	case "import":
		data, err := os.ReadFile(dir + ".archive")
		if err == nil {
			_, err = s.Import(ctx, bytes.NewReader(data), snapshot.ImportOptions{Name: "new"})
		}
		return err
	case "remove":
		return s.Remove(ctx, "base", false)
	case "export": // without an end
		sn, err := s.Get("base")
		if err != nil {
			return err
		}
		return sn.Export(ctx, endless{}, nil)
	case "sweep":
		_, err := s.Sweep(ctx)
		return err
	case "race":
		return race(ctx, s, dir)
	}
	return fmt.Errorf("child: %s", what)
}

// endless writes what it is given to standard output, once, and then takes nothing more.
type endless struct{}

func (endless) Write(p []byte) (int, error) {
	if n, err := os.Stdout.Write(p); err != nil {
		return n, err
	}
	time.Sleep(time.Hour)
	return 0, nil
}

// program is this test program, told what to do in a store's directory.
func program(binary, what, dir string) *exec.Cmd {
	cmd := exec.Command(binary) //nolint:noctx // killed by what runs it
	cmd.Env = append(os.Environ(), childVariable+"="+what, childDir+"="+dir, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	return cmd
}

// Killed at each of the steps by which it changes the file system, an operation leaves all or
// nothing: the next process finds a whole snapshot or none, and after Sweep nothing else.
func TestKilled(t *testing.T) {
	binary := testenv.PlainBinary(t)
	other := export(t, commit(t, open(t), "other"))
	for _, what := range []string{"commit", "import", "remove"} {
		t.Run(what, func(t *testing.T) {
			before, after, step := 0, 0, 1
			for ended := false; !ended; step++ {
				dir := filepath.Join(t.TempDir(), "snapshots")
				s := openAt(t, dir)
				base := commit(t, s, "base")
				must(t, os.WriteFile(dir+".archive", other, 0o600))
				var err error
				ended, err = killat.Run(program(binary, what, dir), step)
				must(t, err)
				all := names(t, s)
				switch want := outcomes[what]; {
				case slices.Equal(all, []string{"base"}):
					before++
				case slices.Equal(all, want):
					after++
				default:
					t.Errorf("step %d: there are %q", step, all)
				}
				if what != "remove" {
					must(t, base.Check(t.Context()))
				}
				_, err = s.Sweep(t.Context())
				must(t, err)
				wantEmpty(t, tempOf(s))
				if now := names(t, s); !slices.Equal(now, all) {
					t.Errorf("step %d: %q before the sweep, %q after it", step, all, now)
				}
				// Who died has taken nothing with him.
				if slices.Contains(all, "new") {
					must(t, s.Remove(t.Context(), "new", false))
				}
				if err := program(binary, "commit", dir).Run(); err != nil {
					t.Errorf("step %d: nobody can make one any more: %v", step, err)
				}
			}
			if before < 3 || after == 0 {
				t.Errorf("of %d steps, %d left it as it was and %d did all", step, before, after)
			}
			t.Logf("killed at %d steps: %d left it as it was, %d did all", step-2, before, after-1)
		})
	}
}

// outcomes are the names of what there is after an operation.
var outcomes = map[string][]string{"commit": {"base", "new"}, "import": {"base", "new"}, "remove": nil}

// names are those of the snapshots, all of which are whole.
func names(t *testing.T, s *snapshot.Store) (names []string) {
	t.Helper()
	all, err := s.List()
	must(t, err)
	for _, sn := range all {
		must(t, sn.Verify(t.Context(), nil))
		names = append(names, sn.Name)
	}
	slices.Sort(names)
	return names
}

// race makes, uses, removes and sweeps snapshots at random. What a VM claims stays while it does.
func race(ctx context.Context, s *snapshot.Store, dir string) error {
	random := rand.New(rand.NewPCG(uint64(os.Getpid()), 1))
	for i := range 40 {
		var err error
		switch random.IntN(5) {
		case 0, 1:
			err = raceCommit(ctx, s, random.IntN(3))
		case 2:
			err = s.Remove(ctx, fmt.Sprintf("name-%d", random.IntN(3)), false)
		case 3:
			_, err = s.Sweep(ctx)
		case 4:
			err = raceUse(ctx, s, filepath.Join(dir+".vms", fmt.Sprintf("vm-%d-%d", os.Getpid(), i)))
		}
		if err != nil && !errors.Is(err, snapshot.ErrNotFound) && !errors.Is(err, snapshot.ErrExists) &&
			!errors.Is(err, snapshot.ErrInUse) {
			return err
		}
	}
	return nil
}

func raceCommit(ctx context.Context, s *snapshot.Store, n int) error {
	d, err := s.Begin(ctx)
	if err != nil {
		return err
	}
	if err := fill(d.Path()); err != nil {
		return err
	}
	m := manifest(fmt.Sprintf("name-%d", n))
	m.Ephemeral = n == 0
	_, err = d.Commit(ctx, m, nil)
	return errors.Join(err, d.Abort())
}

// raceUse is what a VM does with a snapshot.
func raceUse(ctx context.Context, s *snapshot.Store, vm string) error {
	release, err := s.Hold(ctx)
	if err != nil {
		return err
	}
	all, err := s.List()
	if err != nil || len(all) == 0 {
		return errors.Join(err, release())
	}
	sn := all[len(all)-1]
	link := filepath.Join(sn.UsersDir(), filepath.Base(vm))
	if err := errors.Join(os.MkdirAll(vm, 0o700), os.Symlink(vm, link), release()); err != nil {
		return err
	}
	for range 20 {
		if err := sn.Check(ctx); err != nil {
			return fmt.Errorf("in use: %w", err)
		}
	}
	return os.Remove(vm) // the link stays, as after a crash
}

func TestProcesses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "snapshots")
	s := openAt(t, dir)
	binary := testenv.PlainBinary(t)
	var all []*exec.Cmd
	for range 4 {
		cmd := program(binary, "race", dir)
		must(t, cmd.Start())
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		all = append(all, cmd)
	}
	for _, cmd := range all {
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	names(t, s)
	_, err := s.Prune(t.Context(), nil)
	must(t, err)
	wantIDs(t, s)
	wantEmpty(t, tempOf(s))
}

// A process that is making a snapshot is not swept away; one that waits for the store can stop
// waiting.
func TestSweep_Living(t *testing.T) {
	s := open(t)
	d := draft(t, s)
	_, err := s.Sweep(t.Context())
	must(t, err)
	sn, err := d.Commit(t.Context(), manifest(""), nil)
	must(t, err)

	release, err := s.Hold(t.Context())
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	other := openAt(t, filepath.Dir(sn.Dir()))
	other.Waiting = func(string) { cancel() }
	wantError(t, "remove while it is held", other.Remove(ctx, sn.ID, false), context.Canceled)
	wantIDs(t, s, sn.ID)
	must(t, release())
	must(t, other.Remove(t.Context(), sn.ID, false))
}

// Those that give snapshots their names take turns.
func TestCommit_Turns(t *testing.T) {
	s := open(t)
	d := draft(t, s)
	f, err := os.Open(tempOf(s))
	must(t, err)
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	ctx, cancel := context.WithCancel(t.Context())
	s.Waiting = func(string) { cancel() }
	_, err = d.Commit(ctx, manifest("a"), nil)
	wantError(t, "commit while another does", err, context.Canceled)
	wantIDs(t, s)
	must(t, f.Close())
	sn, err := d.Commit(t.Context(), manifest("a"), nil)
	must(t, err)
	must(t, sn.Check(t.Context()))
}

// On disks of all sizes up to what is needed, an import and a commit do all or nothing, and say
// that the disk is full.
func TestDiskFull(t *testing.T) {
	if !testenv.Apart(t) {
		return
	}
	archive := export(t, commit(t, open(t), "new"))
	dir := filepath.Join(t.TempDir(), "small")
	must(t, os.Mkdir(dir, 0o700))
	failed, refused, done := 0, 0, 0
	for pages := 2; done < 2; pages++ {
		must(t, unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("mode=700,size=%d", pages*4096)))
		s := openAt(t, filepath.Join(dir, "s"))
		_, err := s.Import(t.Context(), bytes.NewReader(archive), snapshot.ImportOptions{})
		if err == nil {
			done++
			must(t, s.Remove(t.Context(), "new", false))
		} else {
			failed++
			wantError(t, "import", err, unix.ENOSPC)
			if asked := new(stage.SpaceError); errors.As(err, &asked) {
				refused++
			}
		}
		wantIDs(t, s)
		wantEmpty(t, tempOf(s))
		d, err := s.Begin(t.Context())
		must(t, err)
		if ferr := fill(d.Path()); ferr == nil {
			if _, err := d.Commit(t.Context(), manifest(""), nil); err != nil {
				wantError(t, "commit", err, unix.ENOSPC)
				wantIDs(t, s)
			}
		}
		must(t, d.Abort())
		must(t, unix.Unmount(dir, 0))
	}
	if failed < 3 || refused == 0 {
		t.Errorf("failed on %d sizes, on %d of them before it wrote", failed, refused)
	}
}
