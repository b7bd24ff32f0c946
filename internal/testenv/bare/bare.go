// Package bare gives tests of single packages a real Firecracker with a tiny guest, and nothing of
// ours around it.
package bare

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/tinyguest"
)

// VM is a Firecracker process, killed at the test's end.
type VM struct {
	*firecracker.Client
	Dir     string // its working directory
	Process *os.Process

	mu  sync.Mutex
	out []byte // mu protects it
	end chan struct{}
}

// patience is reached only when something hangs.
const patience = time.Minute

const logFile = "firecracker.log" // in its directory

// Start starts a Firecracker in dir, with an API socket of that name there.
func Start(t testing.TB, dir, socket string) *VM {
	t.Helper()
	testenv.Require(t, testenv.KVM)
	// Its log would stand within the guest's words.
	if err := os.WriteFile(filepath.Join(dir, logFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testenv.Firecracker(t), "--api-sock", socket, "--id", "bare", "--log-path",
		logFile) //nolint:noctx // killed by start
	cmd.Dir = dir
	return start(t, cmd, socket)
}

// StartJailed starts a Firecracker as another user, in a jail below base, which is VM.Dir. What is
// to be there is put there by before.
func StartJailed(t testing.TB, base string, uid int, before func(root string)) *VM {
	t.Helper()
	testenv.Require(t, testenv.KVM, testenv.Root)
	program := testenv.Firecracker(t)
	root := filepath.Join(base, filepath.Base(program), "bare", "root")
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	before(root)
	cmd := exec.Command(testenv.Jailer(t), "--id", "bare", "--exec-file", program, "--uid", strconv.Itoa(uid), "--gid",
		strconv.Itoa(uid), //nolint:noctx // killed by start
		"--chroot-base-dir", base, "--cgroup-version", "2", "--", "--api-sock", "/api")
	cmd.Dir = root
	return start(t, cmd, "api")
}

// start runs a VMM whose socket is in its working directory, as we see that.
func start(t testing.TB, cmd *exec.Cmd, socket string) *VM {
	t.Helper()
	version, err := exec.CommandContext(t.Context(), testenv.Firecracker(t), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	v, err := firecracker.ParseVersionOutput("Firecracker", version)
	if err != nil {
		t.Fatal(err)
	}
	dir := cmd.Dir
	vm := &VM{Dir: dir, end: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = vm, vm
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	vm.Process = cmd.Process
	go func() {
		_ = cmd.Wait()
		close(vm.end)
	}()
	address := testenv.Socket(t, filepath.Join(dir, socket))
	vm.Client = firecracker.New(func(ctx context.Context) (net.Conn, error) {
		var dialer net.Dialer
		for {
			conn, err := dialer.DialContext(ctx, "unix", address)
			if err == nil || ctx.Err() != nil {
				return conn, err
			}
			select {
			case <-vm.end:
				return nil, err
			case <-time.After(time.Millisecond): // until the socket is there
			}
		}
	}, v)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		vm.AwaitEnd(t)
		_ = vm.Close()
		if t.Failed() {
			log, err := os.ReadFile(filepath.Join(dir, logFile))
			t.Logf("firecracker: %q, %v; the guest: %q", log, err, vm.Output())
		}
	})
	return vm
}

// Boot starts a guest.
func (vm *VM) Boot(t testing.TB, g tinyguest.Guest, c firecracker.MachineConfiguration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	kernel := filepath.Join(vm.Dir, "kernel")
	for _, step := range []func() error{
		func() error { return os.WriteFile(kernel, tinyguest.Image(g), 0o600) },
		func() error { return vm.PutBootSource(ctx, firecracker.BootSource{KernelImagePath: "kernel"}) },
		func() error { return vm.PutMachineConfig(ctx, c) },
		func() error { return vm.InstanceStart(ctx) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
}

// Save pauses the VM and writes a full snapshot to files in its directory.
func (vm *VM) Save(t testing.TB, state, memory string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := vm.Pause(ctx)
	if err == nil {
		err = vm.CreateSnapshot(ctx, firecracker.SnapshotCreateParams{SnapshotPath: state, MemFilePath: memory})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// maxOutput bounds what is kept of a VM's output.
const maxOutput = 1 << 20 // bytes

// Write takes output of the VM.
func (vm *VM) Write(p []byte) (int, error) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.out = append(vm.out, p[:min(len(p), maxOutput-len(vm.out))]...)
	return len(p), nil
}

// Output is what the guest has written.
func (vm *VM) Output() string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return string(vm.out)
}

// Await waits until ok.
func (vm *VM) Await(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come; the guest has written %q", what, vm.Output())
		}
	}
}

// Counts are the numbers that a tinyguest.Count has written whole.
func (vm *VM) Counts() (all []uint64) {
	lines := strings.Split(vm.Output(), "\n")
	for _, line := range lines[:len(lines)-1] {
		if n, err := strconv.ParseUint(line, 16, 32); err == nil && len(line) == 8 {
			all = append(all, n)
		}
	}
	return all
}

// AwaitEnd waits until the process is gone.
func (vm *VM) AwaitEnd(t testing.TB) {
	t.Helper()
	select {
	case <-vm.end:
	case <-time.After(patience):
		t.Fatal("Firecracker did not end")
	}
}
