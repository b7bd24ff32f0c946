package guestagent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agentproto"
)

// volumeDir is where the drives of volumes are mounted until the volumes are where they belong.
const volumeDir = "/run/smartvm/volumes"

// mountVolumes puts the host's volumes into the image. What is laid over what is kept by the kernel: afterwards nobody sees the drives.
func (g *guest) mountVolumes(b *agentproto.Boot) error {
	if b.ChangesDevice != "" {
		if err := awaitDevice(b.ChangesDevice); err != nil {
			return err
		}
		if err := mount(filesystem{kind: agentproto.Ext4, source: b.ChangesDevice, target: agentproto.ChangesDir}); err != nil {
			return err
		}
		if err := g.keepWritable(agentproto.ChangesDir); err != nil {
			return err
		}
	}
	if len(b.Volumes) == 0 {
		return nil // the host reads it
	}
	if err := awaitDevice(b.VolumeDevice); err != nil {
		return err
	}
	if err := mount(filesystem{kind: agentproto.Ext4, source: b.VolumeDevice, target: volumeDir, flags: unix.MS_RDONLY, data: "noload"}); err != nil {
		return err
	}
	// One in another comes after that.
	order := make([]int, len(b.Volumes))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int {
		return strings.Count(b.Volumes[i].Target, "/") - strings.Count(b.Volumes[j].Target, "/")
	})
	for _, i := range order {
		if err := mountVolume(strconv.Itoa(i), b.Volumes[i]); err != nil {
			return fmt.Errorf("volume %s: %w", b.Volumes[i].Target, err)
		}
	}
	err := leave(volumeDir)
	if b.ChangesDevice != "" {
		err = errors.Join(err, leave(agentproto.ChangesDir))
	}
	_ = os.Remove(filepath.Dir(volumeDir))
	return err
}

// leave detaches what was mounted on a directory of ours, which goes too.
func leave(dir string) error {
	if err := detach(dir); err != nil {
		return err
	}
	return os.Remove(dir)
}

func mountVolume(number string, v agentproto.Volume) error {
	lower := filepath.Join(volumeDir, number)
	if err := fits(v); err != nil {
		return err
	}
	if v.IsFile {
		if err := touch(v.Target); err != nil {
			return err
		}
	} else if err := os.MkdirAll(v.Target, 0o755); err != nil {
		return err
	}
	if v.ReadOnly {
		return bind(lower, v)
	}
	upper, err := layers(lower, filepath.Join(agentproto.ChangesDir, number))
	if err != nil {
		return err
	}
	f := filesystem{kind: "overlay", target: v.Target}
	if v.IsFile { // overlayfs knows directories only
		f.target = volumeDir + "-" + number
	}
	// What is written is whole, for the host to read.
	f.data = "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + filepath.Join(filepath.Dir(upper), "work") + ",redirect_dir=off,metacopy=off"
	if err := mount(f); err != nil || !v.IsFile {
		return err
	}
	return errors.Join(bind(f.target, v), leave(f.target))
}

// fits says whether a volume can be mounted over what the image has in its place.
func fits(v agentproto.Volume) error {
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
func bind(dir string, v agentproto.Volume) error {
	if v.IsFile {
		dir = filepath.Join(dir, agentproto.VolumeFile)
	}
	if err := unix.Mount(dir, v.Target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", dir, v.Target, err)
	}
	return nil
}

// layers makes the directories that overlayfs wants. Its root is the upper one: that is to look as the lower.
func layers(lower, dir string) (upper string, err error) {
	fi, err := os.Stat(lower)
	if err != nil {
		return "", err
	}
	upper = filepath.Join(dir, agentproto.UpperDir)
	for _, d := range []string{upper, filepath.Join(dir, "work")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
	}
	st := fi.Sys().(*syscall.Stat_t)
	return upper, errors.Join(os.Chown(upper, int(st.Uid), int(st.Gid)), os.Chmod(upper, fi.Mode().Perm()|fi.Mode()&(fs.ModeSticky|fs.ModeSetgid)))
}

// touch makes a file to mount over, where there is none.
func touch(name string) error {
	if _, err := os.Stat(name); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}
