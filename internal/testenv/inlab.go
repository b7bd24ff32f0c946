package testenv

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/internal/lab"
)

// RunInLab runs the calling package's tests that match pattern, as for go
// test's -run, in one boot of the lab, and fails when they do. Where they run
// without the lab, it does nothing: they are part of the same go test then.
//
// Only one lab runs at a time, and no test meanwhile that calls NoLeaks.
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
	Turn(t) // two emulated hosts at once would take more than twice as long
	c := LabConfig(t)
	binary := PlainBinary(t)
	c.Command = []string{binary, "-test.run=" + pattern, "-test.v", "-test.count=1"}
	if deadline, ok := t.Deadline(); ok {
		c.Command = append(c.Command, fmt.Sprintf("-test.timeout=%v", time.Until(deadline).Round(time.Second)))
	}
	c.Env = labEnvironment(os.Environ())
	var out bytes.Buffer
	c.Stdout = io.MultiWriter(t.Output(), &out)
	c.Stderr = c.Stdout
	status, err := lab.Run(t.Context(), c)
	if err != nil {
		t.Fatalf("run tests in the lab: %v", err)
	}
	if status != 0 || !strings.Contains(out.String(), "--- PASS: ") {
		t.Errorf("tests %s in the lab: exit status %d", pattern, status)
	}
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
