package smartvm_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/tinyguest"
)

// faultSite is a host whose Firecracker does what a test tells it.
type faultSite struct {
	dir     string
	program string
	options smartvm.Options
	spec    smartvm.Spec
}

// newFaultSite makes a site with a kernel and a drive. Everything of it is below dir, which is
// removed with the test.
func newFaultSite(t *testing.T, script fakefc.Script) *faultSite {
	t.Helper()
	testenv.Require(t, testenv.KVM)
	dir := t.TempDir()
	program, err := fakefc.Install(dir, script)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"kernel": tinyguest.Image(tinyguest.Guest{Message: "up\n", Then: tinyguest.Idle}),
		"disk":   []byte(strings.Repeat("precious", 1<<12)),
	} {
		if err := writeAs(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return &faultSite{
		dir: dir, program: program,
		options: smartvm.Options{
			RuntimeDir: filepath.Join(dir, "runtime"), DataDir: filepath.Join(dir, "data"),
			FirecrackerBinary: program, Launcher: smartvm.LaunchDirect,
		},
		spec: smartvm.Spec{
			ID:            "victim",
			BootSource:    smartvm.BootSource{KernelImagePath: filepath.Join(dir, "kernel")},
			MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
			Drives:        []smartvm.Drive{{DriveID: "disk", PathOnHost: filepath.Join(dir, "disk")}},
		},
	}
}

// behave makes the site's Firecracker do something else from its next start on.
func (s *faultSite) behave(t *testing.T, script fakefc.Script) {
	t.Helper()
	text, err := json.Marshal(script)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.program+".json", text, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *faultSite) open(t *testing.T) *smartvm.Host {
	t.Helper()
	h, err := smartvm.Open(s.options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil && !errors.Is(err, smartvm.ErrClosed) {
			t.Error(err)
		}
	})
	return h
}

// started makes and starts the VM.
func (s *faultSite) started(t *testing.T, h *smartvm.Host) *smartvm.Machine {
	t.Helper()
	m, err := h.Create(t.Context(), s.spec)
	if err == nil {
		err = m.Start(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// tidy checks that nothing is left of any VM, and that the drive is what it was.
func (s *faultSite) tidy(t *testing.T) {
	t.Helper()
	for _, dir := range []string{"runtime", "runtime/.leases", "data/staging"} {
		entries, err := os.ReadDir(filepath.Join(s.dir, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		for _, e := range entries {
			if e.Name() != store.LeaseDir && e.Name() != store.EventDir {
				t.Errorf("left behind: %s/%s", dir, e.Name())
			}
		}
	}
	if got, err := os.ReadFile(filepath.Join(s.dir, "disk")); err != nil ||
		string(got) != strings.Repeat("precious", 1<<12) {
		t.Errorf("the drive's source changed: %v", err)
	}
}

// works starts, stops and removes the VM, whose Firecracker is well by now.
func works(t *testing.T, m *smartvm.Machine) {
	t.Helper()
	if err := m.Start(t.Context()); err != nil {
		t.Fatalf("start again: %v", err)
	}
	if state, err := m.State(t.Context()); err != nil || state != smartvm.Running {
		t.Errorf("started again it is %s: %v", state, err)
	}
	if how, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil || how != smartvm.Killed {
		t.Errorf("stopped by %q: %v", how, err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// startTimeout is for VMMs that never get ready. It must be long enough for the others to be.
const startTimeout = 5 * time.Second

func TestFault_Start(t *testing.T) {
	bad := fakefc.Fault{Status: 400, Message: "The kernel file cannot be opened: No such file or directory (os error 2)"}
	busy := fakefc.Fault{Status: 503, Body: "busy"}
	type row struct {
		name   string
		script fakefc.Script
		stage  string
		text   []string
		code   int // of the VMM's exit, -1 if it has none to tell
		slow   bool
	}
	rows := []row{
		{
			"hangs before the socket",
			fakefc.Script{NoSocket: true},
			"PUT /machine-config",
			[]string{"did not take its configuration within " + startTimeout.String()},
			-1, true,
		},
		{
			"exits before the socket",
			fakefc.Script{ExitAtOnce: &fakefc.Exit{Status: 3, Message: "Error: no such luck"}},
			"PUT /machine-config",
			[]string{"exit status 3", "VMM log:\n  Error: no such luck"},
			3, false,
		},
		{
			"exits on accept",
			fakefc.Script{ExitOnAccept: &fakefc.Exit{Status: 4, Message: "Error: who is there"}},
			"PUT /machine-config",
			[]string{"exit status 4", "VMM log:\n  Error: who is there"},
			4, false,
		},
		{
			"exits on InstanceStart",
			fakefc.Script{Faults: map[string]fakefc.Fault{
				"InstanceStart": {Exit: &fakefc.Exit{Status: 148, Message: "Error: Bad syscall"}},
			}},
			"boot",
			[]string{"exit status 148", "VMM log:\n  Error: Bad syscall"},
			148, false,
		},
	}
	for _, request := range []string{"PUT /machine-config", "PUT /boot-source", "PUT /drives/disk", "InstanceStart"} {
		stage := request
		if request == "InstanceStart" {
			stage = "boot"
		}
		faulty := func(f fakefc.Fault) fakefc.Script { return fakefc.Script{Faults: map[string]fakefc.Fault{request: f}} }
		rows = append(rows,
			row{request + " answers 400", faulty(bad), stage, []string{bad.Message}, -1, false},
			row{request + " answers 503", faulty(busy), stage, []string{"503"}, -1, false},
			row{
				request + " never answers", faulty(fakefc.Fault{Hang: true}), stage,
				[]string{"did not take its configuration within " + startTimeout.String()},
				-1, true,
			})
	}
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	for _, tt := range rows {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			site := newFaultSite(t, tt.script)
			if tt.slow {
				site.options.StartTimeout = startTimeout
			}
			h := site.open(t)
			m, err := h.Create(t.Context(), site.spec)
			if err != nil {
				t.Fatal(err)
			}
			err = m.Start(t.Context())
			var me *smartvm.MachineError
			if !errors.As(err, &me) {
				t.Fatalf("start: %v, want a *MachineError", err)
			}
			if me.ID != "victim" || me.Stage != tt.stage {
				t.Errorf("error of VM %q at stage %q, want victim at %q", me.ID, me.Stage, tt.stage)
			}
			for _, want := range tt.text {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error lacks %q:\n%v", want, err)
				}
			}
			if tt.code >= 0 && (me.Exit == nil || me.Exit.Code != tt.code) {
				t.Errorf("error's exit is %+v, want code %d", me.Exit, tt.code)
			}
			if tt.code < 0 && me.Exit != nil {
				t.Errorf("error's exit is %+v of a VMM that was there", me.Exit)
			}
			failedAndStartable(t, site, m)
		})
	}
}

// failedAndStartable checks what a failed start leaves.
func failedAndStartable(t *testing.T, site *faultSite, m *smartvm.Machine) {
	t.Helper()
	if state, err := m.State(t.Context()); err != nil || state != smartvm.Failed {
		t.Errorf("state %s, %v, want failed", state, err)
	}
	exit, err := m.Exit()
	if err != nil || exit == nil || exit.Outcome != smartvm.OutcomeFailed || exit.Error == "" {
		t.Errorf("exit.json says %+v, %v", exit, err)
	}
	for _, name := range []string{"run", "run.journal"} {
		if _, err := os.Lstat(filepath.Join(m.RuntimeDir(), name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the failed run left %s: %v", name, err)
		}
	}
	site.behave(t, fakefc.Script{})
	works(t, m)
	site.tidy(t)
}

func TestFault_Stop(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	for _, tt := range []struct {
		name    string
		fault   *fakefc.Fault // of Ctrl-Alt-Del
		timeout time.Duration
		how     string
		outcome smartvm.Outcome
	}{
		{"obeyed", &fakefc.Fault{Exit: &fakefc.Exit{}, After: true}, time.Hour, smartvm.CtrlAltDel, smartvm.OutcomeExited},
		{
			"obeyed with an error", &fakefc.Fault{Exit: &fakefc.Exit{Status: 148}, After: true}, time.Hour, smartvm.CtrlAltDel,
			smartvm.OutcomeCrashed,
		},
		{"ignored", nil, 50 * time.Millisecond, smartvm.Killed, smartvm.OutcomeKilled},
		{"never answered", &fakefc.Fault{Hang: true}, 50 * time.Millisecond, smartvm.Killed, smartvm.OutcomeKilled},
		{"refused", &fakefc.Fault{Status: 400, Message: "no keyboard"}, time.Hour, smartvm.Killed, smartvm.OutcomeKilled},
		{"not asked", &fakefc.Fault{Exit: &fakefc.Exit{}, After: true}, 0, smartvm.Killed, smartvm.OutcomeKilled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			script := fakefc.Script{}
			if tt.fault != nil {
				script.Faults = map[string]fakefc.Fault{"SendCtrlAltDel": *tt.fault}
			}
			site := newFaultSite(t, script)
			m, err := site.open(t).Create(t.Context(), site.spec)
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			how, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: tt.timeout})
			if err != nil || how != tt.how {
				t.Errorf("stopped by %q: %v, want %q", how, err, tt.how)
			}
			if exit, err := m.Exit(); err != nil || exit == nil || exit.Outcome != tt.outcome {
				t.Errorf("exit %+v: %v, want %s", exit, err, tt.outcome)
			}
			if state, err := m.State(t.Context()); err != nil || state != smartvm.Stopped {
				t.Errorf("it is %s: %v", state, err)
			}
			works(t, m)
			site.tidy(t)
		})
	}
}
