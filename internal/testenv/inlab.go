package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/internal/lab"
)

// RunInLab runs the calling package's tests that match pattern, as for go
// test's -run, in one boot of the lab, and fails when they do. Where they run
// without the lab, it does nothing: they are part of the same go test then.
//
// A test that fails there is run again, in a new lab, at most labTries times in all. The emulator is not faultless: of a
// hundred guests one or two stop, or die of registers that nobody wrote, before their first program runs, and now and
// then the lab itself stops. What is wrong with us fails each time.
//
// Only one lab runs at a time: two emulated hosts at once would take more than twice as long.
//
// Those tests call Require(t, LinuxGuest). The test binary is compiled anew,
// without the race detector, which emulation would slow down too much. In the
// lab, SMARTVM_REQUIRE is "kvm,root,linux".
func RunInLab(t *testing.T, pattern string) {
	t.Helper()
	if InLab() {
		t.Skip("this is the lab")
	}
	if probe(LinuxGuest) == nil {
		t.Log("Linux guests boot without the lab")
		return
	}
	c := LabConfig(t)
	one, err := lockDir(filepath.Dir(c.Kernel))
	if err != nil {
		t.Fatalf("wait for other packages' labs: %v", err)
	}
	defer one.Close()
	binary := PlainBinary(t)
	c.Env = labEnvironment(os.Environ())
	left := listTests(t, binary, pattern)
	for try := 1; ; try++ {
		c.Command = []string{binary, "-test.run=^(" + strings.Join(left, "|") + ")$", "-test.v", "-test.count=1"}
		if deadline, ok := t.Deadline(); ok {
			c.Command = append(c.Command, fmt.Sprintf("-test.timeout=%v", time.Until(deadline).Round(time.Second)))
		}
		status, out, err := runWatched(t, c)
		if err != nil && !errors.Is(err, errSilent) && !errors.Is(err, lab.ErrDied) {
			t.Fatalf("run tests in the lab: %v", err)
		}
		left = slices.DeleteFunc(left, func(name string) bool {
			return strings.Contains(out, "--- PASS: "+name+" (") || strings.Contains(out, "--- SKIP: "+name+" (")
		})
		if status == 0 && err == nil && len(left) == 0 {
			return
		}
		if try == labTries || len(left) == 0 {
			t.Fatalf("tests %q in the lab, tried %d times: exit status %d, %v", left, try, status, err)
		}
		t.Logf("once more in a new lab, as what it emulates may have failed: %q; exit status %d, %v", left, status, err)
	}
}

// listTests are the names of a test binary's tests that match pattern.
func listTests(t *testing.T, binary, pattern string) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), binary, "-test.list="+pattern).Output()
	names := strings.Fields(string(out))
	if err != nil || len(names) == 0 {
		t.Fatalf("list tests %s: %v, %q", pattern, err, names)
	}
	return names
}

const (
	// labSilence is longer than any test in the lab says nothing.
	labSilence = 4 * time.Minute
	labTries   = 8
)

var errSilent = fmt.Errorf("the lab has said nothing for %v", labSilence)

// runWatched runs the lab until it is silent for too long, and returns what it said.
func runWatched(t *testing.T, c lab.Config) (status int, out string, err error) {
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	silence := time.AfterFunc(labSilence, func() { cancel(errSilent) })
	defer silence.Stop()
	w := &heard{w: t.Output(), silence: silence}
	c.Stdout, c.Stderr = w, w
	status, err = lab.Run(ctx, c)
	return status, w.said.String(), err
}

// heard passes on what the lab says and puts its watchdog off. Its writes come one at a time.
type heard struct {
	w       io.Writer
	said    bytes.Buffer
	silence *time.Timer
}

func (h *heard) Write(p []byte) (int, error) {
	h.silence.Reset(labSilence)
	h.said.Write(p)
	return h.w.Write(p)
}

// PlainBinary compiles the calling package's tests without the race detector, for children of a test that are
// many or slow. It is gone when the test ends.
func PlainBinary(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "plain.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("compile the tests: %v\n%s", err, out)
	}
	return binary
}

// labEnvironment returns the variables that tests in the lab are to see.
func labEnvironment(all []string) []string {
	env := []string{RequireVariable + "=kvm,root,linux"}
	for _, e := range all {
		switch name, _, _ := strings.Cut(e, "="); name {
		case RequireVariable:
		case "PATH", "HOME", "LANG", "TERM", "TMPDIR", "XDG_CACHE_HOME":
			env = append(env, e)
		default:
			if strings.HasPrefix(name, "SMARTVM_") {
				env = append(env, e)
			}
		}
	}
	return env
}
