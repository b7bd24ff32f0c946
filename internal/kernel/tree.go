package kernel

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"push.rocks/smartvm/internal/depmod"
)

const (
	maxTree  = 8 << 30 // bytes of all modules of a kernel
	maxAsked = 16      // modules that are asked for the release
)

// IsModuleTree says whether tree is an unpacked /lib/modules/<release>.
func IsModuleTree(tree fs.FS) bool {
	for _, name := range []string{"modules.dep", "modules.order", "modules.builtin"} {
		if fi, err := fs.Stat(tree, name); err == nil && fi.Mode().IsRegular() {
			return true
		}
	}
	return false
}

// ModulesRelease returns the release of the kernel that the modules in tree, an
// unpacked /lib/modules/<release>, were built for, or "" if none says so. Those
// that the kernel came with count first: some distributions keep others of older
// releases beside them.
func ModulesRelease(tree fs.FS) (string, error) {
	for _, dir := range []string{"kernel", "."} {
		release, asked := "", 0
		err := fs.WalkDir(tree, dir, func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !moduleFile(name) {
				return err
			}
			if release = builtFor(tree, name); release != "" || asked == maxAsked {
				return fs.SkipAll
			}
			asked++
			return nil
		})
		if release != "" {
			return release, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", fmt.Errorf("look for modules: %w", err)
		}
	}
	return "", nil
}

// builtFor returns the release that a module names, or "" if it cannot be read.
func builtFor(tree fs.FS, name string) string {
	data, err := readFile(tree, name, maxModule)
	if err == nil {
		data, err = unpackModule(name, data)
	}
	if err != nil {
		return ""
	}
	fields, err := modinfo(data)
	if err != nil {
		return ""
	}
	for _, field := range fields {
		if magic, ok := strings.CutPrefix(field, "vermagic="); ok {
			release, _, _ := strings.Cut(magic, " ")
			if validRelease(release) {
				return release
			}
		}
	}
	return ""
}

// WriteModules writes what a guest needs of tree, an unpacked
// /lib/modules/<release>, as a tar: modules, as they are packed, and the lists
// that modprobe reads, all of them root's and dated 1970. Where depmod has not been
// run, as in a package just unpacked, its lists are made. Links to modules are
// followed, where they do not lead out of a tree that is an os.Root's FS. The same
// tree gives the same bytes. Errors match ErrTooLarge or ErrCorrupt, or are those
// of tree and w.
func WriteModules(w io.Writer, tree fs.FS) error {
	t := treeWriter{tree: tree, w: tar.NewWriter(w), left: maxTree}
	_, err := fs.Stat(tree, "modules.dep.bin")
	t.bare = errors.Is(err, fs.ErrNotExist)
	err = fs.WalkDir(tree, ".", t.add)
	if err == nil && t.bare {
		err = t.addLists()
	}
	if err == nil {
		err = t.w.Close()
	}
	if err != nil {
		return fmt.Errorf("pack modules: %w", err)
	}
	return nil
}

type treeWriter struct {
	tree    fs.FS
	w       *tar.Writer
	bare    bool     // depmod has not been run
	modules []string // files
	files   int
	left    int64 // bytes that may still come
}

func (t *treeWriter) add(name string, d fs.DirEntry, err error) error {
	isModule := moduleFile(name)
	switch {
	case err != nil:
		return err
	case d.IsDir():
		return t.w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755})
	case !isModule && (path.Dir(name) != "." || !strings.HasPrefix(name, "modules.")) || t.bare && depmod.Makes(name):
		return nil
	}
	fi, err := fs.Stat(t.tree, name)
	if err != nil && d.Type() == fs.ModeSymlink || err == nil && !fi.Mode().IsRegular() {
		return nil
	}
	if err != nil {
		return err
	}
	t.files, t.left = t.files+1, t.left-fi.Size()
	if t.files > maxModules || t.left < 0 {
		return fmt.Errorf("more than %d modules or %d bytes: %w", maxModules, int64(maxTree), ErrTooLarge)
	}
	if isModule {
		t.modules = append(t.modules, name)
	}
	f, err := t.tree.Open(name)
	if err != nil {
		return err
	}
	err = t.put(name, io.LimitReader(f, fi.Size()), fi.Size())
	return errors.Join(err, f.Close())
}

func (t *treeWriter) put(name string, r io.Reader, size int64) error {
	err := t.w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size})
	if err == nil {
		_, err = io.Copy(t.w, r)
	}
	return err
}

// addLists adds what depmod would have made.
func (t *treeWriter) addLists() error {
	all, err := makeLists(t.tree, t.modules)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if err := t.put(name, bytes.NewReader(all[name]), int64(len(all[name]))); err != nil {
			return err
		}
	}
	return nil
}
