package kernel

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strings"
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
// that modprobe reads, all of them root's and dated 1970. Links to modules are
// followed, where they do not lead out of a tree that is an os.Root's FS. The same
// tree gives the same bytes. Errors match ErrTooLarge, or are those of tree and w.
func WriteModules(w io.Writer, tree fs.FS) error {
	t := tar.NewWriter(w)
	files, left := 0, int64(maxTree)
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755})
		case !moduleFile(name) && (path.Dir(name) != "." || !strings.HasPrefix(name, "modules.")):
			return nil
		}
		fi, err := fs.Stat(tree, name)
		if err != nil && d.Type() == fs.ModeSymlink || err == nil && !fi.Mode().IsRegular() {
			return nil
		}
		if err != nil {
			return err
		}
		files, left = files+1, left-fi.Size()
		if files > maxModules || left < 0 {
			return fmt.Errorf("more than %d modules or %d bytes: %w", maxModules, int64(maxTree), ErrTooLarge)
		}
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: fi.Size()}); err != nil {
			return err
		}
		f, err := tree.Open(name)
		if err != nil {
			return err
		}
		_, err = io.Copy(t, io.LimitReader(f, fi.Size()))
		return errors.Join(err, f.Close())
	})
	if err == nil {
		err = t.Close()
	}
	if err != nil {
		return fmt.Errorf("pack modules: %w", err)
	}
	return nil
}
