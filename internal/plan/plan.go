package plan

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/cgroup"
	"push.rocks/smartvm/internal/configure"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/snapshot"
)

// Plan is what making and starting a VM does to the host, in order, and what the VMM is told.
// Making a plan has no effects.
type Plan struct {
	Create []journal.Effect
	Run    []journal.Effect
	Calls  []configure.Call
	Config vmm.Config

	leased []journal.Effect // before Create: see Input.Lease
}

// Plan is pure: the same input gives the same plan.
func (in *Input) Plan() *Plan {
	s, dir, uid := &in.Spec, in.Store.Dir(in.ID), -1
	run := filepath.Join(dir, store.RunDir)
	pl := &Plan{
		Config: vmm.Config{ID: in.ID, Binary: in.Binary, Dir: run, Cgroup: in.Cgroup, PCI: s.PCI, Log: vmm.LogOptions{}},
	}
	if in.Jailer != "" {
		uid = in.UID
		pl.Config.Jailer = &vmm.Jailer{Binary: in.Jailer, UID: uid}
		pl.leased = append(pl.leased, in.leaseUID())
	}
	if s.Name != "" {
		pl.Create = append(pl.Create, in.Store.Lease("name", s.Name, in.ID))
	}
	pl.Create = append(pl.Create, in.boot()...)
	pl.Run = append(pl.Run, &stage.Tree{Path: run})
	devices := in.Devices()
	copies := &pl.Create
	if in.Restored != nil {
		copies = &pl.Run // each start finds them as the snapshot has them
	}
	*copies = append(*copies, in.trees(devices)...)
	if len(s.Volumes) > 0 {
		image := &share.Image{
			Path: filepath.Join(dir, store.VolumeFile), Volumes: s.Volumes, Named: s.NamedVolumes,
			Limits: in.Limits,
		}
		if share.Synced(s.Volumes) {
			image.Copied = filepath.Join(dir, store.CopiedFile)
		}
		pl.Run = append(pl.Run, image)
	}
	pl.kernel(in)
	for _, d := range devices {
		pl.Config.Items = append(pl.Config.Items, stage.Item{
			Source: d.Source, Name: configure.DevicePath(d.ID), Writable: !d.ReadOnly || d.Staged, File: in.inodes[d.Source],
		})
		switch {
		case d.Staged:
			*copies = append(*copies, &stage.File{Source: d.path, Target: d.Source, UID: uid})
		case !d.ReadOnly:
			pl.Run = append(pl.Run, in.Store.Drive(d.path, in.inodes[d.path], in.ID))
			if owner := in.owners[d.path]; owner != nil {
				pl.Run = append(pl.Run, owner)
			}
		}
	}
	if s.Vsock != nil && s.Vsock.UDSPath != "" {
		pl.Run = append(pl.Run, &stage.Link{Path: s.Vsock.UDSPath, Target: filepath.Join(pl.Config.Root(), store.VsockFile)})
	}
	vm := attach.VM{ID: in.ID, Nonce: in.Nonce, Store: in.Store, UID: max(uid, 0)}
	pl.Run = append(pl.Run, attach.Effects(vm, in.Interfaces, s)...)
	if in.Cgroup != "" {
		pl.Run = append(pl.Run, &cgroup.Group{Path: in.Cgroup})
	}
	if len(in.Interfaces) > 0 {
		pl.Config.NetNS = in.Interfaces[0].File
	}
	if l := s.Logger; l != nil {
		pl.Config.Log = vmm.LogOptions{Level: l.Level, ShowLevel: l.ShowLevel, ShowOrigin: l.ShowLogOrigin}
	}
	pl.Calls = configure.Calls(s, in.VMM())
	if in.Restored != nil {
		pl.Calls = configure.RestoreCalls(s, &in.Restored.Load, in.VMM())
	}
	return pl
}

// trees are the directories of the copies of drives.
func (in *Input) trees(devices []Device) (all []journal.Effect) {
	for _, t := range []struct {
		path    string
		reflink bool
	}{{filepath.Join(in.Store.Dir(in.ID), store.DriveDir), false}, {in.reflinkDir(), true}} {
		if slices.ContainsFunc(devices, func(d Device) bool { return d.Staged && d.Reflinking == t.reflink }) {
			all = append(all, &stage.Tree{Path: t.path})
		}
	}
	return all
}

// kernel gives the VMM what it boots, or is restored from.
func (pl *Plan) kernel(in *Input) {
	item := func(source, name string) {
		pl.Config.Items = append(pl.Config.Items, stage.Item{Source: source, Name: name})
	}
	if r := in.Restored; r != nil {
		item(filepath.Join(r.Dir, snapshot.StateFile), filepath.Join(store.RestoreDir, snapshot.StateFile))
		if r.Load.MemorySocket == "" {
			item(filepath.Join(r.Dir, snapshot.MemoryFile), filepath.Join(store.RestoreDir, snapshot.MemoryFile))
		}
		return
	}
	boot := in.Spec.BootSource
	image := boot.KernelImagePath
	if in.Extract {
		image = filepath.Join(in.Store.Dir(in.ID), store.KernelFile)
		pl.Create = append(pl.Create, &kernel.Extracted{Source: boot.KernelImagePath, Target: image})
	}
	item(image, store.KernelFile)
	if boot.InitrdPath != "" {
		item(boot.InitrdPath, store.InitrdFile)
	}
}

// boot has the VM say that it uses its image, and writes down what its guest is told.
func (in *Input) boot() (all []journal.Effect) {
	if in.Boot == nil {
		return nil
	}
	dir := in.Store.Dir(in.ID)
	for _, users := range in.Boot.Users {
		all = append(all, &stage.Link{Path: filepath.Join(users, in.ID+"-"+in.Nonce), Target: dir})
	}
	if in.Boot.Guest != nil && in.Restored == nil { // a restored guest has read it
		block, _ := in.Boot.Guest.Encode() // was done before
		all = append(all,
			&stage.Content{
				Path: filepath.Join(dir, store.GuestFile), Text: string(bytes.TrimRight(block, "\x00")),
				Size: int64(len(block)),
			})
	}
	return all
}

// MarshalJSON is what --dry-run prints.
func (pl *Plan) MarshalJSON() ([]byte, error) {
	type step struct {
		Kind   string         `json:"kind"`
		Effect journal.Effect `json:"effect"`
	}
	steps := func(all []journal.Effect) ([]step, error) {
		list := []step{}
		for _, e := range all {
			kind, err := Effects.Name(e)
			if err != nil {
				return nil, err
			}
			list = append(list, step{kind, e})
		}
		return list, nil
	}
	create, err := steps(slices.Concat(pl.leased, pl.Create))
	if err != nil {
		return nil, err
	}
	run, err := steps(append(slices.Clip(pl.Run), vmm.New(&pl.Config)))
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		Create []step           `json:"create"`
		Run    []step           `json:"run"`
		Argv   []string         `json:"argv"`
		Calls  []configure.Call `json:"calls"`
	}{create, run, pl.Config.Argv(), pl.Calls})
}
