package warm_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/killat"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/internal/warm"
)

// childVariable makes the test program do what its value says, at the site in childDir, with the
// VMM in childVMM.
const (
	childVariable = "SMARTVM_TEST_WARM"
	childDir      = "SMARTVM_TEST_WARM_DIR"
	childVMM      = "SMARTVM_TEST_WARM_VMM"
)

func TestMain(m *testing.M) {
	testenv.OthersOut()
	what := os.Getenv(childVariable)
	if what == "" {
		os.Exit(m.Run())
	}
	s := &site{dir: os.Getenv(childDir), vmm: os.Getenv(childVMM)}
	if err := s.with(func(h *smartvm.Host, all *warm.Store) error {
		return childMain(context.Background(), what, h, all)
	}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

const (
	pool = "p"
	size = 3
)

func childMain(ctx context.Context, what string, h *smartvm.Host, all *warm.Store) error {
	switch what {
	case "create":
		m, err := h.Create(ctx, smartvm.Spec{
			BootSource:    smartvm.BootSource{KernelImagePath: filepath.Join(filepath.Dir(h.DataDir()), "kernel")},
			MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 64},
		})
		if err != nil {
			return err
		}
		if err := m.Start(ctx); err != nil {
			return err
		}
		sn, err := m.Snapshot(ctx, smartvm.SnapshotOptions{})
		if err := errors.Join(err, warm.End(ctx, m)); err != nil {
			return err
		}
		return all.Create(ctx, warm.Pool{Name: pool, Size: size, Snapshot: sn.ID})
	case "fill":
		return all.Fill(ctx, pool)
	case "take", "keep", "hold":
		t, err := all.Take(ctx, pool)
		if err != nil {
			return err
		}
		fmt.Println(t.ID())
		if what == "keep" {
			return t.Keep()
		}
		if what == "hold" { // until it is told, or dies
			_, _ = io.Copy(io.Discard, os.Stdin)
		}
		return t.End(ctx)
	case "sweep": // as gc does
		_, err := h.Sweep(ctx)
		_, perr := all.Sweep(ctx)
		return errors.Join(err, perr)
	case "remove":
		return all.Remove(ctx, pool)
	}
	return fmt.Errorf("child: %s", what)
}

// site is a host with a pool, that only other processes use: each of them may be killed.
type site struct {
	dir, vmm, binary string
}

func (s *site) with(f func(*smartvm.Host, *warm.Store) error) error {
	h, err := smartvm.Open(smartvm.Options{
		RuntimeDir: filepath.Join(s.dir, "runtime"), DataDir: filepath.Join(s.dir, "data"), FirecrackerBinary: s.vmm,
		Launcher: smartvm.LaunchDirect,
	})
	if err != nil {
		return err
	}
	all, err := warm.Open(h, func(ctx context.Context, _ *smartvm.Host, m *smartvm.Machine) error { return m.Start(ctx) })
	if err == nil {
		err = f(h, all)
	}
	return errors.Join(err, h.Close())
}

func newSite(t *testing.T) *site {
	testenv.Require(t, testenv.KVM)
	dir, err := os.MkdirTemp("/dev/shm", "smartvm-warm-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	must(t, os.WriteFile(filepath.Join(dir, "kernel"), tinyguest.Image(tinyguest.Guest{Then: tinyguest.Idle}), 0o644))
	s := &site{dir: dir, vmm: testenv.Firecracker(t), binary: testenv.PlainBinary(t)}
	must(t, s.with(func(h *smartvm.Host, _ *warm.Store) error { // which makes directories that stay
		_, err := h.Snapshots()
		return errors.Join(err, os.MkdirAll(filepath.Join(h.RuntimeDir(), ".networks"), 0o700),
			os.MkdirAll(filepath.Join(h.RuntimeDir(), ".slots"), 0o700),
			os.MkdirAll(filepath.Join(h.RuntimeDir(), ".leases"), 0o700),
			os.MkdirAll(filepath.Join(h.DataDir(), "staging"), 0o700))
	}))
	testenv.NoLeaks(t, dir)
	t.Cleanup(func() {
		if t.Failed() { // no VM outlives its test for that
			_ = s.with(func(h *smartvm.Host, _ *warm.Store) error {
				ctx := context.Background()
				err := h.StopAll(ctx, smartvm.StopOptions{})
				all, lerr := h.Machines(ctx)
				for _, m := range all {
					err = errors.Join(err, m.Remove(ctx))
				}
				return errors.Join(err, lerr)
			})
		}
	})
	s.do(t, "create")
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (s *site) program(what string) *exec.Cmd {
	cmd := exec.Command(s.binary) //nolint:noctx // killed by what runs it
	cmd.Env = append(os.Environ(), childVariable+"="+what, childDir+"="+s.dir, childVMM+"="+s.vmm)
	return cmd
}

// do has a process do something, and returns what it said.
func (s *site) do(t *testing.T, what string) string {
	t.Helper()
	cmd := s.program(what)
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return strings.TrimSpace(string(out))
}

// wantFull checks that the pool has as many VMs as it should, all of which are ready, and that
// there are others (by id), of which some are kept, and no more.
func (s *site) wantFull(t *testing.T, when string, kept int, others ...string) {
	t.Helper()
	err := s.with(func(h *smartvm.Host, all *warm.Store) error {
		list, err := all.List(t.Context())
		if err != nil {
			return err
		}
		if len(list) != 1 || list[0].Ready != size {
			t.Errorf("%s: pools %+v, want one with %d ready", when, list, size)
		}
		machines, err := h.Machines(t.Context())
		if err != nil {
			return err
		}
		paused := 0
		for _, m := range machines {
			state, err := m.State(t.Context())
			switch {
			case err == nil && state == smartvm.Paused:
				paused++
			case !slices.Contains(others, m.ID()):
				t.Errorf("%s: VM %s is %s (%v)", when, m.ID(), state, err)
			}
		}
		if paused != size || len(machines) != size+len(others) {
			t.Errorf("%s: %d VMs, %d of them paused; want %d and %d", when, len(machines), paused, size+len(others), size)
		}
		members, err := filepath.Glob(filepath.Join(h.DataDir(), "pools/.p.????????????"))
		if want := len(machines) - kept; len(members) != want {
			t.Errorf("%s: %d VMs belong to the pool, want %d", when, len(members), want)
		}
		return err
	})
	must(t, err)
}

// remove removes the pool, with which all goes.
func (s *site) remove(t *testing.T) {
	t.Helper()
	s.do(t, "sweep")
	s.do(t, "remove")
	err := s.with(func(h *smartvm.Host, _ *warm.Store) error {
		all, err := h.Machines(t.Context())
		if len(all) > 0 {
			t.Errorf("%d VMs are left", len(all))
		}
		return err
	})
	must(t, err)
}

// Processes that fill a pool at once make as many VMs as it should have, and no more.
func TestFill_AtOnce(t *testing.T) {
	s := newSite(t)
	s.wantFull(t, "made", 0)
	for range 3 {
		for range size {
			s.do(t, "take")
		}
		var all []*exec.Cmd
		for range 4 {
			cmd := s.program("fill")
			cmd.Stderr = t.Output()
			must(t, cmd.Start())
			all = append(all, cmd)
		}
		for _, cmd := range all {
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		}
		s.wantFull(t, "filled by four", 0)
	}
	s.remove(t)
}

// Processes that take at once get a VM each, and each another one.
func TestTake_AtOnce(t *testing.T) {
	s := newSite(t)
	taken := map[string]bool{}
	var all []*held
	for range size + 1 { // the last finds none ready
		all = append(all, s.hold(t))
	}
	for _, h := range all {
		id := h.id(t)
		if taken[id] {
			t.Errorf("VM %s was given away twice", id)
		}
		taken[id] = true
	}
	s.do(t, "sweep") // who has one keeps it
	for _, h := range all {
		must(t, h.in.Close())
		if err := h.cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
	s.do(t, "fill")
	s.wantFull(t, "filled again", 0)
	// One that is kept is nobody's business any more.
	kept := s.do(t, "keep")
	s.do(t, "fill")
	s.do(t, "sweep")
	s.wantFull(t, "one kept", 1, kept)
	s.on(t, kept, func(m *smartvm.Machine, ctx context.Context) error { return warm.End(ctx, m) })
	s.remove(t)
}

// on does something to a VM.
func (s *site) on(t *testing.T, id string, do func(*smartvm.Machine, context.Context) error) {
	t.Helper()
	must(t, s.with(func(h *smartvm.Host, _ *warm.Store) error {
		m, err := h.Machine(t.Context(), id)
		if err != nil {
			return err
		}
		return do(m, t.Context())
	}))
}

// held is a process that has taken a VM, until its standard input ends.
type held struct {
	cmd *exec.Cmd
	in  io.Closer
	out *bufio.Reader
}

func (s *site) hold(t *testing.T) *held {
	cmd := s.program("hold")
	cmd.Stderr = t.Output()
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return &held{cmd, in, bufio.NewReader(out)}
}

func (h *held) id(t *testing.T) string {
	t.Helper()
	line, err := h.out.ReadString('\n')
	must(t, err)
	return strings.TrimSpace(line)
}

// A VM whose taker died while he used it is removed, and not before; he may have paused it, and
// others do not get it for that.
func TestTake_Dies(t *testing.T) {
	for _, next := range []string{"sweep", "fill"} {
		t.Run(next, func(t *testing.T) {
			s := newSite(t)
			h := s.hold(t)
			id := h.id(t)
			s.on(t, id, (*smartvm.Machine).Pause)
			s.do(t, "fill")
			s.on(t, id, (*smartvm.Machine).Resume)
			s.wantFull(t, "while it is used", 0, id)
			s.on(t, id, (*smartvm.Machine).Pause)
			must(t, h.cmd.Process.Kill())
			_ = h.cmd.Wait()
			s.do(t, next)
			s.wantFull(t, "its taker died", 0)
			s.remove(t)
		})
	}
}

// Killed at each of the steps by which it changes the file system, a filler or taker leaves nothing
// that the next fill does not put right, or the next sweep.
func TestKilled(t *testing.T) {
	for _, what := range []string{"fill", "take"} {
		t.Run(what, func(t *testing.T) {
			s := newSite(t)
			killed := 0
			for step, ended := 1, false; !ended; step++ {
				if what == "fill" {
					s.do(t, "take")
				}
				var err error
				if ended, err = killat.Run(s.program(what), step); err != nil {
					t.Fatalf("step %d: %v", step, err)
				}
				if !ended {
					killed++
				}
				if step%2 == 0 { // first, or last: a VM that has no record yet is not for a fill to see
					s.do(t, "sweep")
				}
				s.do(t, "fill")
				if step%2 == 1 {
					s.do(t, "sweep")
				}
				s.wantFull(t, fmt.Sprintf("%s killed at step %d", what, step), 0)
				if t.Failed() {
					return
				}
			}
			if killed < 3 {
				t.Errorf("killed at %d steps", killed)
			}
			t.Logf("killed at %d steps", killed)
			s.remove(t)
		})
	}
}
