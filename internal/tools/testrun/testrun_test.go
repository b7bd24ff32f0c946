package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// asVariable makes the test binary the program itself.
const asVariable = "SMARTVM_TEST_TESTRUN"

func TestMain(m *testing.M) {
	if os.Getenv(asVariable) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

const transcript = "\x16=== PACKAGE a/b\n-test.shuffle 17\n\x16=== RUN   TestOne\nword\n    x_test.go:1: waited 1.5s for other packages' tests\n" +
	"no end of line\x16--- PASS: TestOne (0.25s)\n\x16=== RUN   TestTwo\n\x16=== RUN   TestTwo/sub\n\x16    --- FAIL: TestTwo/sub (9.00s)\n" +
	"=== RUN   TestChild\n--- PASS: TestChild (1.00s)\n\x16--- FAIL: TestTwo (10.00s)\n\x16=== LEFT 12 sleep 1000\n\n\x16=== STATUS 1\n" +
	"\x16=== PACKAGE c\n\x16=== RUN   TestThree\n"

func TestWatcher(t *testing.T) {
	for _, step := range []int{1, 7, len(transcript)} {
		w := newWatcher("lab", func(string) time.Duration { return time.Hour }, func(err error) { t.Error(err) })
		defer w.stop()
		for i := 0; i < len(transcript); i += step {
			fmt.Fprint(w, transcript[i:min(i+step, len(transcript))])
		}
		want := []result{
			{pkg: "a/b", test: "TestOne", outcome: "PASS", took: 250 * time.Millisecond},
			{pkg: "a/b", test: "TestTwo", outcome: "FAIL", took: 10 * time.Second},
		}
		if diff := cmp.Diff(want, w.results, cmp.AllowUnexported(result{})); diff != "" {
			t.Error(diff)
		}
		if pkg, test := w.running(); pkg != "c" || test != "TestThree" {
			t.Errorf("%s %s runs", pkg, test)
		}
		if got := w.left["a/b"]; len(got) != 1 || got[0] != "12 sleep 1000" || w.status["a/b"] != 1 ||
			w.waited != 1500*time.Millisecond {
			t.Errorf("left %q, status %v, waited %v", got, w.status, w.waited)
		}
		if got := w.said["a/b"].String(); !strings.Contains(got, "no end of line--- PASS: TestOne") ||
			strings.Contains(got, mark) {
			t.Errorf("said %q", got)
		}
	}
}

// Each test has its own time; what writes all the while has no more of it.
func TestWatcher_Limit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got atomic.Value
		w := newWatcher("a", func(test string) time.Duration {
			return map[string]time.Duration{"": time.Second, "TestOne": 10 * time.Second, "TestTwo": 5 * time.Second}[test]
		}, func(err error) { got.Store(err) })
		defer w.stop()
		fmt.Fprint(w, "\x16=== RUN   TestOne\n")
		time.Sleep(9 * time.Second)
		fmt.Fprint(w, "\x16--- PASS: TestOne (9.00s)\n\x16=== RUN   TestTwo\n")
		for range 4 {
			time.Sleep(time.Second)
			fmt.Fprint(w, "still here\n")
		}
		synctest.Wait()
		if err := got.Load(); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if err := got.Load(); fmt.Sprint(err) != "a, TestTwo: over its limit of 5s" {
			t.Errorf("got %v", err)
		}
	})
}

// start runs the program's own process that supervises a shell script.
func start(t *testing.T, script string) (*exec.Cmd, *bufio.Reader) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], superviseVerb, t.TempDir(), "/bin/sh", "-c", script)
	cmd.Env = append(os.Environ(), asVariable+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, bufio.NewReader(out)
}

// end returns the rest of what it says and its exit status.
func end(t *testing.T, cmd *exec.Cmd, out *bufio.Reader) (said string, status int) {
	t.Helper()
	var text strings.Builder
	if _, err := out.WriteTo(&text); err != nil {
		t.Error(err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Error(err)
	}
	return text.String(), cmd.ProcessState.ExitCode()
}

func TestSupervise(t *testing.T) {
	for script, want := range map[string]struct {
		said   string
		status int
	}{
		"echo out; echo err >&2":          {"out\nerr\n", 0},
		"exit 3":                          {"", 3},
		"kill -9 $$":                      {"", 1},
		"(sleep 0.2; echo late) & exit 0": {"late\n", 0}, // it goes by itself
	} {
		cmd, out := start(t, script)
		if said, status := end(t, cmd, out); said != want.said || status != want.status {
			t.Errorf("%s: got %q, %d, want %q, %d", script, said, status, want.said, want.status)
		}
	}
}

// What a test leaves is a failure, and is ended with all below it, whatever session it is in.
func TestSupervise_Left(t *testing.T) {
	cmd, out := start(t, "setsid sh -c 'sleep 1001 & sleep 1002; :' >/dev/null 2>&1 & exit 0")
	said, status := end(t, cmd, out)
	if status != 1 || !strings.Contains(said, leftMark) || !strings.Contains(said, "sleep 1001") ||
		!strings.Contains(said, "sleep 1002") {
		t.Errorf("got %q, %d", said, status)
	}
	for line := range strings.Lines(said) {
		var pid int
		if _, err := fmt.Sscanf(line, leftMark+"%d", &pid); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d: %v", pid, err)
		}
	}
}

// Ctrl-C, which a terminal tells everybody, and the terminal's end leave the binary to whoever runs
// the supervisor.
func TestSupervise_Interrupt(t *testing.T) {
	cmd, out := start(t, "echo ready; sleep 0.3; echo whole")
	if line, err := out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP} {
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	if said, status := end(t, cmd, out); said != "whole\n" || status != 0 {
		t.Errorf("got %q, %d", said, status)
	}
}

// A test binary that is ended may say where it was.
func TestSupervise_Ended(t *testing.T) {
	cmd, out := start(t, "trap 'echo dump; exit 4' QUIT; echo ready; while :; do sleep 0.05; done")
	if line, err := out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if said, status := end(t, cmd, out); said != "dump\n" || status != 4 {
		t.Errorf("got %q, %d", said, status)
	}
}

// Of tests that an emulated host did not get to, those that failed, or ran when it ended, have had
// a try.
func TestTally(t *testing.T) {
	a, b := &pkg{path: "a"}, &pkg{path: "b"}
	const one = "\x16=== PACKAGE a TestOne\n\x16=== RUN   TestOne\n\x16--- PASS: TestOne (1.00s)\n\n\x16=== STATUS 0\n"
	const two = "\x16=== PACKAGE a TestTwo\n\x16=== RUN   TestTwo\n"
	const three = "\x16=== PACKAGE b TestThree\n\x16=== RUN   TestThree\n\x16--- SKIP: TestThree (0.00s)\n\x16=== STATUS 0\n"
	for name, tt := range map[string]struct {
		said string
		err  error
		want []int
		fail string // of the run as a whole
	}{
		"Stalled":  {one + two, errors.New("stalled"), []int{-1, 1, 0}, ""},
		"Failed":   {one + two + "\x16--- FAIL: TestTwo (1.00s)\n\x16=== STATUS 1\n" + three, nil, []int{-1, 1, -1}, ""},
		"Panicked": {two + "panic\n\x16=== STATUS 1\n" + three, nil, []int{0, 1, -1}, ""},
		"NoBoot":   {"", errors.New("no boot"), []int{0, 0, 0}, ""},
		"Left": {
			two + "\x16--- PASS: TestTwo (0.00s)\n\x16=== LEFT 7 sleep\n\x16=== STATUS 1\n", nil,
			[]int{0, 1, 0},
			`a TestTwo (lab): processes outlived it: ["7 sleep"]`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			r := &runner{out: &output{w: null}, times: newTimes()}
			w := newWatcher("lab", func(string) time.Duration { return time.Hour }, nil)
			defer w.stop()
			fmt.Fprint(w, tt.said)
			all := []*labTest{{pkg: a, name: "TestOne"}, {pkg: a, name: "TestTwo"}, {pkg: b, name: "TestThree"}}
			r.tally(all, w, tt.err)
			var got []int
			for _, l := range all {
				got = append(got, l.fails)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if fail := strings.Join(r.times.failed, "; "); fail != tt.fail {
				t.Errorf("the run fails by %q, want %q", fail, tt.fail)
			}
		})
	}
}

// Emulated hosts that share a plan take each test once.
func TestRunPlan_Shared(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "test")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho $1 $DATA; sleep 0.05\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := &runner{dir: dir}
	p := &pkg{path: "p", dir: dir}
	if err := os.MkdirAll(filepath.Join(dir, string(plain)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(script, r.binary(plain, p)); err != nil {
		t.Fatal(err)
	}
	var tests []*labTest
	for i := range 12 {
		tests = append(tests, &labTest{pkg: p, name: fmt.Sprint("Test", i)})
	}
	file, _, err := r.writePlan(tests, map[*pkg]string{p: "data"})
	if err != nil {
		t.Fatal(err)
	}
	outs := make([]bytes.Buffer, 2)
	var hosts sync.WaitGroup
	for i := range outs {
		hosts.Go(func() {
			cmd := exec.CommandContext(t.Context(), os.Args[0], inLabVerb, file)
			cmd.Env, cmd.Stdout = append(os.Environ(), asVariable+"=1"), &outs[i]
			if err := cmd.Run(); err != nil {
				t.Error(err)
			}
		})
	}
	hosts.Wait()
	all := outs[0].String() + outs[1].String()
	for _, l := range tests {
		if n := strings.Count(all, beginMark+l.key()+"\n"); n != 1 || !strings.Contains(all, "-test.run=^"+l.name+"$") {
			t.Errorf("%s was run %d times:\n%s", l.name, n, all)
		}
	}
	if n := strings.Count(all, endMark+"0"); n != len(tests) {
		t.Errorf("%d tests have ended well, of %d", n, len(tests))
	}
}
