package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// phase is a part of a run. It is measured in a process of its own, so that it can be ended
// whatever it waits for.
type phase struct {
	name     string
	expected time.Duration // at a pace of 1, with defaultRounds
	measure  func(*bench, context.Context) error

	own   bool // in a network of its own, which takes root
	guest bool // of the minimal image's guests
	lab   bool // in the lab
}

const defaultRounds = 150

// phases are all there are, of which those in guests are measured in the lab, or not. What is
// expected is from a run on two processors with KVM of the PVM kind, beside other work (load 12),
// rounded up. What was measured in the lab was divided by the pace of the lab, 7.
func phases(lab bool) []phase {
	return []phase{
		{name: "starts", expected: 75 * time.Second, measure: (*bench).starts},
		{name: "loops", expected: 20 * time.Second, measure: (*bench).loops},
		{name: "memory", expected: 10 * time.Second, measure: (*bench).memory},
		{name: "snapshots", expected: 3 * time.Minute, measure: (*bench).snapshots},
		{name: "many", expected: 90 * time.Second, measure: (*bench).many},
		{name: "supervisor", expected: 10 * time.Second, measure: (*bench).supervisor},
		{name: "command-line", expected: 40 * time.Second, measure: (*bench).commandLine},
		{name: "staging", expected: 30 * time.Second, measure: (*bench).staging},
		{name: "pulls", expected: 2 * time.Minute, measure: (*bench).pulls},
		{name: "networks", expected: 2 * time.Minute, measure: (*bench).networks, own: true},
		{
			name: "guests/boots", expected: 60 * time.Second, measure: inGuest((*guestSite).boots), own: true,
			guest: true, lab: lab,
		},
		{
			name: "guests/agent", expected: 2 * time.Minute, measure: inGuest((*guestSite).agent), own: true,
			guest: true, lab: lab,
		},
	}
}

// wanted are those of a list of names, or all if it is empty. "guests" means all whose names begin
// with "guests/".
func wanted(all []phase, list string) []phase {
	if list == "" {
		return all
	}
	names := strings.Split(list, ",")
	return slices.DeleteFunc(all, func(p phase) bool {
		group, _, _ := strings.Cut(p.name, "/")
		return !slices.Contains(names, p.name) && !slices.Contains(names, group)
	})
}

// calibrations tell how slow a machine is, or its lab: they measure paceSample, in seconds, which
// takes quiet on two quiet processors: a tiny guest's first byte comes after 8 to 10 ms, a lab is
// up after 3 to 5 s.
var calibrations = map[bool]struct {
	phase
	quiet time.Duration
}{
	false: {phase{name: "pace", measure: (*bench).calibrate}, 10 * time.Millisecond},
	true:  {phase{name: "lab-pace", measure: (*bench).calibrateLab, own: true, lab: true}, 5 * time.Second},
}

const paceSample = "pace"

// A phase has slack times as long as is expected at the machine's pace: that is taken once, and
// what else the machine does changes.
const slack = 4

// calibrationLimit bounds what finds out the pace.
const calibrationLimit = 4 * time.Minute

// A phase that stops is measured once more.
const tries = 2

// runner measures phases, one after another.
type runner struct {
	rounds int
	report *report
	// try measures a phase at a pace and leaves nothing of it. It returns soon after its context has
	// ended.
	try   func(context.Context, phase, float64) ([]sample, error)
	paces map[bool]float64 // as far as they are known, as calibrations
}

// measure goes on after a phase that stops, and names those that were not measured.
func (r *runner) measure(ctx context.Context, all []phase) error {
	for _, p := range all {
		if p.own && os.Geteuid() != 0 {
			fmt.Fprintf(os.Stderr, "bench: %s needs root: skipped\n", p.name)
			continue
		}
		for try := 1; try <= tries; try++ {
			begun := time.Now()
			samples, err := r.attempt(ctx, p)
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			took := time.Since(begun).Seconds()
			if err == nil {
				fmt.Fprintf(os.Stderr, "bench: %s measured in %.0f s\n", p.name, took)
				if missed := r.report.take(samples, p.lab); len(missed) > 0 {
					r.again(ctx, p, missed)
				}
				break
			}
			s := stop{Phase: p.name, Seconds: took, Try: try, Reason: err.Error()}
			r.report.Stops = append(r.report.Stops, s)
			fmt.Fprintln(os.Stderr, "bench:", s)
		}
	}
	if missing := r.report.missing(); len(missing) > 0 {
		return fmt.Errorf("not measured: %s", strings.Join(missing, ", "))
	}
	return nil
}

// again measures a phase once more of which ratios missed their bar, as something else may have
// been at work on this machine. If that fails, what was measured at first counts.
func (r *runner) again(ctx context.Context, p phase, missed []ratio) {
	for _, x := range missed {
		fmt.Fprintf(os.Stderr, "bench: %s is %.2f: measured again\n", x.Name, x.Value)
	}
	samples, err := r.attempt(ctx, p)
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %s again: %v\n", p.name, err)
		return
	}
	r.report.takeAgain(samples, p.lab, missed)
}

// attempt measures a phase as long as its deadline allows.
func (r *runner) attempt(ctx context.Context, p phase) ([]sample, error) {
	pace, err := r.pace(ctx, p.lab)
	if err != nil {
		return nil, err
	}
	more := max(1, float64(r.rounds)/defaultRounds)
	return r.within(ctx, time.Duration(slack*pace*more*float64(p.expected)), p, pace)
}

func (r *runner) within(ctx context.Context, limit time.Duration, p phase, pace float64) ([]sample, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, late(limit))
	defer cancel()
	samples, err := r.try(ctx, p, pace)
	return samples, because(ctx, err)
}

// late is why a phase is ended that has not ended by itself.
func late(limit time.Duration) error {
	return fmt.Errorf("not done within %v", limit.Round(time.Second))
}

// because adds to an error why its context ended.
func because(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil {
		return err
	}
	return fmt.Errorf("%w: %w", context.Cause(ctx), err)
}

// pace is how many times slower this machine or its lab is than calibrations has it, at least 1.
func (r *runner) pace(ctx context.Context, lab bool) (float64, error) {
	if pace, ok := r.paces[lab]; ok {
		return pace, nil
	}
	c := calibrations[lab]
	samples, err := r.within(ctx, calibrationLimit, c.phase, 1)
	if err == nil && len(samples) != 1 {
		err = fmt.Errorf("%d samples", len(samples))
	}
	if err != nil {
		return 0, fmt.Errorf("take the machine's pace: %w", err)
	}
	pace := max(1, samples[0].Value/c.quiet.Seconds())
	r.paces[lab] = pace
	fmt.Fprintf(os.Stderr, "bench: %s %.1f\n", c.name, pace)
	return pace, nil
}
