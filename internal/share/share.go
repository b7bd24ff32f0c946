// Package share gives a guest copies of directories and files of the host, and brings back what the guest has changed in them.
//
// The copies are an image of a file system of their own; what the guest writes lies on another drive, as layers of overlayfs. So what has
// changed is known without comparing anything, and the host never mounts, or reads, a file system that a guest has written: a VM
// does that, and sends it as a tar archive.
package share

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/spec"
)

// Resolve makes the volumes of a spec absolute, without symbolic links, and returns what is wrong with them as *spec.FieldErrors. The
// slice is made anew.
func Resolve(s *spec.Spec) (errs []error) {
	s.Volumes = append([]spec.Volume(nil), s.Volumes...)
	for i := range s.Volumes {
		v := &s.Volumes[i]
		if err := resolve(v); err != nil {
			reason := err
			if pe, ok := errors.AsType[*fs.PathError](err); ok { // its path is the value
				reason = pe.Err
			}
			errs = append(errs, &spec.FieldError{Path: fmt.Sprintf("volumes[%d].source", i), Value: v.Source, Reason: reason.Error(), Err: err})
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
func Guest(volumes []spec.Volume) (all []agentproto.Volume) {
	for _, v := range volumes {
		fi, err := os.Stat(v.Source)
		all = append(all, agentproto.Volume{Target: v.Target, ReadOnly: v.ReadOnly, IsFile: err == nil && !fi.IsDir()})
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

// Image is the file with the copies, an effect.
type Image struct {
	Path    string        `json:"path"` // in a directory of ours
	Volumes []spec.Volume `json:"volumes"`
}

// Apply makes it. It is refused before it would fill its file system.
func (i *Image) Apply(ctx context.Context) error {
	trees := make([]flatten.Tree, len(i.Volumes))
	for n, v := range i.Volumes {
		dir, file := v.Source, ""
		if fi, err := os.Stat(v.Source); err != nil {
			return fmt.Errorf("copy volume: %w", err)
		} else if !fi.IsDir() {
			dir, file = filepath.Dir(v.Source), filepath.Base(v.Source)
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			return fmt.Errorf("copy volume: %w", err)
		}
		defer root.Close()
		trees[n] = flatten.Tree{Root: root, As: strconv.Itoa(n), File: file, Name: agentproto.VolumeFile, Dirs: i.inside(n), Live: true}
	}
	if err := i.space(trees); err != nil {
		return fmt.Errorf("copy volume: %w", err)
	}
	// A VMM in a jail is another user; others do not come as far as here.
	f, err := os.OpenFile(i.Path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return fmt.Errorf("copy volume: %w", err)
	}
	if err := errors.Join(flatten.TreesToExt4(ctx, trees, f), f.Chmod(0o644), f.Close()); err != nil {
		return fmt.Errorf("copy volume: %w", err)
	}
	return nil
}

// inside are the places of other volumes in the n-th.
func (i *Image) inside(n int) (dirs []string) {
	for _, v := range i.Volumes {
		rel, ok := strings.CutPrefix(v.Target, i.Volumes[n].Target+"/")
		if !ok {
			continue
		}
		if fi, err := os.Stat(v.Source); err == nil && !fi.IsDir() {
			rel = filepath.Dir(rel) // the guest makes the file
		}
		if rel != "." {
			dirs = append(dirs, rel)
		}
	}
	return dirs
}

// space says whether there is room for what is in trees. That more comes meanwhile shows when it does not fit.
func (i *Image) space(trees []flatten.Tree) error {
	var need int64
	for _, t := range trees {
		err := fs.WalkDir(t.Root.FS(), cmp.Or(t.File, "."), func(_ string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return ignoreGone(err)
			}
			fi, err := d.Info()
			if err == nil {
				need += fi.Sys().(*syscall.Stat_t).Blocks * 512
			}
			return ignoreGone(err)
		})
		if err != nil {
			return err
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(i.Path), &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; need > free {
		return &stage.SpaceError{Source: trees[0].Root.Name(), Dir: filepath.Dir(i.Path), Need: need, Free: free}
	}
	return nil
}

func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Revert removes the image.
func (i *Image) Revert(context.Context) error {
	if err := os.Remove(i.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove copies of volumes: %w", err)
	}
	return nil
}
