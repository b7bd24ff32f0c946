package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/testenv"
)

const (
	// nativeWorkers is how many packages' tests run at once. Much of what they do is waiting.
	nativeWorkers = 2
	// nativeLimit is how long a test may take on a quiet machine. The longest took 310 s on one that
	// was twice as slow.
	nativeLimit = 8 * time.Minute
)

// nativeLane runs the tests of packages on this machine.
func (r *runner) nativeLane(ctx context.Context, all []*pkg) error {
	if err := r.compile(ctx, all, race); err != nil {
		return err
	}
	begun := time.Now()
	defer func() { r.times.add("tests on this machine", time.Since(begun)) }()
	queue := make(chan *pkg, len(all))
	for _, p := range all {
		queue <- p
	}
	close(queue)
	var workers sync.WaitGroup
	for range nativeWorkers {
		workers.Go(func() {
			for p := range queue {
				r.native(ctx, p)
			}
		})
	}
	workers.Wait()
	return nil
}

// native runs a package's tests on this machine.
func (r *runner) native(ctx context.Context, p *pkg) {
	if ctx.Err() != nil {
		r.times.fail("%s: not run: %v", p.path, context.Cause(ctx))
		return
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := newWatcher(p.path, r.limit(nativeLimit), cancel)
	defer w.stop()
	w.ended = r.ended
	begun := time.Now()
	command := slices.Concat([]string{superviseVerb, p.dir}, r.odd, []string{r.binary(race, p)},
		testFlags(r.only.String()))
	cmd := exec.CommandContext(ctx, r.self, command...)
	cmd.Env = append(os.Environ(), testenv.PaceVariable+"="+fmt.Sprintf("%.2f", r.pace.get()))
	if r.odd != nil {
		cmd.Env = append(cmd.Env, "TMPDIR="+r.dir) // odd leaves a directory in it
	}
	if p.plain {
		cmd.Env = append(cmd.Env, testenv.PlainVariable+"="+r.binary(plain, p))
	}
	cmd.Stdout, cmd.Stderr = w, w
	endInOrder(cmd)
	err := cmd.Run()
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	r.times.take(w, false)
	if len(w.left[p.path]) > 0 {
		err = errors.Join(err, fmt.Errorf("processes outlived the package: %q", w.left[p.path]))
	}
	if err != nil {
		r.times.fail("%s: %v", p.path, err)
	}
	r.out.pkg(p.path, w.said[p.path].String(), time.Since(begun), err)
}

// endInOrder has a supervisor end what it runs when its context ends, or when we are killed.
func endInOrder(cmd *exec.Cmd) {
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = dumpTime + leaveTime + 5*time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
}

// limit returns how long each test may take, of which the longest takes so long on a quiet machine.
func (r *runner) limit(longest time.Duration) func(test string) time.Duration {
	return func(test string) time.Duration {
		if test == "" {
			return r.pace.of(betweenTests)
		}
		return r.pace.of(longest)
	}
}

// ended says how a test ended, for those who want to hear it.
func (r *runner) ended(res result) {
	if r.out.verbose {
		r.out.printf("%s %s %s (%.1fs)", res.outcome, res.pkg, res.test, res.took.Seconds())
	}
}

// testFlags are those of a test binary.
func testFlags(pattern string) []string {
	return []string{
		"-test.run=" + pattern, "-test.v=test2json", "-test.count=1", "-test.shuffle=on", "-test.paniconexit0",
		"-test.timeout=0",
	}
}

// output prints what the lanes have to say, one at a time.
type output struct {
	verbose bool // what tests that pass say, too

	mu sync.Mutex
	w  *os.File
}

func (o *output) printf(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	fmt.Fprintf(o.w, format+"\n", args...)
}

// pkg prints how a package's tests ended, and all that they said if they failed.
func (o *output) pkg(path, said string, took time.Duration, err error) {
	verdict := "ok  "
	if err != nil {
		verdict = "FAIL"
	}
	if err == nil && !o.verbose {
		said = ""
	}
	if err != nil {
		said += fmt.Sprintf("%s: %v\n", path, err)
	}
	o.printf("%s%s\t%s\t%.1fs", said, verdict, strings.TrimSpace(path), took.Seconds())
}
