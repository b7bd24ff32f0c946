package firecracker_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/tinyguest"
)

// realVMM is a Firecracker process in a directory of its own, killed at the test's end.
type realVMM struct {
	dir     string
	dial    firecracker.DialFunc
	version firecracker.Version
	process *os.Process
}

// startReal starts a real Firecracker in dir.
func startReal(t *testing.T, dir, socket string) realVMM {
	t.Helper()
	testenv.Require(t, testenv.KVM)
	program := testenv.Firecracker(t)
	output, err := exec.CommandContext(t.Context(), program, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	version, err := firecracker.ParseVersionOutput("Firecracker", output)
	if err != nil {
		t.Fatal(err)
	}
	vmm := exec.Command(program, "--api-sock", socket, "--id", "real-1") //nolint:noctx // killed below
	vmm.Dir = dir
	var said bytes.Buffer
	vmm.Stdout, vmm.Stderr = &said, &said
	if err := vmm.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = vmm.Process.Kill()
		_ = vmm.Wait()
		if t.Failed() {
			t.Logf("firecracker: %s", said.String())
		}
	})
	address := testenv.Socket(t, filepath.Join(dir, socket))
	return realVMM{dir: dir, version: version, process: vmm.Process, dial: func(ctx context.Context) (net.Conn, error) {
		var dialer net.Dialer
		for {
			conn, err := dialer.DialContext(ctx, "unix", address)
			if err == nil || ctx.Err() != nil {
				return conn, err
			}
			time.Sleep(time.Millisecond) // until the socket is there
		}
	}}
}

// patience is reached only when something hangs.
func patience(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func step(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

func refusal(t *testing.T, what string, err error, status int, part string) {
	t.Helper()
	var fault *firecracker.APIError
	if !errors.As(err, &fault) || fault.Status != status || !strings.Contains(fault.Fault, part) {
		t.Errorf("%s: %v, want status %d with %q", what, err, status, part)
	}
}

// TestReal_life goes through a VM's life, and that of a copy restored from its snapshot.
func TestReal_life(t *testing.T) {
	dir, ctx := t.TempDir(), patience(t)
	vmm := startReal(t, dir, "a.sock")
	c := newClient(t, vmm.dial, vmm.version)
	for name, size := range map[string]int{"disk": 1 << 20, "disk2": 2 << 20, "metrics": 0} {
		step(t, name, os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o600))
	}
	step(t, "kernel",
		os.WriteFile(filepath.Join(dir, "kernel"), tinyguest.Image(tinyguest.Guest{Then: tinyguest.Idle}), 0o600))

	info, err := c.GetInstanceInfo(ctx)
	check(t, err,
		firecracker.InstanceInfo{
			ID: "real-1", State: firecracker.StateNotStarted, VMMVersion: vmm.version.String(),
			AppName: "Firecracker",
		}, info)
	version, err := c.GetVersion(ctx)
	check(t, err, vmm.version, version)
	refusal(t, "missing kernel", c.PutBootSource(ctx, firecracker.BootSource{KernelImagePath: "none"}), 400,
		"No such file")
	refusal(t, "balloon", discard((*firecracker.Client).GetBalloon)(c, ctx), 400, "")

	boot := firecracker.BootSource{KernelImagePath: "kernel"}
	machine := firecracker.MachineConfiguration{
		VCPUCount: 1, MemSizeMiB: 32, TrackDirtyPages: true,
		HugePages: firecracker.HugePagesNone,
	}
	drive := firecracker.Drive{
		DriveID: "d_1", PathOnHost: "disk", CacheType: firecracker.CacheWriteback, IOEngine: firecracker.IOEngineSync,
		Discard:     vmm.version.AtLeast(firecracker.Version{Major: 1, Minor: 17}),
		RateLimiter: &firecracker.RateLimiter{Ops: &firecracker.TokenBucket{Size: 5, OneTimeBurst: 3, RefillTimeMs: 100}},
	}
	vsock := firecracker.Vsock{GuestCID: 3, UDSPath: "v.sock"}
	balloon := firecracker.Balloon{StatsIntervalS: 1}
	memory := 64
	step(t, "boot source", c.PutBootSource(ctx, boot))
	step(t, "machine", c.PutMachineConfig(ctx, machine))
	step(t, "machine update",
		c.PatchMachineConfig(ctx,
			firecracker.PartialMachineConfiguration{MemSizeMiB: &memory, TrackDirtyPages: &machine.TrackDirtyPages}))
	step(t, "drive", c.PutDrive(ctx, drive))
	step(t, "vsock", c.PutVsock(ctx, vsock))
	step(t, "balloon", c.PutBalloon(ctx, balloon))
	step(t, "entropy", c.PutEntropy(ctx, firecracker.EntropyDevice{}))
	step(t, "logger", c.PutLogger(ctx, firecracker.Logger{Level: firecracker.LogError}))
	step(t, "metrics", c.PutMetrics(ctx, firecracker.Metrics{MetricsPath: "metrics"}))
	step(t, "CPU template", c.PutCPUConfig(ctx, firecracker.CPUConfig{}))
	machine.MemSizeMiB = memory
	config, err := c.GetVMConfig(ctx)
	check(t, err, firecracker.FullVMConfiguration{
		BootSource: &boot, Drives: []firecracker.Drive{drive}, MachineConfig: &machine,
		NetworkInterfaces: config.NetworkInterfaces,
		Vsock:             &vsock, Balloon: &balloon, Entropy: &firecracker.EntropyDevice{}, Pmem: config.Pmem,
	}, config)
	gotMachine, err := c.GetMachineConfig(ctx)
	check(t, err, machine, gotMachine)
	gotBalloon, err := c.GetBalloon(ctx)
	check(t, err, balloon, gotBalloon)

	refusal(t, "early pause", c.Pause(ctx), 400, "not supported before starting")
	step(t, "start", c.InstanceStart(ctx))
	refusal(t, "second start", c.InstanceStart(ctx), 400, "not supported after starting")
	step(t, "flush", c.FlushMetrics(ctx))
	if written, err := os.ReadFile(filepath.Join(dir, "metrics")); err != nil ||
		!bytes.Contains(written, []byte("utc_timestamp_ms")) {
		t.Errorf("metrics: %v, %q", err, written)
	}
	step(t, "drive update",
		c.PatchDrive(ctx, firecracker.PartialDrive{DriveID: "d_1", PathOnHost: "disk2", RateLimiter: unlimited}))
	refusal(t, "unknown drive", c.PatchDrive(ctx, firecracker.PartialDrive{DriveID: "d_2", PathOnHost: "disk2"}), 400, "")
	refusal(t, "balloon without driver", c.PatchBalloon(ctx, 1), 400, "not activated")
	step(t, "statistics", c.PatchBalloonStats(ctx, 2))
	step(t, "get statistics", discard((*firecracker.Client).GetBalloonStats)(c, ctx))
	refusal(t, "snapshot while running",
		c.CreateSnapshot(ctx, firecracker.SnapshotCreateParams{SnapshotPath: "s", MemFilePath: "m"}), 400, "")
	step(t, "pause", c.Pause(ctx))
	step(t, "second pause", c.Pause(ctx))
	info, err = c.GetInstanceInfo(ctx)
	check(t, err, firecracker.StatePaused, info.State)
	step(t, "snapshot",
		c.CreateSnapshot(ctx,
			firecracker.SnapshotCreateParams{SnapshotPath: "s", MemFilePath: "m", SnapshotType: firecracker.SnapshotFull}))
	step(t, "resume", c.Resume(ctx))
	step(t, "remove the socket", os.Remove(filepath.Join(dir, "v.sock")))

	other := startReal(t, dir, "b.sock")
	c = newClient(t, other.dial, firecracker.Version{})
	step(t, "load", c.LoadSnapshot(ctx, firecracker.SnapshotLoadParams{
		SnapshotPath: "s", ResumeVM: true,
		MemBackend: &firecracker.MemBackend{BackendType: firecracker.MemBackendFile, BackendPath: "m"},
	}))
	info, err = c.GetInstanceInfo(ctx)
	check(t, err, firecracker.StateRunning, info.State)
}

// TestReal_errorBodies gets each of the VMM's kinds of refusal from the VMM itself.
func TestReal_errorBodies(t *testing.T) {
	vmm, ctx := startReal(t, t.TempDir(), "s"), patience(t)
	c := newClient(t, vmm.dial, vmm.version)
	step(t, "metadata", c.PutMMDS(ctx, map[string]any{"a": "<&>", "b": 1}))
	step(t, "metadata update", c.PatchMMDS(ctx, map[string]any{"b": nil}))
	metadata, err := c.GetMMDS(ctx)
	check(t, err, json.RawMessage(`{"a":"<&>"}`), metadata)
	step(t, "largest", c.PutMMDS(ctx, strings.Repeat("x", firecracker.MaxPayload-2)))

	if !vmm.version.AtLeast(firecracker.Version{Major: 1, Minor: 14}) {
		newer := newClient(t, vmm.dial, v1_16_1)
		refusal(t, "too new a method", newer.DeleteDrive(ctx, "d"), 400, "Unsupported HTTP method")
		refusal(t, "too new an endpoint", newer.PutSerial(ctx, firecracker.SerialDevice{}), 400,
			"Invalid request method and/or path")
		refusal(t, "too new a field", newer.PutNetworkInterface(ctx, firecracker.NetworkInterface{IfaceID: "e", MTU: 1500}),
			400, "unknown field")
	}

	for range 10 {
		conn, err := vmm.dial(ctx)
		step(t, "dial", err)
		defer conn.Close()
	}
	refusal(t, "eleventh connection",
		discard((*firecracker.Client).GetInstanceInfo)(newClient(t, vmm.dial, vmm.version), ctx), 503,
		"Too many open connections")
}

// TestReal_cancel gives calls up at every moment of theirs. A client that closes its connection at
// once then kills Firecracker 1.12 within some hundred tries.
func TestReal_cancel(t *testing.T) {
	vmm, ctx := startReal(t, t.TempDir(), "s"), patience(t)
	c := newClient(t, vmm.dial, vmm.version)
	for i := range 5000 {
		short, cancel := context.WithTimeout(ctx, time.Duration(i%200)*time.Microsecond)
		if _, err := c.GetVMConfig(short); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("after %d calls: %v", i, err)
		}
		cancel()
	}
	step(t, "last call", discard((*firecracker.Client).GetInstanceInfo)(c, ctx))
}

// TestReal_stopped gives up more calls than the VMM has room for while it is stopped. It survives
// their end.
func TestReal_stopped(t *testing.T) {
	vmm, ctx := startReal(t, t.TempDir(), "s"), patience(t)
	c := newClient(t, vmm.dial, vmm.version)
	step(t, "first call", discard((*firecracker.Client).GetInstanceInfo)(c, ctx))
	step(t, "stop", vmm.process.Signal(syscall.SIGSTOP))
	var calls sync.WaitGroup
	for range 300 {
		calls.Go(func() {
			short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
			defer cancel()
			err := discard((*firecracker.Client).GetInstanceInfo)(newClient(t, vmm.dial, vmm.version), short)
			if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, syscall.EAGAIN) { // the socket's queue is full
				t.Errorf("a call while the VMM is stopped: %v", err)
			}
		})
	}
	calls.Wait()
	step(t, "continue", vmm.process.Signal(syscall.SIGCONT))
	step(t, "last call", discard((*firecracker.Client).GetInstanceInfo)(c, ctx))
}
