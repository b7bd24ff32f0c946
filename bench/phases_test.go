package main

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// fake are phases by their names: what each try of them does.
type fake map[string][]func(context.Context) ([]sample, error)

// runner measures fakes on a machine that is twice as slow as that of phases.
func (f fake) runner(t *testing.T) *runner {
	next := map[string]int{}
	return &runner{
		rounds: defaultRounds, report: newReport(t.Context(), ""), paces: map[bool]float64{},
		try: func(ctx context.Context, p phase, _ float64) ([]sample, error) {
			if p.name == calibrations[false].name {
				return []sample{{paceSample, "s", 2 * calibrations[false].quiet.Seconds()}}, nil
			}
			n := next[p.name]
			next[p.name]++
			if n >= len(f[p.name]) {
				t.Errorf("%s is measured %d times", p.name, n+1)
				return nil, nil
			}
			return f[p.name][n](ctx)
		},
	}
}

func hangs(ctx context.Context) ([]sample, error) {
	<-ctx.Done()
	return []sample{{"value", "ms", 1}}, errors.New("cut off")
}

func fails(context.Context) ([]sample, error) {
	return []sample{{"value", "ms", 2}}, errors.New("the guest is gone")
}

func works(context.Context) ([]sample, error) { return []sample{{"value", "ms", 3}}, nil }

func TestMeasure(t *testing.T) {
	f := fake{"hangs": {hangs, hangs}, "recovers": {fails, works}, "works": {works}}
	r := f.runner(t)
	var all []phase
	for _, name := range []string{"hangs", "recovers", "works"} {
		all = append(all, phase{name: name, expected: time.Minute})
	}
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		err := r.measure(t.Context(), all)
		if err == nil || err.Error() != "not measured: hangs" {
			t.Errorf("it ends with %v", err)
		}
		if got, want := time.Since(begun), 2*2*slack*time.Minute; got != want {
			t.Errorf("two tries of a phase that hangs took %v, want %v", got, want)
		}
	})
	if got := r.report.samples["value"]; len(got) != 2 || got[0] != 3 || got[1] != 3 {
		t.Errorf("the samples are %v, want those of tries that ended well", got)
	}
	var out bytes.Buffer
	r.report.print(&out)
	for _, line := range []string{
		"hangs stopped after 480 s (try 1 of 2): not done within 8m0s: cut off\n",
		"hangs stopped after 480 s (try 2 of 2): not done within 8m0s: cut off\n",
		"recovers stopped after 0 s (try 1 of 2): the guest is gone\n",
	} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("the report lacks %q:\n%s", line, &out)
		}
	}
}

// A phase whose ratio misses its bar is measured once more, and that counts.
func TestMeasure_Again(t *testing.T) {
	opens := func(ms float64) func(context.Context) ([]sample, error) {
		return func(context.Context) ([]sample, error) {
			return []sample{{"open-500", "ms", ms}, {"ps-500", "ms", 1}}, nil
		}
	}
	type tries []func(context.Context) ([]sample, error)
	for name, row := range map[string]struct {
		tries tries
		line  string
		fails int
	}{
		"meets":       {tries{opens(1)}, "open-500-ms   1.00 <=   100 ok", 0},
		"meets again": {tries{opens(200), opens(2)}, "open-500-ms   2.00 <=   100 ok, 200.00 at first", 0},
		"misses":      {tries{opens(200), opens(300)}, "open-500-ms 300.00 <=   100 MISSED, 200.00 at first", 1},
		"fails":       {tries{opens(200), fails}, "open-500-ms 200.00 <=   100 MISSED", 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := fake{"many": row.tries, "works": {works}}.runner(t)
			if err := r.measure(t.Context(), []phase{{name: "many"}, {name: "works"}}); err != nil {
				t.Error(err)
			}
			r.report.ratios()
			if missed := r.report.missed(); len(missed) != row.fails {
				t.Errorf("%q are missed, want %d", missed, row.fails)
			}
			var out bytes.Buffer
			r.report.print(&out)
			got := strings.Join(strings.Fields(out.String()), " ")
			if want := strings.Join(strings.Fields(row.line), " "); !strings.Contains(got+" ", want+" ") {
				t.Errorf("the report lacks %q:\n%s", want, &out)
			}
			if n := len(r.report.samples["ps-500"]); n != 1 {
				t.Errorf("%d samples of another measurement count, want one", n)
			}
		})
	}
}

func TestMeasure_Interrupted(t *testing.T) {
	r := fake{"hangs": {hangs}}.runner(t)
	interrupt := errors.New("interrupt")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(interrupt) })
		begun := time.Now()
		if err := r.measure(ctx, []phase{{name: "hangs", expected: time.Minute}, {name: "works"}}); !errors.Is(err,
			interrupt) {
			t.Errorf("it ends with %v", err)
		}
		if took := time.Since(begun); took != time.Second {
			t.Errorf("it took %v to be interrupted", took-time.Second)
		}
	})
}

func TestMeasure_NoPace(t *testing.T) {
	f := fake{}
	r := f.runner(t)
	r.try = func(context.Context, phase, float64) ([]sample, error) { return fails(t.Context()) }
	err := r.measure(t.Context(), []phase{{name: "works", expected: time.Minute}})
	if err == nil || len(r.report.Stops) != tries {
		t.Errorf("a machine on which nothing starts: %v, %v", err, r.report.Stops)
	}
}

func TestWanted(t *testing.T) {
	for list, want := range map[string]string{
		"":                      "starts loops memory snapshots many supervisor command-line staging pulls networks guests/boots guests/agent",
		"guests,starts":         "starts guests/boots guests/agent",
		"guests/agent,networks": "networks guests/agent",
	} {
		var got []string
		for _, p := range wanted(phases(false), list) {
			got = append(got, p.name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("-only %q measures %v, want %s", list, got, want)
		}
	}
}

func TestKill(t *testing.T) {
	dir := t.TempDir()
	byDir, byArgument, other := exec.Command("sleep", "3600"), exec.Command("sh", "-c", "read x", dir+"/x"),
		exec.Command("sleep", "3600")
	byDir.Dir = dir
	for _, cmd := range []*exec.Cmd{byDir, byArgument, other} {
		if cmd == byArgument {
			stdin, err := cmd.StdinPipe() // it waits for a line
			if err != nil {
				t.Fatal(err)
			}
			defer stdin.Close()
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	}
	if err := kill(dir); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range []*exec.Cmd{byDir, byArgument} {
		_ = cmd.Wait()
		if s := cmd.ProcessState.Sys().(syscall.WaitStatus); s.Signal() != syscall.SIGKILL {
			t.Errorf("%v ended with %v", cmd.Args, s)
		}
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("a process that works elsewhere: %v", err)
	}
}
