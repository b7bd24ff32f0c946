package smartvm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"push.rocks/smartvm"
)

// soakVariable is how many VMs TestSoak makes, in place of a number for every day.
const soakVariable = "SMARTVM_SOAK"

const (
	soakCycles      = 60
	soakConcurrency = 4
)

// TestSoak makes, starts, ends and removes VMs, several at once, in every way in which one can end.
// The host, and what this process holds, must be afterwards what they were before.
func TestSoak(t *testing.T) {
	cycles := soakCycles
	if text := os.Getenv(soakVariable); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			t.Fatalf("%s is %q, want a number", soakVariable, text)
		}
		cycles = n
	}
	launchers := []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed}
	for _, launcher := range launchers {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			s.options.Console = nil
			soak(t, s, cycles/len(launchers))
		})
	}
}

func soak(t *testing.T, s *site, cycles int) {
	h := s.open()
	var next, failed atomic.Int32
	var workers sync.WaitGroup
	for range soakConcurrency {
		workers.Go(func() {
			for failed.Load() == 0 {
				n := int(next.Add(1)) - 1
				if n >= cycles {
					return
				}
				if err := soakCycle(t.Context(), s, h, n); err != nil {
					t.Errorf("cycle %d: %v", n, err)
					failed.Add(1)
				}
			}
		})
	}
	workers.Wait()
	if all, err := h.Machines(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("%d VMs are left, %v", len(all), err)
	}
}

func soakCycle(ctx context.Context, s *site, h *smartvm.Host, n int) error {
	spec := s.spec([]string{"idle", "idle", "reboot", "count"}[n%4])
	spec.Name = fmt.Sprintf("soak-%d", n)
	spec.Vsock = &smartvm.Vsock{GuestCID: 3, UDSPath: s.path(spec.Name + ".vsock")}
	if n%4 == 3 {
		return soakRun(ctx, h, spec)
	}
	m, err := h.Create(ctx, spec)
	if err != nil {
		return err
	}
	if err := m.Start(ctx); err != nil {
		return err
	}
	want := smartvm.OutcomeKilled
	switch n % 4 {
	case 0:
		_, err = m.Stop(ctx, smartvm.StopOptions{})
	case 1: // by somebody else
		var i *smartvm.Inspection
		if i, err = m.Inspect(ctx); err == nil && len(i.PIDs) > 0 {
			err = syscall.Kill(i.PIDs[0], syscall.SIGKILL)
		}
	case 2:
		want = smartvm.OutcomeExited
	}
	if err != nil {
		return err
	}
	if exit, err := m.Wait(ctx); err != nil || exit.Outcome != want {
		return errors.Join(fmt.Errorf("it ended %+v, want %s", exit, want), err)
	}
	return m.Remove(ctx)
}

// soakRun ends a VM that is one call's as soon as its guest has written, which may be before its
// start is through.
func soakRun(ctx context.Context, h *smartvm.Host, spec smartvm.Spec) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	exit, err := h.Run(ctx, spec, smartvm.RunOptions{
		Console: writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil }),
	})
	if errors.Is(err, context.Canceled) || err == nil && exit.Outcome == smartvm.OutcomeKilled {
		return nil
	}
	return errors.Join(fmt.Errorf("it ended %+v, want killed", exit), err)
}
