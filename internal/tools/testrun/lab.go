package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/lab"
	"push.rocks/smartvm/internal/testenv"
)

const (
	// labLimit is how long a test of a Linux guest may take on a quiet machine. The longest took 170 s
	// on one that was twice as slow.
	labLimit = 3 * time.Minute
	// labTries is how often a test may fail.
	labTries = 3
	// labsAtOnce is how many emulated hosts there are at a time. The tests on this machine, beside
	// them, mostly wait.
	labsAtOnce = 2
	// maxRounds bounds how often what is left is tried.
	maxRounds = 6
)

// labTest is a test of real Linux guests.
type labTest struct {
	pkg   *pkg
	name  string
	fails int
}

// plan is what emulated hosts are to run, each test in a process of its own. Hosts that run at once
// share it: each takes a test by making a directory named as its place in Tests, in Claims.
type plan struct {
	Claims string
	Tests  []planned
}

type planned struct {
	Path, Dir, Binary, Env, Name string
}

// labLane runs the tests of real Linux guests in emulated hosts until none is left.
func (r *runner) labLane(ctx context.Context, all []*pkg) error {
	config, err := labConfig(ctx)
	if err != nil {
		return err
	}
	begun := time.Now()
	var left []*labTest
	data := map[*pkg]string{}
	for _, p := range all {
		if !p.lab {
			continue
		}
		tests, err := r.labTests(ctx, p)
		if err != nil {
			return err
		}
		if len(tests) == 0 {
			continue
		}
		if data[p], err = r.prepare(ctx, p); err != nil {
			return err
		}
		left = append(left, tests...)
	}
	rand.Shuffle(len(left), func(i, j int) { left[i], left[j] = left[j], left[i] })
	r.times.add("prepare for the lab", time.Since(begun))
	for round := 1; len(left) > 0; round++ {
		if round > maxRounds {
			return fmt.Errorf("%d rounds of labs have not been enough for %s", maxRounds, names(left))
		}
		if round > 1 {
			r.out.printf("lab: once more, in a new one, as what it emulates may have failed: %s", names(left))
		}
		if err := r.round(ctx, config, left, data); err != nil {
			return err
		}
		left = slices.DeleteFunc(left, func(t *labTest) bool {
			if t.fails == labTries {
				r.times.fail("%s %s failed in %d labs", t.pkg.path, t.name, labTries)
			}
			return t.fails < 0 || t.fails == labTries
		})
	}
	return nil
}

// round runs tests in emulated hosts beside each other. With one processor each they are quicker
// than one with two.
func (r *runner) round(ctx context.Context, c lab.Config, tests []*labTest, data map[*pkg]string) error {
	file, claims, err := r.writePlan(tests, data)
	if err != nil {
		return err
	}
	c.Command, c.Share = []string{r.self, inLabVerb, file}, []string{claims}
	errs := make([]error, min(labsAtOnce, len(tests)))
	var labs sync.WaitGroup
	for i := range errs {
		labs.Go(func() {
			// What an emulated host that died has not taken is there for the next.
			for died, n := true, 0; died && n < maxRounds && errs[i] == nil && unclaimed(claims, tests); n++ {
				died, errs[i] = r.oneLab(ctx, c, tests)
			}
		})
	}
	labs.Wait()
	return errors.Join(errs...)
}

// unclaimed says whether a plan has tests that no emulated host has taken.
func unclaimed(claims string, tests []*labTest) bool {
	taken, err := os.ReadDir(claims)
	return err == nil && len(taken) < len(tests)
}

func names(tests []*labTest) string {
	var all []string
	for _, t := range tests {
		all = append(all, t.name)
	}
	return strings.Join(all, " ")
}

// labConfig gets what the emulated host needs.
func labConfig(ctx context.Context) (c lab.Config, err error) {
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return c, err
	}
	cache.Messages = os.Stderr
	c, err = cache.Lab(ctx)
	c.Dir, c.Env = "/", labEnvironment(os.Environ())
	return c, err
}

// labEnvironment returns the variables that tests in the lab are to see.
func labEnvironment(all []string) []string {
	env := []string{testenv.RequireVariable + "=kvm,root,linux"}
	for _, e := range all {
		switch name, _, _ := strings.Cut(e, "="); name {
		case testenv.RequireVariable:
		case "PATH", "HOME", "LANG", "TERM", "XDG_CACHE_HOME":
			env = append(env, e)
		default:
			if strings.HasPrefix(name, "SMARTVM_") {
				env = append(env, e)
			}
		}
	}
	return env
}

// labTests are those of a package that are to be run.
func (r *runner) labTests(ctx context.Context, p *pkg) (tests []*labTest, err error) {
	out, err := exec.CommandContext(ctx, r.binary(plain, p), "-test.list=^TestLinux").Output()
	if err != nil {
		return nil, fmt.Errorf("list tests of %s: %w", p.path, err)
	}
	for _, name := range strings.Fields(string(out)) {
		if r.only.MatchString(name) {
			tests = append(tests, &labTest{pkg: p, name: name})
		}
	}
	return tests, nil
}

// prepare has a package make on this machine what its tests need in the emulated host, and returns
// where that is.
func (r *runner) prepare(ctx context.Context, p *pkg) (dir string, err error) {
	dir = filepath.Join(r.dir, "data", p.name())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, r.pace.of(nativeLimit))
	defer cancel()
	cmd := exec.CommandContext(ctx, r.self,
		append([]string{superviseVerb, p.dir, r.binary(plain, p)}, "-test.run=^TestPrepareLab$", "-test.v")...)
	cmd.Env = append(os.Environ(), testenv.DataVariable+"="+dir)
	endInOrder(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("prepare tests of %s for the lab: %w\n%s", p.path, err, out)
	}
	return dir, nil
}

// oneLab runs an emulated host in which tests are taken until none is left, and counts how they
// fare: fails is -1 for those that passed. It returns whether the host died before, and an error
// only when there is no sense in another one.
func (r *runner) oneLab(ctx context.Context, c lab.Config, tests []*labTest) (died bool, err error) {
	inner, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := newWatcher("lab", r.limit(labLimit), cancel)
	defer w.stop()
	w.ended = r.ended
	begun, booted := time.Now(), time.Duration(0)
	c.Booted = func() {
		booted = time.Since(begun)
		r.pace.boot(booted)
		r.out.printf("lab: up after %.1f s", booted.Seconds())
	}
	c.Stdout, c.Stderr = w, w
	status, err := lab.Run(inner, c)
	r.times.add("lab boots", booted)
	r.times.add("lab tests", time.Since(begun)-booted)
	if err == nil && status != 0 && len(w.status) == 0 {
		err = fmt.Errorf("exit status %d", status)
	}
	r.tally(tests, w, err)
	if err != nil {
		last, _ := w.running()
		r.out.printf("lab: ended in %s: %v", last, err)
	}
	if ctx.Err() != nil {
		return true, context.Cause(ctx)
	}
	if errors.Is(err, lab.ErrConfig) {
		return true, err
	}
	return err != nil, nil
}

// tally counts how tests fared in an emulated host that ended with err.
func (r *runner) tally(tests []*labTest, w *watcher, err error) {
	r.times.take(w, true)
	last, _ := w.running()
	for _, t := range tests {
		status, ended := w.status[t.key()]
		var how error
		switch {
		case ended && status == 0:
			t.fails = -1
		case ended:
			t.fails++
			how = fmt.Errorf("exit status %d", status)
		case err != nil && t.key() == last:
			t.fails++
			how = err
		default:
			continue // it was not taken, or by another host
		}
		if how != nil || r.out.verbose {
			r.out.pkg(t.key()+" (lab)", w.said[t.key()].String(), 0, how)
		}
	}
	for key, processes := range w.left {
		r.times.fail("%s (lab): processes outlived it: %q", key, processes)
	}
}

// key is how a test is named in what an emulated host prints.
func (t *labTest) key() string { return t.pkg.path + " " + t.name }

// writePlan writes what emulated hosts are to run.
func (r *runner) writePlan(tests []*labTest, data map[*pkg]string) (file, claims string, err error) {
	if claims, err = os.MkdirTemp(r.dir, "claims-"); err != nil {
		return "", "", err
	}
	all := plan{Claims: claims}
	for _, t := range tests {
		all.Tests = append(all.Tests, planned{
			Path: t.pkg.path, Dir: t.pkg.dir, Binary: r.binary(plain, t.pkg),
			Env: testenv.DataVariable + "=" + data[t.pkg], Name: t.name,
		})
	}
	text, err := json.Marshal(all)
	if err != nil {
		return "", "", err
	}
	file = claims + ".plan"
	return file, claims, os.WriteFile(file, text, 0o644)
}

// runPlan is what runs in the emulated host: one test after the other. It returns its exit status.
func runPlan(file string) int {
	text, err := os.ReadFile(file)
	var all plan
	if err == nil {
		err = json.Unmarshal(text, &all)
	}
	self, selfErr := os.Executable()
	if err := errors.Join(err, selfErr); err != nil {
		fmt.Println("testrun:", err)
		return 1
	}
	var uptime float64
	if text, err := os.ReadFile("/proc/uptime"); err == nil {
		_, _ = fmt.Sscan(string(text), &uptime)
	}
	pace := fmt.Sprintf("%s=%.2f", testenv.PaceVariable, paceOf(time.Duration(uptime*float64(time.Second))))
	for i, p := range all.Tests {
		if err := os.Mkdir(filepath.Join(all.Claims, strconv.Itoa(i)), 0o755); errors.Is(err, fs.ErrExist) {
			continue
		} else if err != nil {
			fmt.Println("testrun:", err)
			return 1
		}
		fmt.Printf("%s%s %s\n", beginMark, p.Path, p.Name)
		cmd := exec.Command(self,
			append([]string{superviseVerb, p.Dir, p.Binary},
				testFlags("^"+p.Name+"$")...)...) //nolint:noctx // the emulated host is ended with it
		cmd.Env = append(os.Environ(), pace, p.Env)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
		status := 0
		if err := cmd.Run(); err != nil {
			status = 1
		}
		fmt.Printf("\n%s%d\n", endMark, status)
	}
	return 0
}
