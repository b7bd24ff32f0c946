package smartvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/capture"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/restore"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/snapshot"
	"push.rocks/smartvm/status"
)

// Snapshot is a VM at one moment: its memory, its devices and what it had written. It never
// changes; any number of VMs can start from it, see Host.Restore and Fork.
type Snapshot struct {
	*snapshot.Snapshot
	Warnings []string // of its making: what may be amiss with it

	host *Host
}

// VM is the name of the VM that the snapshot was made of, or its id.
func (sn *Snapshot) VM() string {
	s, _ := restore.Read(sn.Snapshot) // for people to read
	return cmp.Or(s.Spec.Name, s.Spec.ID)
}

// SnapshotOptions say how a snapshot is made. The zero value serves.
type SnapshotOptions struct {
	Name   string // a second handle, unique among snapshots
	Labels map[string]string
	// Diff writes only the memory that has changed since the VM's last snapshot, into a copy of that.
	// The snapshot is as whole as any other; it is made sooner where that copy is a reflink. Without a
	// last snapshot it makes no difference. Needs a Spec with TrackDirtyPages, or Firecracker ≥ 1.13;
	// with 1.14.0 and 1.14.1 it is refused where they write it wrongly: on x86 above 3 GiB of memory,
	// and with MemoryHotplug.
	Diff bool
	// Hook is a program in the guest that is run with the argument "freeze" before all is stopped, and
	// with "thaw" afterwards, be it in this VM or in one that is restored. It must exit with 0. The
	// snapshot is not made where it cannot be run or does not want it; what it says to "thaw" is a
	// warning.
	Hook string
	// DropCaches has the guest forget what it can read again and, where the Spec has a Balloon, that
	// take what the guest does not use meanwhile: there is less to write, keep and share then. It
	// needs an agent in the guest.
	DropCaches bool
	// Stop ends the VM when it is written down: nothing happens in it afterwards, so that one that is
	// restored has its connections.
	Stop bool
	// Progress receives how many bytes have been read for digests, after the VM goes on. It may be
	// nil.
	Progress func(done, total int64)

	ephemeral bool // it goes with its last VM
}

// Snapshot makes a snapshot of a VM that runs or is paused, from any process. The VM stands still
// while its memory is written and goes on afterwards, whatever happens; if this process dies,
// others see to that. What Exec has under way goes on too; CopyTo, CopyFrom and connections to the
// guest are cut off.
func (m *Machine) Snapshot(ctx context.Context, o SnapshotOptions) (_ *Snapshot, err error) {
	hold, err := m.vm.Freeze("snapshot")
	if err != nil {
		return nil, err
	}
	v := &capture.VM{Hold: hold}
	all, err := m.host.Snapshots()
	if err == nil {
		err = m.vm.Allowed(ctx, "call", "snapshot")
	}
	var draft *snapshot.Draft
	if err == nil {
		draft, err = all.Begin(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, hold.Release())
	}
	if err := draft.Check(o.Name, o.Labels); err != nil {
		return nil, errors.Join(m.vm.Fail("snapshot", err, nil), draft.Abort(), hold.Release())
	}
	// While this VM's last snapshot is looked at and copied it is not removed.
	release, err := all.Hold(ctx)
	if err != nil {
		return nil, errors.Join(err, draft.Abort(), hold.Release())
	}
	var sn *snapshot.Snapshot
	commit := func(manifest *snapshot.Manifest) (err error) {
		if !o.ephemeral {
			err = stage.Sparse(ctx, filepath.Join(draft.Path(), snapshot.MemoryFile))
		}
		if err == nil {
			m.vm.TraceCall("commit")
			sn, err = draft.Commit(ctx, *manifest, o.Progress)
		}
		if err == nil {
			err = m.host.data().Refer(sn)
		}
		return err
	}
	manifest, warnings, err := m.capture(ctx, o, v, draft, commit)
	err = errors.Join(err, release(), hold.Release())
	if err == nil && o.Stop {
		// It has ended. Until nothing of its run is left; what goes wrong with that is no reason to do
		// without the snapshot.
		if _, err := m.Stop(context.WithoutCancel(ctx), StopOptions{}); err != nil && !errors.Is(err, ErrNotFound) {
			warnings = append(warnings, err.Error())
		}
	} else if err == nil {
		err = commit(&manifest)
	}
	if err != nil && sn != nil {
		err = errors.Join(err, m.host.RemoveSnapshot(context.WithoutCancel(ctx), sn.ID, true))
	}
	if err != nil {
		return nil, errors.Join(m.vm.Fail("snapshot", err, nil), draft.Abort())
	}
	m.host.env.Log.Info("snapshot", "vm", m.rec().ID, "snapshot", sn.ID, "paused", manifest.Paused)
	m.vm.Event(status.EventSnapshot, "action", "create", "snapshot", sn.ID)
	return &Snapshot{Snapshot: sn, Warnings: warnings, host: m.host}, nil
}

// diffBase is the snapshot that a diff is made against, nil if there is none.
func (m *Machine) diffBase(ctx context.Context, o SnapshotOptions) (*snapshot.Snapshot, error) {
	if !o.Diff {
		return nil, nil
	}
	config := m.rec().Spec.MachineConfig
	if capture.CorruptsDiffs(m.rec().VMM(), config.MemSizeMiB, m.rec().Spec.MemoryHotplug != nil) {
		return nil, hint.Add(
			fmt.Errorf("%w: a diff of memory over 3 GiB or that can be plugged, with Firecracker %s, which writes it wrongly",
				ErrNotSupported, m.rec().BinaryVersion),
			"use Firecracker 1.14.2 or newer, or make a full snapshot")
	}
	tracked := config.TrackDirtyPages
	if !tracked && !m.rec().VMM().AtLeast(firecracker.Version{Major: 1, Minor: 13}) {
		return nil, hint.Add(
			fmt.Errorf("%w: a diff of memory that is not tracked, Firecracker %s", ErrNotSupported, m.rec().BinaryVersion),
			"make the VM with trackDirtyPages, use Firecracker 1.13 or newer, or make a full snapshot")
	}
	if !tracked && capture.Swaps() {
		return nil, hint.Add(fmt.Errorf("%w: a diff of memory that is not tracked, on a host that swaps", ErrNotSupported),
			"swapoff -a, make the VM with trackDirtyPages, or make a full snapshot")
	}
	id, err := os.ReadFile(m.vm.Path(store.LastSnapshot))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	last, err := m.host.Snapshot(string(id))
	if err == nil {
		err = last.Check(ctx)
	}
	// then all of the memory is written
	if errors.Is(err, snapshot.ErrNotFound) || errors.Is(err, snapshot.ErrDamaged) || errors.Is(err, ErrNotSupported) {
		m.host.env.Log.Debug("no base for a diff", "vm", m.rec().ID, "err", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return last.Snapshot, nil
}

// capture writes all files of the snapshot but the manifest, which it returns. The VM's own state
// is as before afterwards, unless it is to stop: then it ends when commit has made the snapshot,
// and only then.
func (m *Machine) capture(ctx context.Context, o SnapshotOptions, v *capture.VM, draft *snapshot.Draft,
	commit func(*snapshot.Manifest) error,
) (sm snapshot.Manifest, warnings []string, err error) {
	last, err := m.diffBase(ctx, o)
	if err != nil {
		return sm, nil, err
	}
	v.Name, v.Client, v.Process, v.Root, v.Trace = cmp.Or(m.rec().Spec.Name, m.rec().ID), m.vm.Dial(), m.vm.Process(),
		m.vm.Root(), m.vm.TraceCall
	defer func() { err = errors.Join(err, v.Client.Close()) }()
	defer v.Process.EndIfHung(ctx)()
	info, err := v.Client.GetInstanceInfo(ctx) // however long it takes to say so
	if err != nil {
		return sm, nil, err
	}
	v.Running = info.State == firecracker.StateRunning || v.Hold.Resumes() // who held it still has died
	if m.rec().Jailer != "" {
		v.UID = m.rec().UID
	}
	g, err := m.vm.Guest()
	if err != nil {
		return sm, nil, err
	}
	if m.rec().HasAgent() {
		v.Agent, v.Booting = m.vm.Agent(), !g.Ready()
	}
	// What is written from then on is what has changed since this snapshot. If it does not come to be,
	// a diff finds none.
	v.Forget = func() error { return atomicfile.Write(m.vm.Path(store.LastSnapshot), []byte(draft.ID()), 0o600) }
	v.Metadata, v.Balloon, v.Drives = m.rec().Spec.MMDS != nil, m.rec().Spec.Balloon != nil, map[string]string{}
	in, err := m.host.env.Look(m.rec())
	if err != nil {
		return sm, nil, err
	}
	keep := restore.Saved{Hook: o.Hook}
	for _, d := range in.Devices() {
		// what it only reads of others stays where it is
		if !d.ReadOnly || d.Staged || strings.HasPrefix(d.Source, m.RuntimeDir()+"/") {
			v.Drives[d.ID] = d.Source
			keep.Drives = append(keep.Drives, d.ID)
		}
	}
	sm = snapshot.Manifest{Name: o.Name, Labels: o.Labels, Ephemeral: o.ephemeral, Format: m.snapshotFormat(ctx)}
	if last != nil {
		sm.Parent = last.ID
	} else if r := m.rec().Restored; r != nil {
		sm.Parent = r.Snapshot
	}
	complete := func(r capture.Result) error {
		keep.Balloon, sm.Paused = r.Balloon, r.Paused
		return m.describe(&sm, &keep)
	}
	how := capture.Options{Hook: o.Hook, DropCaches: o.DropCaches}
	if last != nil {
		how.Base = last.Path(snapshot.MemoryFile)
	}
	if o.Stop {
		how.End = func(r capture.Result) error {
			if err := complete(r); err != nil {
				return err
			}
			return commit(&sm)
		}
	}
	result, err := v.Capture(ctx, draft.Path(), how)
	if err == nil && !o.Stop {
		err = complete(result)
	}
	return sm, result.Warnings, err
}

// snapshotFormat returns the format in which the VM's VMM writes its state. If the VMM's program
// was replaced or removed since the VM was made, the format is not known and empty.
func (m *Machine) snapshotFormat(ctx context.Context) string {
	b, err := m.host.vmms.At(ctx, m.rec().Binary)
	if err != nil || b.Version != m.rec().VMM() {
		return ""
	}
	return m.host.snapshotFormat(ctx, b)
}

// describe completes the manifest of a snapshot.
func (m *Machine) describe(sm *snapshot.Manifest, keep *restore.Saved) error {
	facts, err := m.host.facts()
	if err != nil {
		return err
	}
	sm.CPUVendor, sm.CPUModel, sm.HostKernel = facts.CPUVendor, facts.CPUModel, facts.Kernel
	return keep.Describe(sm, m.rec(), m.host.data())
}
