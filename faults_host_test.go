package smartvm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
)

func init() {
	children["no-kvm"] = noKVMChild
	children["forbidden-kvm"] = forbiddenKVMChild
	children["no-space"] = noSpaceChild
	children["full"] = fullChild
}

// refuses checks that nothing can be made with a Firecracker, and that nothing is.
func refuses(t *testing.T, site *faultSite, wantHint string, wantText ...string) error {
	t.Helper()
	h := site.open(t)
	_, err := h.Create(t.Context(), site.spec)
	if err == nil {
		t.Fatal("a VM was made")
	}
	for _, want := range wantText {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q lacks %q", err, want)
		}
	}
	if hint := smartvm.Hint(err); !strings.Contains(hint, wantHint) {
		t.Errorf("hint %q lacks %q", hint, wantHint)
	}
	site.tidy(t)
	return err
}

func TestFault_Firecracker(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	const hint = "install Firecracker"
	t.Run("missing", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{})
		site.options.FirecrackerBinary = filepath.Join(site.dir, "nowhere")
		if err := refuses(t, site, hint, "find Firecracker", "nowhere"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v is not fs.ErrNotExist", err)
		}
	})
	t.Run("missing in PATH", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		site := newFaultSite(t, fakefc.Script{})
		site.options.FirecrackerBinary = ""
		if err := refuses(t, site, hint, "find Firecracker"); !errors.Is(err, exec.ErrNotFound) {
			t.Errorf("%v is not exec.ErrNotFound", err)
		}
	})
	t.Run("not executable", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{})
		site.options.FirecrackerBinary = filepath.Join(site.dir, "disk")
		if err := refuses(t, site, hint, "find Firecracker"); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%v is not fs.ErrPermission", err)
		}
	})
	t.Run("executable rubbish", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{})
		site.options.FirecrackerBinary = filepath.Join(site.dir, "firecracker-rubbish")
		if err := os.WriteFile(site.options.FirecrackerBinary, []byte{0, 1, 2, 3}, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := refuses(t, site, "is it Firecracker?", "--version"); !errors.Is(err, unix.ENOEXEC) {
			t.Errorf("%v is not ENOEXEC", err)
		}
	})
	t.Run("/bin/false", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{})
		site.options.FirecrackerBinary = "/bin/false"
		refuses(t, site, "is it Firecracker?", "--version", "exit status 1")
	})
	t.Run("too old", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{Version: "1.6.0"})
		if err := refuses(t, site, hint, "is Firecracker 1.6.0"); !errors.Is(err, smartvm.ErrNotSupported) {
			t.Errorf("%v is not ErrNotSupported", err)
		}
	})
	t.Run("garbage", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{VersionOutput: "\x1b[31mQEMU emulator version 9\n"})
		if err := refuses(t, site, "is it Firecracker?", "--version"); strings.Contains(err.Error(), "\x1b") {
			t.Errorf("error %q steers the terminal", err)
		}
	})
	t.Run("hangs", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{VersionHang: true})
		refuses(t, site, "is it Firecracker?", "--version", "no answer within 5s")
	})
	t.Run("hangs and the caller goes", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{VersionHang: true})
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errGone)
		if _, err := site.open(t).Create(ctx, site.spec); !errors.Is(err, errGone) {
			t.Errorf("create: %v, want %v", err, errGone)
		}
		site.tidy(t)
	})
	t.Run("replaced by a newer one", func(t *testing.T) {
		site := newFaultSite(t, fakefc.Script{Version: "1.6.0"})
		h := site.open(t)
		if _, err := h.Create(t.Context(), site.spec); !errors.Is(err, smartvm.ErrNotSupported) {
			t.Fatalf("create: %v, want ErrNotSupported", err)
		}
		site.behave(t, fakefc.Script{})
		m, err := h.Create(t.Context(), site.spec)
		if err != nil {
			t.Fatal(err)
		}
		works(t, m)
		site.tidy(t)
	})
	t.Run("jailer missing", func(t *testing.T) {
		testenv.Require(t, testenv.Root)
		t.Setenv("PATH", t.TempDir())
		site := newFaultSite(t, fakefc.Script{})
		site.options.Launcher = smartvm.LaunchJailed
		refuses(t, site, "--launcher direct", "find jailer")
	})
	t.Run("a name that the jailer refuses", func(t *testing.T) {
		testenv.Require(t, testenv.Root)
		site := newFaultSite(t, fakefc.Script{})
		site.options.Launcher = smartvm.LaunchJailed
		renamed := filepath.Join(site.dir, "vmm")
		script := "#!/bin/sh\necho 'Firecracker v1.12.1'\n"
		if err := os.WriteFile(renamed, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		site.options.FirecrackerBinary = renamed
		refuses(t, site, "must contain", "takes no file named \"vmm\"")
	})
}

var errGone = errors.New("the caller has gone")

// A VM whose guest ran does not count as one that starts when its VMM has no time to answer.
func TestFault_Busy(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	site := newFaultSite(t, fakefc.Script{Faults: map[string]fakefc.Fault{"GET /": {Hang: true}}})
	h, other := site.open(t), site.open(t)
	m, err := h.Create(t.Context(), site.spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	state := func(h *smartvm.Host) smartvm.State {
		m, err := h.Machine(t.Context(), "victim")
		if err != nil {
			t.Fatal(err)
		}
		s, err := m.State(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if got := state(h); got != smartvm.Running {
		t.Errorf("who started it finds it %s", got)
	}
	if got := state(other); got != smartvm.Starting {
		t.Errorf("another finds one %s of which nobody has told anything", got)
	}
	if err := os.WriteFile(filepath.Join(m.RuntimeDir(), store.GuestStateFile), []byte(`{"vmm":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := state(other); got != smartvm.Running {
		t.Errorf("another finds it %s", got)
	}
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// A guest that writes without end cannot fill the disk.
func TestFault_ConsoleFlood(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	const flood = 16 << 20
	site := newFaultSite(t, fakefc.Script{ConsoleBytes: flood, Faults: map[string]fakefc.Fault{
		"SendCtrlAltDel": {Exit: &fakefc.Exit{}, After: true},
	}})
	seen := new(counter)
	enough := make(chan struct{})
	seen.at, seen.reached = flood, enough
	h := site.open(t)
	exited := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		exit, err := h.Run(ctx, site.spec, smartvm.RunOptions{Console: seen})
		if err == nil && exit.Outcome != smartvm.OutcomeKilled {
			err = fmt.Errorf("ended %+v", exit)
		}
		exited <- err
	}()
	select {
	case <-enough: // the fake waits for its console, as a pipe with somebody reading lets it
	case err := <-exited:
		t.Fatalf("it ended before: %v", err)
	}
	for _, name := range []string{"console.log", "console.log.1"} {
		eventually(t, "there is "+name, func() bool { // while it gets its other name there is none
			fi, err := os.Stat(filepath.Join(site.dir, "runtime/victim", name))
			if err == nil && fi.Size() > 1<<20 {
				t.Errorf("%s has %d bytes", name, fi.Size())
			}
			return err == nil
		})
	}
	cancel()
	if err := <-exited; err != nil {
		t.Error(err)
	}
	site.tidy(t)
}

// counter tells when it has got a number of bytes.
type counter struct {
	n, at   int
	reached chan struct{}
}

func (c *counter) Write(p []byte) (int, error) {
	before := c.n
	c.n += len(p)
	if before < c.at && c.n >= c.at {
		close(c.reached)
	}
	return len(p), nil
}

// childReport is what a child saw. It prints it as JSON.
type childReport struct {
	Create, Hint string // errors of Create and their hint, if there were any
	Start        string
	StartHint    string
	State        smartvm.State
	NoSpace      bool
	Outcome      smartvm.Outcome
	Left         []string // in the runtime directory
}

// childSite is the site of newFaultSite in dir, as a child sees it.
func childSite(dir string) *faultSite {
	return &faultSite{
		dir: dir,
		options: smartvm.Options{
			RuntimeDir: filepath.Join(dir, "runtime"), DataDir: filepath.Join(dir, "data"),
			FirecrackerBinary: filepath.Join(dir, "firecracker"), Launcher: smartvm.LaunchDirect,
		},
		spec: smartvm.Spec{
			ID:            "victim",
			BootSource:    smartvm.BootSource{KernelImagePath: filepath.Join(dir, "kernel")},
			MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
			Drives:        []smartvm.Drive{{DriveID: "disk", PathOnHost: filepath.Join(dir, "disk")}},
		},
	}
}

// runChild runs a child in a mount namespace of its own.
func (s *faultSite) runChild(t *testing.T, child string, args ...string) (report childReport) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), childTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], append([]string{s.dir}, args...)...)
	cmd.Env = append(os.Environ(), "SMARTVM_TEST_CHILD="+child)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(out, &report)
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", child, err, out, &stderr)
	}
	return report
}

// childTime bounds a child's life.
const childTime = time.Minute

// tryLife makes a VM and, if it is made, starts it and removes it.
func tryLife(site *faultSite) (report childReport, err error) {
	ctx := context.Background()
	h, err := smartvm.Open(site.options)
	if err != nil {
		return report, err
	}
	m, err := h.Create(ctx, site.spec)
	if err != nil {
		report.Create, report.Hint, report.NoSpace = err.Error(), smartvm.Hint(err), errors.Is(err, unix.ENOSPC)
	} else {
		if err := m.Start(ctx); err != nil {
			report.Start, report.StartHint = err.Error(), smartvm.Hint(err)
		} else if _, err := m.Stop(ctx, smartvm.StopOptions{}); err != nil {
			return report, err
		}
		if report.State, err = m.State(ctx); err != nil {
			return report, err
		}
		if err := m.Remove(ctx); err != nil {
			return report, err
		}
	}
	for _, dir := range []string{".", ".leases"} {
		entries, err := os.ReadDir(filepath.Join(h.RuntimeDir(), dir))
		if err != nil {
			return report, err
		}
		for _, e := range entries {
			if e.Name() != store.EventDir {
				report.Left = append(report.Left, filepath.Join(dir, e.Name()))
			}
		}
	}
	return report, nil
}

// finish prints what a child saw, and is its exit status.
func finish(report childReport, err error) int {
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(report)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// bareDev puts a /dev with little in it over the one there is.
func bareDev() error {
	if err := unix.Mount("none", "/dev", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	return errors.Join(unix.Mknod("/dev/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), os.Chmod("/dev/null", 0o666))
}

func noKVMChild(args []string) int {
	if err := bareDev(); err != nil {
		return finish(childReport{}, err)
	}
	return finish(tryLife(childSite(args[0])))
}

// nobody is a user who may do nothing.
const nobody = 65534

func forbiddenKVMChild(args []string) int {
	err := errors.Join(
		bareDev(),
		unix.Mknod("/dev/kvm", unix.S_IFCHR|0o660, int(unix.Mkdev(10, 232))),
		syscall.Setgroups(nil), syscall.Setgid(nobody), syscall.Setuid(nobody),
	)
	if err != nil {
		return finish(childReport{}, err)
	}
	return finish(tryLife(childSite(args[0])))
}

func TestFault_KVM(t *testing.T) {
	testenv.Require(t, testenv.KVM, testenv.Root)
	testenv.NoLeaks(t)
	for _, tt := range []struct{ child, text, hint string }{
		{"no-kvm", "use KVM: open /dev/kvm: no such file or directory", "load kvm_intel or kvm_amd"},
		{"forbidden-kvm", "use KVM: open /dev/kvm: permission denied", "usermod -aG kvm"},
	} {
		t.Run(tt.child, func(t *testing.T) {
			site := newFaultSite(t, fakefc.Script{})
			// Nobody else's: the way to it, and what is in it.
			err := errors.Join(os.Chmod(filepath.Dir(site.dir), 0o755), os.Chown(site.dir, nobody, nobody),
				os.Chown(site.program+".json", nobody, nobody))
			if err != nil {
				t.Fatal(err)
			}
			if tt.child == "no-kvm" { // whose parents must be its own
				if err := os.Chown(site.dir, 0, 0); err != nil {
					t.Fatal(err)
				}
			}
			report := site.runChild(t, tt.child)
			if report.Create != "" || !strings.Contains(report.Start, tt.text) {
				t.Errorf("create: %q, start: %q, want %q of start", report.Create, report.Start, tt.text)
			}
			if !strings.Contains(report.StartHint, tt.hint) {
				t.Errorf("hint %q lacks %q", report.StartHint, tt.hint)
			}
			if report.State != smartvm.Failed {
				t.Errorf("it is %s, want failed", report.State)
			}
			site.tidy(t)
		})
	}
}

// noSpaceChild stages to a file system of a few MiB. With a second argument, another writer fills
// that up meanwhile.
func noSpaceChild(args []string) int {
	site := childSite(args[0])
	size := args[1]
	if err := errors.Join(os.Mkdir(site.options.RuntimeDir, 0o700),
		unix.Mount("none", site.options.RuntimeDir, "tmpfs", 0, "mode=700,size="+size)); err != nil {
		return finish(childReport{}, err)
	}
	hog := filepath.Join(site.options.RuntimeDir, ".hog")
	if len(args) > 2 {
		site.options.Progress = func(_ string, done, total int64) {
			if done < total { // and so not yet through
				_ = os.WriteFile(hog, make([]byte, 64<<20), 0o600) // takes what there is
			}
		}
	}
	report, err := tryLife(site)
	return finish(report, errors.Join(err, os.RemoveAll(hog)))
}

func TestFault_NoSpace(t *testing.T) {
	testenv.Require(t, testenv.KVM, testenv.Root)
	testenv.NoLeaks(t)
	for _, tt := range []struct {
		name string
		data int
		args []string
		text string
		left []string
	}{
		{"from the start", 8 << 20, []string{"4m"}, "needs 8 MiB, 3 MiB are free", []string{".leases"}},
		{"from the middle on", 20 << 20, []string{"24m", "hog"}, "no space left on device", []string{".hog", ".leases"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			site := newFaultSite(t, fakefc.Script{})
			disk := filepath.Join(site.dir, "disk")
			data := bytes.Repeat([]byte("precious"), tt.data/8)
			if err := writeAs(disk, data, 0o644); err != nil {
				t.Fatal(err)
			}
			report := site.runChild(t, "no-space", tt.args...)
			if !report.NoSpace || !strings.Contains(report.Create, tt.text) {
				t.Errorf("create: %q, want %q", report.Create, tt.text)
			}
			if !strings.Contains(report.Hint, "free space there") {
				t.Errorf("hint %q says not what to do", report.Hint)
			}
			if diff := cmp.Diff(tt.left, report.Left); diff != "" {
				t.Errorf("-want +left behind:\n%s", diff)
			}
			if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, data) {
				t.Errorf("the source changed: %v", err)
			}
		})
	}
}

// fullChild runs a VM on a file system that becomes full before the VM ends, by itself or because
// it was lost.
func fullChild(args []string) int {
	site, dir := childSite(args[0]), filepath.Join(args[0], "runtime")
	err := errors.Join(os.Mkdir(dir, 0o700), unix.Mount("none", dir, "tmpfs", 0, "mode=700,size=4m"))
	if err != nil {
		return finish(childReport{}, err)
	}
	report, err := fullLife(site, args[1] == "lost")
	return finish(report, errors.Join(err, os.RemoveAll(filepath.Join(dir, ".hog"))))
}

func fullLife(site *faultSite, lost bool) (report childReport, err error) {
	ctx := context.Background()
	h, err := smartvm.Open(site.options)
	if err != nil {
		return report, err
	}
	m, err := h.Create(ctx, site.spec)
	if err == nil {
		err = m.Start(ctx)
	}
	if err != nil {
		return report, err
	}
	hog := filepath.Join(h.RuntimeDir(), ".hog")
	for _, size := range []int{4 << 20, 1} { // what is free, and the rest of it
		if err := os.WriteFile(hog, make([]byte, size), 0o600); size > 1 && !errors.Is(err, unix.ENOSPC) {
			return report, fmt.Errorf("it is not full: %w", err)
		}
		hog += "-more"
	}
	if lost {
		in, err := m.Inspect(ctx)
		if err = errors.Join(err, h.Close()); err != nil {
			return report, err
		}
		if err := syscall.Kill(in.PIDs[0], syscall.SIGKILL); err != nil {
			return report, err
		}
	} else if _, err := m.Stop(ctx, smartvm.StopOptions{}); err != nil {
		return report, err
	}
	// As any process sees it.
	other, err := smartvm.Open(site.options)
	if err == nil {
		m, err = other.Machine(ctx, m.ID())
	}
	if err != nil {
		return report, err
	}
	exit, err := m.Wait(ctx)
	if err == nil {
		report.Outcome = exit.Outcome
		report.State, err = m.State(ctx)
	}
	return report, errors.Join(err, m.Remove(ctx))
}

// How a VM ended is known although its file system was full by then; else one that is to be removed
// at its end would stay, and the file system full.
func TestFault_FullAtTheEnd(t *testing.T) {
	testenv.Require(t, testenv.KVM, testenv.Root)
	testenv.NoLeaks(t)
	for how, want := range map[string]childReport{
		"stopped": {Outcome: smartvm.OutcomeKilled, State: smartvm.Stopped},
		"lost":    {Outcome: smartvm.OutcomeLost, State: smartvm.Lost},
	} {
		t.Run(how, func(t *testing.T) {
			site := newFaultSite(t, fakefc.Script{})
			if diff := cmp.Diff(want, site.runChild(t, "full", how)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// Root may read anything: somebody else asks.
func TestFault_Unreadable(t *testing.T) {
	testenv.Require(t, testenv.KVM, testenv.Root)
	testenv.NoLeaks(t)
	site := newFaultSite(t, fakefc.Script{})
	err := errors.Join(
		os.Chmod(filepath.Dir(site.dir), 0o755), os.Chown(site.dir, nobody, nobody),
		os.Chown(site.program+".json", nobody, nobody),
		os.Chmod(filepath.Join(site.dir, "kernel"), 0), os.Chmod(filepath.Join(site.dir, "disk"), 0),
	)
	if err != nil {
		t.Fatal(err)
	}
	report := site.runChild(t, "forbidden-kvm")
	for _, want := range []string{
		"bootSource.kernelImagePath: permission denied",
		"drives[0].pathOnHost: permission denied",
	} {
		if !strings.Contains(report.Create, want) {
			t.Errorf("create: %q lacks %q", report.Create, want)
		}
	}
	site.tidy(t)
}
