package smartvm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/capture"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/locate"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/restore"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/snapshot"
	"push.rocks/smartvm/status"
)

// RestoreOptions say how a VM that starts from a snapshot differs from the one that the snapshot
// was made of. The zero value serves.
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
	// HugePages is the kind of its memory's pages: None, Transparent or 2M, of which the last needs
	// MemoryUFFD, the default then. Empty: as the snapshot's VM had. Firecracker ≥ 1.17.
	HugePages string
	// Trust takes an imported snapshot for one of this host's own. Without, its VM needs a jail, and
	// gets nothing of this host but images.
	Trust bool
	// Paused leaves the VM paused when it is started: Resume lets it go on at once.
	Paused bool

	anew bool // its network identity is never that of the snapshot's VM
}

// Restore makes a VM that starts from a snapshot, and goes on from there each time that it is
// started. It has drives of its own, as they were; another id, host name and machine id, and what
// tells random numbers apart; and the addresses of the snapshot's VM where they are free. Its
// guest's programs do not run before it knows. It has the VMM of new VMs or, if that cannot read
// the snapshot and Options name none, the newest installed VMM that can. Returns
// snapshot.ErrNotFound, snapshot.ErrDamaged, and what does not match: see snapshot.Compatible.
func (h *Host) Restore(ctx context.Context, ref string, o RestoreOptions) (*Machine, error) {
	sn, err := h.Snapshot(ref)
	if err != nil {
		return nil, err
	}
	from, err := sn.open(ctx, o)
	if err != nil {
		return nil, err
	}
	m, lock, err := from.restore(ctx, o)
	if err == nil {
		err = lock.Unlock()
	}
	return m, errors.Join(err, from.release())
}

// origin is a snapshot that VMs are about to start from: it was looked at, and nothing that they
// need is removed until release.
type origin struct {
	restore.Origin
	host    *Host
	vmm     locate.VMM
	release func() error
}

func (sn *Snapshot) open(ctx context.Context, o RestoreOptions) (_ *origin, err error) {
	h := sn.host
	all, err := h.Snapshots()
	if err != nil {
		return nil, err
	}
	from := &origin{host: h}
	from.Snapshot, from.Host, from.Data = sn.Snapshot, h.env.Host, h.data()
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
	if from.Saved, err = restore.Read(sn.Snapshot); err != nil {
		return nil, err
	}
	if err := from.Saved.Check(sn.Files); err != nil {
		return nil, err
	}
	if from.Untrusted = sn.Imported && !o.Trust; from.Untrusted {
		if err := from.Saved.CheckUntrusted(h.opts.Launcher == LaunchJailed); err != nil {
			return nil, hint.Add(fmt.Errorf("%w: it was imported: %w", ErrNotSupported, err),
				"with --trust it is taken for one of this host's own")
		}
	}
	if err := from.Data.Missing(from.Saved); err != nil {
		return nil, err
	}
	if from.vmm, err = h.restorer(ctx, &sn.Manifest); err != nil {
		return nil, err
	}
	from.Firecracker = from.vmm.Version
	if from.Saved.Spec.MMDS != nil {
		if from.Metadata, err = os.ReadFile(sn.Path(capture.MetadataFile)); err != nil {
			return nil, err
		}
	}
	if from.Networks, err = h.Networks(); err != nil {
		return nil, err
	}
	if from.Saved.Spec.Vsock != nil && from.vmm.Version == (firecracker.Version{Major: 1, Minor: 16}) {
		h.env.Log.Warn("restored guests hear nothing over vsock with Firecracker 1.16.0; 1.16.1 mends that",
			"snapshot", sn.ID)
	}
	asked := sn.Manifest
	asked.HugePages = o.hugePages(&asked)
	return from, h.compatible(ctx, &asked, from.vmm)
}

// restore makes a VM. It returns the new VM's lock.
func (from *origin) restore(ctx context.Context, o RestoreOptions) (*Machine, *store.Lock, error) {
	in, err := from.look(o)
	if err != nil {
		return nil, nil, fmt.Errorf("restore snapshot %s: %w", from.Snapshot.ID, err)
	}
	vm, lock, err := from.host.env.Make(ctx, in)
	if err != nil {
		return nil, nil, err
	}
	kind := status.EventRestored
	if o.anew {
		kind = status.EventForked
	}
	vm.Event(kind, "snapshot", from.Snapshot.ID)
	return &Machine{from.host, vm}, lock, nil
}

func (from *origin) look(o RestoreOptions) (*plan.Input, error) {
	rec, err := from.Record(restore.Options{
		ID: o.ID, Name: o.Name, Hostname: o.Hostname, Labels: o.Labels, Ports: o.Ports, Policy: o.Policy,
		Metadata:  o.Metadata,
		HugePages: o.HugePages, UFFD: o.Memory == MemoryUFFD || o.Memory == "" &&
			o.hugePages(&from.Snapshot.Manifest) != "", Paused: o.Paused, Anew: o.anew,
	})
	if err != nil {
		return nil, err
	}
	if err := from.host.launcher(rec, from.vmm); err != nil {
		return nil, err
	}
	return from.host.env.Look(rec)
}

// restorer finds the VMM that VMs of a snapshot start with: that of new VMs or, if that cannot read
// the snapshot and the user has named none, the newest installed VMM that can. If none can, it is
// that of new VMs, which compatible then refuses.
func (h *Host) restorer(ctx context.Context, m *snapshot.Manifest) (locate.VMM, error) {
	reads := func(b locate.VMM) bool {
		return m.CheckFormat(snapshot.HostFacts{Firecracker: b.Version, Format: h.snapshotFormat(ctx, b)}) == nil
	}
	first, err := h.vmms.VMM(ctx)
	if err != nil || h.opts.FirecrackerBinary != "" || h.opts.FirecrackerVersion != "" || reads(first) {
		return first, err
	}
	binaries, err := h.Binaries()
	if err != nil {
		return first, err
	}
	installed, err := binaries.List()
	if err != nil {
		return first, err
	}
	for _, i := range installed {
		b, err := h.vmms.At(ctx, i.Firecracker)
		if err != nil {
			h.env.Log.Debug("restore", "firecracker", i.Firecracker, "err", err)
		} else if reads(b) {
			h.env.Log.Info("restore with another Firecracker", "snapshot", m.ID, "format", m.Format, "firecracker", b.Version,
				"default", first.Version)
			return b, nil
		}
	}
	return first, nil
}

// snapshotFormat returns the format of a VMM's snapshots, empty where its program does not name it.
func (h *Host) snapshotFormat(ctx context.Context, b locate.VMM) string {
	format, err := h.vmms.SnapshotFormat(ctx, b)
	if err != nil {
		h.env.Log.Debug("no snapshot format", "firecracker", b.Path, "err", err)
	}
	return format
}

// hugePages is what a manifest would say of the VM's pages: "2M" or nothing.
func (o *RestoreOptions) hugePages(m *snapshot.Manifest) string {
	switch o.HugePages {
	case "":
		return m.HugePages
	case "2M":
		return o.HugePages
	}
	return ""
}

// compatible says why this host cannot go on where a snapshot stopped, and warns of what may go
// wrong.
func (h *Host) compatible(ctx context.Context, m *snapshot.Manifest, b locate.VMM) error {
	facts, err := h.facts()
	if m.HugePages != "" { // those that are free are others now
		facts, err = snapshot.ReadHostFacts()
	}
	if err != nil {
		return err
	}
	facts.Firecracker, facts.Format = b.Version, h.snapshotFormat(ctx, b)
	warnings, refusals := snapshot.Compatible(m, facts)
	for _, w := range warnings {
		h.env.Log.Warn("restore", "snapshot", m.ID, "err", w)
	}
	if refusals != nil {
		return fmt.Errorf("%w: %w", ErrNotSupported, refusals)
	}
	return nil
}

// ForkOptions say how VMs are made of one.
type ForkOptions struct {
	RestoreOptions     // ID, Name and Hostname get "-1" and so on added
	Concurrency    int // how many are started at once. 0: DefaultConcurrency
	// Start starts a VM. Nil: this process does, and supervises it.
	Start func(context.Context, *Machine) error
}

// DefaultConcurrency is how many VMs are started at once.
const DefaultConcurrency = 8

// Fork makes and starts n VMs that go on where a VM stopped, at once: they share its memory until
// they write to it. All have an identity of their own. If one cannot be started, none is left.
func (sn *Snapshot) Fork(ctx context.Context, n int, o ForkOptions) ([]*Machine, error) {
	if n < 1 || o.Concurrency < 0 {
		return nil, fmt.Errorf("fork snapshot %s: %d VMs, %d at once", sn.ID, n, o.Concurrency)
	}
	from, err := sn.open(ctx, o.RestoreOptions)
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
				sn.host.env.Log.Warn("stop a fork", "vm", m.ID(), "err", err)
			}
			if err := m.vm.RemoveIfThere(down); err != nil {
				sn.host.env.Log.Warn("remove a fork", "vm", m.ID(), "err", err)
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
		_, err := f.vm.Start(ctx, f.lock, nil)
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

// Fork makes VMs of one that runs on: see Snapshot.Fork. The snapshot that this takes goes with the
// last of them.
func (m *Machine) Fork(ctx context.Context, n int, o ForkOptions) ([]*Machine, error) {
	snapshots, err := m.host.Snapshots()
	if err != nil {
		return nil, err
	}
	release, err := snapshots.Hold(ctx) // until a VM refers to it, it could be swept away
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
