package testenv

import (
	"bytes"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Apart runs the calling test in a mount namespace of its own, where it may mount what it likes,
// and says whether it is there. It needs root.
func Apart(t *testing.T) bool {
	t.Helper()
	const variable = "SMARTVM_TEST_APART"
	if os.Getenv(variable) != "" {
		return true
	}
	Require(t, Root)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	// The race detector sleeps for a second at the end, unless told not to.
	cmd.Env = append(os.Environ(), variable+"=1", "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Errorf("in a namespace of its own: %v\n%s", err, out)
	}
	return false
}
