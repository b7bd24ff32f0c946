// Package hostkernel finds the files of the kernel that this machine runs, and those of a kernel's
// modules.
package hostkernel

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/imagename"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/kernel"
)

// ErrNone says that this machine's kernel is not to be had.
var ErrNone = errors.New("no kernel")

// Files are this machine's kernel and its modules.
type Files struct {
	Release string // of the kernel that runs, whose the files are
	Kernel  string // a path
	Modules string // a directory; "": there are none
}

// Machine says where to look.
type Machine struct {
	Root    string // what all paths are below; "": the file system
	Release string // of the kernel that runs; "": the kernel is asked
}

// Find returns the machine's kernel and its modules. Distributions that keep one kernel alone name
// its file after no release: such a file counts if it says that it is of the kernel that runs.
// Returns ErrNone, with the release.
func (m Machine) Find() (h Files, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return h, err
	}
	h.Release = cmp.Or(m.Release, unix.ByteSliceToString(u.Release[:]))
	modules := "/lib/modules/" + h.Release
	if fi, err := os.Stat(m.Root + modules); err == nil && fi.IsDir() {
		h.Modules = m.Root + modules
	}
	paths := []string{
		"/boot/vmlinuz-" + h.Release, modules + "/vmlinuz", "/boot/vmlinux-" + h.Release,
		"/boot/Image-" + h.Release, "/boot/kernel-" + h.Release,
	}
	var unreadable error
	for i, path := range append(paths, m.nameless()...) {
		path = m.Root + path
		f, err := os.Open(path)
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			if unreadable == nil && !errors.Is(err, fs.ErrNotExist) {
				unreadable = err
			}
			continue
		}
		if info, err := kernel.Check(path); i < len(paths) || err == nil && info.Release == h.Release {
			h.Kernel = path
			return h, nil
		}
	}
	if unreadable != nil {
		err := fmt.Errorf("read this machine's kernel: %w: %w", ErrNone, unreadable)
		if denied, ok := errors.AsType[*fs.PathError](unreadable); ok && errors.Is(denied, fs.ErrPermission) {
			err = hint.Add(err,
				"import a copy that you may read: sudo cat %s >vmlinuz; smartvm image import --kernel vmlinuz --modules %s kernel",
				denied.Path, m.Root+modules)
		}
		return h, err
	}
	return h, hint.Add(fmt.Errorf("find this machine's kernel: %w in %s", ErrNone, strings.Join(paths, ", ")),
		"import one of a distribution: smartvm image import --kernel VMLINUZ --modules DIR kernel")
}

// nameless are files of kernels that may be of any release: /boot/vmlinuz-linux, -lts, -virt and
// the like.
func (m Machine) nameless() (paths []string) {
	for _, pattern := range []string{"/boot/vmlinuz*", "/boot/EFI/Linux/*.efi", "/efi/EFI/Linux/*.efi"} {
		found, _ := filepath.Glob(m.Root + pattern)
		for _, path := range found {
			paths = append(paths, strings.TrimPrefix(path, m.Root))
		}
	}
	return append(paths, "/run/booted-system/kernel")
}

// Stamp changes with the files.
func (h Files) Stamp() (string, error) {
	path, err := filepath.EvalSymlinks(h.Kernel)
	if err != nil {
		return "", err
	}
	stamp, err := kept.Stamp(path)
	if err != nil {
		return "", err
	}
	modules := "none"
	for _, list := range []string{"modules.dep", "modules.order"} {
		if modules, err = kept.Stamp(filepath.Join(h.Modules, list)); h.Modules != "" && err == nil {
			break
		}
		modules = "none"
	}
	return fmt.Sprintf("%s modules %s", stamp, modules), nil
}

// OpenModules opens an unpacked /lib/modules/RELEASE: dir, or the directory in it that is meant.
func OpenModules(dir, release string) (*os.Root, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	if kernel.IsModuleTree(root.FS()) {
		return root, nil
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, e := range entries {
		below, err := fs.Sub(root.FS(), e.Name())
		if err == nil && kernel.IsModuleTree(below) {
			found = append(found, e.Name())
		}
	}
	switch {
	case slices.Contains(found, release):
		return root.OpenRoot(release)
	case len(found) == 1:
		return root.OpenRoot(found[0])
	case len(found) == 0:
		return nil, imagename.Invalid(
			"neither it nor a directory in it has a kernel's modules: no modules.dep, modules.order or modules.builtin")
	}
	return nil, hint.Add(
		imagename.Invalid("there are those of %s, and which of them are the kernel's is not known",
			strings.Join(found, ", ")),
		"name one: --modules %s", filepath.Join(dir, found[0]))
}
