// Package bootfiles makes the files that a kernel is stored as: the kernel, extracted, and its
// modules.
package bootfiles

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/imagename"
	"push.rocks/smartvm/internal/initramfs"
	"push.rocks/smartvm/internal/kernel"
)

// Kernel extracts the kernel at src, of an architecture as Go spells it, to the new file dst, and
// returns its release, which is empty if it does not say. Returns kernel.ErrFormat.
func Kernel(ctx context.Context, dst, src, arch string) (release string, err error) {
	f, err := os.Open(src)
	if err != nil {
		return "", err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() {
		return "", imagename.Invalid("%s: no regular file", src)
	}
	err = Create(dst, func(w io.Writer) error {
		info, err := kernel.Extract(ctx, w, f, fi.Size())
		if err == nil && info.Arch != arch {
			err = fmt.Errorf("%s: it is for %s, not %s: %w", src, info.Arch, arch, kernel.ErrFormat)
		} else if err != nil {
			err = fmt.Errorf("%s: %w", src, err)
		}
		release = info.Release
		return err
	})
	return release, err
}

// Initramfs writes those modules of a kernel that a guest needs to find its root to the new file
// dst. The kernel's release may be empty; it is returned.
func Initramfs(dst string, modules *os.Root, release string) (string, error) {
	own, err := kernel.ModulesRelease(modules.FS())
	if err != nil {
		return "", err
	}
	release = cmp.Or(release, own, filepath.Base(modules.Name()))
	if own != "" && own != release {
		return "", imagename.Invalid("they are for the kernel %s, and the kernel is %s", own, release)
	}
	return release, Create(dst, func(w io.Writer) error {
		return initramfs.Build(w, initramfs.Options{Modules: modules.FS(), Release: release})
	})
}

// Modules makes the new file dst an ext4 file system with a kernel's modules. What is packed is
// read through watch.
func Modules(ctx context.Context, dst string, modules fs.FS, watch func(io.Reader) io.Reader) error {
	return Create(dst, func(f io.Writer) error {
		r, w := io.Pipe()
		packed := make(chan struct{})
		go func() {
			defer close(packed)
			w.CloseWithError(kernel.WriteModules(w, modules))
		}()
		err := flatten.TarToExt4(ctx, watch(r), f.(*os.File), flatten.Limits{})
		r.CloseWithError(err)
		<-packed
		return err
	})
}

// Create makes a file that is not there, for write, whose argument is an *os.File.
func Create(path string, write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}
