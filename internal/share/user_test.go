package share_test

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// asUserDir names the directory of a test that runs again as an ordinary user.
const asUserDir = "SMARTVM_TEST_USER_DIR"

// nobody is an ordinary user.
const nobody = 65534

// asUser runs the rest of the test as an ordinary user, in a directory of its own that prepare has
// filled before: in another process, if this is root. It returns "" where there is no more to do.
func asUser(t *testing.T, prepare func(dir string)) string {
	t.Helper()
	if dir := os.Getenv(asUserDir); dir != "" {
		return dir
	}
	dir, err := os.MkdirTemp("", "user")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	prepare(dir)
	if os.Geteuid() != 0 {
		return dir
	}
	if err := os.Chown(dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	program, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/fd/3", "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1")
	cmd.ExtraFiles = []*os.File{program} // what is above it is closed to others
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	cmd.Env = append(os.Environ(), asUserDir+"="+dir, "TMPDIR="+dir, "GORACE=atexit_sleep_ms=0")
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	t.Logf("as another user:\n%s", out)
	if err != nil {
		t.Fatal(err)
	}
	return ""
}
