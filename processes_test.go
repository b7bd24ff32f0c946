package smartvm_test

import (
	"slices"
	"strings"
	"syscall"
	"testing"

	"push.rocks/smartvm"
)

// Of many processes that recover at once, one takes up what is left; when that one dies in turn,
// another does.
func TestProcesses_RecoverAtOnce(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		starter := s.remote()
		running := s.startedBy(starter, h, "count")
		ended := s.startedBy(starter, h, "idle")
		pid := vmmProcess(t, ended)
		starter.kill()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it is lost", func() bool {
			state, err := ended.State(t.Context())
			return err == nil && state == smartvm.Lost
		})
		heirs := []*remote{s.remote(), s.remote(), s.remote()}
		for left := heirs; len(left) > 0; {
			var adopters []*remote
			recovered := 0
			for i, a := range together(left, request{Op: "recover"}) {
				if a.Err != "" {
					t.Fatalf("recover: %s", a.Err)
				}
				if slices.Contains(a.Report.Adopted, running.ID()) {
					adopters = append(adopters, left[i])
				}
				recovered += len(a.Report.Recovered)
			}
			if len(adopters) != 1 {
				t.Fatalf("%d of %d processes adopted it", len(adopters), len(left))
			}
			if want := len(left) / len(heirs); recovered != want { // the first time only
				t.Errorf("the run that had ended was undone %d times, want %d", recovered, want)
			}
			if watched, err := running.Supervised(); err != nil || !watched {
				t.Errorf("supervised: %v, %v", watched, err)
			}
			adopters[0].kill()
			left = slices.DeleteFunc(left, func(r *remote) bool { return r == adopters[0] })
		}
		wantState(t, running, smartvm.Running)
		report, err := h.Recover(t.Context())
		wantReport(t, report, err, smartvm.Report{Adopted: []string{running.ID()}})
		eventually(t, "the console goes on", func() bool { return strings.Count(s.console.get(running.ID()), "\n") > 10 })
		if running, err = h.Machine(t.Context(), running.ID()); err != nil {
			t.Fatal(err)
		}
		s.stopAndRemove(running)
		s.stopAndRemove(ended)
	})
}

// What dies while it is made is gone after one of many recoveries, and its id and name are free.
func TestProcesses_MakerDies(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	spec := s.spec("idle")
	spec.ID, spec.Name = "unfinished", "name"
	maker := s.remote()
	maker.ask(request{Op: "recover"}) // it is up
	maker.send(request{Op: "create", Spec: spec})
	maker.kill()
	remotes := []*remote{s.remote(), s.remote(), s.remote()}
	removed := 0
	for _, a := range together(remotes, request{Op: "recover"}) {
		if a.Err != "" {
			t.Errorf("recover: %s", a.Err)
		}
		removed += len(a.Report.Removed)
	}
	if removed > 1 {
		t.Errorf("it was removed %d times", removed)
	}
	h := s.open()
	// The maker may have got through: that VM is whole.
	if m, err := h.Machine(t.Context(), spec.ID); err == nil {
		wantState(t, m, smartvm.Stopped)
		s.stopAndRemove(m)
	}
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	s.stopAndRemove(m)
}
