package guestagent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/guestagent/disk"
)

// volumeDir is where the drives of volumes are mounted until the volumes are where they belong.
const volumeDir = "/run/smartvm/volumes"

// mountVolumes puts the host's volumes into the image. What is laid over what is kept by the
// kernel: afterwards nobody sees the drives.
func (g *system) mountVolumes(b *guest.Boot) error {
	if b.ChangesDevice != "" {
		if err := awaitDevice(b.ChangesDevice); err != nil {
			return err
		}
		if err := mount(
			filesystem{
				kind: guest.Ext4, source: b.ChangesDevice, target: guest.ChangesDir,
				data: disk.Options("/sys", b.ChangesDevice),
			}); err != nil {
			return err
		}
		if err := g.keepWritable(guest.ChangesDir); err != nil {
			return err
		}
	}
	places := make([]place, 0, len(b.Disks)+len(b.Volumes))
	for i, d := range b.Disks {
		places = append(places, place{d.Target, func() error { return g.mountDisk(i, d) }})
	}
	if len(b.Volumes) == 0 { // changes are for the host to read
		err := mountAll(places)
		_ = os.Remove(filepath.Dir(volumeDir))
		return err
	}
	if err := awaitDevice(b.VolumeDevice); err != nil {
		return err
	}
	if err := mount(
		filesystem{
			kind: guest.Ext4, source: b.VolumeDevice, target: volumeDir, flags: unix.MS_RDONLY,
			data: "noload",
		}); err != nil {
		return err
	}
	for i, v := range b.Volumes {
		places = append(places, place{v.Target, func() error { return mountVolume(strconv.Itoa(i), v) }})
	}
	err := mountAll(places)
	if err != nil {
		return err
	}
	err = leave(volumeDir)
	if b.ChangesDevice != "" {
		err = errors.Join(err, leave(guest.ChangesDir))
	}
	_ = os.Remove(filepath.Dir(volumeDir))
	return err
}

// place is where something is to be mounted.
type place struct {
	target string
	mount  func() error
}

// mountAll mounts what is in another place after that.
func mountAll(places []place) error {
	slices.SortStableFunc(places, func(a, b place) int {
		return strings.Count(a.target, "/") - strings.Count(b.target, "/")
	})
	for _, p := range places {
		if err := p.mount(); err != nil {
			return fmt.Errorf("volume %s: %w", p.target, err)
		}
	}
	return nil
}

// mountDisk mounts a disk that outlives the guest. One that is new gets what the image has in its
// place.
func (g *system) mountDisk(number int, d guest.Disk) error {
	if err := awaitDevice(d.Device); err != nil {
		return err
	}
	at := fmt.Sprintf("/run/smartvm/disk-%d", number)
	if err := mount(
		filesystem{kind: guest.Ext4, source: d.Device, target: at, data: disk.Options("/sys", d.Device)}); err != nil {
		return err
	}
	if err := g.keepWritable(at); err != nil {
		return err
	}
	if err := disk.Put(at, d); err != nil {
		return err
	}
	return leave(at)
}

// leave detaches what was mounted on a directory of ours, which goes too.
func leave(dir string) error {
	if err := detach(dir); err != nil {
		return err
	}
	return os.Remove(dir)
}

func mountVolume(number string, v guest.Volume) error {
	lower := filepath.Join(volumeDir, number)
	if err := fits(v); err != nil {
		return err
	}
	if v.IsFile {
		if err := disk.Touch(v.Target); err != nil {
			return err
		}
	} else if err := os.MkdirAll(v.Target, 0o755); err != nil {
		return err
	}
	if v.ReadOnly {
		return bind(lower, v)
	}
	upper, err := disk.Layers(lower, filepath.Join(guest.ChangesDir, number))
	if err != nil {
		return err
	}
	f := filesystem{kind: "overlay", target: v.Target}
	if v.IsFile { // overlayfs knows directories only
		f.target = volumeDir + "-" + number
	}
	// What is written is whole, for the host to read.
	f.data = "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + filepath.Join(filepath.Dir(upper), "work") +
		",redirect_dir=off,metacopy=off"
	if err := mount(f); err != nil || !v.IsFile {
		return err
	}
	return errors.Join(bind(f.target, v), leave(f.target))
}

// fits says whether a volume can be mounted over what the image has in its place.
func fits(v guest.Volume) error {
	fi, err := os.Stat(v.Target)
	switch {
	case err != nil: // nothing, or a link to nothing
		return nil
	case v.IsFile && fi.IsDir():
		return errors.New("it is a file of the host, and the image has a directory there")
	case !v.IsFile && !fi.IsDir():
		return errors.New("it is a directory of the host, and the image has a file there")
	}
	return nil
}

// bind mounts a directory, or the file in it, where a volume belongs.
func bind(dir string, v guest.Volume) error {
	if v.IsFile {
		dir = filepath.Join(dir, guest.VolumeFile)
	}
	if err := unix.Mount(dir, v.Target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", dir, v.Target, err)
	}
	return nil
}
