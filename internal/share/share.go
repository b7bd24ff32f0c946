// Package share gives a guest copies of directories and files of the host, and brings back what the
// guest has changed in them.
//
// The copies are an image of a file system of their own; what the guest writes lies on another
// drive, as layers of overlayfs. So what has changed is known without comparing anything, and the
// host never mounts, or reads, a file system that a guest has written: a VM does that, and sends it
// as a tar archive.
package share

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/spec"
)

// Resolve makes the volumes of a spec absolute, without symbolic links, and returns what is wrong
// with them as *spec.FieldErrors. The slice is made anew.
func Resolve(s *spec.Spec) (errs []error) {
	s.Volumes = append([]spec.Volume(nil), s.Volumes...)
	for i := range s.Volumes {
		v := &s.Volumes[i]
		if err := resolve(v); err != nil {
			reason := err
			if pe, ok := errors.AsType[*fs.PathError](err); ok { // its path is the value
				reason = pe.Err
			}
			errs = append(errs,
				&spec.FieldError{Path: fmt.Sprintf("volumes[%d].source", i), Value: v.Source, Reason: reason.Error(), Err: err})
		}
	}
	return errs
}

func resolve(v *spec.Volume) error {
	abs, err := filepath.Abs(v.Source)
	if err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return err
	}
	fi, err := os.Stat(real)
	if err != nil {
		return err
	}
	need := uint32(unix.R_OK)
	switch {
	case fi.IsDir():
		need |= unix.X_OK
	case !fi.Mode().IsRegular():
		return errors.New("neither a directory nor a file")
	}
	if v.Sync {
		dir := real
		if !fi.IsDir() {
			dir = filepath.Dir(real)
		}
		if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
			return fmt.Errorf("copy back to %s: %w", dir, err)
		}
	}
	v.Source = real
	return unix.Access(real, need)
}

// Guest says what the guest is told of volumes.
func Guest(volumes []spec.Volume) (all []guest.Volume) {
	for _, v := range volumes {
		fi, err := os.Stat(v.Source)
		all = append(all, guest.Volume{Target: v.Target, ReadOnly: v.ReadOnly, IsFile: err == nil && !fi.IsDir()})
	}
	return all
}

// Synced says whether any of volumes is copied back.
func Synced(volumes []spec.Volume) bool {
	for _, v := range volumes {
		if v.Sync {
			return true
		}
	}
	return false
}
