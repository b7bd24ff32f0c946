package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/image/internal/bootfiles"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/initramfs"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/spec"
)

// BootOptions say how an image is to boot, in place of what it says itself. The zero value changes
// nothing.
type BootOptions struct {
	// Kernel is the name of the image whose kernel is used, or HostKernel. Empty: the image's own,
	// else DefaultKernel's.
	Kernel string
	// NoKernel says that the caller brings a kernel.
	NoKernel bool
	Command  []string // replaces the image's Cmd, as with docker run
	// replaces the image's Entrypoint, and its Cmd; empty, but not nil, or one empty element clears
	// both
	Entrypoint []string
	Systemd    string   // when the command is process 1: see spec.Spec
	Env        []string // NAME=VALUE, added
	User       string
	WorkingDir string
	Hostname   string
}

// Boot is what a VM needs for an image. All paths are files that must not be written.
type Boot struct {
	Image          *Image
	Kernel, Initrd string // paths
	BootArgs       string
	Root, RootType string // path of the root file system; "": the initramfs is all there is
	CopyRoot       bool   // the guest writes its root: it needs a copy
	Modules        string // path of an ext4 file system with the kernel's modules, for Guest; "": there is none
	// Guest is what the initramfs reads from a drive of its own; nil: the initramfs is not ours, and
	// there is no overlay.
	Guest *guest.Boot
	// Users are directories in which the VM says that it uses what is here, by a symbolic link to its
	// own directory.
	Users []string
	// Release lets others remove what the VM has not yet said that it uses. It is called once, and
	// never nil.
	Release func() error
}

// QuietBootArgs is the kernel command line of an image that has none and whose command's output is
// what counts.
const QuietBootArgs = spec.DefaultBootArgs + " quiet"

// Devices of a guest that our initramfs boots: the order of its drives.
const (
	rootDevice    = "/dev/vda"
	scratchDevice = "/dev/vdb"
)

// Boot finds all that a VM of an image needs, checks it, and makes what is missing. Nothing of it
// is removed until the caller releases it. Returns ErrNotFound, ErrCorrupt, ErrNoKernel.
func (s *Store) Boot(ctx context.Context, name string, o BootOptions) (b *Boot, err error) {
	release, err := s.Hold(ctx)
	if err != nil {
		return nil, err
	}
	b = &Boot{Release: release}
	defer func() {
		if err != nil {
			b, err = nil, errors.Join(err, b.Release())
		}
	}()
	i, err := s.Find(name)
	if err != nil {
		return b, err
	}
	b.Image, b.BootArgs = i, i.BootArgs
	modules, err := s.bootKernel(ctx, b, o)
	if err == nil {
		err = s.bootRoot(ctx, b)
	}
	if err == nil && !i.Itself && b.Root != "" {
		b.Guest = guestConfig(b, o)
		b.BootArgs = cmp.Or(b.BootArgs, QuietBootArgs)
		_, encodeErr := b.Guest.Encode() // it may be too long
		err = errors.Join(encodeErr, s.bootInitramfs(ctx, b, modules))
	}
	if b.Guest == nil {
		b.Modules = "" // nobody would mount them
	}
	if err != nil {
		err = fmt.Errorf("boot image %s: %w", i.Name, err)
	}
	return b, err
}

// bootKernel returns the kernel's object if it has modules.
func (s *Store) bootKernel(ctx context.Context, b *Boot, o BootOptions) (*object, error) {
	i := b.Image
	switch {
	case o.NoKernel:
		return nil, nil
	case o.Kernel != "" || i.Kernel == "" && i.Bundle == "":
		with, err := s.kernelImage(ctx, o.Kernel)
		if err != nil {
			return nil, err
		}
		i = with
	case i.Bundle != "":
		return nil, nil // bootRoot has it
	}
	k, err := s.objects.Use(ctx, i.Kernel, false)
	if err != nil {
		return nil, err
	}
	b.Kernel = s.objects.File(k)
	s.keep(b, k)
	if i.Modules != "" {
		all, err := s.objects.Use(ctx, i.Modules, false)
		if err != nil {
			return nil, err
		}
		b.Modules = s.objects.File(all)
		s.keep(b, all)
	}
	if !k.Modules {
		return nil, nil
	}
	return k, nil
}

func (s *Store) bootRoot(ctx context.Context, b *Boot) error {
	i := b.Image
	if i.Bundle != "" {
		bundle, err := s.bundle(ctx, b)
		if err != nil {
			return err
		}
		b.Kernel, b.Root, b.RootType = cmp.Or(b.Kernel, bundle.KernelPath), bundle.RootfsPath, bundle.RootfsType
		b.CopyRoot = i.Itself
		users := filepath.Join(bundle.Dir, kept.UsersDir)
		b.Users = append(b.Users, users)
		return os.MkdirAll(users, 0o700)
	}
	if i.Initrd != "" {
		o, err := s.objects.Use(ctx, i.Initrd, false)
		if err != nil {
			return err
		}
		b.Initrd = s.objects.File(o)
		s.keep(b, o)
	}
	if i.Root == "" {
		return nil
	}
	o, err := s.objects.Use(ctx, i.Root, false)
	if err != nil {
		return err
	}
	b.Root, b.RootType = s.objects.File(o), o.Type
	s.keep(b, o)
	return nil
}

// bundle returns b's bundle and holds it.
func (s *Store) bundle(ctx context.Context, b *Boot) (*base.Bundle, error) {
	release, err := s.opts.Base.Hold(ctx, b.Image.Bundle)
	if isNotExist(err) {
		return nil, fmt.Errorf("%w: its bundle has made room for others", ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	store := b.Release
	b.Release = func() error { return errors.Join(release(), store()) }
	return s.opts.Base.Open(ctx, b.Image.Bundle)
}

// keep has the VM keep an object.
func (s *Store) keep(b *Boot, o *object) {
	b.Users = append(b.Users, filepath.Join(s.objects.Dir(o.ID), kept.UsersDir))
}

// bootInitramfs stores an initramfs of the agent and a kernel's modules, if it is not there.
func (s *Store) bootInitramfs(ctx context.Context, b *Boot, modules *object) error {
	if len(s.opts.Agent) == 0 {
		return hint.Add(errors.New("this smartvm was built without its guest agent"),
			"build it with make, or in a program of your own set Options.Images.Agent")
	}
	h := sha256.New()
	h.Write(s.opts.Agent)
	if modules != nil {
		fmt.Fprint(h, modules.ID)
	}
	id := kindInitrd + "-" + hex.EncodeToString(h.Sum(nil))
	o, err := s.objects.Use(ctx, id, false)
	if isNotExist(err) {
		o, err = s.objects.Build(ctx, func(dir string) (*object, error) {
			return &object{ID: id, Files: []file{{Name: initrdFile}}},
				bootfiles.Create(filepath.Join(dir, initrdFile), func(w io.Writer) error {
					if err := initramfs.Build(w, initramfs.Options{Agent: s.opts.Agent}); err != nil || modules == nil {
						return err
					}
					// The kernel takes one archive after the other.
					f, err := os.Open(filepath.Join(s.objects.Dir(modules.ID), modulesFile))
					if err != nil {
						return err
					}
					_, err = io.Copy(w, f)
					return errors.Join(err, f.Close())
				})
		})
	}
	if err != nil {
		return fmt.Errorf("make initramfs: %w", err)
	}
	b.Initrd = s.objects.File(o)
	s.keep(b, o)
	return nil
}

// guestConfig is what the agent is told.
func guestConfig(b *Boot, o BootOptions) *guest.Boot {
	c := b.Image.Config
	run, dir, signal := command(c, o), o.WorkingDir, c.StopSignal
	if dir == "" && c.WorkingDir != "" {
		dir = path.Join("/", c.WorkingDir) // which is what a relative one means
	}
	if _, err := guest.ParseSignal(signal); err != nil {
		signal = "" // as with docker
	}
	return &guest.Boot{
		RootDevice: rootDevice, RootType: b.RootType, ScratchDevice: scratchDevice,
		Hostname: o.Hostname, Command: run, Init: becomesInit(run, c, o),
		Env:  slices.Concat(slices.DeleteFunc(slices.Clone(c.Env), unnamed), o.Env),
		User: cmp.Or(o.User, c.User), WorkingDir: dir, StopSignal: signal, Directories: c.Volumes,
	}
}

// unnamed says of a variable that it is none, which OCI forbids and docker overlooks.
func unnamed(variable string) bool { return strings.Index(variable, "=") < 1 }

// command is what docker run would run.
func command(c oci.Config, o BootOptions) []string {
	if o.Entrypoint != nil {
		if slices.Equal(o.Entrypoint, []string{""}) {
			return o.Command
		}
		return slices.Concat(o.Entrypoint, o.Command)
	}
	if len(o.Command) > 0 {
		return slices.Concat(c.Entrypoint, o.Command)
	}
	return slices.Concat(c.Entrypoint, c.Cmd)
}

// becomesInit says whether a command boots the guest as its process 1. What is an init is podman's
// rule (podman-run(1), --systemd), which looks behind the shell that a Dockerfile's CMD without
// brackets has. Podman runs all else as process 1 too; so here does an image that says by itself
// that its entrypoint is to prepare the way for an init, its last argument (kindest/node).
func becomesInit(command []string, c oci.Config, o BootOptions) bool {
	if len(command) == 0 || o.Systemd == spec.SystemdFalse {
		return false
	}
	name := command[0]
	if len(command) > 2 && command[0] == "/bin/sh" && command[1] == "-c" {
		name = command[2]
	}
	last := command[len(command)-1]
	prepared := o.Entrypoint == nil && len(o.Command) == 0 && len(c.Entrypoint) > 0 && path.IsAbs(last) && isInit(last)
	return o.Systemd == spec.SystemdAlways || isInit(name) || prepared
}

func isInit(program string) bool {
	return path.Base(program) == "systemd" ||
		slices.Contains([]string{"/sbin/init", "/usr/sbin/init", "/usr/local/sbin/init"}, program)
}
