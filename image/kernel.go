package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/initramfs"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/kernel"
)

// HostKernel stands for the kernel that this machine runs, and for the image that holds it.
const HostKernel = "host"

// hostKernel finds this machine's kernel and its modules.
func hostKernel() (image, modules string, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", "", err
	}
	release := unix.ByteSliceToString(u.Release[:])
	modules = filepath.Join("/lib/modules", release)
	if _, err := os.Stat(modules); err != nil {
		modules = ""
	}
	paths := []string{"/boot/vmlinuz-" + release, filepath.Join("/lib/modules", release, "vmlinuz"), "/boot/vmlinux-" + release}
	for _, path := range paths {
		f, err := os.Open(path)
		if err == nil {
			return path, modules, f.Close()
		}
		if !isNotExist(err) {
			return "", "", fmt.Errorf("read this machine's kernel: %w: %w", ErrNoKernel, err)
		}
	}
	return "", "", hint.Add(fmt.Errorf("find this machine's kernel: %w in %s", ErrNoKernel, strings.Join(paths, ", ")),
		"import one of a distribution: smartvm image import --kernel VMLINUZ --modules DIR kernel")
}

// DefaultKernel is the image whose kernel boots those without one, if there is such an image; else it is HostKernel's.
const DefaultKernel = "kernel"

// kernelImage returns the image that has the kernel to boot with: of a name, or the default.
func (s *Store) kernelImage(ctx context.Context, name string) (*Image, error) {
	i, err := s.Find(cmp.Or(name, DefaultKernel))
	if name == HostKernel || name == "" && errors.Is(err, ErrNotFound) {
		i, _ = s.Find(HostKernel)
		return s.currentHostKernel(ctx, i)
	}
	if err == nil && i.Kernel == "" {
		err = fmt.Errorf("image %s: %w in it", i.Name, ErrNoKernel)
	}
	return i, err
}

// currentHostKernel is the host's kernel as an image, made if it has changed since old. The caller holds the store.
func (s *Store) currentHostKernel(ctx context.Context, old *Image) (*Image, error) {
	path, modules, err := hostKernel()
	if err != nil {
		return nil, err
	}
	now, err := kept.Stamp(path)
	if real, evalErr := filepath.EvalSymlinks(path); evalErr == nil {
		now, err = kept.Stamp(real)
	}
	if err != nil {
		return nil, fmt.Errorf("look at this machine's kernel: %w", err)
	}
	if old != nil && old.Stamp == now {
		return old, nil
	}
	o, err := s.storeKernel(ctx, path, modules)
	if err != nil {
		return nil, err
	}
	i := &Image{Name: HostKernel, Source: "import", Arch: s.opts.Arch, Kernel: o.ID, Stamp: now}
	return i, s.name(ctx, i)
}

// storeKernel stores the kernel at path, extracted, and of its modules those that a guest needs to find its root.
// Modules is an unpacked /lib/modules/RELEASE, or the directory above, or "": all is built in.
func (s *Store) storeKernel(ctx context.Context, path, modules string) (*Object, error) {
	src, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("import kernel: %w", err)
	}
	defer src.Close()
	fi, err := src.Stat()
	if err != nil {
		return nil, fmt.Errorf("import kernel: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return nil, invalid("import kernel %s: no regular file", path)
	}
	return s.build(ctx, func(dir string) (*Object, error) {
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
		if o.Release == "" {
			o.Release = filepath.Base(modules)
		}
		if below := filepath.Join(modules, o.Release); isDir(below) {
			modules = below
		}
		root, err := os.OpenRoot(modules)
		if err != nil {
			return nil, fmt.Errorf("import modules: %w", err)
		}
		defer root.Close()
		o.Modules, o.Files = true, append(o.Files, File{Name: modulesFile})
		err = create(filepath.Join(dir, modulesFile), func(w io.Writer) error {
			return initramfs.Build(w, initramfs.Options{Modules: root.FS(), Release: o.Release})
		})
		if err != nil {
			return nil, fmt.Errorf("import modules of %s: %w", modules, err)
		}
		return o, nil
	})
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
