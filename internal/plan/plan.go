package smartvm

import (
	"bytes"
	"cmp"
	"encoding/json"
	"path/filepath"
	"slices"
	"strconv"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/cgroup"
	"push.rocks/smartvm/internal/configure"
	"push.rocks/smartvm/internal/journal"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/snapshot"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
)

// proposal is what a host offers to one VM: everything a plan needs that is not in the Spec.
type proposal struct {
	id, nonce string
	store     *store.Store
	stageDir  string // beside the data directory, for drives that can be reflinked there
	binary    string
	jailer    string                  // "": started directly
	uid       int                     // with a jailer
	cgroup    string                  // "": no control group
	ephemeral bool                    // the host's ephemeralWritableDrives
	extract   bool                    // the kernel is a bzImage
	copies    map[string]StagedDrive  // that were made, by drive id
	reflinks  map[string]bool         // by path: a copy can be a reflink
	inodes    map[string]string       // of files that are written in place, by path: their lease
	owners    map[string]*stage.Owner // of those, by path, who must be lent to the jail's user
	boot      *boot                   // of a VM with an image
	secrets   *Secrets                // of its first start
	restored  *restored               // of a VM that starts from a snapshot
	version   firecracker.Version
	limits    flatten.Limits // of what Volumes hold

	interfaces []attach.Interface
}

// plan is what making and starting a VM does to the host, in order, and what the VMM is told. Making one has
// no effects.
type plan struct {
	Create []journal.Effect
	Run    []journal.Effect
	Calls  []configure.Call
	config vmm.Config
}

// device is a drive or pmem device, as far as staging goes.
type device struct {
	id, path           string
	readOnly, isPmem   bool
	ephemeral          *bool
	staged, reflinking bool
	source             string // what the VMM opens: the path, or its copy
}

func devices(s *Spec, p *proposal) []device {
	var all []device
	for _, d := range s.Drives {
		all = append(all, device{id: d.DriveID, path: d.PathOnHost, readOnly: d.IsReadOnly, ephemeral: d.Ephemeral})
	}
	for _, d := range s.Pmem {
		all = append(all, device{id: d.ID, path: d.PathOnHost, readOnly: d.IsReadOnly, ephemeral: d.Ephemeral, isPmem: true})
	}
	for i := range all {
		d := &all[i]
		d.source = d.path
		if d.staged = stage.Wanted(p.ephemeral, d.readOnly, d.ephemeral); !d.staged {
			continue
		}
		dir := filepath.Join(p.store.Dir(p.id), store.DriveDir)
		if p.reflinks[d.path] {
			dir = p.reflinkDir()
		}
		d.source = cmp.Or(p.copies[d.id].Path, filepath.Join(dir, d.id))
		d.reflinking = filepath.Dir(d.source) == p.reflinkDir()
	}
	return all
}

func (p *proposal) reflinkDir() string { return filepath.Join(p.stageDir, p.id+"-"+p.nonce) }

// makePlan is pure: the same spec and proposal give the same plan.
func makePlan(s *Spec, p *proposal) *plan {
	dir := p.store.Dir(p.id)
	run := filepath.Join(dir, store.RunDir)
	uid := -1
	pl := &plan{config: vmm.Config{ID: p.id, Binary: p.binary, Dir: run, Cgroup: p.cgroup}}
	if p.jailer != "" {
		uid = p.uid
		pl.config.Jailer = &vmm.Jailer{Binary: p.jailer, UID: uid}
		pl.Create = append(pl.Create, p.store.Lease("uid", strconv.Itoa(uid), p.id)) // first: what follows depends on it
	}
	if s.Name != "" {
		pl.Create = append(pl.Create, p.store.Lease("name", s.Name, p.id))
	}
	pl.Create = append(pl.Create, p.boot.effects(dir, p.id+"-"+p.nonce, p.restored)...)
	pl.Run = append(pl.Run, &stage.Tree{Path: run})
	copies := &pl.Create
	if p.restored != nil {
		copies = &pl.Run // each start finds them as the snapshot has them
	}
	devs := devices(s, p)
	for _, t := range []struct {
		path    string
		reflink bool
	}{{filepath.Join(dir, store.DriveDir), false}, {p.reflinkDir(), true}} {
		if slices.ContainsFunc(devs, func(d device) bool { return d.staged && d.reflinking == t.reflink }) {
			*copies = append(*copies, &stage.Tree{Path: t.path})
		}
	}
	if len(s.Volumes) > 0 {
		image := &share.Image{Path: filepath.Join(dir, store.VolumeFile), Volumes: s.Volumes, Named: s.NamedVolumes, Limits: p.limits}
		if share.Synced(s.Volumes) {
			image.Copied = filepath.Join(dir, store.CopiedFile)
		}
		pl.Run = append(pl.Run, image)
	}
	pl.kernel(s, p)
	for _, d := range devs {
		pl.config.Items = append(pl.config.Items, stage.Item{Source: d.source, Name: configure.DevicePath(d.id), Writable: !d.readOnly || d.staged})
		switch {
		case d.staged:
			*copies = append(*copies, &stage.File{Source: d.path, Target: d.source, UID: uid})
		case !d.readOnly:
			pl.Run = append(pl.Run, p.store.Drive(d.path, p.inodes[d.path], p.id))
			if owner := p.owners[d.path]; owner != nil {
				pl.Run = append(pl.Run, owner)
			}
		}
	}
	if s.Vsock != nil && s.Vsock.UDSPath != "" {
		pl.Run = append(pl.Run, &stage.Link{Path: s.Vsock.UDSPath, Target: filepath.Join(pl.config.Root(), store.VsockFile)})
	}
	vm := attach.VM{ID: p.id, Nonce: p.nonce, Store: p.store, UID: max(uid, 0)}
	pl.Run = append(pl.Run, attach.Effects(vm, p.interfaces, s)...)
	if p.cgroup != "" {
		pl.Run = append(pl.Run, &cgroup.Group{Path: p.cgroup})
	}
	if len(p.interfaces) > 0 {
		pl.config.NetNS = p.interfaces[0].File
	}
	pl.config.Log = vmm.LogOptions{}
	if l := s.Logger; l != nil {
		pl.config.Log = vmm.LogOptions{Level: l.Level, ShowLevel: l.ShowLevel, ShowOrigin: l.ShowLogOrigin}
	}
	pl.Calls = configure.Calls(s, p.version)
	if p.restored != nil {
		pl.Calls = configure.RestoreCalls(s, &p.restored.Load, p.version)
	}
	return pl
}

// kernel gives the VMM what it boots, or is restored from.
func (pl *plan) kernel(s *Spec, p *proposal) {
	item := func(source, name string) {
		pl.config.Items = append(pl.config.Items, stage.Item{Source: source, Name: name})
	}
	if r := p.restored; r != nil {
		item(filepath.Join(r.Dir, snapshot.StateFile), filepath.Join(store.RestoreDir, snapshot.StateFile))
		if r.Load.MemorySocket == "" {
			item(filepath.Join(r.Dir, snapshot.MemoryFile), filepath.Join(store.RestoreDir, snapshot.MemoryFile))
		}
		return
	}
	image := s.BootSource.KernelImagePath
	if p.extract {
		image = filepath.Join(p.store.Dir(p.id), store.KernelFile)
		pl.Create = append(pl.Create, &kernel.Extracted{Source: s.BootSource.KernelImagePath, Target: image})
	}
	item(image, store.KernelFile)
	if s.BootSource.InitrdPath != "" {
		item(s.BootSource.InitrdPath, store.InitrdFile)
	}
}

// effects say that a VM uses its image, and write down what its guest is told.
func (b *boot) effects(dir, vm string, r *restored) []journal.Effect {
	if b == nil {
		return nil
	}
	var all []journal.Effect
	for _, users := range b.Users {
		all = append(all, &stage.Link{Path: filepath.Join(users, vm), Target: dir})
	}
	if b.Guest != nil && r == nil { // a restored guest has read it
		block, _ := b.Guest.Encode() // was done before
		all = append(all, &stage.Content{Path: filepath.Join(dir, store.GuestFile), Text: string(bytes.TrimRight(block, "\x00")), Size: int64(len(block))})
	}
	return all
}

// MarshalJSON is what --dry-run prints.
func (pl *plan) MarshalJSON() ([]byte, error) {
	type step struct {
		Kind   string         `json:"kind"`
		Effect journal.Effect `json:"effect"`
	}
	steps := func(all []journal.Effect) ([]step, error) {
		list := []step{}
		for _, e := range all {
			kind, err := effects.Name(e)
			if err != nil {
				return nil, err
			}
			list = append(list, step{kind, e})
		}
		return list, nil
	}
	create, err := steps(pl.Create)
	if err != nil {
		return nil, err
	}
	run, err := steps(append(slices.Clip(pl.Run), vmm.New(&pl.config)))
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		Create []step           `json:"create"`
		Run    []step           `json:"run"`
		Argv   []string         `json:"argv"`
		Calls  []configure.Call `json:"calls"`
	}{create, run, pl.config.Argv(), pl.Calls})
}
