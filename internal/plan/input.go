package plan

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
)

// Host is what a plan depends on that is the same for all VMs of a host.
type Host struct {
	Store    *store.Store
	StageDir string         // beside the data directory, for drives that can be reflinked there
	Limits   flatten.Limits // of what Volumes hold
}

// Input is everything that a plan depends on: a VM's record, and what its host has answered.
type Input struct {
	*Record
	Host
	reflinks map[string]bool         // by path: a copy can be a reflink
	inodes   map[string]string       // of files that are written in place, by path: their lease
	owners   map[string]*stage.Owner // of those, by path, which must be lent to the jail's user
}

// Look asks the host about what the record names. With a jailer it proposes a user id where the
// record has none yet.
func (h Host) Look(rec *Record) (*Input, error) {
	in := &Input{
		Record: rec, Host: h, reflinks: map[string]bool{}, inodes: map[string]string{},
		owners: map[string]*stage.Owner{},
	}
	if r := rec.Restored; r != nil {
		in.StageDir = r.StageDir // not every process has the data directory in its options
	}
	if rec.Jailer != "" {
		rec.UID = cmp.Or(rec.UID, store.UID(h.Store.Path(), rec.ID, 0))
	}
	for _, d := range in.Devices() {
		if d.Staged {
			if rec.Staged == nil {
				in.reflinks[d.path] = stage.CanReflink(d.path, in.StageDir)
			}
			continue
		}
		if d.ReadOnly {
			continue
		}
		fi, err := os.Stat(d.path)
		if err != nil {
			return nil, fmt.Errorf("look at drive %s: %w", d.ID, err)
		}
		in.inodes[d.path] = store.DriveName(fi)
		if rec.Jailer == "" || !fi.Mode().IsRegular() {
			continue // a block device gets a node of its own in the jail
		}
		if in.owners[d.path], err = stage.NewOwner(d.path, in.inodes[d.path], rec.UID); err != nil {
			return nil, fmt.Errorf("look at drive %s: %w", d.ID, err)
		}
	}
	return in, nil
}

// Lease takes what other VMs may take first, and completes the record by it: the jail's user id,
// and addresses, of which the guest is told. It comes before Plan.
func (in *Input) Lease(ctx context.Context, do attach.Do) error {
	if in.Jailer != "" {
		err := do(ctx, in.leaseUID())
		for i := uint32(1); errors.Is(err, fs.ErrExist) && i < store.UIDs; i++ {
			in.UID = store.UID(in.Store.Path(), in.ID, i)
			err = do(ctx, in.leaseUID())
		}
		if err != nil {
			return err
		}
	}
	if len(in.Interfaces) == 0 {
		return nil
	}
	if err := attach.Address(ctx, attach.VM{ID: in.ID, Store: in.Store}, in.Interfaces, do); err != nil {
		return err
	}
	var guest *guest.Boot
	if in.HasAgent() {
		guest = in.Boot.Guest
	}
	if in.Restored != nil {
		if err := in.readdress(); err != nil || guest == nil { // a restored kernel reads no command line
			return err
		}
	}
	return attach.Tell(&in.Spec, guest, in.Interfaces)
}

// readdress looks at the addresses that a restored VM has got. A guest without an agent cannot be
// told of others.
func (in *Input) readdress() error {
	for i := range in.Spec.NetworkInterfaces {
		n := &in.Spec.NetworkInterfaces[i]
		if at := slices.IndexFunc(in.Interfaces, func(i attach.Interface) bool {
			return i.ID == n.IfaceID
		}); at >= 0 && !n.Namespace {
			n.GuestMAC = in.Interfaces[at].MAC
		}
	}
	if len(attach.Rekey(in.Restored.Was, in.Interfaces)) > 0 && !in.HasAgent() {
		return hint.Add(
			fmt.Errorf("%w: another VM has the addresses of this one, and no agent in its guest can be told of others",
				spec.ErrNotSupported),
			"stop the other; or make VMs of which there are to be several with --net netns: there addresses may be the same")
	}
	return nil
}

func (in *Input) leaseUID() *store.Lease { return in.Store.Lease("uid", strconv.Itoa(in.UID), in.ID) }

// Device is a drive or pmem device, as far as staging goes.
type Device struct {
	ID         string
	Source     string // what the VMM opens: the file that was named, or its copy
	ReadOnly   bool
	Staged     bool
	Reflinking bool

	path      string
	ephemeral *bool
}

// Devices are the VM's drives and pmem devices, in this order.
func (in *Input) Devices() []Device {
	var all []Device
	for _, d := range in.Spec.Drives {
		all = append(all, Device{ID: d.DriveID, path: d.PathOnHost, ReadOnly: d.IsReadOnly, ephemeral: d.Ephemeral})
	}
	for _, d := range in.Spec.Pmem {
		all = append(all, Device{ID: d.ID, path: d.PathOnHost, ReadOnly: d.IsReadOnly, ephemeral: d.Ephemeral})
	}
	for i := range all {
		d := &all[i]
		d.Source = d.path
		if d.Staged = stage.Wanted(in.Ephemeral, d.ReadOnly, d.ephemeral); !d.Staged {
			continue
		}
		dir := filepath.Join(in.Store.Dir(in.ID), store.DriveDir)
		if in.reflinks[d.path] {
			dir = in.reflinkDir()
		}
		d.Source = cmp.Or(in.Staged[d.ID].Path, filepath.Join(dir, d.ID))
		d.Reflinking = filepath.Dir(d.Source) == in.reflinkDir()
	}
	return all
}

func (in *Input) reflinkDir() string { return filepath.Join(in.StageDir, in.ID+"-"+in.Nonce) }
