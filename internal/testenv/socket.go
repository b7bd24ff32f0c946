package testenv

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// maxSocketPath is what fits into a socket's address.
const maxSocketPath = 107

// Socket returns an address of the Unix socket at path, whose directory exists. A path that is too
// long for one is reached through a descriptor of that directory, until the test ends: TMPDIR may
// be long, and a test's name is in the path too.
func Socket(t testing.TB, path string) string {
	t.Helper()
	if len(path) <= maxSocketPath {
		return path
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	return fmt.Sprintf("/proc/%d/fd/%d/%s", os.Getpid(), dir.Fd(), filepath.Base(path))
}
