package disks

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/store"
)

// diskUser is a VM that has a disk itself, not a copy of it.
type diskUser struct {
	vm    *smartvm.Machine
	alive bool // it may be running
}

// diskUsers finds the VMs of a host that have the disk at path.
func diskUsers(ctx context.Context, h *smartvm.Host, path string) ([]diskUser, error) {
	disk, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	all, err := h.Machines(ctx)
	if err != nil {
		return nil, err
	}
	var users []diskUser
	for _, m := range all {
		ids := devicesAt(m.Spec(), disk)
		if len(ids) == 0 {
			continue
		}
		i, err := m.Inspect(ctx)
		if errors.Is(err, smartvm.ErrNotFound) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(ids, func(id string) bool { _, staged := i.Staged[id]; return !staged }) {
			users = append(users,
				diskUser{m, !slices.Contains([]smartvm.State{smartvm.Stopped, smartvm.Failed, smartvm.Lost}, i.State)})
		}
	}
	return users, nil
}

// devicesAt are the ids of the drives and pmem devices that are a disk.
func devicesAt(s smartvm.Spec, disk fs.FileInfo) (ids []string) {
	is := func(path string) bool {
		fi, err := os.Stat(path)
		return err == nil && os.SameFile(fi, disk)
	}
	for _, d := range s.Drives {
		if is(d.PathOnHost) {
			ids = append(ids, d.DriveID)
		}
	}
	for _, d := range s.Pmem {
		if is(d.PathOnHost) {
			ids = append(ids, d.ID)
		}
	}
	return ids
}

// unused is for volume.Options.InUse of what only reads a disk: no VM may write it.
func unused(ctx context.Context, h *smartvm.Host) func(path string) error {
	return func(path string) error {
		fi, err := os.Stat(path)
		if err != nil {
			return err
		}
		vms, err := store.Open(h.RuntimeDir())
		if err != nil {
			return err
		}
		id := vms.Holder("drive", store.DriveName(fi))
		if id == "" {
			return nil
		}
		name := id
		if m, err := h.Machine(ctx, id); err == nil {
			name = cmp.Or(m.Name(), id)
		}
		return hint.Add(fmt.Errorf("%w: VM %s uses it", smartvm.ErrState, name), "smartvm stop %s first", name)
	}
}

// unread is the same of what changes a disk: no VM that runs may have it. With stopped, none at
// all.
func unread(ctx context.Context, h *smartvm.Host, stopped bool) func(path string) error {
	return func(path string) error {
		if err := unused(ctx, h)(path); err != nil {
			return err
		}
		users, err := diskUsers(ctx, h, path)
		if err != nil {
			return err
		}
		for _, u := range users {
			name := cmp.Or(u.vm.Name(), u.vm.ID())
			if u.alive {
				return hint.Add(fmt.Errorf("%w: VM %s uses it", smartvm.ErrState, name), "smartvm stop %s first", name)
			}
			if stopped {
				return hint.Add(fmt.Errorf("%w: VM %s, which is stopped, uses it", smartvm.ErrState, name),
					"smartvm rm %s first; with -f the disk goes, and the VM cannot start any more", name)
			}
		}
		return nil
	}
}
