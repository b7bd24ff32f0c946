package smartvm_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/store"
)

// A record that another version of smartvm has written hides no other VM, keeps none from being
// stopped, and says what it is. One of this version may have more fields.
func TestHost_OtherVersions(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	runs, newer, more := s.started(h, s.spec("idle")), s.started(h, s.spec("idle")), s.started(h, s.spec("idle"))
	change := func(m *smartvm.Machine, old, with string) {
		t.Helper()
		path := filepath.Join(m.RuntimeDir(), store.MachineFile)
		data, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(data), old) {
			t.Fatalf("%s, %v", data, err)
		}
		if err := os.WriteFile(path, []byte(strings.Replace(string(data), old, with, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	change(newer, `"version": 1,`, `"version": 2, "created": {"by": "another"}, "isNew": [1],`)
	change(more, `"version": 1,`, `"version": 1, "isNew": [1],`)
	other := s.open()
	all, err := other.Machines(t.Context())
	if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), newer.ID()) ||
		!strings.Contains(err.Error(), "version 2") {
		t.Errorf("got %v, want that VM %s is not supported", err, newer.ID())
	}
	if len(all) != 2 {
		t.Fatalf("%d VMs, want the others", len(all))
	}
	if _, err := other.Machine(t.Context(), newer.ID()); !errors.Is(err, smartvm.ErrNotSupported) {
		t.Errorf("got %v", err)
	}
	if err := other.StopAll(t.Context(), smartvm.StopOptions{}); !errors.Is(err, smartvm.ErrNotSupported) {
		t.Errorf("got %v", err)
	}
	wantState(t, runs, smartvm.Stopped)
	wantState(t, more, smartvm.Stopped)
	wantState(t, newer, smartvm.Running)
	change(newer, `"version": 2, "created": {"by": "another"}, "isNew": [1],`, `"version": 1,`)
	for _, m := range []*smartvm.Machine{runs, newer, more} {
		s.stopAndRemove(m)
	}
}

// Who waits when its host is closed is told so: the VM has not ended.
func TestMachine_WaitAcrossClose(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	m := s.started(h, s.spec("idle"))
	waited := make(chan error, 1)
	waiting := make(chan struct{})
	go func() {
		close(waiting)
		exit, err := m.Wait(t.Context())
		if exit != nil {
			t.Errorf("it ended %+v", exit)
		}
		waited <- err
	}()
	<-waiting
	if err := errors.Join(h.Close(), h.Close()); err != nil {
		t.Fatal(err)
	}
	// Wait may also have begun afterwards: then it waits for the VM itself.
	select {
	case err := <-waited:
		if !errors.Is(err, smartvm.ErrClosed) {
			t.Errorf("got %v", err)
		}
	case <-time.After(time.Second):
		t.Log("it waits for the VM")
		defer func() { <-waited }()
	}
	next, err := s.open().Machine(t.Context(), m.ID())
	if err != nil {
		t.Fatal(err)
	}
	wantState(t, next, smartvm.Running)
	spec := s.spec("idle")
	late, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := late.Start(t.Context()); !errors.Is(err, smartvm.ErrClosed) {
		t.Errorf("a closed host starts a VM: %v", err)
	}
	s.stopAndRemove(late)
	s.stopAndRemove(next)
}

// A VM's end is noticed at once, also while it is repaired: here it is to be resumed, as the
// process that froze it has died, and what should answer does not.
func TestMachine_EndsWhileRepaired(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	s.options = smartvm.WithHealInterval(s.options, 20*time.Millisecond)
	m := s.started(s.open(), s.spec("idle"))
	pid := vmmProcess(t, m)
	if err := errors.Join(m.Pause(t.Context()), os.Remove(m.SocketPath())); err != nil {
		t.Fatal(err)
	}
	silent, err := net.Listen("unix", m.SocketPath())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	all, err := store.Open(s.options.RuntimeDir)
	if err != nil {
		t.Fatal(err)
	}
	hold, err := all.Hold(m.ID())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(hold.MustResume(), hold.Abandon()); err != nil {
		t.Fatal(err)
	}
	repair, err := silent.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer repair.Close()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // the repair would take a minute
	defer cancel()
	if exit, err := m.Wait(ctx); err != nil || exit.Outcome != smartvm.OutcomeKilled {
		t.Errorf("it ended %+v, %v", exit, err)
	}
	s.stopAndRemove(m)
}

// State keeps to its context, whatever the VMM does.
func TestMachine_StateInTime(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	m := s.started(s.open(), s.spec("idle"))
	pid := vmmProcess(t, m)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	asks := s.open()
	other, err := asks.Machine(t.Context(), m.ID())
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]*smartvm.Machine{"its supervisor": m, "another process": other} {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		begun := time.Now()
		state, err := m.State(ctx)
		if took := time.Since(begun); !errors.Is(err, context.DeadlineExceeded) || took > 3*time.Second { // it took five
			t.Errorf("%s: got %s, %v after %s", name, state, err, took)
		}
		cancel()
		begun = time.Now()
		if state, err := m.State(t.Context()); err != nil || state != smartvm.Running && state != smartvm.Starting ||
			time.Since(begun) > 4*time.Second {
			t.Errorf("%s: got %s, %v after %s", name, state, err, time.Since(begun))
		}
	}
	begun := time.Now()
	if err := asks.Close(); err != nil || time.Since(begun) > 3*time.Second { // it took five
		t.Errorf("a host that has asked a VMM that does not answer is closed after %s, %v", time.Since(begun), err)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if info, err := m.Info(t.Context()); err != nil || info.State != "Running" {
		t.Errorf("a VMM that goes on, and was asked meanwhile: %s, %v", info.State, err)
	}
	s.stopAndRemove(m)
}
