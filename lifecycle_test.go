package smartvm_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
)

// Lives that take an unusual turn. The usual ones are in machine_test.go.

// inPlace is a VM that writes to its drive's file itself.
func (s *site) inPlace(guest string) smartvm.Spec {
	spec := s.spec(guest)
	spec.Drives[0].Ephemeral = new(bool)
	return spec
}

// A file goes from one VM to the next without a pause: it is the user's own again in the end, not
// the first VM's.
func TestDrives_LentFromHandToHand(t *testing.T) {
	s := newSite(t, smartvm.LaunchJailed)
	h := s.open()
	first := s.started(h, s.inPlace("idle"))
	second, err := h.Create(t.Context(), s.inPlace("idle"))
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	s.options = smartvm.WithTrace(s.options, func(step string) {
		if stopped || step != "append lease" {
			return
		}
		stopped = true // the second has looked at the file, and is about to take it
		if _, err := first.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
			t.Error(err)
		}
	})
	again, err := s.open().Machine(t.Context(), second.ID())
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Start(t.Context()); err != nil || !stopped {
		t.Fatalf("start: %v; the first was stopped meanwhile: %v", err, stopped)
	}
	s.stopAndRemove(again)
	s.stopAndRemove(first)
	if owner := ownerOf(t, s.path("disk")); owner != os.Getuid() {
		t.Errorf("the drive belongs to %d afterwards", owner)
	}
}

// It is the file that must not be written by two VMs, whatever they call it.
func TestDrives_InPlaceByOtherNames(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			h := s.open()
			first := s.started(h, s.inPlace("idle"))
			lentTo := ownerOf(t, s.path("disk"))
			for name, link := range map[string]func(string, string) error{"hard": os.Link, "symbolic": os.Symlink} {
				if err := link(s.path("disk"), s.path(name)); err != nil {
					t.Fatal(err)
				}
				spec := s.inPlace("idle")
				spec.Drives[0].PathOnHost = s.path(name)
				m, err := h.Create(t.Context(), spec)
				if err != nil {
					t.Fatal(err)
				}
				if err := m.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "taken by VM "+first.ID()) {
					t.Errorf("start on a %s link: %v, want it to name the first", name, err)
				}
				if owner := ownerOf(t, s.path("disk")); owner != lentTo {
					t.Errorf("refused, it gave the file from %d to %d", lentTo, owner)
				}
				if err := errors.Join(m.Remove(t.Context()), os.Remove(s.path(name))); err != nil {
					t.Error(err)
				}
			}
			wantState(t, first, smartvm.Running)
			s.stopAndRemove(first)
		})
	}
}

// A copy is one VM's own, from its making to its removal, through runs that end in any way.
func TestDrives_CopyLasts(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		var copies []string
		var machines []*smartvm.Machine
		for _, mark := range []string{"one's", "two's"} {
			m := s.started(h, s.spec("idle"))
			i, err := m.Inspect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
				t.Fatal(err)
			}
			// As its guest would.
			f, err := os.OpenFile(i.Staged["disk"].Path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = f.WriteString(mark)
			if err := errors.Join(err, f.Close()); err != nil {
				t.Fatal(err)
			}
			copies, machines = append(copies, i.Staged["disk"].Path), append(machines, m)
		}
		for n, m := range machines {
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(vmmProcess(t, m), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if _, err := m.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(copies[n])
			if want := []string{"one's", "two's"}[n] + "ous"; err != nil || !bytes.HasPrefix(got, []byte(want)) {
				t.Errorf("copy %d begins %q, %v, want %q", n, got[:min(8, len(got))], err, want)
			}
			if err := m.Remove(t.Context()); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(copies[n]); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("copy %d after the removal: %v", n, err)
			}
		}
		if got, err := os.ReadFile(s.path("disk")); err != nil || !bytes.Equal(got, bytes.Repeat([]byte("precious"), 1<<13)) {
			t.Errorf("the source changed: %v", err)
		}
	})
}

// A VM runs on when the file of its drive is unlinked, and is taken up and ended all the same.
func TestHost_AdoptsWithoutTheDrivesName(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			s.write("brief", bytes.Repeat([]byte("precious"), 1<<13))
			first := s.open()
			spec := s.inPlace("count")
			spec.Drives[0].PathOnHost = s.path("brief")
			m := s.started(first, spec)
			if err := errors.Join(os.Remove(s.path("brief")), first.Close()); err != nil {
				t.Fatal(err)
			}
			h := s.open()
			report, err := h.Recover(t.Context())
			wantReport(t, report, err, smartvm.Report{Adopted: []string{m.ID()}})
			was := len(s.console.get(m.ID()))
			eventually(t, "the console goes on", func() bool { return len(s.console.get(m.ID())) > was+100 })
			if m, err = h.Machine(t.Context(), m.ID()); err != nil {
				t.Fatal(err)
			}
			s.stopAndRemove(m)
		})
	}
}

// Whoever knew a VM that was removed does nothing to another that has got its id.
func TestMachine_FormerOfTheID(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h, other := s.open(), s.open()
		spec := s.spec("idle")
		spec.ID = "again"
		if _, err := h.Create(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		former, err := other.Machine(t.Context(), spec.ID)
		if err != nil {
			t.Fatal(err)
		}
		m, err := h.Machine(t.Context(), spec.ID)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		first := s.open()
		m, err = first.Create(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		refused := func(when string) {
			t.Helper()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, stopErr := former.Stop(ctx, smartvm.StopOptions{})
			_, stateErr := former.State(ctx)
			for op, err := range map[string]error{
				"start": former.Start(ctx), "stop": stopErr, "remove": former.Remove(ctx), "state": stateErr,
				"pause": former.Pause(ctx), "adopt": former.Adopt(ctx),
			} {
				if !errors.Is(err, smartvm.ErrNotFound) {
					t.Errorf("%s, the other being %s: %v, want ErrNotFound", op, when, err)
				}
			}
		}
		refused("stopped")
		wantState(t, m, smartvm.Stopped)
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		refused("running")
		wantState(t, m, smartvm.Running)
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		refused("unattended")
		wantState(t, m, smartvm.Running)
		s.stopAndRemove(m)
	})
}

// liveCalls are the calls that take a VM that runs, by name.
func liveCalls(m *smartvm.Machine) map[string]func(context.Context) error {
	limit := &smartvm.RateLimiter{}
	return map[string]func(context.Context) error{
		"Pause":         m.Pause,
		"Resume":        m.Resume,
		"Adopt":         m.Adopt,
		"Info":          func(ctx context.Context) error { _, err := m.Info(ctx); return err },
		"VMConfig":      func(ctx context.Context) error { _, err := m.VMConfig(ctx); return err },
		"FlushMetrics":  m.FlushMetrics,
		"SetMetadata":   func(ctx context.Context) error { return m.SetMetadata(ctx, 1) },
		"PatchMetadata": func(ctx context.Context) error { return m.PatchMetadata(ctx, 1) },
		"Metadata":      func(ctx context.Context) error { _, err := m.Metadata(ctx); return err },
		"UpdateDrive":   func(ctx context.Context) error { return m.UpdateDrive(ctx, "disk", limit, true) },
		"UpdateNetworkInterface": func(ctx context.Context) error {
			return m.UpdateNetworkInterface(ctx, "eth0", limit, limit)
		},
		"UpdateBalloon":       func(ctx context.Context) error { return m.UpdateBalloon(ctx, 1) },
		"UpdateBalloonStats":  func(ctx context.Context) error { return m.UpdateBalloonStats(ctx, 1) },
		"UpdatePmem":          func(ctx context.Context) error { return m.UpdatePmem(ctx, "pmem", limit) },
		"StartBalloonHinting": m.StartBalloonHinting,
		"StopBalloonHinting":  m.StopBalloonHinting,
		"BalloonHinting":      func(ctx context.Context) error { _, err := m.BalloonHinting(ctx); return err },
		"UpdateMemoryHotplug": func(ctx context.Context) error { return m.UpdateMemoryHotplug(ctx, 128) },
		"MemoryHotplug":       func(ctx context.Context) error { _, err := m.MemoryHotplug(ctx); return err },
		"ConsoleInput": func(ctx context.Context) error {
			in, err := m.ConsoleInput(ctx)
			if err == nil {
				err = in.Close()
			}
			return err
		},
		"Exec": func(ctx context.Context) error {
			_, err := m.Exec(ctx, smartvm.Cmd{Args: []string{"true"}})
			return err
		},
		"Snapshot": func(ctx context.Context) error {
			_, err := m.Snapshot(ctx, smartvm.SnapshotOptions{})
			return err
		},
		"Fork": func(ctx context.Context) error {
			_, err := m.Fork(ctx, 1, smartvm.ForkOptions{})
			return err
		},
		"CopyTo": func(ctx context.Context) error { return m.CopyTo(ctx, "/etc", "/", nil, smartvm.CopyOptions{}) },
		"CopyFrom": func(ctx context.Context) error {
			return m.CopyFrom(ctx, "/etc", "/tmp", nil, smartvm.CopyOptions{})
		},
		"DialTCP":        func(ctx context.Context) error { _, err := m.DialTCP(ctx, 80); return err },
		"DialVsock":      func(ctx context.Context) error { _, err := m.DialVsock(ctx, 80); return err },
		"GuestProcesses": func(ctx context.Context) error { _, err := m.GuestProcesses(ctx); return err },
		"GuestStats":     func(ctx context.Context) error { _, err := m.GuestStats(ctx); return err },
		"BalloonStats":   func(ctx context.Context) error { _, err := m.BalloonStats(ctx); return err },
	}
}

// No call that takes a running VM is missing here, and each is refused in each state in which there
// is none.
func TestMachine_CallsWithoutVMM(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	m, err := h.Create(t.Context(), s.spec("idle"))
	if err != nil {
		t.Fatal(err)
	}
	calls := liveCalls(m)
	others := []string{
		"AwaitReady", "CommandLog", "ConsoleLog", "Discard", "Exit", "Firecracker", "Forward", "Guest",
		"ID", "Inspect", "MemoryStats", "Name", "Provide", "ReadScratch", "Remove", "RuntimeDir", "Secrets", "SocketPath",
		"Spec", "Start", "State", "Stop", "Supervised", "Update", "VMMLog", "Wait",
	}
	for i := range reflect.TypeOf(m).NumMethod() {
		name := reflect.TypeOf(m).Method(i).Name
		if calls[name] == nil && !slices.Contains(others, name) {
			t.Errorf("%s is not in this test", name)
		}
	}
	refused := func(state smartvm.State) {
		t.Helper()
		wantState(t, m, state)
		for name, call := range calls {
			err := call(t.Context())
			se, ok := errors.AsType[*smartvm.StateError](err)
			if !ok || !errors.Is(err, smartvm.ErrState) || se.ID != m.ID() || se.State != state {
				t.Errorf("%s of what is %s: %v, want a StateError", name, state, err)
			}
			code := "NO_CLIENT"
			if name == "Resume" { // it is of what is paused, not of what runs
				code = "INVALID_STATE"
			}
			if got := smartvm.Code(err); got != code {
				t.Errorf("%s of what is %s: code %q, want %q", name, state, got, code)
			}
		}
	}
	refused(smartvm.Stopped)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := m.Start(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("start: %v, want it cancelled", err)
	}
	refused(smartvm.Failed)
	if err := m.Start(t.Context()); err != nil { // and can be started all the same
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(vmmProcess(t, m), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit, err := m.Wait(t.Context()); err != nil || exit.Outcome != smartvm.OutcomeLost {
		t.Errorf("it ended %+v, %v, want lost", exit, err)
	}
	refused(smartvm.Lost)
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, call := range calls {
		if err := call(t.Context()); !errors.Is(err, smartvm.ErrNotFound) {
			t.Errorf("%s of what is removed: %v, want ErrNotFound", name, err)
		}
	}
}

// A paused VM stays paused when its host goes and another comes.
func TestHost_AdoptsPaused(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		first := s.open()
		m := s.started(first, s.spec("key"))
		if err := errors.Join(m.Pause(t.Context()), first.Close()); err != nil {
			t.Fatal(err)
		}
		wantState(t, m, smartvm.Paused)
		h := s.open()
		report, err := h.Recover(t.Context())
		wantReport(t, report, err, smartvm.Report{Adopted: []string{m.ID()}})
		wantState(t, m, smartvm.Paused)
		if err := m.Resume(t.Context()); err != nil { // by one that does not supervise it
			t.Error(err)
		}
		if m, err = h.Machine(t.Context(), m.ID()); err != nil {
			t.Fatal(err)
		}
		wantState(t, m, smartvm.Running)
		how, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: 20 * time.Second})
		if err != nil || how != smartvm.CtrlAltDel {
			t.Errorf("stopped by %q, %v, want %q", how, err, smartvm.CtrlAltDel)
		}
		s.stopAndRemove(m)
	})
}

// All VMs of a runtime directory are stopped at once: those of this host, of another, of nobody,
// and those that do not run.
func TestHost_StopAll(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h, other, gone := s.open(), s.open(), s.open()
	ms := []*smartvm.Machine{
		s.started(h, s.spec("idle")), s.started(other, s.spec("key")),
		s.started(gone, s.spec("count")),
	}
	if err := gone.Close(); err != nil {
		t.Fatal(err)
	}
	rested, err := h.Create(t.Context(), s.spec("idle"))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.StopAll(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	for i, want := range []smartvm.State{smartvm.Stopped, smartvm.Stopped, smartvm.Lost, smartvm.Stopped} {
		m := append(ms, rested)[i]
		wantState(t, m, want)
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// The VM of one call can be stopped by others, and is removed by that call.
func TestHost_RunStoppedByAnother(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h, other := s.open(), s.open()
		spec := s.spec("key")
		spec.Name = "one-call"
		stopped := make(chan error, 1)
		runs := make(chan struct{})
		go func() {
			<-runs
			m, err := other.Machine(t.Context(), spec.Name)
			if err == nil {
				_, err = m.Stop(t.Context(), smartvm.StopOptions{Timeout: 20 * time.Second})
			}
			stopped <- err
		}()
		exit, err := h.Run(t.Context(), spec, smartvm.RunOptions{Console: writerFunc(func(p []byte) (int, error) {
			if bytes.Contains(p, []byte("\n")) {
				close(runs)
			}
			return len(p), nil
		})})
		if err != nil || exit.Outcome != smartvm.OutcomeExited || exit.Code != 0 {
			t.Errorf("it ended %+v, %v", exit, err)
		}
		if err := <-stopped; err != nil {
			t.Error(err)
		}
		if all, err := h.Machines(t.Context()); err != nil || len(all) > 0 {
			t.Errorf("it is still there: %v, %v", all, err)
		}
	})
}

// A console writer that blocks holds up the undoing of its VM's run, but neither the VM's end nor
// Stop beyond its context.
func TestMachine_ConsoleBlocks(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	blocked, unblock := make(chan struct{}), make(chan struct{})
	block := sync.OnceFunc(func() { close(blocked); <-unblock })
	s.options.Console = func(string) io.Writer {
		return writerFunc(func(p []byte) (int, error) { block(); return len(p), nil })
	}
	h := s.open()
	m := s.started(h, s.spec("count"))
	<-blocked
	pid := vmmProcess(t, m)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := m.Stop(ctx, smartvm.StopOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop: %v, want the context's end", err)
	}
	eventually(t, "the VMM ends", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
	defer close(unblock)
	if exit, err := m.Wait(t.Context()); err != nil || exit.Outcome != smartvm.OutcomeKilled {
		t.Errorf("it ended %+v, %v", exit, err)
	}
	s.stopAndRemove(m)
}
