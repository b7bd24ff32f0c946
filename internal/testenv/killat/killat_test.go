package killat_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/internal/testenv/killat"
)

const childVariable = "SMARTVM_TEST_KILLAT"

func TestMain(m *testing.M) {
	dir := os.Getenv(childVariable)
	if dir == "" {
		os.Exit(m.Run())
	}
	// Four changes: a file made, its mode, a name, a directory.
	path := filepath.Join(dir, "a")
	err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o400), os.Rename(path, path+"b"),
		os.Mkdir(filepath.Join(dir, "c"), 0o700))
	if err != nil {
		os.Exit(7)
	}
	os.Exit(0)
}

func child(dir string) *exec.Cmd {
	cmd := exec.Command(os.Args[0]) //nolint:noctx // killed or ended when it has been run
	cmd.Env = append(os.Environ(), childVariable+"="+dir, "GORACE=atexit_sleep_ms=0")
	return cmd
}

// The program is killed before its n-th change, not after it.
func TestRun(t *testing.T) {
	for n, want := range []string{"ab c", "", "a", "a", "ab", "ab c"} {
		dir := t.TempDir()
		ended, err := killat.Run(child(dir), n)
		if err != nil || ended != (n == 0 || n > 4) {
			t.Fatalf("%d: ended %v, %v", n, ended, err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range entries {
			got = append(got, e.Name())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%d: there are %q, want %q", n, got, want)
		}
	}
	if ended, err := killat.Run(child(filepath.Join(t.TempDir(), "none")), 9); !ended || err == nil {
		t.Errorf("one that fails: ended %v, %v", ended, err)
	}
}
