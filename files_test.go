package smartvm_test

import (
	"errors"
	"io/fs"
	"os"
	"testing"
)

// writeAs makes a file of that mode, whatever the umask is.
func writeAs(path string, data []byte, mode fs.FileMode) error {
	return errors.Join(os.WriteFile(path, data, 0o600), os.Chmod(path, mode))
}

// shortDir is a directory in memory, where the path of a socket fits into an address, whatever
// TMPDIR is.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "smartvm-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
