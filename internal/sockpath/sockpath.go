// Package sockpath names Unix sockets by paths that fit into their addresses.
package sockpath

import (
	"fmt"
	"os"
	"path/filepath"
)

// maxPath is what fits into a socket's address, in bytes.
const maxPath = 107

// At returns a path of the socket dir/name, however long that is, which serves until done.
func At(dir, name string) (path string, done func(), err error) {
	path, done = filepath.Join(dir, name), func() {}
	if len(path) <= maxPath {
		return path, done, nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name), func() { _ = d.Close() }, nil
}
