// Command testrun runs the tests of packages of this module: all of them on this machine, by the
// race detector's leave, and beside that those of real Linux guests in emulated hosts (see
// internal/lab), where this machine's KVM boots no Linux.
//
//	testrun [-native | -lab] [-odd] [-run regexp] [-v] [package...]
//
// Tests of real Linux guests have names that begin with TestLinux. A package that needs things for
// them which are made quicker outside the emulated host makes them in TestPrepareLab, in the
// directory that SMARTVM_TEST_DATA names.
//
// Everything has a deadline that fits the machine's pace: each test, each emulated host, the whole
// run. What passes it is ended and named. Tests that an emulated host did not get to the end of, or
// failed, are run again in a new one, three times in all: the emulator is not faultless. No process
// may outlive the package that started it, or in an emulated host the test.
//
// With -odd the tests on this machine inherit an unusual environment: see internal/tools/odd.
//
// At the end it says where the time went and which tests were slowest.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/lab"
)

// Verbs of this program's own processes.
const (
	superviseVerb = "supervise"
	inLabVerb     = "in-lab"
)

func main() {
	if len(os.Args) > 2 {
		switch os.Args[1] {
		case superviseVerb:
			os.Exit(supervise(os.Args[2], os.Args[3:]))
		case inLabVerb:
			os.Exit(runPlan(os.Args[2]))
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	ok, err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// runLimit is how long a whole run may take on a quiet machine, on which it takes a quarter of an
// hour. CI ends at 90.
const runLimit = 25 * time.Minute

// runner is one run of tests.
type runner struct {
	self  string // this program
	dir   string // of what is compiled and made, removed at the end
	only  *regexp.Regexp
	odd   []string // what a test binary on this machine is an argument of, if anything
	out   *output
	times *times
	pace  *pace
}

func run(ctx context.Context) (ok bool, err error) {
	onlyNative := flag.Bool("native", false, "only tests on this machine")
	onlyLab := flag.Bool("lab", false, "only tests of real Linux guests")
	odd := flag.Bool("odd", false, "tests on this machine inherit an unusual environment")
	pattern := flag.String("run", ".", "`regexp` of the names of tests")
	verbose := flag.Bool("v", false, "print the output of tests that pass, too")
	flag.Parse()
	r := &runner{out: &output{verbose: *verbose, w: os.Stdout}, times: newTimes(), pace: new(pace)}
	if r.only, err = regexp.Compile(*pattern); err != nil {
		return false, err
	}
	if r.self, err = os.Executable(); err != nil {
		return false, err
	}
	decision, err := lab.Decide(lab.Mode(os.Getenv("SMARTVM_LAB")))
	if err != nil {
		return false, err
	}
	if r.dir, err = os.MkdirTemp("", "smartvm-test-"); err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(r.dir)) }()
	// Users of jails read what is compiled.
	if err := os.Chmod(r.dir, 0o755); err != nil {
		return false, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go r.expire(ctx, cancel)
	all, err := r.list(ctx, flag.Args())
	if err != nil {
		return false, err
	}
	if *odd {
		program := filepath.Join(r.dir, "odd")
		if out, err := exec.CommandContext(ctx, "go", "build", "-o", program,
			"push.rocks/smartvm/internal/tools/odd").CombinedOutput(); err != nil {
			return false, fmt.Errorf("compile odd: %w\n%s", err, out)
		}
		r.odd = []string{program, "--"}
	}
	if err := r.compile(ctx, all, plain); err != nil {
		return false, err
	}
	err = r.lanes(ctx, all, !*onlyLab || !decision.Lab, !*onlyNative && decision.Lab)
	r.times.print(r.out.w)
	return r.times.passed(), err
}

// expire ends a run that takes too long for this machine.
func (r *runner) expire(ctx context.Context, cancel context.CancelCauseFunc) {
	begun := time.Now()
	for left := runLimit; left > 0; left = r.pace.of(runLimit) - time.Since(begun) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(left):
		}
	}
	cancel(fmt.Errorf("the run has taken %v", time.Since(begun).Round(time.Second)))
}

// lanes runs the tests on this machine and those in emulated hosts beside each other. An error in
// one ends the other: it is none of a test's.
func (r *runner) lanes(ctx context.Context, all []*pkg, native, inLab bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var lanes sync.WaitGroup
	for _, lane := range []struct {
		wanted bool
		run    func(context.Context, []*pkg) error
	}{{native, r.nativeLane}, {inLab, r.labLane}} {
		if lane.wanted {
			lanes.Go(func() {
				if err := lane.run(ctx, all); err != nil {
					cancel(err)
				}
			})
		}
	}
	lanes.Wait()
	return context.Cause(ctx)
}

// pace is how many times slower this machine is than a quiet one, at least 1. It is known from the
// first boot of an emulated host.
type pace struct {
	mu    sync.Mutex
	value float64
}

const (
	quietBoot = 5 * time.Second // of an emulated host, on a quiet machine
	maxPace   = 3
	// unknownPace is supposed while nothing has been measured.
	unknownPace = 2
)

func (p *pace) boot(took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.value == 0 {
		p.value = paceOf(took)
	}
}

func paceOf(boot time.Duration) float64 {
	return min(max(float64(boot)/float64(quietBoot), 1), maxPace)
}

func (p *pace) get() float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.value == 0 {
		return unknownPace
	}
	return p.value
}

// of is a time of a quiet machine on this one.
func (p *pace) of(d time.Duration) time.Duration { return time.Duration(float64(d) * p.get()) }
