package smartvm_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/tinyguest"
)

// site is a runtime directory on a tmpfs, and what VMs in it are made of. Real Firecracker, guests
// of some dozen instructions.
type site struct {
	t       *testing.T
	dir     string
	options smartvm.Options
	console consoles
}

// variants are the ways in which a VM can be run: everything about its life must be the same.
var variants = []struct {
	name     string
	launcher smartvm.Launcher
	noCgroup bool
}{
	{"direct", smartvm.LaunchDirect, false},
	{"direct without cgroups", smartvm.LaunchDirect, true},
	{"jailed", smartvm.LaunchJailed, false},
	{"jailed without cgroups", smartvm.LaunchJailed, true},
}

// eachVariant runs test at a site of its own for each variant.
func eachVariant(t *testing.T, test func(*testing.T, *site)) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			s := newSite(t, v.launcher)
			if v.noCgroup {
				s.options = smartvm.WithoutCgroups(s.options)
			}
			test(t, s)
		})
	}
}

func newSite(t *testing.T, launcher smartvm.Launcher) *site {
	t.Helper()
	testenv.Require(t, testenv.KVM)
	if launcher == smartvm.LaunchJailed {
		testenv.Require(t, testenv.Root)
	}
	dir := shortDir(t)
	s := &site{t: t, dir: dir}
	s.options = smartvm.Options{
		RuntimeDir: filepath.Join(dir, "runtime"), DataDir: filepath.Join(dir, "data"), Launcher: launcher,
		FirecrackerBinary: testenv.Firecracker(t), Console: s.console.of,
	}
	if launcher == smartvm.LaunchJailed {
		s.options.JailerBinary = testenv.Jailer(t)
	}
	for _, d := range []string{
		"runtime", "runtime/.leases", "runtime/.networks", "runtime/.slots", "data", "data/staging",
		"data/snapshots", "data/snapshots/.tmp",
	} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	s.write("disk", bytes.Repeat([]byte("precious"), 1<<13))
	for name, then := range map[string]tinyguest.Then{
		"idle": tinyguest.Idle, "reboot": tinyguest.Reboot, "count": tinyguest.Count, "key": tinyguest.AwaitKey,
		"echo": tinyguest.Echo, "crash": tinyguest.Crash,
	} {
		s.write(name, tinyguest.Image(tinyguest.Guest{Message: name + " is up\n", Then: then}))
	}
	testenv.NoLeaks(t, dir)
	t.Cleanup(func() {
		if t.Failed() { // no VM outlives its test for that
			s.clear()
		}
	})
	return s
}

// clear ends and removes what a test that failed has left.
func (s *site) clear() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	h, err := smartvm.Open(s.options)
	if err != nil {
		s.t.Error(err)
		return
	}
	all, err := h.Machines(ctx)
	errs := []error{err, h.StopAll(ctx, smartvm.StopOptions{})}
	for _, m := range all {
		errs = append(errs, m.Remove(ctx))
	}
	if err := errors.Join(append(errs, h.Close())...); err != nil {
		s.t.Log(err)
	}
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name string, data []byte) {
	s.t.Helper()
	if err := writeAs(s.path(name), data, 0o644); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) open() *smartvm.Host {
	s.t.Helper()
	h, err := smartvm.Open(s.options)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := h.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return h
}

// spec is a VM with one drive that runs the guest of that name.
func (s *site) spec(guest string) smartvm.Spec {
	return smartvm.Spec{
		BootSource:    smartvm.BootSource{KernelImagePath: s.path(guest)},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
		Drives:        []smartvm.Drive{{DriveID: "disk", PathOnHost: s.path("disk")}},
	}
}

func (s *site) started(h *smartvm.Host, spec smartvm.Spec) *smartvm.Machine {
	s.t.Helper()
	m, err := h.Create(s.t.Context(), spec)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := m.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	return m
}

func (s *site) stopAndRemove(m *smartvm.Machine) {
	s.t.Helper()
	if _, err := m.Stop(s.t.Context(), smartvm.StopOptions{}); err != nil {
		s.t.Error(err)
	}
	if err := m.Remove(s.t.Context()); err != nil {
		s.t.Error(err)
	}
}

func wantState(t *testing.T, m *smartvm.Machine, want smartvm.State) {
	t.Helper()
	got, err := m.State(t.Context())
	// One that does not say so in time, on a busy machine, counts as another.
	for range 5 {
		if err != nil || got == want || got != smartvm.Running && got != smartvm.Starting {
			break
		}
		got, err = m.State(t.Context())
	}
	if err != nil || got != want {
		t.Errorf("state is %q (%v), want %q", got, err, want)
	}
}

// consoles collects what guests write.
type consoles struct {
	mu   sync.Mutex
	text map[string]*bytes.Buffer
}

func (c *consoles) of(id string) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.text == nil {
			c.text = map[string]*bytes.Buffer{}
		}
		if c.text[id] == nil {
			c.text[id] = new(bytes.Buffer)
		}
		return c.text[id].Write(p)
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func (c *consoles) forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.text, id)
}

func (c *consoles) get(id string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.text[id] == nil {
		return ""
	}
	return c.text[id].String()
}

// eventually waits until done says so; what names it.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("%s: it did not happen", what)
		}
	}
}

// adoptedKilled says whether an exit is that of an adopted VM whose VMM was killed, as far as the
// kernel tells it.
func adoptedKilled(t *testing.T, exit *smartvm.Exit) bool {
	t.Helper()
	if exit == nil || exit.Code != -1 {
		return false
	}
	return exit.Outcome == smartvm.OutcomeKilled && exit.Signal == "SIGKILL" ||
		exit.Outcome == smartvm.OutcomeLost && !testenv.ForeignExits(t)
}

func TestMachine_Life(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		m, err := h.Create(t.Context(), s.spec("idle"))
		if err != nil {
			t.Fatal(err)
		}
		wantState(t, m, smartvm.Stopped)
		if _, err := m.Info(t.Context()); smartvm.Code(err) != "NO_CLIENT" || !errors.Is(err, smartvm.ErrState) {
			t.Errorf("info before start: %v (code %q), want NO_CLIENT", err, smartvm.Code(err))
		}
		for range 2 { // a stopped VM starts again
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantState(t, m, smartvm.Running)
			eventually(t, "the guest writes", func() bool { return strings.Contains(s.console.get(m.ID()), "idle is up\n") })
			i, err := m.Inspect(t.Context())
			if err != nil || len(i.PIDs) == 0 || i.FirecrackerVersion == "" || i.Launcher != s.options.Launcher {
				t.Errorf("inspect: %+v, %v", i, err)
			}
			if s.options.Launcher == smartvm.LaunchJailed {
				fi, err := os.Stat(filepath.Join("/proc", strconv.Itoa(i.PIDs[0])))
				if err != nil || fi.Sys().(*syscall.Stat_t).Uid != uint32(i.UID) || i.UID < 1_900_000_000 {
					t.Errorf("the VMM is not user %d: %v", i.UID, err)
				}
			}
			if err := m.Start(t.Context()); !errors.Is(err, smartvm.ErrState) {
				t.Errorf("start of a running VM: %v, want ErrState", err)
			}
			if err := m.Remove(t.Context()); !errors.Is(err, smartvm.ErrState) {
				t.Errorf("remove of a running VM: %v, want ErrState", err)
			}
			if err := m.Pause(t.Context()); err != nil {
				t.Error(err)
			}
			wantState(t, m, smartvm.Paused)
			if err := m.Pause(t.Context()); !errors.Is(err, smartvm.ErrState) ||
				!strings.Contains(err.Error(), "paused, not running") {
				t.Errorf("pause of a paused VM: %v, want ErrState", err)
			}
			if err := m.Resume(t.Context()); err != nil {
				t.Error(err)
			}
			if how, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil || how != smartvm.Killed {
				t.Errorf("stopped by %q: %v", how, err)
			}
			wantState(t, m, smartvm.Stopped)
			if exit, err := m.Exit(); err != nil || exit.Outcome != smartvm.OutcomeKilled || exit.Signal != "SIGKILL" {
				t.Errorf("exit %+v, %v", exit, err)
			}
			if how, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil || how != "" {
				t.Errorf("stop of a stopped VM: %q, %v", how, err)
			}
		}
		if err := m.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := m.State(t.Context()); !errors.Is(err, smartvm.ErrNotFound) {
			t.Errorf("state of a removed VM: %v, want ErrNotFound", err)
		}
		if _, err := h.Machine(t.Context(), m.ID()); !errors.Is(err, smartvm.ErrNotFound) {
			t.Errorf("look-up of a removed VM: %v, want ErrNotFound", err)
		}
	})
}

func TestMachine_EndsByItself(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		for guest, outcome := range map[string]smartvm.Outcome{"reboot": smartvm.OutcomeExited} {
			m := s.started(h, s.spec(guest))
			exit, err := m.Wait(t.Context())
			if err != nil || exit.Outcome != outcome {
				t.Errorf("%s ended %+v, %v, want %s", guest, exit, err, outcome)
			}
			wantState(t, m, smartvm.Stopped)
			s.stopAndRemove(m)
		}
	})
}

func TestMachine_StopsGracefully(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		m := s.started(h, s.spec("key"))
		if err := m.Pause(t.Context()); err != nil { // it is resumed for the key
			t.Fatal(err)
		}
		how, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: 20 * time.Second})
		if err != nil || how != smartvm.CtrlAltDel {
			t.Errorf("stopped by %q: %v, want %q", how, err, smartvm.CtrlAltDel)
		}
		if exit, err := m.Exit(); err != nil || exit.Outcome != smartvm.OutcomeExited || exit.Code != 0 {
			t.Errorf("exit %+v, %v", exit, err)
		}
		s.stopAndRemove(m)
	})
}

// A guest that does not listen is killed after the time it was given.
func TestMachine_StopKillsTheDeaf(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	m := s.started(h, s.spec("idle"))
	how, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: 50 * time.Millisecond})
	if err != nil || how != smartvm.Killed {
		t.Errorf("stopped by %q: %v, want %q", how, err, smartvm.Killed)
	}
	s.stopAndRemove(m)
}

func TestHost_Run(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		var console bytes.Buffer
		exit, err := h.Run(t.Context(), s.spec("reboot"), smartvm.RunOptions{Console: &console})
		if err != nil || exit.Outcome != smartvm.OutcomeExited || console.String() != "reboot is up\n" {
			t.Errorf("ended %+v, %v; console %q", exit, err, &console)
		}
		if all, err := h.Machines(t.Context()); err != nil || len(all) > 0 {
			t.Errorf("it is still there: %v, %v", all, err)
		}
	})
}

func TestHost_RunEndsWithItsContext(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		ctx, cancel := context.WithCancel(t.Context())
		var console bytes.Buffer
		exit, err := h.Run(ctx, s.spec("count"), smartvm.RunOptions{Console: writerFunc(func(p []byte) (int, error) {
			if console.Len() > 500 { // long after the start
				cancel()
			}
			return console.Write(p)
		})})
		if err != nil || exit.Outcome != smartvm.OutcomeKilled {
			t.Errorf("ended %+v, %v, want killed", exit, err)
		}
	})
}

// A copy is the VM's until it is removed, through any number of runs, and the source never changes.
func TestDrives_Staging(t *testing.T) {
	yes, no := true, false
	for _, tt := range []struct {
		name     string
		host     *bool
		drive    *bool
		readOnly bool
		want     bool
	}{
		{"by default", nil, nil, false, true},
		{"read-only", nil, nil, true, false},
		{"read-only that asks for it", nil, &yes, true, true},
		{"opted out", nil, &no, false, false},
		{"host switched off", &no, nil, false, false},
		{"host switched off, drive insists", &no, &yes, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
				s := newSite(t, launcher)
				s.options.EphemeralWritableDrives = tt.host
				h := s.open()
				spec := s.spec("idle")
				spec.Drives[0].Ephemeral, spec.Drives[0].IsReadOnly = tt.drive, tt.readOnly
				m := s.started(h, spec)
				i, err := m.Inspect(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				copied, ok := i.Staged["disk"]
				if ok != tt.want {
					t.Errorf("%s: staged: %v, want %v", launcher, ok, tt.want)
				}
				lent := launcher == smartvm.LaunchJailed && !tt.want && !tt.readOnly
				if owner := ownerOf(t, s.path("disk")); (owner == i.UID && i.UID != 0) != lent {
					t.Errorf("%s: the source belongs to %d while the VM of user %d runs", launcher, owner, i.UID)
				}
				if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
					t.Fatal(err)
				}
				if tt.want {
					if got, err := os.ReadFile(copied.Path); err != nil || !bytes.HasPrefix(got, []byte("precious")) {
						t.Errorf("%s: the copy is gone with the run: %v", launcher, err)
					}
				}
				s.stopAndRemove(m)
				if _, err := os.Stat(copied.Path); tt.want && !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s: the copy is there after removal: %v", launcher, err)
				}
				if owner := ownerOf(t, s.path("disk")); owner != os.Getuid() {
					t.Errorf("%s: the source belongs to %d afterwards", launcher, owner)
				}
				if got, err := os.ReadFile(s.path("disk")); err != nil ||
					!bytes.Equal(got, bytes.Repeat([]byte("precious"), 1<<13)) {
					t.Errorf("%s: the source changed: %v", launcher, err)
				}
			}
		})
	}
}

func ownerOf(t *testing.T, path string) int {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return int(fi.Sys().(*syscall.Stat_t).Uid)
}

// Two VMs must not write to one file.
func TestDrives_InPlaceIsExclusive(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := s.spec("idle")
	spec.Drives[0].Ephemeral = new(bool)
	first := s.started(h, spec)
	second, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "taken by VM "+first.ID()) {
		t.Errorf("start of a second VM on the drive: %v, want it to name the first", err)
	}
	wantState(t, second, smartvm.Failed)
	s.stopAndRemove(first)
	if err := second.Start(t.Context()); err != nil {
		t.Errorf("start after the first is gone: %v", err)
	}
	s.stopAndRemove(second)
}

func TestMachine_FilesTheUserNamed(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		spec := s.spec("idle")
		spec.Vsock = &smartvm.Vsock{GuestCID: 3, UDSPath: s.path("vsock")}
		spec.Logger = &smartvm.Logger{LogPath: s.path("vmm.log"), Level: "Debug", ShowLevel: true}
		spec.Metrics = &smartvm.Metrics{MetricsPath: s.path("metrics")}
		m := s.started(h, spec)
		if fi, err := os.Stat(s.path("vsock")); err != nil || fi.Mode()&os.ModeSocket == 0 {
			t.Errorf("vsock leads to no socket: %v", err)
		}
		if err := m.FlushMetrics(t.Context()); err != nil {
			t.Error(err)
		}
		eventually(t, "metrics and log", func() bool {
			metrics, _ := os.ReadFile(s.path("metrics"))
			log, _ := os.ReadFile(s.path("vmm.log"))
			return bytes.Contains(metrics, []byte(`"api_server"`)) && bytes.Contains(log, []byte(":INFO] Running Firecracker"))
		})
		s.stopAndRemove(m)
		if _, err := os.Lstat(s.path("vsock")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("vsock link after the end: %v", err)
		}
		for _, name := range []string{"vmm.log", "metrics"} { // the user's own
			if err := os.Remove(s.path(name)); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestMachine_LiveUpdates(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := s.spec("idle")
	spec.Balloon = &smartvm.Balloon{AmountMiB: 8, DeflateOnOOM: true}
	m := s.started(h, spec)
	limit := &smartvm.RateLimiter{Ops: &smartvm.TokenBucket{Size: 100, RefillTime: 1000}}
	if err := m.UpdateDrive(t.Context(), "disk", limit, true); err != nil {
		t.Error(err)
	}
	config, err := m.VMConfig(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(config.Drives) != 1 || config.Drives[0].RateLimiter == nil || config.Drives[0].RateLimiter.Ops.Size != 100 ||
		config.Drives[0].PathOnHost != "drives/disk" {
		t.Errorf("the VMM has %+v", config.Drives)
	}
	err = m.UpdateDrive(t.Context(), "nosuch", limit, false)
	if e, ok := errors.AsType[*smartvm.MachineError](err); !ok || e.ID != m.ID() || e.Stage != "update drive" {
		t.Errorf("update of no drive: %v", err)
	}
	// The guest has no balloon driver, and the VMM says so.
	if err := m.UpdateBalloon(t.Context(), 16); err == nil || !strings.Contains(err.Error(), "balloon") {
		t.Errorf("update balloon: %v", err)
	}
	s.stopAndRemove(m)
}

func TestHost_Names(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := s.spec("idle")
	spec.ID, spec.Name = "abc-1", "web"
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Create(t.Context(), spec); !errors.Is(err, smartvm.ErrExists) {
		t.Errorf("the same id again: %v, want ErrExists", err)
	}
	spec.ID = "abc-2"
	if _, err := h.Create(t.Context(), spec); !errors.Is(err, smartvm.ErrExists) ||
		!strings.Contains(err.Error(), `"web" is taken by VM abc-1`) {
		t.Errorf("the same name again: %v, want ErrExists and by whom", err)
	}
	spec.Name = ""
	other, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]string{"abc-1": "abc-1", "web": "abc-1", "abc-2": "abc-2"} {
		if got, err := h.Machine(t.Context(), ref); err != nil || got.ID() != want {
			t.Errorf("%q leads to %v, %v, want %s", ref, got, err, want)
		}
	}
	if _, err := h.Machine(t.Context(), "abc"); !errors.Is(err, smartvm.ErrAmbiguous) ||
		errors.Is(err, smartvm.ErrNotFound) || !strings.Contains(err.Error(), "abc-1, abc-2") {
		t.Errorf("an ambiguous beginning: %v", err)
	}
	if err := other.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if got, err := h.Machine(t.Context(), "ab"); err != nil || got.ID() != "abc-1" {
		t.Errorf("a unique beginning leads to %v, %v", got, err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// Close leaves VMs running; another process's host takes them up.
func TestHost_CloseAndAdopt(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		first := s.open()
		m := s.started(first, s.spec("count"))
		eventually(t, "it writes", func() bool { return s.console.get(m.ID()) != "" })
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		before := len(s.console.get(m.ID()))
		wantState(t, m, smartvm.Running)
		var adopted consoles
		s.options.Console = adopted.of
		h := s.open()
		report, err := h.Recover(t.Context())
		if err != nil || len(report.Adopted) != 1 || report.Adopted[0] != m.ID() {
			t.Fatalf("recovery %+v, %v, want it adopted", report, err)
		}
		eventually(t, "the console goes on", func() bool { return len(adopted.get(m.ID())) > 100 })
		if after := len(s.console.get(m.ID())); after != before {
			t.Errorf("the host that is closed has read %d bytes of the console more, after %d", after-before, before)
		}
		if report, err := h.Recover(t.Context()); err != nil || len(report.Adopted) > 0 {
			t.Errorf("adopted twice: %+v, %v", report, err)
		}
		m, err = h.Machine(t.Context(), m.ID())
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan *smartvm.Exit, 1)
		go func() {
			exit, _ := m.Wait(t.Context())
			ended <- exit
		}()
		i, err := m.Inspect(t.Context())
		if err != nil || len(i.PIDs) == 0 {
			t.Fatalf("inspect: %+v, %v", i, err)
		}
		if err := syscall.Kill(i.PIDs[0], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if exit := <-ended; !adoptedKilled(t, exit) {
			t.Errorf("ended %+v, want it killed", exit)
		}
		s.stopAndRemove(m)
	})
}

// Firecracker 1.12.1 may hang when its guest ends while a request is served. A VM ends all the
// same.
func TestMachine_EndsWhileAsked(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h, other := s.open(), s.open()
	for range 8 {
		m, err := h.Create(t.Context(), s.spec("reboot"))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		var asking sync.WaitGroup
		for range 3 {
			asking.Go(func() {
				seen, err := other.Machine(ctx, m.ID())
				for err == nil && ctx.Err() == nil {
					_, err = seen.State(ctx)
				}
			})
		}
		// The request that hangs may be the one that started the guest.
		if err := m.Start(ctx); err != nil && !strings.Contains(err.Error(), "killed by SIGKILL") {
			t.Error(err)
		}
		exit, err := m.Wait(ctx)
		cancel()
		asking.Wait()
		if err != nil || exit == nil {
			t.Errorf("ended %+v, %v", exit, err)
		}
		s.stopAndRemove(m)
	}
}

// What is written to a VM's console is typed at its serial port, from any process, also when no
// process supervises the VM.
func TestMachine_ConsoleInput(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		first := s.open()
		m, err := first.Create(t.Context(), s.spec("echo"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.ConsoleInput(t.Context()); !errors.Is(err, smartvm.ErrState) {
			t.Errorf("input of a VM that does not run: %v, want ErrState", err)
		}
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		in, err := m.ConsoleInput(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		typed := func(text string) {
			t.Helper()
			if n, err := io.WriteString(in, text); err != nil || n != len(text) {
				t.Fatalf("wrote %d of %d bytes: %v", n, len(text), err)
			}
		}
		wrote := func(text string) {
			t.Helper()
			eventually(t, text, func() bool { return strings.Contains(s.console.get(m.ID()), text) })
		}
		typed("hello\n")
		wrote("echo is up\nhello\n")
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		typed("unsupervised\n")
		second := s.open()
		if _, err := second.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		typed("adopted\n")
		wrote("hello\nunsupervised\nadopted\n")
		if m, err = second.Machine(t.Context(), m.ID()); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(in, "too late"); !errors.Is(err, smartvm.ErrState) {
			t.Errorf("written to a VM that has ended: %v, want ErrState", err)
		}
		s.stopAndRemove(m)
	})
}
