package update_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/cli/guest"
	"push.rocks/smartvm/internal/cli/update"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/tinyguest"
)

func TestMain(m *testing.M) {
	if fakefc.Called(os.Args) {
		os.Exit(fakefc.Main(os.Args, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

var errUsage = errors.New("usage")

// started runs a VM by a fake Firecracker 1.16.1, and returns the command that changes it.
func started(t *testing.T, change func(*smartvm.Spec, string)) (m *smartvm.Machine,
	run func(args ...string) (string, error),
) {
	t.Helper()
	testenv.Require(t, testenv.KVM)
	dir := t.TempDir()
	program, err := fakefc.Install(dir, fakefc.Script{Version: "1.16.1"})
	if err != nil {
		t.Fatal(err)
	}
	kernel := filepath.Join(dir, "kernel")
	if err := os.WriteFile(kernel, tinyguest.Image(tinyguest.Guest{Then: tinyguest.Idle}), 0o600); err != nil {
		t.Fatal(err)
	}
	options := smartvm.Options{
		RuntimeDir: filepath.Join(dir, "runtime"), DataDir: filepath.Join(dir, "data"), FirecrackerBinary: program,
		Launcher: smartvm.LaunchDirect,
	}
	h, err := smartvm.Open(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	spec := smartvm.Spec{
		ID: "vm", BootSource: smartvm.BootSource{KernelImagePath: kernel},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
	}
	change(&spec, dir)
	if m, err = h.Create(t.Context(), spec); err == nil {
		err = m.Start(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		_, err := m.Stop(ctx, smartvm.StopOptions{})
		if err := errors.Join(err, m.Remove(ctx)); err != nil {
			t.Error(err)
		}
	})
	return m, func(args ...string) (string, error) {
		var stdout bytes.Buffer
		shell := &update.Shell{Shell: &guest.Shell{
			Stdout: &stdout, JSON: func() bool { return false },
			Takes: func(int, int, string) cobra.PositionalArgs { return cobra.ExactArgs(1) },
			VMs:   func(int) cobra.CompletionFunc { return nil },
			Usage: func(err error, _ string) error { return fmt.Errorf("%w: %w", errUsage, err) },
			One: func(ctx context.Context, ref string) (*smartvm.Host, *smartvm.Machine, error) {
				h, err := smartvm.Open(options)
				if err != nil {
					return nil, nil, err
				}
				m, err := h.Machine(ctx, ref)
				return h, m, err
			},
		}}
		cmd := shell.Commands()[0]
		cmd.SilenceErrors, cmd.SilenceUsage = true, true
		cmd.SetArgs(append(args, "vm"))
		err := cmd.ExecuteContext(t.Context())
		return stdout.String(), err
	}
}

func config(t *testing.T, m *smartvm.Machine) firecracker.FullVMConfiguration {
	t.Helper()
	c, err := m.VMConfig(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Memory is plugged in by a flag, alone and beside what changes the configuration.
func TestUpdate_HotplugMemory(t *testing.T) {
	m, run := started(t, func(s *smartvm.Spec, _ string) {
		s.MemoryHotplug = &smartvm.MemoryHotplug{TotalSizeMiB: 2048}
		s.NetworkInterfaces = []smartvm.NetworkInterface{{IfaceID: "eth0", HostDevName: "smartvm-none"}}
	})
	for _, row := range []struct {
		args []string
		mib  uint64
	}{
		{[]string{"--hotplug-memory", "1G"}, 1024},
		{[]string{"--hotplug-memory", "6", "--rx", "1M"}, 6},
		{[]string{"--rx", "2M"}, 6},
		{[]string{"--hotplug-memory=0"}, 0},
	} {
		if out, err := run(row.args...); err != nil || out != "vm\n" {
			t.Errorf("%q: %q, %v", row.args, out, err)
		}
		if s, err := m.MemoryHotplug(t.Context()); err != nil || s.PluggedSizeMiB != row.mib {
			t.Errorf("%q: plugged are %d MiB, %v, want %d", row.args, s.PluggedSizeMiB, err, row.mib)
		}
	}
	if n := config(t, m).NetworkInterfaces[0]; n.RxRateLimiter == nil || n.RxRateLimiter.Bandwidth.Size != 2<<20 {
		t.Errorf("limits of the interface are %+v", n)
	}
	if _, err := run("--hotplug-memory", "4G"); !errors.As(err, new(*smartvm.FieldError)) ||
		!strings.Contains(err.Error(), "totalSizeMib (2048)") {
		t.Errorf("too much: %v", err)
	}
	if _, err := run(); !errors.Is(err, errUsage) || !strings.Contains(err.Error(), "nothing to change") {
		t.Errorf("nothing: %v", err)
	}
}

// The balloon and the limits of drives are changed by flags, until the run ends.
func TestUpdate_Devices(t *testing.T) {
	m, run := started(t, func(s *smartvm.Spec, dir string) {
		disk := filepath.Join(dir, "disk")
		if err := os.WriteFile(disk, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		s.Drives = []smartvm.Drive{{DriveID: "data", PathOnHost: disk}}
		s.Pmem = []smartvm.Pmem{{ID: "log", PathOnHost: disk}}
		s.Balloon = &smartvm.Balloon{AmountMiB: 8, FreePageHinting: true}
	})
	must := func(args ...string) {
		t.Helper()
		if _, err := run(args...); err != nil {
			t.Fatalf("%q: %v", args, err)
		}
	}
	wantHinting := func(command uint64) {
		t.Helper()
		in, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if h := in.BalloonHinting; h == nil || h.HostCommand != command {
			t.Errorf("hinting is %+v, want command %d", h, command)
		}
	}
	wantHinting(0)
	must("--balloon", "32M", "--balloon-hinting", "start", "--drive-rate", "data=1M", "--drive-rate", "log=80mbit")
	wantHinting(2)
	c := config(t, m)
	if c.Balloon.AmountMiB != 32 {
		t.Errorf("the balloon has %d MiB, want 32", c.Balloon.AmountMiB)
	}
	if d, p := c.Drives[0].RateLimiter, c.Pmem[0].RateLimiter; d == nil || d.Bandwidth.Size != 1<<20 || p == nil ||
		p.Bandwidth.Size != 10e6 {
		t.Errorf("limits are %+v of the drive and %+v of the pmem device", d, p)
	}
	must("--balloon-hinting=stop", "--drive-rate=log=0")
	wantHinting(1)
	if c = config(t, m); c.Balloon.AmountMiB != 32 || c.Drives[0].RateLimiter.Bandwidth.Size != 1<<20 ||
		c.Pmem[0].RateLimiter.Bandwidth.Size != 0 {
		t.Errorf("it has %+v, %+v, %+v", c.Balloon, c.Drives[0], c.Pmem[0])
	}
	for text, args := range map[string][]string{
		"want start or stop": {"--balloon-hinting", "go"},
		"want ID=RATE":       {"--drive-rate", "1M"},
		"is no rate":         {"--drive-rate", "data=fast"},
		"Device not found":   {"--drive-rate", "nosuch=1M"},
	} {
		if _, err := run(args...); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%q: %v, want %q", args, err, text)
		}
	}
}
