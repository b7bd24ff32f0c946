package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"push.rocks/smartvm/image/internal/bootfiles"
	"push.rocks/smartvm/internal/hostkernel"
	"push.rocks/smartvm/internal/initramfs"
	"push.rocks/smartvm/internal/objects"
)

// HostKernel stands for the kernel that this machine runs, and for the image that holds it.
const HostKernel = "host"

// DefaultKernel is the image whose kernel boots those without one, if there is such an image; else
// it is HostKernel's.
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

// fetchKernel stores the kernel of the newest base image under DefaultKernel, where this machine's
// own is not to be had. The caller holds the store.
func (s *Store) fetchKernel(ctx context.Context, why error) (i *Image, err error) {
	err = s.opts.Base.Kernel(ctx, func(path, _ string) error {
		i = &Image{Name: DefaultKernel, Source: ImportSource, Arch: s.opts.Arch}
		if err := s.placeAll(s.storeKernel(ctx, i, path, "")); err != nil {
			return err
		}
		if s.opts.Installed != nil {
			s.opts.Installed(filepath.Base(path)+" of Firecracker's own images",
				filepath.Join(s.opts.Dir, objectsDir, i.Kernel, kernelFile))
		}
		return s.name(ctx, i)
	})
	if err != nil {
		return nil, errors.Join(why, err)
	}
	return i, nil
}

// currentHostKernel is the host's kernel as an image, made if it, its modules or what is made of
// them have changed since old. Where its files are gone, as after an upgrade, or cannot be read,
// old serves. The caller holds the store.
func (s *Store) currentHostKernel(ctx context.Context, old *Image) (*Image, error) {
	h, err := s.host.Find()
	if err != nil && errors.Is(err, ErrNoKernel) && old != nil && old.Kernel != "" {
		s.log.Warn("this machine's kernel is not to be had; the one that was stored is taken", "running",
			h.Release, "err", err)
		return old, nil
	}
	if err != nil {
		return nil, err
	}
	now, err := h.Stamp()
	if err != nil {
		return nil, fmt.Errorf("look at this machine's kernel: %w", err)
	}
	now = fmt.Sprintf("%s made %d-%s", now, kernelFormat, initramfs.Fingerprint())
	if old != nil && old.Stamp == now {
		return old, nil
	}
	i := &Image{Name: HostKernel, Source: ImportSource, Arch: s.opts.Arch, Stamp: now}
	if err := s.placeAll(s.storeKernel(ctx, i, h.Kernel, h.Modules)); err != nil {
		return nil, err
	}
	return i, s.name(ctx, i)
}

// kernelFormat is to be raised when storeKernel makes something else of the same files.
const kernelFormat = 1

// placeAll puts drafts in their places and closes them. The caller holds the store.
func (s *Store) placeAll(parts []*objects.Draft, err error) error {
	for _, d := range parts {
		if err == nil {
			err = s.objects.Place(d)
		}
		err = errors.Join(err, d.Close())
	}
	return err
}

// storeKernel drafts the kernel at path for i, extracted, with those of its modules that a guest
// needs to find its root, and all of them as a disk that guests share. Modules is an unpacked
// /lib/modules/RELEASE, or the directory above, or "": all is built in. The caller closes the
// drafts, on error too.
func (s *Store) storeKernel(ctx context.Context, i *Image, path, modules string) (parts []*objects.Draft, err error) {
	var tree *os.Root
	k, err := s.objects.Draft(ctx, func(dir string) (*object, error) {
		o := &object{ID: kindKernel + "-", Files: []file{{Name: kernelFile}}}
		if o.Release, err = bootfiles.Kernel(ctx, filepath.Join(dir, kernelFile), path, s.opts.Arch); err != nil {
			return nil, fmt.Errorf("import kernel: %w", err)
		}
		if modules == "" {
			return o, nil
		}
		o.Modules, o.Files = true, append(o.Files, file{Name: modulesFile})
		if tree, err = hostkernel.OpenModules(modules, o.Release); err == nil {
			o.Release, err = bootfiles.Initramfs(filepath.Join(dir, modulesFile), tree, o.Release)
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
	all, err := s.objects.Draft(ctx, func(dir string) (*object, error) {
		o := &object{ID: kindModules + "-", Type: "ext4", Release: k.Release, Files: []file{{Name: modulesDisk}}}
		return o, bootfiles.Modules(ctx, filepath.Join(dir, modulesDisk), tree.FS(), func(r io.Reader) io.Reader {
			return s.objects.Watch(ctx, r, "copy the kernel's modules", 0)
		})
	})
	if err != nil {
		return parts, fmt.Errorf("import modules of %s: %w", modules, err)
	}
	i.Modules = all.ID
	return append(parts, all), nil
}
