// Package disk brings disks that outlive a guest to their places in it.
package disk

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/treetar"
)

// Options are those to mount an ext4 on a drive with: where the drive takes it, the host is told at
// once what is free again. The kernel complains of the option elsewhere. Sys is /sys.
func Options(sys, device string) string {
	text, err := os.ReadFile(filepath.Join(sys, "block", filepath.Base(device), "queue/discard_max_bytes"))
	if err != nil || strings.TrimSpace(string(text)) == "0" {
		return ""
	}
	return "discard"
}

// Put brings the disk that is mounted on at to where it belongs.
func Put(at string, d guest.Disk) error {
	if err := os.MkdirAll(d.Target, 0o755); err != nil {
		return err
	}
	data := filepath.Join(at, guest.DiskDir)
	if _, err := os.Lstat(data); errors.Is(err, fs.ErrNotExist) {
		if err := fill(data, d.Target); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	if err := unix.Mount(data, d.Target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", d.Device, d.Target, err)
	}
	if d.ReadOnly {
		if err := unix.Mount("", d.Target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("mount %s read-only: %w", d.Device, err)
		}
	}
	return nil
}

// fill makes a directory of what is in another. It is there when all of it is: a guest that was
// killed meanwhile begins anew.
func fill(dir, from string) error {
	temp := dir + ".new"
	fi, err := os.Stat(from)
	if err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(temp), os.Mkdir(temp, 0o700)); err != nil {
		return err
	}
	root, err := os.OpenRoot(temp)
	if err != nil {
		return err
	}
	defer root.Close()
	in, out := io.Pipe()
	packed := make(chan struct{})
	go func() {
		defer close(packed)
		out.CloseWithError(treetar.Pack(out, from, ".", treetar.PackOptions{}))
	}()
	err = treetar.Unpack(in, root, treetar.Options{Owners: true, Odd: func(h *tar.Header) error {
		kind := map[byte]uint32{
			tar.TypeFifo: unix.S_IFIFO, tar.TypeChar: unix.S_IFCHR,
			tar.TypeBlock: unix.S_IFBLK,
		}[h.Typeflag]
		return unix.Mknod(filepath.Join(temp, h.Name), kind|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))))
	}})
	in.CloseWithError(errors.Join(err, io.EOF))
	<-packed
	if err != nil {
		return fmt.Errorf("copy what the image has there: %w", err)
	}
	st := fi.Sys().(*syscall.Stat_t)
	err = errors.Join(os.Chown(temp, int(st.Uid), int(st.Gid)),
		os.Chmod(temp, fi.Mode().Perm()|fi.Mode()&(fs.ModeSticky|fs.ModeSetgid)))
	if err != nil {
		return err
	}
	unix.Sync() // what is in it before its name
	err = os.Rename(temp, dir)
	unix.Sync()
	return err
}
