package restore

import (
	"cmp"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/snapshot"
	"push.rocks/smartvm/spec"
)

// Origin is a snapshot that VMs start from, which has been checked, and where they do.
type Origin struct {
	Snapshot    *snapshot.Snapshot
	Saved       *Saved
	Firecracker firecracker.Version
	Metadata    json.RawMessage // of the snapshot's VM, if it has MMDS
	Untrusted   bool            // its maker may have had anything in mind

	Host     plan.Host
	Data     Data
	Networks *catalog.Store
}

// Options say how a VM differs from the one that the snapshot was made of.
type Options struct {
	ID, Name, Hostname string // empty: a random one; none; Name, else ID
	Labels             map[string]string
	Ports              []spec.Port
	Policy             *policy.Policy  // nil: as before
	Metadata           json.RawMessage // nil: as before
	HugePages          string          // None, Transparent or 2M; empty: as before
	UFFD               bool            // it gets its memory by userfaultfd
	Paused             bool            // it is left so when it has started
	Anew               bool            // its network identity is never that of the snapshot's VM
}

// Record says what a restored VM is. Which VMM starts it, and how, is not in it yet.
func (o *Origin) Record(v Options) (*plan.Record, error) {
	s, rec := o.Saved, plan.New(v.ID)
	rec.Ephemeral = true
	rec.Restored = &plan.Restored{
		Snapshot: o.Snapshot.ID, Dir: o.Snapshot.Dir(), StageDir: o.Host.StageDir,
		Was: s.Interfaces, Hook: s.Hook,
	}
	load := &rec.Restored.Load
	load.Paused, load.Balloon, load.HugePages = v.Paused, s.Balloon, v.HugePages
	params := firecracker.SnapshotLoadParams{HugePages: firecracker.HugePages(v.HugePages)}
	if err := firecracker.CheckVersion(o.Firecracker, params); err != nil {
		return nil, hint.Add(fmt.Errorf("%w: %w", spec.ErrNotSupported, err),
			"without a choice of huge pages it has those of the snapshot's VM")
	}
	if v.UFFD {
		load.MemorySocket = store.MemorySocket
		if !o.Firecracker.AtLeast(firecracker.Version{Major: 1, Minor: 12}) { // it would hang with its server, not end
			return nil, fmt.Errorf("%w: memory by userfaultfd with Firecracker %s, which is older than 1.12",
				spec.ErrNotSupported, o.Firecracker)
		}
	}
	rec.Spec = o.spec(rec.ID, v)
	if err := validate(&rec.Spec); err != nil {
		return nil, err
	}
	rec.Boot = &plan.Boot{Users: []string{o.Snapshot.UsersDir()}}
	for _, users := range s.Images {
		rec.Boot.Users = append(rec.Boot.Users, o.Data.local(users))
	}
	if s.Guest != nil {
		guest := *s.Guest
		guest.Hostname, guest.MachineID = cmp.Or(v.Hostname, v.Name, rec.ID), plan.RandomHex(16)
		rec.Boot.Guest = &guest
	}
	if load.Metadata = o.Metadata; rec.Spec.MMDS != nil && v.Metadata != nil {
		load.Metadata = v.Metadata
	}
	return rec, o.interfaces(rec, v.Anew)
}

// spec is the VM's configuration, from that of the snapshot's.
func (o *Origin) spec(id string, v Options) spec.Spec {
	s := o.Saved.Spec
	s.Drives, s.Pmem = slices.Clone(s.Drives), slices.Clone(s.Pmem)
	s.ID, s.Name, s.Hostname, s.Ports = id, v.Name, v.Hostname, v.Ports
	s.MachineConfig.HugePages = cmp.Or(v.HugePages, s.MachineConfig.HugePages)
	if v.Labels != nil {
		s.Labels = v.Labels
	}
	if v.Policy != nil {
		s.Policy = v.Policy
	}
	s.Logger, s.Metrics = nil, nil // files of the user's, which are another VM's
	// what was in them is in the memory and the drives
	s.Volumes, s.NamedVolumes, s.Secrets, s.EnvFiles = nil, nil, nil, nil
	if s.Vsock != nil {
		s.Vsock = &spec.Vsock{GuestCID: s.Vsock.GuestCID}
	}
	at := func(device, path string) string {
		if slices.Contains(o.Saved.Drives, device) {
			return o.Snapshot.Path(filepath.Join(snapshot.DrivesDir, device))
		}
		return o.Data.local(path)
	}
	for i := range s.Drives {
		d := &s.Drives[i]
		d.Ephemeral, d.PathOnHost = nil, at(d.DriveID, d.PathOnHost)
	}
	for i := range s.Pmem {
		d := &s.Pmem[i]
		d.Ephemeral, d.PathOnHost = nil, at(d.ID, d.PathOnHost)
	}
	return s
}

// validate checks what is new. The rest was checked when the snapshot's VM was made, and has been
// completed since.
func validate(s *spec.Spec) error {
	fresh := spec.Spec{
		ID: s.ID, Name: s.Name, Hostname: s.Hostname, Labels: s.Labels, Ports: s.Ports, Policy: s.Policy,
		MachineConfig: s.MachineConfig, BootSource: spec.BootSource{KernelImagePath: "restored"},
	}
	for _, n := range s.NetworkInterfaces {
		fresh.NetworkInterfaces = append(fresh.NetworkInterfaces, spec.NetworkInterface{IfaceID: n.IfaceID})
	}
	return fresh.Validate()
}

// interfaces decides what is behind the interfaces.
func (o *Origin) interfaces(rec *plan.Record, anew bool) (err error) {
	was := rec.Restored.Was
	taps := attach.Anew(&rec.Spec, was)
	rec.Restored.Load.Taps = taps
	rec.Interfaces,
		err = attach.Resolve(attach.VM{ID: rec.ID, Nonce: rec.Nonce, Store: o.Host.Store}, &rec.Spec, o.Networks)
	if err != nil {
		return err
	}
	if !anew && !o.Untrusted {
		attach.Wish(rec.Interfaces, was)
	}
	for _, i := range rec.Spec.NetworkInterfaces {
		if taps[i.IfaceID] == i.HostDevName {
			delete(taps, i.IfaceID)
		} else if taps[i.IfaceID] != "" {
			taps[i.IfaceID] = i.HostDevName
		}
	}
	if len(taps) == 0 {
		return nil
	}
	load := firecracker.SnapshotLoadParams{NetworkOverrides: make([]firecracker.NetworkOverride, 1)}
	if err := firecracker.CheckVersion(o.Firecracker, load); err != nil {
		return hint.Add(fmt.Errorf("%w: %w", spec.ErrNotSupported, err),
			"make VMs of which there are to be snapshots with --net netns: there the name is always the same")
	}
	return nil
}
