package vmm

import (
	"fmt"
	"os/exec"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/osthread"
	"push.rocks/smartvm/internal/stage"
)

// startJailed starts cmd, a jailer, with binds mounted in a mount namespace that only it has: the
// host's mount table stays as it is, and the mounts vanish with the VM. The namespace is that of an
// OS thread that is given up afterwards; the child is forked from it.
func startJailed(cmd *exec.Cmd, jail string, binds []stage.Bind) error {
	var st unix.Statfs_t
	if err := unix.Statfs(jail, &st); err != nil {
		return fmt.Errorf("look at jail: %w", err)
	}
	// A distribution's /dev/shm allows no device nodes, and the jail has /dev/kvm; some allow no
	// programs.
	remount := st.Flags&(unix.ST_NODEV|unix.ST_NOEXEC) != 0
	if !remount && len(binds) == 0 {
		return cmd.Start()
	}
	return osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("make mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
			return fmt.Errorf("cut off mount namespace: %w", err)
		}
		if remount {
			if err := unix.Mount(jail, jail, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("mount jail: %w", err)
			}
			if err := unix.Mount("", jail, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_NOSUID, ""); err != nil {
				return fmt.Errorf("mount jail: %w", err)
			}
		}
		for _, b := range binds {
			if err := bind(b); err != nil {
				return fmt.Errorf("mount %s: %w", b.Source, err)
			}
		}
		return cmd.Start()
	})
}

func bind(b stage.Bind) error {
	if err := unix.Mount(b.Source, b.Target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := b.Check(); err != nil { // by path, it may have been replaced meanwhile
		return err
	}
	if !b.ReadOnly {
		return nil
	}
	return unix.Mount("", b.Target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC, "")
}
