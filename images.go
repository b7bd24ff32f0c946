package smartvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/image/release"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/agentbin"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
	"push.rocks/smartvm/status"
)

// Images is where the images are that VMs of this host boot.
func (h *Host) Images() (*image.Store, error) { return h.images() }

func (h *Host) openImages() (*image.Store, error) {
	if err := store.Secure(h.opts.DataDir); err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	o := h.opts.Images
	o.Dir, o.Log = filepath.Join(h.opts.DataDir, store.ImageDir), h.env.Log
	o.FetchKernel, o.Installed = o.FetchKernel || h.opts.Install, h.opts.Installed
	o.Changed = h.changes(status.EventImage)
	if o.Agent == nil {
		o.Agent = agentbin.Agent()
	}
	if o.Base == nil {
		b := h.opts.BaseImages
		b.Dir, b.Log, b.Offline, b.Progress = cmp.Or(b.Dir, filepath.Join(h.opts.DataDir, store.BaseDir)), h.env.Log,
			o.Offline, o.Progress
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
	o.Dir, o.Log, o.Offline = filepath.Join(h.opts.DataDir, store.BinaryDir), h.env.Log, h.opts.Images.Offline
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

const guestDrive = spec.GuestDrive

// bootImage puts into s what its image gives: a kernel, an initramfs, a root drive and what goes
// over it. Release lets others remove the image, unless a VM has said by then that it uses it.
func (h *Host) bootImage(ctx context.Context, s *Spec) (_ *plan.Boot, release func() error, err error) {
	if s.Image == "" {
		return nil, func() error { return nil }, nil
	}
	images, err := h.Images()
	if err != nil {
		return nil, nil, err
	}
	b, err := images.Boot(ctx, s.Image, image.BootOptions{
		Kernel: s.Kernel, NoKernel: s.BootSource.KernelImagePath != "", Entrypoint: s.Entrypoint,
		Command: s.Command, Env: s.Env,
		User: s.User, WorkingDir: s.WorkingDir, Systemd: s.Systemd, Hostname: cmp.Or(s.Hostname, s.Name, s.ID),
	})
	switch {
	case errors.Is(err, image.ErrNotFound):
		return nil, nil, hint.Add(err, "smartvm image ls lists the images here; smartvm image pull %s fetches it", s.Image)
	case err != nil:
		return nil, nil, err
	}
	if err := h.bootFrom(ctx, s, b); err != nil {
		return nil, nil, errors.Join(err, b.Release())
	}
	return &plan.Boot{Users: b.Users, Guest: b.Guest}, b.Release, nil
}

// bootFrom is bootImage for an image that was found.
func (h *Host) bootFrom(ctx context.Context, s *Spec, b *image.Boot) error {
	if err := attach.Expose(s, b.Image.Config.ExposedPorts, h.env.Log); err != nil {
		return err
	}
	if n := len(s.Secrets) + len(s.EnvFiles) + len(s.Volumes) + len(s.NamedVolumes); n > 0 && b.Guest == nil {
		return fmt.Errorf("image %s boots by itself: %w: secrets, env files and volumes are for our own agent", s.Image,
			ErrNotSupported)
	}
	if b.Guest != nil {
		b.Guest.MachineID, b.Guest.Secrets = plan.RandomHex(16), len(s.Secrets)+len(s.EnvFiles) > 0
		if s.Vsock == nil { // for the agent
			s.Vsock = &Vsock{GuestCID: plan.AgentCID}
		}
	}
	s.BootSource.KernelImagePath = cmp.Or(s.BootSource.KernelImagePath, b.Kernel)
	s.BootSource.InitrdPath = cmp.Or(s.BootSource.InitrdPath, b.Initrd)
	s.BootSource.BootArgs = cmp.Or(s.BootSource.BootArgs, b.BootArgs)
	drives, yes := []Drive(nil), true
	if b.Root != "" {
		drives = append(drives,
			Drive{DriveID: spec.RootDrive, PathOnHost: b.Root, IsRootDevice: true, IsReadOnly: !b.CopyRoot})
	}
	if b.Guest != nil {
		scratch, err := h.scratch(ctx, s.Scratch)
		if err != nil {
			return err
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
	return nil
}

// addDrive adds a drive and says what the guest calls it.
func addDrive(s *Spec, d Drive) (device string) {
	s.Drives = append(s.Drives, d)
	return guest.DriveDevice(len(s.Drives))
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

// addVolumes gives a VM of an image the drives for its volumes, and tells its guest.
func (h *Host) addVolumes(ctx context.Context, rec *plan.Record) error {
	s, g := &rec.Spec, rec.Boot.Guest
	disks, err := h.Volumes()
	if err != nil {
		return err
	}
	for i, v := range s.NamedVolumes {
		path, err := disks.Volumes().Named(ctx, v.Name, int64(cmp.Or(v.SizeMiB, spec.DefaultVolumeMiB))<<20)
		if err != nil {
			return err
		}
		device := addDrive(s,
			Drive{DriveID: spec.NamedDrive(i), PathOnHost: path, CacheType: "Writeback", Ephemeral: new(bool)})
		g.Disks = append(g.Disks, guest.Disk{Device: device, Target: v.Target, ReadOnly: v.ReadOnly})
	}
	if len(s.Volumes) == 0 {
		_, err := g.Encode() // it may be too long by now
		return err
	}
	g.Volumes = share.Guest(s.Volumes)
	g.VolumeDevice = addDrive(s,
		Drive{
			DriveID: spec.VolumeDrive, PathOnHost: filepath.Join(h.env.Store.Dir(rec.ID), store.VolumeFile),
			IsReadOnly: true,
		})
	if slices.ContainsFunc(s.Volumes, func(v Volume) bool { return !v.ReadOnly }) {
		var size Scratch
		if s.Scratch != nil {
			size.SizeMiB = s.Scratch.SizeMiB
		}
		changes, err := h.scratch(ctx, &size)
		if err != nil {
			return err
		}
		yes := true
		changes.DriveID, changes.Ephemeral = spec.ChangesDrive, &yes
		g.ChangesDevice = addDrive(s, changes)
	}
	_, err = g.Encode() // it may be too long by now
	return err
}
