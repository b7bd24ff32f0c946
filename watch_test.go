package smartvm_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/status"
)

// watches is a host that watches, and what it has done.
type watches struct {
	t       *testing.T
	reports chan *smartvm.Report
	stop    func()
}

func watch(t *testing.T, h *smartvm.Host) *watches {
	t.Helper()
	w := &watches{t: t, reports: make(chan *smartvm.Report, 100)}
	over := errors.New("over")
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(t.Context())) // which ends before cleanups
	ended := make(chan error, 1)
	go func() {
		ended <- h.Watch(ctx, func(r *smartvm.Report, err error) {
			if err != nil {
				t.Error(err)
			}
			w.reports <- r
		})
	}()
	w.stop = sync.OnceFunc(func() {
		cancel(over)
		if err := <-ended; !errors.Is(err, over) {
			t.Errorf("it ended with %v, want its context's cause", err)
		}
	})
	t.Cleanup(w.stop)
	return w
}

// next is the next report.
func (w *watches) next() *smartvm.Report {
	w.t.Helper()
	select {
	case r := <-w.reports:
		return r
	case <-time.After(20 * time.Second):
		w.t.Fatal("nothing was done")
		return nil
	}
}

// A VM whose supervisor is killed is adopted at once by a host that watches, whether it was made
// before or later.
func TestHost_Watch(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		early, late := s.remote(), s.remote()
		before := s.startedBy(early, h, "count")
		w := watch(t, h)
		after := s.startedBy(late, h, "count")
		for _, tt := range []struct {
			by *remote
			m  *smartvm.Machine
		}{{early, before}, {late, after}} {
			tt.by.kill()
			wantReport(t, w.next(), nil, smartvm.Report{Adopted: []string{tt.m.ID()}})
			eventually(t, "the console goes on", func() bool {
				return strings.Count(s.console.get(tt.m.ID()), "\n") > 10
			})
		}
		for _, m := range []*smartvm.Machine{before, after} {
			if err := syscall.Kill(vmmProcess(t, m), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if exit, err := m.Wait(t.Context()); err != nil || !adoptedKilled(t, exit) {
				t.Errorf("it ended %+v, %v, want it killed", exit, err)
			}
		}
		// What another host releases is adopted too, and a run that nobody supervised when it ended
		// is undone.
		other := s.open()
		released := s.started(other, s.spec("idle"))
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		wantReport(t, w.next(), nil, smartvm.Report{Adopted: []string{released.ID()}})
		for _, m := range []*smartvm.Machine{before, after, released} {
			m, err := h.Machine(t.Context(), m.ID())
			if err != nil {
				t.Fatal(err)
			}
			s.stopAndRemove(m)
		}
		w.stop()
		close(w.reports)
		for r := range w.reports {
			t.Errorf("it did more: %+v", r)
		}
	})
}

// A VM of a call whose process dies is ended.
func TestHost_WatchEndsRuns(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h, runner := s.open(), s.remote()
	w := watch(t, h)
	spec := s.spec("idle")
	spec.ID = "run"
	started := make(chan struct{})
	go func() {
		for e, err := range h.Events(t.Context(), 0) {
			if err != nil || e.Type == status.EventStarted {
				close(started)
				return
			}
		}
	}()
	runner.send(request{Op: "run", Spec: spec})
	<-started
	runner.kill()
	wantReport(t, w.next(), nil, smartvm.Report{Removed: []string{"run"}})
	if _, err := h.Machine(t.Context(), "run"); !errors.Is(err, smartvm.ErrNotFound) {
		t.Errorf("it is there: %v", err)
	}
}

// Of several hosts that watch, one adopts; when its process dies too, another does.
func TestHost_WatchTogether(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h, starter := s.open(), s.remote()
	m := s.startedBy(starter, h, "count")
	a, b := watch(t, s.open()), watch(t, s.open())
	heir := s.remote()
	heir.ask(request{Op: "watch"})
	starter.kill()
	eventually(t, "it is adopted", func() bool {
		watched, err := m.Supervised()
		return err == nil && watched
	})
	heir.kill()
	// Whether the process that died had it or not, one of the two has it now.
	got := make(chan *smartvm.Report)
	go func() {
		select {
		case r := <-a.reports:
			got <- r
		case r := <-b.reports:
			got <- r
		}
	}()
	wantReport(t, <-got, nil, smartvm.Report{Adopted: []string{m.ID()}})
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	a.stop()
	b.stop()
	close(a.reports)
	close(b.reports)
	for r := range a.reports {
		t.Errorf("a did more: %+v", r)
	}
	for r := range b.reports {
		t.Errorf("b did more: %+v", r)
	}
	s.stopAndRemove(m)
}
