package testenv

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// Variables by which the program that runs the tests (internal/tools/testrun) tells them things.
const (
	// DataVariable names a directory of the package's own. TestPrepareLab makes in it, on this
	// machine, what the package's tests of real Linux guests need in the lab, where making it takes
	// long.
	DataVariable = "SMARTVM_TEST_DATA"
	// PaceVariable is how many times slower than a quiet machine this one is.
	PaceVariable = "SMARTVM_TEST_PACE"
	// PlainVariable names the package's tests, compiled without the race detector.
	PlainVariable = "SMARTVM_TEST_PLAIN"
)

// Patience returns how long to wait here for what takes so long at most on a quiet machine.
func Patience(d time.Duration) time.Duration {
	pace, err := strconv.ParseFloat(os.Getenv(PaceVariable), 64)
	if err != nil {
		pace = defaultPace
	}
	return time.Duration(float64(d) * pace)
}

// defaultPace is for tests that somebody runs by hand.
const defaultPace = 2

// PlainBinary returns the calling package's tests, compiled without the race detector, for children
// of a test that are many or slow. It is gone when the test ends.
func PlainBinary(t *testing.T) string {
	t.Helper()
	if binary := os.Getenv(PlainVariable); binary != "" {
		return binary
	}
	binary := filepath.Join(t.TempDir(), "plain.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("compile the tests: %v\n%s", err, out)
	}
	return binary
}
