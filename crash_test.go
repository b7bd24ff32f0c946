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
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/leak"
	"push.rocks/smartvm/internal/tinyguest"
)

// The crash matrix: a process that makes, starts, stops and removes a VM is killed at each of its steps in turn; then
// one that recovers is killed at each of its own, again and again, until it gets through. Whatever VM is then
// legitimately there is removed, and the host must be as it was.

func init() {
	children["crash-life"] = func(args []string) int { return crashChild(args, crashLife) }
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
			FirecrackerBinary: firecracker, JailerBinary: jailer,
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

// crashChild runs work and kills the process at the step whose number is its last argument. It prints how many
// steps there were.
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
	cmd := exec.CommandContext(ctx, s.binary, s.dir, string(s.launcher), s.options.FirecrackerBinary, s.options.JailerBinary, strconv.Itoa(step))
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
		if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
			t.Error(err)
		}
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

func TestCrashMatrix(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	binary := testenv.PlainBinary(t)
	for _, row := range []struct {
		launcher smartvm.Launcher
		stride   int // of the steps at which recovery dies
	}{{smartvm.LaunchDirect, 1}, {smartvm.LaunchJailed, 1}} {
		t.Run(string(row.launcher), func(t *testing.T) {
			if row.launcher == smartvm.LaunchJailed {
				testenv.Require(t, testenv.Root)
			}
			crashMatrix(t, binary, row.launcher, row.stride)
		})
	}
}

func crashMatrix(t *testing.T, binary string, launcher smartvm.Launcher, stride int) {
	dir, err := os.MkdirTemp("/dev/shm", "smartvm-crash-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	site := newCrashSite(dir, launcher, testenv.Firecracker(t), testenv.Jailer(t))
	site.binary = binary
	content := bytes.Repeat([]byte("precious"), 1<<15)
	for name, data := range map[string][]byte{
		"kernel": tinyguest.Image(tinyguest.Guest{Message: "up\n", Then: tinyguest.Idle}),
		"copied": content, "inplace": content,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// Once to the end: it makes the directories that stay, and counts the steps.
	steps, survived := site.run(t, "crash-life", -1)
	if !survived || steps < 20 {
		t.Fatalf("an undisturbed life has %d steps", steps)
	}
	testenv.NoLeaks(t, dir)
	before, err := leak.Take(leak.Scope{Roots: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	recoveries := 0
	for step := 1; step <= steps; step++ {
		if _, survived := site.run(t, "crash-life", step); survived {
			t.Fatalf("step %d of %d did not come", step, steps)
		}
		for fatal := 1; ; fatal += stride {
			recoveries++
			if _, survived := site.run(t, "crash-recover", fatal); survived {
				break
			}
		}
		site.clean(t)
		settled, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		left, err := before.Settle(settled)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if len(left) > 0 {
			t.Fatalf("killed at step %d of %d: left behind:\n%s", step, steps, strings.Join(left, "\n"))
		}
		for _, name := range []string{"copied", "inplace"} {
			got, err := os.ReadFile(filepath.Join(dir, name))
			fi, statErr := os.Stat(filepath.Join(dir, name))
			if err != nil || statErr != nil || !bytes.Equal(got, content) {
				t.Fatalf("killed at step %d: drive %s changed: %v %v", step, name, err, statErr)
			}
			if uid := fi.Sys().(*syscall.Stat_t).Uid; int(uid) != os.Getuid() {
				t.Fatalf("killed at step %d: drive %s belongs to %d", step, name, uid)
			}
		}
	}
	t.Logf("%d steps of a life, %d recoveries", steps, recoveries)
}
