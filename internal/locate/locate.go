// Package locate finds the VMM and its jailer.
package locate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/spec"
)

// VMM is a Firecracker.
type VMM struct {
	Path    string // absolute, no symbolic links: the jailer names the jail after it
	Version firecracker.Version
	id      string // inode, size and time: what the version was asked of
	format  string // of snapshots; empty until it was asked for
}

// Finder finds VMMs and asks each for its version and snapshot format once. It is safe for
// concurrent use.
type Finder struct {
	Binary  string // of that path or name in PATH; if empty:
	Version string // of this version among those installed; if empty, "firecracker" in PATH or else the newest installed
	// Installed returns the path of an installed version, of the newest for "", or an error that is
	// fs.ErrNotExist. It may install one.
	Installed func(ctx context.Context, version string) (string, error)

	mu    sync.Mutex
	known map[string]VMM // by path
}

// VMM finds a Firecracker and its version. One that is too old is spec.ErrNotSupported.
func (f *Finder) VMM(ctx context.Context) (VMM, error) {
	path, err := f.Find(ctx)
	if err != nil {
		return VMM{}, err
	}
	return f.At(ctx, path)
}

// At returns the Firecracker at a path, as VMM does.
func (f *Finder) At(ctx context.Context, path string) (b VMM, err error) {
	if path, err = program(path); err != nil {
		return VMM{}, err
	}
	b = VMM{Path: path, id: fileID(path)}
	f.mu.Lock()
	known, ok := f.known[path]
	f.mu.Unlock()
	if ok && known.id == b.id {
		return known, nil
	}
	if b.Version, err = vmm.Version(ctx, path); err != nil {
		return VMM{}, hint.Add(err, "is it Firecracker? "+advice, firecracker.MinVersion)
	}
	if !b.Version.AtLeast(firecracker.MinVersion) {
		return VMM{},
			hint.Add(fmt.Errorf("%s is Firecracker %s: %w", path, b.Version, spec.ErrNotSupported), advice,
				firecracker.MinVersion)
	}
	f.remember(b)
	return b, nil
}

func (f *Finder) remember(b VMM) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.known == nil {
		f.known = map[string]VMM{}
	}
	f.known[b.Path] = b
}

// SnapshotFormat returns the format in which a VMM that was found writes a VM's state: "6.0.0".
func (f *Finder) SnapshotFormat(ctx context.Context, b VMM) (format string, err error) {
	if b.format == "" {
		if b.format, err = vmm.SnapshotFormat(ctx, b.Path); err == nil {
			f.remember(b)
		}
	}
	return b.format, err
}

const advice = "install Firecracker %v or newer (smartvm firecracker install), or name it with --firecracker"

// Find finds a Firecracker, without a look at its version.
func (f *Finder) Find(ctx context.Context) (path string, err error) {
	if path, err = f.find(ctx); err != nil {
		return "", hint.Add(fmt.Errorf("find Firecracker: %w", err), advice, firecracker.MinVersion)
	}
	return path, nil
}

func (f *Finder) find(ctx context.Context) (string, error) {
	if f.Binary != "" {
		return program(f.Binary)
	}
	var notInPath error
	if f.Version == "" {
		path, err := program("firecracker")
		if err == nil {
			return path, nil
		}
		notInPath = err
	}
	path, err := f.Installed(ctx, f.Version)
	if errors.Is(err, fs.ErrNotExist) {
		return "", cmp.Or(notInPath, err)
	}
	if err != nil {
		return "", errors.Join(notInPath, err)
	}
	return program(path)
}

// Jailer finds the jailer of a VMM: of a path or name, if that is not empty, else beside the VMM,
// else in PATH.
func Jailer(b VMM, name string) (string, error) {
	if os.Geteuid() != 0 {
		return "", hint.Add(fmt.Errorf("jail VMM: %w", fs.ErrPermission), "the jailer needs root; --launcher direct does not")
	}
	if !strings.Contains(filepath.Base(b.Path), "firecracker") {
		return "", hint.Add(fmt.Errorf("jail VMM: the jailer takes no file named %q", filepath.Base(b.Path)),
			"its name must contain \"firecracker\"")
	}
	if name == "" {
		name = filepath.Join(filepath.Dir(b.Path), "jailer")
		if _, err := os.Stat(name); err != nil {
			name = "jailer"
		}
	}
	path, err := program(name)
	if err != nil {
		return "", hint.Add(fmt.Errorf("find jailer: %w", err),
			"it comes with Firecracker; name it with --jailer, or do without: --launcher direct")
	}
	return path, nil
}

// program returns the program that name leads to, free of symbolic links.
func program(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", err
	}
	if path, err = filepath.Abs(path); err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(path)
}

// fileID changes when the file at path does.
func fileID(path string) string {
	fi, err := os.Stat(path)
	if err != nil {
		return ""
	}
	return fmt.Sprint(fi.Sys().(*syscall.Stat_t).Ino, fi.Size(), fi.ModTime().UnixNano())
}
