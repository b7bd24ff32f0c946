package smartvm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/capture"
	"push.rocks/smartvm/internal/configure"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/locate"
	"push.rocks/smartvm/internal/snapshot"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/stranger"
	"push.rocks/smartvm/network/policy"
)

// RestoreOptions say how a VM that starts from a snapshot differs from the one that the snapshot was made of. The zero value serves.
type RestoreOptions struct {
	ID, Name string // as in a Spec: empty: one is made; none
	Hostname string // empty: Name, else ID
	Labels   map[string]string
	Ports    []Port         // published on the host
	Policy   *policy.Policy // what the guest may reach; nil: as before
	// Metadata replaces that of the snapshot, if the VM has MMDS.
	Metadata json.RawMessage
	// Memory says how it gets its memory. Empty: MemoryFile, or MemoryUFFD for large pages.
	Memory Memory
	// Trust takes an imported snapshot for one of this host's own. Without, its VM needs a jail, and gets nothing of this host but images.
	Trust bool
	// Paused leaves the VM paused when it is started: Resume lets it go on at once.
	Paused bool

	anew bool // its network identity is never that of the snapshot's VM
}

// restored is what is different about a VM that starts from a snapshot.
type restored struct {
	Load     configure.Restored `json:"load"`
	Snapshot string             `json:"snapshot"` // its id
	Dir      string             `json:"dir"`      // its directory
	StageDir string             `json:"stageDir"` // where drives are staged that can be reflinked there
	Was      []attach.Interface `json:"was,omitempty"`
	Hook     string             `json:"hook,omitempty"`
}

// Restore makes a VM that starts from a snapshot, and goes on from there each time that it is started. It has drives of its own, as
// they were; another id, host name and machine id, and what tells random numbers apart; and the addresses of the snapshot's VM where they
// are free. Its guest's programs do not run before it knows. Returns snapshot.ErrNotFound, snapshot.ErrDamaged, and what does not match:
// see snapshot.Compatible.
func (h *Host) Restore(ctx context.Context, ref string, o RestoreOptions) (*Machine, error) {
	sn, err := h.Snapshot(ref)
	if err != nil {
		return nil, err
	}
	from, err := sn.open(ctx, o.Trust)
	if err != nil {
		return nil, err
	}
	m, lock, err := from.restore(ctx, o)
	if err == nil {
		err = lock.Unlock()
	}
	return m, errors.Join(err, from.release())
}

// origin is a snapshot that VMs are about to start from: it was looked at, and nothing that they need is removed until release.
type origin struct {
	*Snapshot
	saved    saved
	bin      locate.VMM
	metadata []byte
	stranger bool // whoever made it may have had anything in mind
	release  func() error
}

func (sn *Snapshot) open(ctx context.Context, trust bool) (_ *origin, err error) {
	all, err := sn.host.Snapshots()
	if err != nil {
		return nil, err
	}
	from := &origin{Snapshot: sn}
	if from.release, err = all.Hold(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("restore snapshot %s: %w", sn.ID, err), from.release())
		}
	}()
	if err := sn.Check(ctx); err != nil {
		return nil, err
	}
	if from.saved, err = readSaved(sn.Snapshot); err != nil {
		return nil, err
	}
	s := &from.saved
	vm := &stranger.VM{Spec: &s.Spec, Images: s.Images, Drives: s.Drives, Interfaces: s.Interfaces, Files: func(name string) bool { _, ok := sn.Files[name]; return ok }}
	if err := vm.Whole(); err != nil {
		return nil, err
	}
	if from.stranger = sn.Imported && !trust; from.stranger {
		if err := vm.Harmless(sn.host.opts.Launcher == LaunchJailed); err != nil {
			return nil, hint.Add(fmt.Errorf("%w: it was imported: %w", ErrNotSupported, err), "with --trust it is taken for one of this host's own")
		}
	}
	if err := sn.Lacks(); err != nil {
		return nil, err
	}
	if from.bin, err = sn.host.vmms.VMM(ctx); err != nil {
		return nil, err
	}
	if from.saved.Spec.MMDS != nil {
		if from.metadata, err = os.ReadFile(sn.Path(capture.MetadataFile)); err != nil {
			return nil, err
		}
	}
	return from, sn.host.compatible(&sn.Manifest, from.bin.Version)
}

// restore makes a VM. It returns the new VM's lock.
func (from *origin) restore(ctx context.Context, o RestoreOptions) (*Machine, *store.Lock, error) {
	rec, err := from.record(o)
	var p *proposal
	if err == nil {
		p, err = from.host.proposal(rec)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("restore snapshot %s: %w", from.ID, err)
	}
	return from.host.build(ctx, rec, p)
}

// record says what the restored VM is.
func (from *origin) record(o RestoreOptions) (*record, error) {
	h, s := from.host, &from.saved
	rec := &record{Version: recordVersion, Nonce: randomHex(4), Created: time.Now().UTC(), ID: cmp.Or(o.ID, randomHex(6)), Ephemeral: true}
	rec.Restored = &restored{Snapshot: from.ID, Dir: from.Dir(), StageDir: h.stageDir(), Was: s.Interfaces, Hook: s.Hook}
	rec.Restored.Load.Paused, rec.Restored.Load.Balloon = o.Paused, s.Balloon
	if o.Memory == MemoryUFFD || o.Memory == "" && from.HugePages != "" {
		rec.Restored.Load.MemorySocket = store.MemorySocket
		if !from.bin.Version.AtLeast(firecracker.Version{Major: 1, Minor: 12}) { // it would hang with who serves it, not end
			return nil, fmt.Errorf("%w: memory by userfaultfd with Firecracker %s, which is older than 1.12", ErrNotSupported, from.bin.Version)
		}
	}
	if err := from.respec(rec, o); err != nil {
		return nil, err
	}
	if err := h.launcher(rec, from.bin); err != nil {
		return nil, err
	}
	rec.Boot = &boot{Users: []string{from.UsersDir()}, release: func() error { return nil }}
	for _, users := range s.Images {
		rec.Boot.Users = append(rec.Boot.Users, h.local(users))
	}
	if s.Guest != nil {
		guest := *s.Guest
		guest.Hostname, guest.MachineID = cmp.Or(o.Hostname, o.Name, rec.ID), randomHex(16)
		rec.Boot.Guest = &guest
	}
	if rec.Restored.Load.Metadata = from.metadata; rec.Spec.MMDS != nil && o.Metadata != nil {
		rec.Restored.Load.Metadata = o.Metadata
	}
	return rec, from.resolve(rec, o)
}

// compatible says why this host cannot go on where a snapshot stopped, and warns of what may go wrong.
func (h *Host) compatible(m *snapshot.Manifest, v firecracker.Version) error {
	facts, err := h.facts()
	if m.HugePages != "" { // those that are free are others now
		facts, err = snapshot.ReadHostFacts()
	}
	if err != nil {
		return err
	}
	facts.Firecracker = v
	warnings, refusals := snapshot.Compatible(m, facts)
	for _, w := range warnings {
		h.log.Warn("restore", "snapshot", m.ID, "err", w)
	}
	if refusals != nil {
		return fmt.Errorf("%w: %w", ErrNotSupported, refusals)
	}
	return nil
}

// respec is the VM's configuration, from that of the snapshot's.
func (from *origin) respec(rec *record, o RestoreOptions) error {
	rec.Spec = from.saved.Spec
	v, kept := &rec.Spec, from.saved.Drives
	v.Drives, v.Pmem = slices.Clone(v.Drives), slices.Clone(v.Pmem)
	v.ID, v.Name, v.Hostname, v.Ports = rec.ID, o.Name, o.Hostname, o.Ports
	if o.Labels != nil {
		v.Labels = o.Labels
	}
	if o.Policy != nil {
		v.Policy = o.Policy
	}
	v.Logger, v.Metrics = nil, nil                                        // files of the user's, which are another VM's
	v.Volumes, v.NamedVolumes, v.Secrets, v.EnvFiles = nil, nil, nil, nil // what was in them is in the memory and the drives
	if v.Vsock != nil {
		v.Vsock = &Vsock{GuestCID: v.Vsock.GuestCID}
	}
	for i := range v.Drives {
		d := &v.Drives[i]
		d.Ephemeral = nil
		if slices.Contains(kept, d.DriveID) {
			d.PathOnHost = from.Path(filepath.Join(snapshot.DrivesDir, d.DriveID))
			continue
		}
		d.PathOnHost = from.host.local(d.PathOnHost)
	}
	for i := range v.Pmem {
		d := &v.Pmem[i]
		d.Ephemeral = nil
		if d.PathOnHost = from.host.local(d.PathOnHost); slices.Contains(kept, d.ID) {
			d.PathOnHost = from.Path(filepath.Join(snapshot.DrivesDir, d.ID))
		}
	}
	return validateRestored(v)
}

// validateRestored checks what is new. The rest was checked when the snapshot's VM was made, and has been completed since.
func validateRestored(v *Spec) error {
	fresh := Spec{
		ID: v.ID, Name: v.Name, Hostname: v.Hostname, Labels: v.Labels, Ports: v.Ports, Policy: v.Policy,
		MachineConfig: v.MachineConfig, BootSource: BootSource{KernelImagePath: "restored"},
	}
	for _, n := range v.NetworkInterfaces {
		fresh.NetworkInterfaces = append(fresh.NetworkInterfaces, NetworkInterface{IfaceID: n.IfaceID})
	}
	return fresh.Validate()
}

// resolve decides what is behind the interfaces.
func (from *origin) resolve(rec *record, o RestoreOptions) error {
	h := from.host
	networks, err := h.Networks()
	if err != nil {
		return err
	}
	rec.Restored.Load.Taps = attach.Anew(&rec.Spec, rec.Restored.Was)
	rec.Interfaces, err = attach.Resolve(attach.VM{ID: rec.ID, Nonce: rec.Nonce, Store: h.store}, &rec.Spec, networks)
	if err != nil {
		return err
	}
	if !o.anew && !from.stranger {
		attach.Wish(rec.Interfaces, rec.Restored.Was)
	}
	for _, i := range rec.Spec.NetworkInterfaces {
		if rec.Restored.Load.Taps[i.IfaceID] == i.HostDevName {
			delete(rec.Restored.Load.Taps, i.IfaceID)
		} else if rec.Restored.Load.Taps[i.IfaceID] != "" {
			rec.Restored.Load.Taps[i.IfaceID] = i.HostDevName
		}
	}
	if len(rec.Restored.Load.Taps) > 0 {
		load := firecracker.SnapshotLoadParams{NetworkOverrides: make([]firecracker.NetworkOverride, 1)}
		if err := firecracker.CheckVersion(from.bin.Version, load); err != nil {
			return hint.Add(fmt.Errorf("%w: %w", ErrNotSupported, err), "make VMs of which there are to be snapshots with --net netns: there the name is always the same")
		}
	}
	return nil
}

// readdress looks at the addresses that the VM has got. A guest without an agent cannot be told of others.
func (r *restored) readdress(rec *record, agent bool) error {
	for i := range rec.Spec.NetworkInterfaces {
		n := &rec.Spec.NetworkInterfaces[i]
		if at := slices.IndexFunc(rec.Interfaces, func(i attach.Interface) bool { return i.ID == n.IfaceID }); at >= 0 && !n.Namespace {
			n.GuestMAC = rec.Interfaces[at].MAC
		}
	}
	if len(attach.Rekey(r.Was, rec.Interfaces)) > 0 && !agent {
		return hint.Add(fmt.Errorf("%w: another VM has the addresses of this one, and nobody in its guest can be told of others", ErrNotSupported),
			"stop the other; or make VMs of which there are to be several with --net netns: there addresses may be the same")
	}
	return nil
}

// identity is what the guest is told.
func (m *Machine) identity() *agentproto.Identity {
	b, r := m.rec().Boot.Guest, m.rec().Restored
	return &agentproto.Identity{Hostname: b.Hostname, MachineID: b.MachineID, Interfaces: attach.Rekey(r.Was, m.rec().Interfaces), DNS: b.DNS, Hosts: b.Hosts}
}

// identifyTime bounds one try to tell a guest who it is.
const identifyTime = time.Minute

// identify tells a restored guest who it is, as soon as it listens, and writes down when that was.
func (m *Machine) identify(ctx context.Context, r *run, g *GuestState) {
	var warnings []string
	err := capture.Retry(ctx, func() (err error) {
		short, cancel := context.WithTimeout(ctx, identifyTime)
		defer cancel()
		g.Skew, warnings, err = m.guest().Identify(short, m.identity())
		return err
	})
	if err != nil {
		return // the context has ended: so has the VM
	}
	for _, w := range warnings {
		m.host.log.Warn("restored guest", "vm", m.rec().ID, "err", w)
	}
	if err := capture.RunHook(ctx, m.guest(), m.rec().Restored.Hook, capture.HookThaw); err != nil {
		m.host.log.Warn("restored guest", "vm", m.rec().ID, "err", err)
	}
	g.Agent = time.Since(r.started)
	g.Command = g.Agent
}

// ForkOptions say how VMs are made of one.
type ForkOptions struct {
	RestoreOptions     // ID, Name and Hostname get "-1" and so on added
	Concurrency    int // how many are started at once. 0: DefaultConcurrency
	// Start starts a VM. Nil: this process does, and looks after it.
	Start func(context.Context, *Machine) error
}

// DefaultConcurrency is how many VMs are started at once.
const DefaultConcurrency = 8

// Fork makes and starts n VMs that go on where a VM stopped, at once: they share its memory until they write to it. All have
// an identity of their own. If one cannot be started, none is left.
func (sn *Snapshot) Fork(ctx context.Context, n int, o ForkOptions) ([]*Machine, error) {
	if n < 1 || o.Concurrency < 0 {
		return nil, fmt.Errorf("fork snapshot %s: %d VMs, %d at once", sn.ID, n, o.Concurrency)
	}
	from, err := sn.open(ctx, o.Trust)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	all := make([]*Machine, 0, n)
	made := make(chan fork) // the next one is made while others start
	var wg sync.WaitGroup
	for range cmp.Or(o.Concurrency, DefaultConcurrency) {
		wg.Go(func() {
			for f := range made {
				if err := f.start(ctx, o.Start); err != nil {
					cancel(err)
				}
			}
		})
	}
	for i := 1; i <= n && ctx.Err() == nil; i++ {
		m, lock, err := from.restore(ctx, o.ith(i, n))
		if err != nil {
			cancel(err)
			break
		}
		all = append(all, m)
		made <- fork{m, lock}
	}
	close(made)
	wg.Wait()
	if err := from.release(); err != nil {
		cancel(err)
	}
	if ctx.Err() == nil {
		return all, nil
	}
	down := context.WithoutCancel(ctx)
	for _, m := range all {
		wg.Go(func() {
			if _, err := m.Stop(down, StopOptions{}); err != nil {
				sn.host.log.Warn("stop a fork", "vm", m.ID(), "err", err)
			}
			if err := m.vanish(down); err != nil {
				sn.host.log.Warn("remove a fork", "vm", m.ID(), "err", err)
			}
		})
	}
	wg.Wait()
	return nil, context.Cause(ctx) // what went wrong first
}

// fork is a VM that was made and is to start.
type fork struct {
	*Machine
	lock *store.Lock
}

// start gives up the lock.
func (f *fork) start(ctx context.Context, start func(context.Context, *Machine) error) error {
	if start == nil {
		_, err := f.Machine.start(ctx, f.lock, nil)
		return err
	}
	if err := f.lock.Unlock(); err != nil {
		return err
	}
	return start(ctx, f.Machine)
}

// ith is what is different about the i-th of n forks.
func (o RestoreOptions) ith(i, n int) RestoreOptions {
	o.anew = true
	if n > 1 {
		for _, s := range []*string{&o.ID, &o.Name, &o.Hostname} {
			if *s != "" {
				*s = fmt.Sprintf("%s-%d", *s, i)
			}
		}
	}
	return o
}

// Fork makes VMs of one that runs on: see Snapshot.Fork. The snapshot that this takes goes with the last of them.
func (m *Machine) Fork(ctx context.Context, n int, o ForkOptions) ([]*Machine, error) {
	snapshots, err := m.host.Snapshots()
	if err != nil {
		return nil, err
	}
	release, err := snapshots.Hold(ctx) // until somebody uses it, it could be swept away
	if err != nil {
		return nil, err
	}
	sn, err := m.Snapshot(ctx, SnapshotOptions{ephemeral: true})
	if err != nil {
		return nil, errors.Join(err, release())
	}
	all, err := sn.Fork(ctx, n, o)
	err = errors.Join(err, release())
	if err != nil {
		err = errors.Join(err, m.host.RemoveSnapshot(context.WithoutCancel(ctx), sn.ID, false))
	}
	return all, err
}
