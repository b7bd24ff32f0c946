package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"

	"push.rocks/smartvm/image/internal/bootfiles"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/imagename"
	"push.rocks/smartvm/internal/objects"
	"push.rocks/smartvm/internal/stage"
)

// ImportOptions say what an image is made of. Name and one of Kernel and Rootfs are required.
type ImportOptions struct {
	Name string
	// Kernel is the path of a vmlinux or bzImage, or HostKernel. An image with a kernel and nothing
	// else lends it to others.
	Kernel string
	// Modules is the kernel's unpacked /lib/modules/RELEASE, or the directory above. Empty: what a
	// guest needs is built in; for HostKernel the host's.
	Modules string
	// Rootfs is the path of a directory, a tar (plain, gzip, xz, zstd or bzip2), or an ext4, squashfs
	// or erofs image; "-" for a tar that is read from Stdin.
	Rootfs string
	Stdin  io.Reader
	// Initrd is the path of an initramfs that boots by itself, in place of ours. It needs Kernel.
	Initrd   string
	BootArgs string
	// Runs is what the root file system's image runs.
	Runs config.Change
}

// check also returns what the image runs.
func (o *ImportOptions) check() (config.Config, error) {
	errs := []error{OwnName(o.Name)}
	runs, err := o.Runs.Apply(config.Config{})
	if err != nil {
		errs = append(errs, invalid("%w", err))
	}
	if o.Rootfs == "" && !reflect.ValueOf(runs).IsZero() {
		errs = append(errs, invalid("what an image runs needs a root file system"))
	}
	if o.Kernel == "" && o.Rootfs == "" {
		errs = append(errs, invalid("an image needs a kernel or a root file system"))
	}
	if o.Kernel == "" && o.Initrd != "" {
		errs = append(errs, invalid("an initramfs needs a kernel"))
	}
	if o.Kernel == "" && o.Modules != "" {
		errs = append(errs, invalid("modules need their kernel"))
	}
	return runs, errors.Join(errs...)
}

// Import makes an image of files of this machine, which are only read, and gives it a name, in
// place of what had it. Errors that are fs.ErrInvalid are the caller's; ErrNoKernel says that this
// machine's kernel was not found.
func (s *Store) Import(ctx context.Context, o ImportOptions) (*Image, error) {
	runs, err := o.check()
	if err != nil {
		return nil, err
	}
	err = s.locks.Begin()
	i := &Image{
		Name: imagename.Familiar(o.Name), Source: ImportSource, Arch: s.opts.Arch, BootArgs: o.BootArgs,
		Itself: o.Initrd != "", Config: runs,
	}
	var parts []*objects.Draft
	if err == nil {
		parts, err = s.importParts(ctx, i, o)
	}
	if err == nil {
		err = s.publish(ctx, i, parts...)
	}
	for _, d := range parts {
		err = errors.Join(err, d.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("import image %s: %w", o.Name, err)
	}
	return i, nil
}

// publish puts an image's parts in their places and gives it its name.
func (s *Store) publish(ctx context.Context, i *Image, parts ...*objects.Draft) error {
	release, err := s.Hold(ctx)
	if err != nil {
		return err
	}
	for _, d := range parts {
		err = errors.Join(err, s.objects.Place(d))
	}
	if gone := s.missing(i); err == nil && len(gone) > 0 {
		err = fmt.Errorf("%w: %s was removed meanwhile", ErrNotFound, gone[0])
	}
	if err == nil {
		err = s.name(ctx, i)
	}
	return errors.Join(err, release())
}

// importParts drafts an image's parts. The caller closes them, on error too.
func (s *Store) importParts(ctx context.Context, i *Image, o ImportOptions) (parts []*objects.Draft, err error) {
	if o.Kernel == HostKernel {
		h, err := s.host.Find()
		if old, _ := s.Find(HostKernel); err != nil && errors.Is(err, ErrNoKernel) && old != nil && o.Modules == "" {
			i.Kernel, i.Modules = old.Kernel, old.Modules
		} else if err != nil {
			return nil, err
		}
		o.Kernel, o.Modules = h.Kernel, cmp.Or(o.Modules, h.Modules)
	}
	if o.Kernel != "" {
		k, err := s.storeKernel(ctx, i, o.Kernel, o.Modules)
		if err != nil {
			return k, err
		}
		parts = append(parts, k...)
	}
	if o.Initrd != "" {
		r, err := s.storeCopy(ctx, o.Initrd, &object{ID: kindInitrd + "-", Files: []file{{Name: initrdFile}}})
		if err != nil {
			return parts, err
		}
		i.Initrd, parts = r.ID, append(parts, r)
	}
	if o.Rootfs != "" {
		r, err := s.storeRootfs(ctx, o)
		if err != nil {
			return parts, err
		}
		i.Root, parts = r.ID, append(parts, r)
	}
	return parts, nil
}

// storeCopy drafts a file as it is.
func (s *Store) storeCopy(ctx context.Context, path string, o *object) (*objects.Draft, error) {
	return s.objects.Draft(ctx, func(dir string) (*object, error) {
		f := &stage.File{
			Source: path, Target: filepath.Join(dir, o.Files[0].Name), UID: -1,
			Progress: func(done, total int64) { s.opts.Progress("copy "+filepath.Base(path), done, total) },
		}
		return o, f.Apply(ctx)
	})
}

func (s *Store) storeRootfs(ctx context.Context, o ImportOptions) (*objects.Draft, error) {
	if o.Rootfs == "-" {
		return s.storeUnpacked(ctx, func(dst *os.File) error {
			return flatten.TarToExt4(ctx, s.objects.Watch(ctx, o.Stdin, "unpack", 0), dst, s.opts.Limits)
		})
	}
	path := o.Rootfs
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return s.storeUnpacked(ctx, func(dst *os.File) error {
			root, err := os.OpenRoot(path)
			if err != nil {
				return err
			}
			return errors.Join(flatten.DirToExt4(ctx, root, dst, s.opts.Limits), root.Close())
		})
	}
	if !fi.Mode().IsRegular() {
		return nil, invalid("root file system %s: neither a file nor a directory", path)
	}
	kind, err := volume.Detect(path)
	if err != nil {
		return nil, err
	}
	if dirty, err := volume.NeedsRecovery(path); err != nil {
		return nil, err
	} else if dirty {
		return nil, hint.Add(
			invalid("root file system %s: its journal is not replayed: it was copied while it was mounted, or not unmounted",
				path), "e2fsck -p %s repairs it", path)
	}
	switch kind {
	case "ext4", "squashfs", "erofs":
		return s.storeCopy(ctx, path, &object{ID: kindRoot + "-", Type: kind, Files: []file{{Name: "root." + kind}}})
	case "":
		return s.storeUnpacked(ctx, func(dst *os.File) error {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			r := s.objects.Watch(ctx, f, "unpack "+filepath.Base(path), fi.Size())
			return errors.Join(flatten.TarToExt4(ctx, r, dst, s.opts.Limits), f.Close())
		})
	}
	return nil, invalid("root file system %s: a guest cannot have %s for its root; make it ext4, squashfs or erofs", path,
		kind)
}

func (s *Store) storeUnpacked(ctx context.Context, unpack func(dst *os.File) error) (*objects.Draft, error) {
	return s.objects.Draft(ctx, func(dir string) (*object, error) {
		o := &object{ID: kindRoot + "-", Type: "ext4", Files: []file{{Name: "root.ext4"}}}
		return o, bootfiles.Create(filepath.Join(dir, "root.ext4"), func(w io.Writer) error { return unpack(w.(*os.File)) })
	})
}
