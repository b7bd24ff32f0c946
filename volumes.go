package smartvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
)

// addVolumes gives a VM of an image the drives for its volumes, and tells its guest.
func (h *Host) addVolumes(ctx context.Context, rec *record) error {
	s, g := &rec.Spec, rec.Boot.Guest
	disks, err := h.Volumes()
	if err != nil {
		return err
	}
	for i, v := range s.NamedVolumes {
		path, err := disks.Volumes().Named(ctx, v.Name, int64(cmp.Or(v.SizeMiB, spec.DefaultVolumeMiB))<<20)
		if err != nil {
			return err
		}
		device := addDrive(s, Drive{DriveID: spec.NamedDrive(i), PathOnHost: path, CacheType: "Writeback", Ephemeral: new(bool)})
		g.Disks = append(g.Disks, agentproto.Disk{Device: device, Target: v.Target, ReadOnly: v.ReadOnly})
	}
	if len(s.Volumes) == 0 {
		_, err := g.Encode() // it may be too long by now
		return err
	}
	g.Volumes = share.Guest(s.Volumes)
	g.VolumeDevice = addDrive(s, Drive{DriveID: spec.VolumeDrive, PathOnHost: filepath.Join(h.store.Dir(rec.ID), store.VolumeFile), IsReadOnly: true})
	if slices.ContainsFunc(s.Volumes, func(v Volume) bool { return !v.ReadOnly }) {
		var size Scratch
		if s.Scratch != nil {
			size.SizeMiB = s.Scratch.SizeMiB
		}
		changes, err := h.scratch(ctx, &size)
		if err != nil {
			return err
		}
		yes := true
		changes.DriveID, changes.Ephemeral = spec.ChangesDrive, &yes
		g.ChangesDevice = addDrive(s, changes)
	}
	_, err = g.Encode() // it may be too long by now
	return err
}

// renewChanges makes ready what the guest writes in volumes: what it wrote in its last run is copied back, or gone.
func (m *Machine) renewChanges(ctx context.Context) error {
	i := slices.IndexFunc(m.rec().Spec.Drives, func(d Drive) bool { return d.DriveID == spec.ChangesDrive })
	if len(m.rec().Spec.Volumes) == 0 || i < 0 {
		return nil
	}
	f := &stage.File{Source: m.rec().Spec.Drives[i].PathOnHost, Target: m.rec().Staged[spec.ChangesDrive].Path, UID: -1}
	if m.rec().Jailer != "" {
		f.UID = m.rec().UID
	}
	if err := errors.Join(f.Revert(ctx), f.Apply(ctx)); err != nil || !share.Synced(m.rec().Spec.Volumes) {
		return err
	}
	return atomicfile.WriteJSON(m.path(store.PendingFile), share.Pending{Taken: time.Now()})
}

// conclude undoes a run that nobody watched to its end, and copies back what its guest has changed. The caller has the lock.
func (m *Machine) conclude(ctx context.Context) error {
	return errors.Join(m.mourn(ctx), m.syncBack(ctx))
}

// Bounds of how long copying back may take, and the boot of the VM for it.
const (
	syncTimeout = 15 * time.Minute
	syncBoot    = 2 * time.Minute
)

// syncBack copies back what the guest has changed in volumes, if that is not done. The VM has ended, and the caller has the lock.
func (m *Machine) syncBack(ctx context.Context) error {
	pending, err := share.ReadPending(m.path(store.PendingFile))
	if pending == nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, syncTimeout, fmt.Errorf("it takes more than %s", syncTimeout))
	defer cancel()
	changes := m.rec().Staged[spec.ChangesDrive].Path
	fi, err := os.Stat(changes)
	if err != nil {
		return fmt.Errorf("copy back: %w", err)
	}
	merge := share.Merge{
		Volumes: m.rec().Spec.Volumes, Told: m.rec().Boot.Guest.Volumes, Copied: m.path(store.CopiedFile), Suffix: ".guest-" + m.rec().ID, MaxBytes: fi.Size(),
	}
	var report share.Report
	if err = merge.Check(); err == nil { // before a VM is made for it
		err = m.readChanges(ctx, changes, func(r io.Reader) (err error) {
			report, err = merge.Apply(ctx, r)
			return err
		})
	}
	report.Log(m.host.log.With("vm", m.rec().ID))
	if err != nil {
		return hint.Add(fmt.Errorf("VM %s: %w", m.rec().ID, pending.Failed(m.path(store.PendingFile), err)),
			"smartvm stop %s tries again; smartvm rm --discard %s does without what its guest has changed", m.rec().ID, m.rec().ID)
	}
	return share.Forget(m.path(store.PendingFile), m.path(store.CopiedFile))
}

// Discard forgets what the guest of a VM that does not run has changed in volumes and could not be copied back.
func (m *Machine) Discard() error {
	lock, err := m.host.store.TryLock(m.rec().ID)
	if err != nil {
		return fmt.Errorf("discard changes of VM %s: %w: %w", m.rec().ID, ErrState, err)
	}
	return errors.Join(share.Forget(m.path(store.PendingFile), m.path(store.CopiedFile)), lock.Unlock())
}

// readChanges gives take, as an archive, what the guest has written on its drive of changes. Another VM reads that: what a guest has written
// is not for the host's kernel to mount.
func (m *Machine) readChanges(ctx context.Context, changes string, take func(io.Reader) error) (err error) {
	rec := m.reader(changes)
	p, err := m.host.proposal(rec)
	if err != nil {
		return err
	}
	helper, lock, err := m.host.build(ctx, rec, p)
	if err != nil {
		return err
	}
	down := context.WithoutCancel(ctx)
	r, err := helper.start(ctx, lock, nil)
	if err != nil {
		return errors.Join(err, helper.vanish(down))
	}
	defer func() {
		_, stopErr := helper.Stop(down, StopOptions{})
		err = errors.Join(err, stopErr, helper.vanish(down))
	}()
	in, out := io.Pipe()
	go func() {
		up, cancel := context.WithTimeoutCause(ctx, syncBoot, fmt.Errorf("the VM that reads what has changed is not up within %s", syncBoot))
		defer cancel()
		err := helper.onceUp(up, r, func(c *agent.Client) error { _, err := c.Stats(up); return err })
		if err == nil {
			err = helper.guest().CopyFrom(ctx, agentproto.ChangesDir+"/.", "-", out, CopyOptions{})
		}
		out.CloseWithError(err)
	}()
	defer in.Close()
	if err := take(in); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, in) // its end is that of the whole
	return err
}

// reader describes a VM that shows what is on a drive of changes: the image's, with nobody's command in it and no network.
func (m *Machine) reader(changes string) *record {
	was, no, yes := &m.rec().Spec, false, true
	scratch := was.Drives[slices.IndexFunc(was.Drives, func(d Drive) bool { return d.DriveID == spec.ChangesDrive })]
	scratch.DriveID, scratch.Ephemeral = spec.ScratchDrive, &yes
	s := Spec{
		ID: randomHex(6), Labels: map[string]string{"reads": m.rec().ID}, BootSource: was.BootSource, MachineConfig: was.MachineConfig,
		Vsock:  &Vsock{GuestCID: agentCID},
		Drives: []Drive{was.Drives[0], scratch, {DriveID: spec.ChangesDrive, PathOnHost: changes, Ephemeral: &no}},
	}
	s.MachineConfig.VCPUCount, s.MachineConfig.SMT = 1, false
	rec := &record{
		Version: recordVersion, ID: s.ID, Nonce: randomHex(4), Created: time.Now().UTC(), Attached: true,
		Binary: m.rec().Binary, BinaryVersion: m.rec().BinaryVersion, Jailer: m.rec().Jailer, Extract: m.rec().Extract,
		Boot: &boot{Users: m.rec().Boot.Users, Guest: &agentproto.Boot{
			RootDevice: "/dev/vda", RootType: m.rec().Boot.Guest.RootType, ScratchDevice: "/dev/vdb", ChangesDevice: "/dev/vdc",
			Command: []string{"-"}, Attach: true, // which nobody asks for
		}},
	}
	s.Drives = append(s.Drives, Drive{DriveID: guestDrive, PathOnHost: filepath.Join(m.host.store.Dir(s.ID), store.GuestFile), IsReadOnly: true})
	if rec.Spec = s; m.rec().Cgroup != "" {
		rec.Cgroup = filepath.Join(filepath.Dir(m.rec().Cgroup), rec.ID+"-"+rec.Nonce)
	}
	return rec
}
