package smartvm

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/snapshot"
	"push.rocks/smartvm/internal/store"
)

// whole says what of the devices makes no sense: their ids are names of files.
func (from *origin) whole() error {
	s := &from.saved
	var ids []string
	for _, d := range s.Spec.Drives {
		ids = append(ids, d.DriveID)
	}
	for _, d := range s.Spec.Pmem {
		ids = append(ids, d.ID)
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
		if _, ok := from.Files[snapshot.DrivesDir+"/"+id]; !ok || !slices.Contains(ids, id) {
			return fmt.Errorf("%w: drive %q is not in it", snapshot.ErrDamaged, id)
		}
	}
	return nil
}

// harmless says what an imported snapshot would have of this host that its maker could have chosen.
func (from *origin) harmless() error {
	s := &from.saved
	var errs []error
	if from.host.opts.Launcher != LaunchJailed {
		errs = append(errs, errors.New("its VMM can open any file that this user can; in a jail, which root can make, it cannot"))
	}
	inImages := func(path string) bool {
		return filepath.IsLocal(path) && filepath.Clean(path) == path && (strings.HasPrefix(path, store.ImageDir+"/objects/") || strings.HasPrefix(path, store.BaseDir+"/"))
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
		if !inImages(users) || filepath.Base(users) != filepath.Base(from.UsersDir()) {
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
