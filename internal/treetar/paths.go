package treetar

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Contents says whether a source means what is in the directory, not itself: "." and what ends in
// "/.".
func Contents(name string) bool { return name == "." || strings.HasSuffix(name, "/.") }

// Source finds what is to be packed. A link is followed if follow says so, or if the name ends in
// "/" or "/.", as everywhere: then it must be a directory.
func Source(name string, follow bool) (string, error) {
	if !Contents(name) && !strings.HasSuffix(name, "/") {
		_, err := os.Lstat(name)
		if err == nil && follow {
			return filepath.EvalSymlinks(name)
		}
		return filepath.Clean(name), err
	}
	real, err := filepath.EvalSymlinks(name)
	if err != nil {
		return "", err
	}
	if fi, err := os.Stat(real); err != nil {
		return "", err
	} else if !fi.IsDir() {
		return "", fmt.Errorf("%s: not a directory", name)
	}
	return real, nil
}

// Target finds where a copy goes: into dir, under its own name if top is "", else called top. A
// link at the end of the name is followed, as by cp. What is there must be a file or a directory.
func Target(name string) (dir, top string, err error) {
	fi, err := os.Stat(name)
	switch {
	case err == nil && fi.IsDir():
		return name, "", nil
	case err == nil && strings.HasSuffix(name, "/"):
		return "", "", fmt.Errorf("%s: not a directory", name)
	case err == nil && !fi.Mode().IsRegular():
		return "", "", fmt.Errorf("%s is neither a file nor a directory, and is not replaced", name)
	case err == nil:
		real, err := filepath.EvalSymlinks(name)
		return filepath.Dir(real), filepath.Base(real), err
	case !errors.Is(err, fs.ErrNotExist):
		return "", "", err
	case strings.HasSuffix(name, "/"):
		return "", "", fmt.Errorf("%s: no such directory", name)
	}
	if _, err := os.Lstat(name); err == nil {
		return "", "", fmt.Errorf("%s is a symbolic link that leads nowhere", name)
	}
	return filepath.Dir(name), filepath.Base(name), nil
}

// LeftOut collects what was not copied.
type LeftOut struct {
	all []error
	n   int
}

const maxLeft = 10 // that are named

// Add is for Left of PackOptions and Options.
func (l *LeftOut) Add(name string, why error) {
	if l.n++; l.n <= maxLeft {
		l.all = append(l.all, fmt.Errorf("left out %q: %w", name, why))
	}
}

// Err is nil if nothing was left out.
func (l *LeftOut) Err() error {
	if more := l.n - len(l.all); more > 0 {
		return errors.Join(append(l.all, fmt.Errorf("left out %d more", more))...)
	}
	return errors.Join(l.all...)
}
