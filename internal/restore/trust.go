package restore

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/snapshot"
)

// Check says which devices make no sense: their ids are names of files, and relative paths are
// below the data directory. Files says whether the snapshot has a file. The error is
// snapshot.ErrDamaged.
func (s *Saved) Check(files map[string]snapshot.File) error {
	var ids []string
	paths := slices.Clone(s.Images)
	for _, d := range s.Spec.Drives {
		ids, paths = append(ids, d.DriveID), append(paths, d.PathOnHost)
	}
	for _, d := range s.Spec.Pmem {
		ids, paths = append(ids, d.ID), append(paths, d.PathOnHost)
	}
	for _, path := range paths {
		if !filepath.IsAbs(path) && !filepath.IsLocal(path) {
			return fmt.Errorf("%w: path %q", snapshot.ErrDamaged, path)
		}
	}
	for _, n := range s.Spec.NetworkInterfaces {
		ids = append(ids, n.IfaceID)
	}
	for _, id := range ids {
		if id == "" || strings.Trim(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_") != "" {
			return fmt.Errorf("%w: device %q", snapshot.ErrDamaged, id)
		}
	}
	for _, id := range s.Drives {
		if _, ok := files[snapshot.DrivesDir+"/"+id]; !ok || !slices.Contains(ids, id) {
			return fmt.Errorf("%w: drive %q is not in it", snapshot.ErrDamaged, id)
		}
	}
	return nil
}

// inImages says whether a path, below the data directory, is that of an image.
func inImages(path string) bool {
	return filepath.IsLocal(path) && filepath.Clean(path) == path &&
		(strings.HasPrefix(path, store.ImageDir+"/objects/") || strings.HasPrefix(path, store.BaseDir+"/"))
}

// isUsers says whether a path, below the data directory, is where users of an image say so.
func isUsers(path string) bool { return inImages(path) && filepath.Base(path) == kept.UsersDir }

// CheckUntrusted says what an imported snapshot would have of this host that its maker could have
// chosen.
func (s *Saved) CheckUntrusted(jailed bool) error {
	var errs []error
	if !jailed {
		errs = append(errs,
			errors.New("its VMM can open any file that this user can; in a jail, which root can make, it cannot"))
	}
	outside := func(id, path string, readOnly bool) {
		if !slices.Contains(s.Drives, id) && !(readOnly && inImages(path)) {
			errs = append(errs, fmt.Errorf("drive %s is %s of this host", id, path))
		}
	}
	for _, d := range s.Spec.Drives {
		outside(d.DriveID, d.PathOnHost, d.IsReadOnly)
	}
	for _, d := range s.Spec.Pmem {
		outside(d.ID, d.PathOnHost, d.IsReadOnly)
	}
	for _, users := range s.Images {
		if !isUsers(users) {
			errs = append(errs, fmt.Errorf("image %s is none", users))
		}
	}
	for _, n := range s.Spec.NetworkInterfaces {
		if !slices.ContainsFunc(s.Interfaces, func(i attach.Interface) bool { return i.ID == n.IfaceID }) {
			errs = append(errs, fmt.Errorf("interface %s is on TAP %s of this host", n.IfaceID, n.HostDevName))
		}
	}
	return errors.Join(errs...)
}
