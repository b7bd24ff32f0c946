package smartvm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/leak"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/network"
)

// The crash matrix: a process that makes, starts, stops and removes a VM is killed at each of its
// steps in turn; then one that recovers is killed at each of its own, again and again, until it
// gets through. Whatever VM is then legitimately there is removed, and the host must be as it was.
// So must it be of a start that fails, and of a VM that is one call's.

func init() {
	children["crash-life"] = func(args []string) int { return crashChild(args, crashLife) }
	children["crash-image"] = func(args []string) int { return crashChild(args, crashImage) }
	children["crash-failing"] = func(args []string) int { return crashChild(args, crashFailing) }
	children["crash-run"] = func(args []string) int { return crashChild(args, crashRun) }
	children["crash-fork"] = func(args []string) int { return crashChild(args, crashFork) }
	children["crash-recover"] = func(args []string) int { return crashChild(args, crashRecover) }
}

// crashSite is what the processes of one row of the matrix share.
type crashSite struct {
	binary   string // the program that the children are
	dir      string
	launcher smartvm.Launcher
	options  smartvm.Options
	spec     smartvm.Spec
}

func newCrashSite(dir string, launcher smartvm.Launcher, firecracker, jailer string) *crashSite {
	return &crashSite{
		dir: dir, launcher: launcher,
		options: smartvm.Options{
			RuntimeDir: filepath.Join(dir, "runtime"), DataDir: filepath.Join(dir, "data"), Launcher: launcher,
			FirecrackerBinary: firecracker, JailerBinary: jailer, Images: image.Options{Agent: []byte("no guest runs it")},
		},
		spec: smartvm.Spec{
			ID: "victim", Name: "victim-name",
			BootSource:    smartvm.BootSource{KernelImagePath: filepath.Join(dir, "kernel")},
			MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
			Drives: []smartvm.Drive{
				{DriveID: "copied", PathOnHost: filepath.Join(dir, "copied")},
				{DriveID: "inplace", PathOnHost: filepath.Join(dir, "inplace"), Ephemeral: new(bool)},
			},
			Vsock: &smartvm.Vsock{GuestCID: 3, UDSPath: filepath.Join(dir, "vsock")},
		},
	}
}

// crashChild runs work and kills the process at the step whose number is its last argument. It
// prints how many steps there were.
func crashChild(args []string, work func(context.Context, *crashSite) error) int {
	site := newCrashSite(args[0], smartvm.Launcher(args[1]), args[2], args[3])
	fatal, err := strconv.Atoi(args[4])
	if err != nil {
		panic(err)
	}
	steps := make(chan int, 1)
	steps <- 0
	site.options = smartvm.WithTrace(site.options, func(string) {
		n := <-steps + 1
		if n == fatal {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		steps <- n
	})
	err = work(context.Background(), site)
	fmt.Println(<-steps)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func crashLife(ctx context.Context, site *crashSite) error {
	h, err := smartvm.Open(site.options)
	if err != nil {
		return err
	}
	m, err := h.Create(ctx, site.spec)
	if err != nil {
		return err
	}
	if err := m.Start(ctx); err != nil {
		return err
	}
	if _, err := m.Stop(ctx, smartvm.StopOptions{}); err != nil {
		return err
	}
	return errors.Join(m.Remove(ctx), h.Close())
}

// crashImage is the life of a VM whose kernel and root come from an image.
func crashImage(ctx context.Context, site *crashSite) error {
	site.spec.Image, site.spec.BootSource.KernelImagePath = "tiny", ""
	return crashLife(ctx, site)
}

// makeImage makes that image.
func (s *crashSite) makeImage(t *testing.T) {
	t.Helper()
	h, err := smartvm.Open(s.options)
	if err != nil {
		t.Fatal(err)
	}
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	o := image.ImportOptions{Name: "tiny", Kernel: s.spec.BootSource.KernelImagePath, Rootfs: root}
	if _, err := images.Import(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
}

// crashFailing makes a VM whose start fails late and is undone.
func crashFailing(ctx context.Context, site *crashSite) error {
	h, err := smartvm.Open(site.options)
	if err != nil {
		return err
	}
	site.spec.MachineConfig.HugePages = "2M" // of which the host has none
	m, err := h.Create(ctx, site.spec)
	if err != nil {
		return err
	}
	if err := m.Start(ctx); err == nil {
		return errors.New("it has started")
	}
	return errors.Join(m.Remove(ctx), h.Close())
}

// crashRun is a VM that is one call's and ends by itself.
func crashRun(ctx context.Context, site *crashSite) error {
	h, err := smartvm.Open(site.options)
	if err != nil {
		return err
	}
	_, err = h.Run(ctx, site.spec, smartvm.RunOptions{})
	return errors.Join(err, h.Close())
}

// crashFork is the life of a VM, of one restored from its snapshot, and of a fork.
func crashFork(ctx context.Context, site *crashSite) error {
	h, err := smartvm.Open(site.options)
	if err != nil {
		return err
	}
	site.spec.MachineConfig.MemSizeMiB = 64
	m, err := h.Create(ctx, site.spec)
	if err != nil {
		return err
	}
	if err := m.Start(ctx); err != nil {
		return err
	}
	sn, err := m.Snapshot(ctx, smartvm.SnapshotOptions{Name: "kept"})
	if err != nil {
		return err
	}
	restored, err := h.Restore(ctx, "kept", smartvm.RestoreOptions{ID: "restored"})
	if err != nil {
		return err
	}
	forks, err := m.Fork(ctx, 1, smartvm.ForkOptions{RestoreOptions: smartvm.RestoreOptions{ID: "fork"}})
	if err != nil {
		return err
	}
	if err := restored.Start(ctx); err != nil {
		return err
	}
	for _, m := range []*smartvm.Machine{m, restored, forks[0]} {
		if _, err := m.Stop(ctx, smartvm.StopOptions{}); err != nil {
			return err
		}
		if err := m.Remove(ctx); err != nil {
			return err
		}
	}
	_, err = h.Sweep(ctx)
	return errors.Join(h.RemoveSnapshot(ctx, sn.ID, false), err, h.Close())
}

func crashRecover(ctx context.Context, site *crashSite) error {
	h, err := smartvm.Open(site.options)
	if err != nil {
		return err
	}
	_, err = h.Recover(ctx)
	return errors.Join(err, h.Close())
}

// run runs a child that dies at a step, and says how many steps it had if it got through.
func (s *crashSite) run(t *testing.T, child string, step int) (steps int, survived bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.binary, s.dir, string(s.launcher), s.options.FirecrackerBinary,
		s.options.JailerBinary, strconv.Itoa(step))
	cmd.Env = append(os.Environ(), "SMARTVM_TEST_CHILD="+child)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() && ctx.Err() == nil {
		return 0, false
	}
	if err != nil {
		t.Fatalf("%s, to die at step %d: %v\n%s", child, step, err, &stderr)
	}
	steps, err = strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	return steps, true
}

// clean removes what VM is there after a recovery.
func (s *crashSite) clean(t *testing.T) {
	t.Helper()
	h, err := smartvm.Open(s.options)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if _, err := h.Recover(t.Context()); err != nil {
		t.Error(err)
	}
	all, err := h.Machines(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if state, err := m.State(t.Context()); err != nil || state == smartvm.Paused {
			t.Errorf("VM %s is %s (%v): nobody lets it go on", m.ID(), state, err)
		}
		if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
			t.Error(err)
		}
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := h.Warm(t.Context(), network.DefaultName, 0); err != nil {
		t.Error(err)
	}
	if _, err := h.PruneSnapshots(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCrashMatrix(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	binary := testenv.PlainBinary(t)
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		for _, row := range []struct {
			name, life string
			then       tinyguest.Then
			matrix     func(*crashMatrix)
		}{
			{"life", "crash-life", tinyguest.Idle, (*crashMatrix).again},
			{"life of an image", "crash-image", tinyguest.Idle, (*crashMatrix).again},
			{"failing start", "crash-failing", tinyguest.Idle, (*crashMatrix).again},
			{"run", "crash-run", tinyguest.Reboot, (*crashMatrix).afresh},
			{"snapshot, restore and fork", "crash-fork", tinyguest.Idle, (*crashMatrix).once},
		} {
			if row.life == "crash-image" && launcher == smartvm.LaunchJailed {
				continue // what an image adds knows nothing of jails
			}
			t.Run(string(launcher)+" "+row.name, func(t *testing.T) {
				if launcher == smartvm.LaunchJailed {
					testenv.Require(t, testenv.Root)
				}
				if row.life == "crash-failing" && hugePages(t) {
					t.Skip("the host has huge pages")
				}
				x := newCrashMatrix(t, binary, launcher, row.life, row.then)
				row.matrix(x)
				t.Logf("%d steps of a life, %d recoveries", x.steps, x.recoveries)
			})
		}
	}
}

func hugePages(t *testing.T) bool {
	t.Helper()
	number, err := os.ReadFile("/proc/sys/vm/nr_hugepages")
	return err == nil && strings.TrimSpace(string(number)) != "0"
}

// crashMatrix is one kind of life, whose process dies at each of its steps.
type crashMatrix struct {
	*crashSite
	t          *testing.T
	life       string
	steps      int // of an undisturbed life
	recoveries int
	before     *leak.Snapshot
}

// precious is what the drives hold.
func precious() []byte { return bytes.Repeat([]byte("precious"), 1<<15) }

func newCrashMatrix(t *testing.T, binary string, launcher smartvm.Launcher, life string,
	then tinyguest.Then,
) *crashMatrix {
	dir, err := os.MkdirTemp("/dev/shm", "smartvm-crash-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	x := &crashMatrix{crashSite: newCrashSite(dir, launcher, testenv.Firecracker(t), testenv.Jailer(t)), t: t, life: life}
	x.binary = binary
	testenv.Turn(t) // the life that counts the steps is not for other packages' watches to see
	for name, data := range map[string][]byte{
		"kernel": tinyguest.Image(tinyguest.Guest{Message: "up\n", Then: then}), "copied": precious(), "inplace": precious(),
	} {
		if err := writeAs(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if life == "crash-image" {
		x.makeImage(t)
	}
	// Once to the end: it makes the directories that stay, and counts the steps.
	var survived bool
	if x.steps, survived = x.run(t, life, -1); !survived || x.steps < 20 {
		t.Fatalf("an undisturbed life has %d steps", x.steps)
	}
	// which looking for snapshots makes
	if err := os.MkdirAll(filepath.Join(dir, "data/snapshots/.tmp"), 0o700); err != nil {
		t.Fatal(err)
	}
	testenv.NoLeaks(t, dir)
	if x.before, err = leak.Take(leak.Scope{Roots: []string{dir}}); err != nil {
		t.Fatal(err)
	}
	return x
}

// die lives until a step.
func (x *crashMatrix) die(step int) {
	x.t.Helper()
	if _, survived := x.run(x.t, x.life, step); survived {
		x.t.Fatalf("step %d of %d did not come", step, x.steps)
	}
}

// recover recovers until a step, and says whether there was none such.
func (x *crashMatrix) recover(fatal int) (survived bool) {
	x.t.Helper()
	x.recoveries++
	_, survived = x.run(x.t, "crash-recover", fatal)
	return survived
}

// again: after each death recoveries die at one step after the other, each in what the one before
// has left. Where there is one journal to be undone, that is as if each came first.
func (x *crashMatrix) again() {
	for step := 1; step <= x.steps; step++ {
		x.die(step)
		for fatal := 1; !x.recover(fatal); fatal++ {
		}
		x.clean(x.t)
		x.wantAsBefore("killed at step %d of %d", step, x.steps)
	}
}

// once: after each death one recovery dies too, each time at another step, and the next gets
// through.
func (x *crashMatrix) once() {
	for step := 1; step <= x.steps; step++ {
		x.die(step)
		if !x.recover(1 + step%crashStride) {
			x.recover(-1)
		}
		x.clean(x.t)
		x.wantAsBefore("killed at step %d of %d", step, x.steps)
	}
}

// crashStride spreads what would take minutes.
const crashStride = 12

// afresh: each recovery that dies is the first after a death of its own. Every step of both is hit,
// one pair in crashStride. Of a VM that is one call's nothing may be left for others to remove.
func (x *crashMatrix) afresh() {
	for step := 1; step <= x.steps; step++ {
		for fatal := 1 + step%crashStride; ; fatal += crashStride {
			x.die(step)
			survived := x.recover(fatal)
			if !survived {
				x.recover(-1)
			}
			x.wantEmpty("killed at step %d of %d, its recovery at %d", step, x.steps, fatal)
			if survived {
				break
			}
		}
		x.wantAsBefore("killed at step %d of %d", step, x.steps)
	}
}

// wantEmpty is what of wantAsBefore takes no time.
func (x *crashMatrix) wantEmpty(when string, args ...any) {
	x.t.Helper()
	for _, dir := range []string{
		x.options.RuntimeDir, filepath.Join(x.options.RuntimeDir, store.LeaseDir),
		filepath.Join(x.options.DataDir, "staging"),
	} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			x.t.Fatal(err)
		}
		for _, e := range entries {
			if e.Name() != store.LeaseDir && e.Name() != store.NetworkDir && e.Name() != store.SlotDir &&
				e.Name() != store.EventDir {
				x.clean(x.t)
				x.t.Fatalf("%s: left behind: %s in %s", fmt.Sprintf(when, args...), e.Name(), dir)
			}
		}
	}
}

// wantAsBefore checks the host and the drives. When says what happened to them.
func (x *crashMatrix) wantAsBefore(when string, args ...any) {
	t := x.t
	t.Helper()
	when = fmt.Sprintf(when, args...)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	left, err := x.before.Settle(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		x.clean(t)
		t.Fatalf("%s: left behind:\n%s", when, strings.Join(left, "\n"))
	}
	for _, name := range []string{"copied", "inplace"} {
		got, err := os.ReadFile(filepath.Join(x.dir, name))
		if err != nil || !bytes.Equal(got, precious()) {
			t.Fatalf("%s: drive %s changed: %v", when, name, err)
		}
		if owner := ownerOf(t, filepath.Join(x.dir, name)); owner != os.Getuid() {
			t.Fatalf("%s: drive %s belongs to %d", when, name, owner)
		}
	}
}
