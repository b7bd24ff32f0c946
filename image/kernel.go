package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/initramfs"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/kernel"
)

// HostKernel stands for the kernel that this machine runs, and for the image that holds it.
const HostKernel = "host"

// hostFiles are this machine's kernel and its modules.
type hostFiles struct {
	release string // of the kernel that runs, whose the files are
	kernel  string // a path
	modules string // a directory; "": there are none
}

// hostKernel finds this machine's kernel and its modules. Distributions that keep one kernel alone name its file after no
// release: such a file counts if it says that it is of the kernel that runs. Returns ErrNoKernel, with the release.
func (s *Store) hostKernel() (h hostFiles, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return h, err
	}
	h.release = cmp.Or(s.hostRelease, unix.ByteSliceToString(u.Release[:]))
	modules := "/lib/modules/" + h.release
	if isDir(s.hostRoot + modules) {
		h.modules = s.hostRoot + modules
	}
	paths := []string{"/boot/vmlinuz-" + h.release, modules + "/vmlinuz", "/boot/vmlinux-" + h.release, "/boot/Image-" + h.release, "/boot/kernel-" + h.release}
	var unreadable error
	for i, path := range append(paths, s.nameless()...) {
		path = s.hostRoot + path
		f, err := os.Open(path)
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			if unreadable == nil && !isNotExist(err) {
				unreadable = err
			}
			continue
		}
		if info, err := kernel.Check(path); i < len(paths) || err == nil && info.Release == h.release {
			h.kernel = path
			return h, nil
		}
	}
	if unreadable != nil {
		err := fmt.Errorf("read this machine's kernel: %w: %w", ErrNoKernel, unreadable)
		if denied, ok := errors.AsType[*fs.PathError](unreadable); ok && errors.Is(denied, fs.ErrPermission) {
			err = hint.Add(err, "import a copy that you may read: sudo cat %s >vmlinuz; smartvm image import --kernel vmlinuz --modules %s kernel",
				denied.Path, s.hostRoot+modules)
		}
		return h, err
	}
	return h, hint.Add(fmt.Errorf("find this machine's kernel: %w in %s", ErrNoKernel, strings.Join(paths, ", ")),
		"import one of a distribution: smartvm image import --kernel VMLINUZ --modules DIR kernel")
}

// nameless are files of kernels that may be of any release: /boot/vmlinuz-linux, -lts, -virt and the like.
func (s *Store) nameless() (paths []string) {
	for _, pattern := range []string{"/boot/vmlinuz*", "/boot/EFI/Linux/*.efi", "/efi/EFI/Linux/*.efi"} {
		found, _ := filepath.Glob(s.hostRoot + pattern)
		for _, path := range found {
			paths = append(paths, strings.TrimPrefix(path, s.hostRoot))
		}
	}
	return append(paths, "/run/booted-system/kernel")
}

// DefaultKernel is the image whose kernel boots those without one, if there is such an image; else it is HostKernel's.
const DefaultKernel = "kernel"

// kernelImage returns the image that has the kernel to boot with: of a name, or the default.
func (s *Store) kernelImage(ctx context.Context, name string) (*Image, error) {
	i, err := s.Find(cmp.Or(name, DefaultKernel))
	if name == HostKernel || name == "" && errors.Is(err, ErrNotFound) {
		i, _ = s.Find(HostKernel)
		i, err = s.currentHostKernel(ctx, i)
		if errors.Is(err, ErrNoKernel) && name == "" && s.opts.FetchKernel && s.opts.Base != nil {
			return s.fetchKernel(ctx, err)
		}
		return i, err
	}
	if err == nil && i.Kernel == "" {
		err = fmt.Errorf("image %s: %w in it", i.Name, ErrNoKernel)
	}
	return i, err
}

// fetchKernel stores the kernel of the newest base image under DefaultKernel, where this machine's own is not to be had. The caller holds the store.
func (s *Store) fetchKernel(ctx context.Context, why error) (i *Image, err error) {
	err = s.opts.Base.Kernel(ctx, func(path, _ string) error {
		i = &Image{Name: DefaultKernel, Source: importSource, Arch: s.opts.Arch}
		if err := s.placeAll(s.storeKernel(ctx, i, path, "")); err != nil {
			return err
		}
		if s.opts.Installed != nil {
			s.opts.Installed(filepath.Base(path)+" of Firecracker's own images", filepath.Join(s.opts.Dir, objectsDir, i.Kernel, kernelFile))
		}
		return s.name(ctx, i)
	})
	if err != nil {
		return nil, errors.Join(why, err)
	}
	return i, nil
}

// currentHostKernel is the host's kernel as an image, made if it, its modules or what is made of them have changed since
// old. Where its files are gone, as after an upgrade, or cannot be read, old serves. The caller holds the store.
func (s *Store) currentHostKernel(ctx context.Context, old *Image) (*Image, error) {
	h, err := s.hostKernel()
	if err != nil && errors.Is(err, ErrNoKernel) && old != nil && old.Kernel != "" {
		s.log.Warn("this machine's kernel is not to be had; the one that was stored is taken", "running", h.release, "err", err)
		return old, nil
	}
	if err != nil {
		return nil, err
	}
	now, err := h.stamp()
	if err != nil {
		return nil, fmt.Errorf("look at this machine's kernel: %w", err)
	}
	if old != nil && old.Stamp == now {
		return old, nil
	}
	i := &Image{Name: HostKernel, Source: importSource, Arch: s.opts.Arch, Stamp: now}
	if err := s.placeAll(s.storeKernel(ctx, i, h.kernel, h.modules)); err != nil {
		return nil, err
	}
	return i, s.name(ctx, i)
}

// kernelFormat is to be raised when storeKernel makes something else of the same files.
const kernelFormat = 1

// stamp changes with the files, and with what this smartvm makes of them.
func (h hostFiles) stamp() (string, error) {
	path, err := filepath.EvalSymlinks(h.kernel)
	if err != nil {
		return "", err
	}
	stamp, err := kept.Stamp(path)
	if err != nil {
		return "", err
	}
	modules := "none"
	for _, list := range []string{"modules.dep", "modules.order"} {
		if modules, err = kept.Stamp(filepath.Join(h.modules, list)); h.modules != "" && err == nil {
			break
		}
		modules = "none"
	}
	return fmt.Sprintf("%s modules %s made %d-%s", stamp, modules, kernelFormat, initramfs.Fingerprint()), nil
}

// placeAll puts drafts in their places and closes them. The caller holds the store.
func (s *Store) placeAll(parts []*draft, err error) error {
	for _, d := range parts {
		if err == nil {
			err = s.objects.Place(d)
		}
		err = errors.Join(err, d.Close())
	}
	return err
}

// storeKernel drafts the kernel at path for i, extracted, with those of its modules that a guest needs to find its root, and
// all of them as a disk that guests share. Modules is an unpacked /lib/modules/RELEASE, or the directory above, or "": all
// is built in. The caller closes the drafts, on error too.
func (s *Store) storeKernel(ctx context.Context, i *Image, path, modules string) (parts []*draft, err error) {
	src, err := os.Open(path)
	if err != nil {
		return parts, fmt.Errorf("import kernel: %w", err)
	}
	defer src.Close()
	fi, err := src.Stat()
	if err != nil {
		return parts, fmt.Errorf("import kernel: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return nil, invalid("import kernel %s: no regular file", path)
	}
	var tree *os.Root
	k, err := s.draft(ctx, func(dir string) (*Object, error) {
		o := &Object{ID: kindKernel + "-", Files: []File{{Name: kernelFile}}}
		err := create(filepath.Join(dir, kernelFile), func(w io.Writer) error {
			info, err := kernel.Extract(ctx, w, src, fi.Size())
			if err == nil && info.Arch != s.opts.Arch {
				err = fmt.Errorf("it is for %s, not %s: %w", info.Arch, s.opts.Arch, kernel.ErrFormat)
			}
			o.Release = info.Release
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("import kernel %s: %w", path, err)
		}
		if modules == "" {
			return o, nil
		}
		if tree, err = openModules(modules, o.Release); err == nil {
			err = addModules(dir, o, tree)
		}
		if err != nil {
			return nil, fmt.Errorf("import modules of %s: %w", modules, err)
		}
		return o, nil
	})
	if tree != nil {
		defer tree.Close()
	}
	if err != nil {
		return nil, err
	}
	parts = append(parts, k)
	if i.Kernel = k.ID; tree == nil {
		return parts, nil
	}
	all, err := s.draft(ctx, func(dir string) (*Object, error) {
		o := &Object{ID: kindModules + "-", Type: "ext4", Release: k.Release, Files: []File{{Name: modulesDisk}}}
		return o, create(filepath.Join(dir, modulesDisk), func(w io.Writer) error { return s.modulesToExt4(ctx, tree.FS(), w.(*os.File)) })
	})
	if err != nil {
		return parts, fmt.Errorf("import modules of %s: %w", modules, err)
	}
	i.Modules = all.ID
	return append(parts, all), nil
}

// addModules puts into o's directory those modules of o's kernel that a guest needs to find its root.
func addModules(dir string, o *Object, root *os.Root) error {
	release, err := kernel.ModulesRelease(root.FS())
	if err != nil {
		return err
	}
	if o.Release == "" {
		o.Release = cmp.Or(release, filepath.Base(root.Name()))
	}
	if release != "" && release != o.Release {
		return invalid("they are for the kernel %s, and the kernel is %s", release, o.Release)
	}
	o.Modules, o.Files = true, append(o.Files, File{Name: modulesFile})
	return create(filepath.Join(dir, modulesFile), func(w io.Writer) error {
		return initramfs.Build(w, initramfs.Options{Modules: root.FS(), Release: o.Release})
	})
}

// openModules opens an unpacked /lib/modules/RELEASE: dir, or the directory in it that is meant.
func openModules(dir, release string) (*os.Root, error) {
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
		return nil, invalid("neither it nor a directory in it has a kernel's modules: no modules.dep, modules.order or modules.builtin")
	}
	return nil, hint.Add(invalid("there are those of %s, and which of them are the kernel's is not known", strings.Join(found, ", ")),
		"name one: --modules %s", filepath.Join(dir, found[0]))
}

// modulesToExt4 makes a disk of a kernel's modules.
func (s *Store) modulesToExt4(ctx context.Context, tree fs.FS, dst *os.File) error {
	r, w := io.Pipe()
	packed := make(chan struct{})
	go func() {
		defer close(packed)
		w.CloseWithError(kernel.WriteModules(w, tree))
	}()
	err := flatten.TarToExt4(ctx, s.watch(ctx, r, "copy the kernel's modules", 0), dst)
	r.CloseWithError(err)
	<-packed
	return err
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

// create makes a file that was not there.
func create(path string, write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}
