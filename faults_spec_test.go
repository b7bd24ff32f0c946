package smartvm_test

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
)

func TestFault_RuntimeDir(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		root       bool
		prepare    func(dir string) error
	}{
		{"a symbolic link", "is a symbolic link", false, func(dir string) error {
			return errors.Join(os.Mkdir(dir+"-there", 0o700), os.Symlink(dir+"-there", dir))
		}},
		{"a file", "is not a directory", false, func(dir string) error { return os.WriteFile(dir, nil, 0o700) }},
		{"mode 0755", "has mode 0755, not 0700", false, func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, 0o755))
		}},
		{"mode 0500", "has mode 0500, not 0700", false, func(dir string) error { return os.Mkdir(dir, 0o500) }},
		{"another's", "belongs to user 65534", true, func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, nobody, nobody))
		}},
		{"below what is another's", "above it, belongs to user 65534", true, func(dir string) error {
			return os.Chown(filepath.Dir(dir), nobody, nobody)
		}},
		{"below what all may write", "can be written by anybody", false, func(dir string) error {
			return os.Chmod(filepath.Dir(dir), 0o777)
		}},
		{"leases a symbolic link", "is a symbolic link", false, func(dir string) error {
			return errors.Join(os.Mkdir(dir, 0o700), os.Symlink("..", filepath.Join(dir, store.LeaseDir)))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.root {
				testenv.Require(t, testenv.Root)
			}
			dir := filepath.Join(t.TempDir(), "runtime")
			if err := tt.prepare(dir); err != nil {
				t.Fatal(err)
			}
			_, err := smartvm.Open(smartvm.Options{RuntimeDir: dir})
			if !errors.Is(err, store.ErrUnsafe) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("open: %v, want ErrUnsafe, %q", err, tt.text)
			}
			if hint := smartvm.Hint(err); !strings.Contains(hint, "--runtime-dir") {
				t.Errorf("hint %q", hint)
			}
		})
	}
	t.Run("below what all may write, sticky", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o777|fs.ModeSticky); err != nil {
			t.Fatal(err)
		}
		h, err := smartvm.Open(smartvm.Options{RuntimeDir: filepath.Join(dir, "runtime")})
		if err != nil {
			t.Fatal(err)
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
}

// The path of the API socket does not fit into a socket address: real Firecracker by both
// launchers.
func TestFault_LongSocketPath(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	firecracker, jailer := testenv.Firecracker(t), testenv.Jailer(t)
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			if launcher == smartvm.LaunchJailed {
				testenv.Require(t, testenv.Root)
			}
			site := newFaultSite(t, fakefc.Script{})
			testenv.NoLeaks(t)
			site.options.FirecrackerBinary, site.options.JailerBinary, site.options.Launcher = firecracker, jailer, launcher
			site.options.RuntimeDir = filepath.Join(site.dir, strings.Repeat("d", 64), "runtime")
			site.spec.ID = strings.Repeat("i", 64)
			m, err := site.open(t).Create(t.Context(), site.spec)
			if err != nil {
				t.Fatal(err)
			}
			if len(m.SocketPath()) <= 108 {
				t.Fatalf("%s is not long", m.SocketPath())
			}
			works(t, m)
		})
	}
}

// fieldPaths are the paths of the FieldErrors that are joined in err, in order.
func fieldPaths(err error) []string {
	var paths []string
	var visit func(error)
	visit = func(err error) {
		//nolint:errorlint // walks the tree itself
		switch e := err.(type) {
		case *smartvm.FieldError:
			paths = append(paths, e.Path)
		case interface{ Unwrap() []error }:
			for _, e := range e.Unwrap() {
				visit(e)
			}
		case interface{ Unwrap() error }:
			visit(e.Unwrap())
		}
	}
	visit(err)
	return paths
}

func TestFault_Spec(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	write := func(t *testing.T, site *faultSite, name, text string, mode fs.FileMode) string {
		path := filepath.Join(site.dir, name)
		if err := writeAs(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const kernel = "bootSource.kernelImagePath"
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, site *faultSite)
		paths []string
		text  string
		is    error
	}{
		{"id of 65", func(_ *testing.T, s *faultSite) { s.spec.ID = strings.Repeat("i", 65) }, []string{"id"}, "64", nil},
		{"id with a slash", func(_ *testing.T, s *faultSite) { s.spec.ID = "../victim" }, []string{"id"}, "", nil},
		{"id with a dot", func(_ *testing.T, s *faultSite) { s.spec.ID = ".leases" }, []string{"id"}, "", nil},
		{"no kernel", func(_ *testing.T, s *faultSite) {
			s.spec.BootSource.KernelImagePath += "-gone"
		}, []string{kernel}, "no such file", fs.ErrNotExist},
		{"kernel a directory", func(_ *testing.T, s *faultSite) {
			s.spec.BootSource.KernelImagePath = s.dir
		}, []string{kernel}, "neither a file", nil},
		{"kernel rubbish", func(t *testing.T, s *faultSite) {
			s.spec.BootSource.KernelImagePath = write(t, s, "rubbish", strings.Repeat("#!/bin/sh\n", 1000), 0o644)
		}, []string{kernel}, "", nil},
		{"kernel empty", func(t *testing.T, s *faultSite) {
			s.spec.BootSource.KernelImagePath = write(t, s, "empty", "", 0o644)
		}, []string{kernel}, "", nil},
		{"no initrd", func(_ *testing.T, s *faultSite) {
			s.spec.BootSource.InitrdPath = s.dir + "/none"
		}, []string{"bootSource.initrdPath"}, "no such file", fs.ErrNotExist},
		{"initrd a directory", func(_ *testing.T, s *faultSite) {
			s.spec.BootSource.InitrdPath = s.dir
		}, []string{"bootSource.initrdPath"}, "neither a file", nil},
		{"no drive", func(_ *testing.T, s *faultSite) {
			s.spec.Drives[0].PathOnHost = s.dir + "/none"
		}, []string{"drives[0].pathOnHost"}, "no such file", fs.ErrNotExist},
		{"drive a directory", func(_ *testing.T, s *faultSite) {
			s.spec.Drives[0].PathOnHost = s.dir
		}, []string{"drives[0].pathOnHost"}, "neither a file", nil},
		{"drive a FIFO", func(t *testing.T, s *faultSite) {
			s.spec.Drives[0].PathOnHost = s.dir + "/fifo"
			if err := unix.Mkfifo(s.dir+"/fifo", 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"drives[0].pathOnHost"}, "neither a file", nil},
		{"drive a character device", func(_ *testing.T, s *faultSite) {
			s.spec.Drives[0].PathOnHost = "/dev/zero"
		}, []string{"drives[0].pathOnHost"}, "neither a file", nil},
		{"drive a loop of links", func(t *testing.T, s *faultSite) {
			s.spec.Drives[0].PathOnHost = s.dir + "/loop"
			if err := os.Symlink("loop", s.dir+"/loop"); err != nil {
				t.Fatal(err)
			}
		}, []string{"drives[0].pathOnHost"}, "", nil},
		{"all at once", func(_ *testing.T, s *faultSite) {
			s.spec.BootSource = smartvm.BootSource{KernelImagePath: s.dir + "/none", InitrdPath: s.dir + "/none"}
			s.spec.Drives = append(s.spec.Drives, smartvm.Drive{DriveID: "second", PathOnHost: s.dir + "/none"})
		}, []string{kernel, "bootSource.initrdPath", "drives[1].pathOnHost"}, "no such file", fs.ErrNotExist},
		{"all at once, of the spec itself", func(_ *testing.T, s *faultSite) {
			s.spec.ID = "a b"
			s.spec.MachineConfig = smartvm.MachineConfig{VCPUCount: 33, MemSizeMiB: -1}
			s.spec.Drives[0].DriveID = "a-b"
		}, []string{"id", "machineConfig.vcpuCount", "machineConfig.memSizeMib", "drives[0].driveId"}, "", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			site := newFaultSite(t, fakefc.Script{})
			tt.spoil(t, site)
			h := site.open(t)
			_, err := h.Create(t.Context(), site.spec)
			if diff := cmp.Diff(tt.paths, fieldPaths(err)); diff != "" {
				t.Errorf("-want +got paths of %v:\n%s", err, diff)
			}
			if err != nil && !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%q lacks %q", err, tt.text)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("%v is not %v", err, tt.is)
			}
			if _, planErr := h.Plan(t.Context(), site.spec); planErr == nil {
				t.Error("what cannot be made has a plan")
			}
			site.tidy(t)
		})
	}
}

// A bzImage is looked into only when it is extracted. One that is broken inside is found out while
// the VM is made.
func TestFault_CorruptBzImage(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	site := newFaultSite(t, fakefc.Script{})
	image := make([]byte, 64<<10)
	image[0x1f1] = 4 // setup sectors
	copy(image[0x1fe:], "\x55\xaa")
	copy(image[0x202:], "HdrS\x0f\x02")
	image[0x236] = 1                                  // 64-bit
	copy(image[0x248:], []byte{0, 0x10, 0, 0, 0, 64}) // payload at 0x1000
	copy(image[5*512+0x1000:], "\x1f\x8b\x08\x00rubbish")
	site.spec.BootSource.KernelImagePath = filepath.Join(site.dir, "bzImage")
	if err := writeAs(site.spec.BootSource.KernelImagePath, image, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := site.open(t).Create(t.Context(), site.spec)
	var me *smartvm.MachineError
	if !errors.As(err, &me) || me.ID != "victim" || me.Stage != "create" ||
		!strings.Contains(err.Error(), "extract kernel "+site.spec.BootSource.KernelImagePath) {
		t.Errorf("create: %v, want a *MachineError of the extraction", err)
	}
	site.tidy(t)
}

func TestFault_TakenNames(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	site := newFaultSite(t, fakefc.Script{})
	site.spec.Name = "one"
	h := site.open(t)
	m, err := h.Create(t.Context(), site.spec)
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(m.RuntimeDir(), store.MachineFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Create(t.Context(), site.spec); !errors.Is(err, smartvm.ErrExists) {
		t.Errorf("same id: %v, want ErrExists", err)
	}
	other := site.spec
	other.ID = "other"
	if _, err := h.Create(t.Context(), other); !errors.Is(err, smartvm.ErrExists) ||
		!strings.Contains(err.Error(), "victim") {
		t.Errorf("same name: %v, want ErrExists, saying whose it is", err)
	}
	after, err := os.ReadFile(filepath.Join(m.RuntimeDir(), store.MachineFile))
	if err != nil || string(after) != string(before) {
		t.Errorf("the first VM's record changed: %v", err)
	}
	works(t, m)
	site.tidy(t)
}

// The context ends at each step of a VM's making and start in turn.
func TestFault_Cancelled(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	site := newFaultSite(t, fakefc.Script{})
	testenv.NoLeaks(t)
	site.spec.Name = "name"
	site.spec.Drives = append(site.spec.Drives,
		smartvm.Drive{DriveID: "inplace", PathOnHost: filepath.Join(site.dir, "disk"), Ephemeral: new(bool)})
	site.spec.Vsock = &smartvm.Vsock{GuestCID: 3, UDSPath: filepath.Join(shortDir(t), "vsock")}
	var step, at int
	var last string
	var cancel context.CancelCauseFunc
	site.options = smartvm.WithTrace(site.options, func(name string) {
		if step++; step == at {
			last = name
			cancel(errGone)
		}
	})
	h := site.open(t)
	// disturbed calls f with a context that ends at a step.
	disturbed := func(n int, f func(context.Context) error) error {
		var ctx context.Context
		ctx, cancel = context.WithCancelCause(t.Context())
		defer cancel(nil)
		step, at = 0, n
		err := f(ctx)
		at = 0
		return err
	}
	var m *smartvm.Machine
	create := func(ctx context.Context) (err error) {
		m, err = h.Create(ctx, site.spec)
		return err
	}
	start := func(ctx context.Context) error { return m.Start(ctx) }
	if err := disturbed(0, create); err != nil {
		t.Fatal(err)
	}
	creation := step
	if err := disturbed(0, start); err != nil {
		t.Fatal(err)
	}
	launch := step
	end := func(remove bool) {
		t.Helper()
		if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
			t.Error(err)
		}
		if remove {
			if err := m.Remove(t.Context()); err != nil {
				t.Error(err)
			}
			site.tidy(t)
		}
	}
	end(true)
	if creation < 10 || launch < 15 {
		t.Fatalf("%d and %d steps were seen", creation, launch)
	}
	for n := 1; n <= creation; n++ {
		err := disturbed(n, create)
		if err == nil && n == creation { // its last look at the context was before the last step
			end(true)
			continue
		}
		if !errors.Is(err, errGone) {
			t.Errorf("create, cancelled at %q: %v", last, err)
		}
		if _, err := h.Machine(t.Context(), "victim"); !errors.Is(err, smartvm.ErrNotFound) {
			t.Errorf("create, cancelled at %q: it is there: %v", last, err)
		}
		site.tidy(t)
	}
	if err := disturbed(0, create); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= launch; n++ {
		err := disturbed(n, start)
		if !errors.Is(err, errGone) {
			t.Errorf("start, cancelled at %q: %v", last, err)
		}
		if state, err := m.State(t.Context()); err != nil || state != smartvm.Failed {
			t.Errorf("start, cancelled at %q: it is %s: %v", last, state, err)
		}
		for _, gone := range []string{
			filepath.Join(m.RuntimeDir(), store.RunDir),
			filepath.Join(m.RuntimeDir(), store.RunJournal), site.spec.Vsock.UDSPath,
		} {
			if _, err := os.Lstat(gone); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("start, cancelled at %q: left %s: %v", last, gone, err)
			}
		}
	}
	if err := disturbed(0, start); err != nil {
		t.Errorf("start again: %v", err)
	}
	end(true)
}

// What a VMM is too old for is refused before anything is made; a newer one is told.
func TestFault_Versions(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	want := func(s *smartvm.Spec, dir string) {
		s.NetworkInterfaces = []smartvm.NetworkInterface{{IfaceID: "eth0", HostDevName: "smartvm-none", MTU: 1400}}
		s.Serial = &smartvm.Serial{RateLimiter: &smartvm.TokenBucket{Size: 1 << 10, RefillTime: 100}}
		s.Pmem = []smartvm.Pmem{{ID: "pmem0", PathOnHost: filepath.Join(dir, "disk")}}
	}
	t.Run("old", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{Version: "1.12.1"})
		want(&site.spec, site.dir)
		err := refuses(t, site, "newer Firecracker", "mtu", "1.16", "serial", "pmem", "1.14")
		if !errors.Is(err, smartvm.ErrNotSupported) {
			t.Errorf("%v is not ErrNotSupported", err)
		}
		if _, err := os.Stat(filepath.Join(site.dir, "runtime/victim")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("something was made: %v", err)
		}
	})
	t.Run("new", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{Version: "1.16.1"})
		want(&site.spec, site.dir)
		m, err := site.open(t).Create(t.Context(), site.spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		config, err := m.VMConfig(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(config.NetworkInterfaces) != 1 || config.NetworkInterfaces[0].MTU != 1400 {
			t.Errorf("interfaces %+v", config.NetworkInterfaces)
		}
		if len(config.Pmem) != 1 || config.Pmem[0].PathOnHost != "drives/pmem0" {
			t.Errorf("pmem %+v", config.Pmem)
		}
		if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
			t.Error(err)
		}
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		site.tidy(t)
	})
}

// What can be changed while a VM runs, as its VMM has it afterwards.
func TestFault_LiveUpdates(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	site := newFaultSite(t, fakefc.Script{Faults: map[string]fakefc.Fault{
		"PATCH /balloon/statistics": {Status: 400, Message: "Statistics for the balloon device are not enabled."},
	}})
	site.spec.NetworkInterfaces = []smartvm.NetworkInterface{{IfaceID: "eth0", HostDevName: "smartvm-none"}}
	site.spec.Balloon = &smartvm.Balloon{AmountMiB: 16, DeflateOnOOM: true}
	site.spec.MMDS = &smartvm.MMDS{NetworkInterfaces: []string{"eth0"}}
	ctx := t.Context()
	m, err := site.open(t).Create(ctx, site.spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Info(ctx); smartvm.Code(err) != "NO_CLIENT" {
		t.Errorf("info before the start: %v, code %q", err, smartvm.Code(err))
	}
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.SetMetadata(ctx, map[string]any{"a": 1, "b": map[string]any{"c": "d", "e": "f"}}); err != nil {
		t.Error(err)
	}
	if err := m.PatchMetadata(ctx, map[string]any{"a": 2}); err != nil {
		t.Error(err)
	}
	metadata, err := m.Metadata(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var got any
	if err := json.Unmarshal(metadata, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(any(map[string]any{"a": 2.0, "b": map[string]any{"c": "d", "e": "f"}}), got); diff != "" {
		t.Errorf("-want +got metadata:\n%s", diff)
	}
	limit := &smartvm.RateLimiter{Bandwidth: &smartvm.TokenBucket{Size: 1 << 20, RefillTime: 100}}
	if err := m.UpdateNetworkInterface(ctx, "eth0", limit, nil); err != nil {
		t.Error(err)
	}
	if err := m.UpdateDrive(ctx, "disk", limit, true); err != nil {
		t.Error(err)
	}
	if err := m.UpdateBalloon(ctx, 32); err != nil {
		t.Error(err)
	}
	err = m.UpdateBalloonStats(ctx, 5)
	var me *smartvm.MachineError
	if !errors.As(err, &me) || me.Stage != "update balloon statistics" ||
		!strings.Contains(err.Error(), "are not enabled") {
		t.Errorf("update balloon statistics: %v", err)
	}
	if err := m.UpdateNetworkInterface(ctx, "eth1", limit, nil); err == nil || !strings.Contains(err.Error(), "eth1") &&
		!strings.Contains(err.Error(), "Device not found") {
		t.Errorf("update of an interface that there is not: %v", err)
	}
	config, err := m.VMConfig(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if n := config.NetworkInterfaces[0]; n.RxRateLimiter == nil || n.RxRateLimiter.Bandwidth.Size != 1<<20 ||
		n.TxRateLimiter != nil {
		t.Errorf("interface %+v", n)
	}
	if d := config.Drives[0]; d.RateLimiter == nil || d.RateLimiter.Bandwidth.RefillTimeMs != 100 ||
		d.PathOnHost != "drives/disk" {
		t.Errorf("drive %+v", d)
	}
	if config.Balloon == nil || config.Balloon.AmountMiB != 32 {
		t.Errorf("balloon %+v", config.Balloon)
	}
	if _, err := m.Stop(ctx, smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	if err := m.Remove(ctx); err != nil {
		t.Error(err)
	}
	site.tidy(t)
}
