package smartvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/image/release"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/agentbin"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
)

// Images is where the images are that VMs of this host boot.
func (h *Host) Images() (*image.Store, error) { return h.images() }

func (h *Host) openImages() (*image.Store, error) {
	if err := store.Secure(h.opts.DataDir); err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	o := h.opts.Images
	o.Dir, o.Log = filepath.Join(h.opts.DataDir, store.ImageDir), h.log
	o.FetchKernel, o.Installed = o.FetchKernel || h.opts.Install, h.opts.Installed
	if o.Agent == nil {
		o.Agent = agentbin.Agent()
	}
	if o.Base == nil {
		b := h.opts.BaseImages
		b.Dir, b.Log, b.Offline, b.Progress = cmp.Or(b.Dir, filepath.Join(h.opts.DataDir, store.BaseDir)), h.log, o.Offline, o.Progress
		b.Waiting, b.InUse, b.Named = o.Waiting, image.InUse, image.Bundles(o.Dir)
		var err error
		if o.Base, err = base.Open(b); err != nil {
			return nil, err
		}
	}
	return image.Open(o)
}

// Binaries is where the versions of Firecracker are that were installed.
func (h *Host) Binaries() (*release.Store, error) {
	if err := store.Secure(h.opts.DataDir); err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	o := h.opts.Binaries
	o.Dir, o.Log, o.Offline = filepath.Join(h.opts.DataDir, store.BinaryDir), h.log, h.opts.Images.Offline
	o.Progress, o.Waiting = h.opts.Images.Progress, h.opts.Images.Waiting
	return release.Open(o)
}

// installed is for locate.Finder.
func (h *Host) installed(ctx context.Context, version string) (string, error) {
	installed, err := h.Binaries()
	if err != nil {
		return "", err
	}
	b, err := installed.Find(version)
	if errors.Is(err, fs.ErrNotExist) && h.opts.Install && !h.opts.Images.Offline {
		if b, err = installed.Install(ctx, version); err == nil && h.opts.Installed != nil {
			h.opts.Installed("Firecracker "+b.Version, b.Firecracker)
		}
	}
	return b.Firecracker, err
}

// EnsureFirecracker finds a VMM for new VMs, as Create does: see Options.Install.
func (h *Host) EnsureFirecracker(ctx context.Context) error {
	_, err := h.vmms.Find(ctx)
	return err
}

// Volumes is where the disks are that outlive VMs.
func (h *Host) Volumes() (*volume.Store, error) {
	return volume.Open(filepath.Join(h.opts.DataDir, store.VolumeDir))
}

// boot is what a VM gets of its image, in its record.
type boot struct {
	Users []string         `json:"users"`           // where it says that it uses the image
	Guest *agentproto.Boot `json:"guest,omitempty"` // what its guest's first program is told

	release func() error // of the image: see image.Boot
}

const guestDrive = spec.GuestDrive

// agentCID is the guest's context id, where nobody asks for another: the VMM keeps those of different VMs apart.
const agentCID = 3

// staged tells of the root that the VM has a layer over, and has room for what is copied.
func (b *boot) staged(s *Spec) map[string]StagedDrive {
	if b == nil || b.Guest == nil {
		return map[string]StagedDrive{}
	}
	return map[string]StagedDrive{spec.RootDrive: {s.Drives[0].PathOnHost, "overlay"}}
}

// done lets others remove the image, unless the VM has said that it uses it.
func (b *boot) done() error {
	if b == nil {
		return nil
	}
	return b.release()
}

// bootImage puts into s what its image gives: a kernel, an initramfs, a root drive and what goes over it.
func (h *Host) bootImage(ctx context.Context, s *Spec) (*boot, error) {
	if s.Image == "" {
		return nil, nil
	}
	images, err := h.Images()
	if err != nil {
		return nil, err
	}
	b, err := images.Boot(ctx, s.Image, image.BootOptions{
		Kernel: s.Kernel, NoKernel: s.BootSource.KernelImagePath != "", Entrypoint: s.Entrypoint, Command: s.Command, Env: s.Env,
		User: s.User, WorkingDir: s.WorkingDir, Systemd: s.Systemd, Hostname: cmp.Or(s.Hostname, s.Name, s.ID),
	})
	switch {
	case errors.Is(err, image.ErrNotFound):
		return nil, hint.Add(err, "smartvm image ls lists the images here; smartvm image pull %s fetches it", s.Image)
	case err != nil:
		return nil, err
	}
	boot := &boot{Users: b.Users, Guest: b.Guest, release: b.Release}
	if err := attach.Expose(s, b.Image.Config.ExposedPorts, h.log); err != nil {
		return nil, errors.Join(err, boot.release())
	}
	if n := len(s.Secrets) + len(s.EnvFiles) + len(s.Volumes) + len(s.NamedVolumes); n > 0 && b.Guest == nil {
		return nil, errors.Join(fmt.Errorf("image %s boots by itself: %w: secrets, env files and volumes are for our own agent", s.Image, ErrNotSupported), boot.release())
	}
	if b.Guest != nil {
		b.Guest.MachineID, b.Guest.Secrets = randomHex(16), len(s.Secrets)+len(s.EnvFiles) > 0
		if s.Vsock == nil { // for the agent
			s.Vsock = &Vsock{GuestCID: agentCID}
		}
	}
	s.BootSource.KernelImagePath = cmp.Or(s.BootSource.KernelImagePath, b.Kernel)
	s.BootSource.InitrdPath = cmp.Or(s.BootSource.InitrdPath, b.Initrd)
	s.BootSource.BootArgs = cmp.Or(s.BootSource.BootArgs, b.BootArgs)
	drives, yes := []Drive(nil), true
	if b.Root != "" {
		drives = append(drives, Drive{DriveID: spec.RootDrive, PathOnHost: b.Root, IsRootDevice: true, IsReadOnly: !b.CopyRoot})
	}
	if b.Guest != nil {
		scratch, err := h.scratch(ctx, s.Scratch)
		if err != nil {
			return nil, errors.Join(err, boot.release())
		}
		scratch.Ephemeral = &yes
		if s.Scratch != nil && s.Scratch.Keep != "" {
			scratch.Ephemeral = new(bool)
		}
		drives = append(drives, scratch)
	}
	if b.CopyRoot {
		drives[0].Ephemeral = &yes
	}
	s.Drives = append(drives, s.Drives...)
	if b.Modules != "" {
		b.Guest.ModulesDevice = addDrive(s, Drive{DriveID: spec.ModulesDrive, PathOnHost: b.Modules, IsReadOnly: true})
	}
	return boot, nil
}

// addDrive adds a drive and says what the guest calls it.
func addDrive(s *Spec, d Drive) (device string) {
	s.Drives = append(s.Drives, d)
	return agentproto.DriveDevice(len(s.Drives))
}

// scratch is the drive that an image's guest writes.
func (h *Host) scratch(ctx context.Context, s *spec.Scratch) (Drive, error) {
	d := Drive{DriveID: spec.ScratchDrive}
	volumes, err := h.Volumes()
	if err != nil {
		return d, err
	}
	if s == nil {
		s = &spec.Scratch{}
	}
	size := int64(cmp.Or(s.SizeMiB, spec.DefaultScratchMiB)) << 20
	if s.Keep != "" {
		d.PathOnHost, err = volumes.Named(ctx, s.Keep, size)
	} else {
		d.PathOnHost, err = volumes.Blank(ctx, size)
	}
	return d, err
}
