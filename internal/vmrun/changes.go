package vmrun

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
	"push.rocks/smartvm/status"
)

// renewChanges makes ready what the guest writes in volumes: what it wrote in its last run is
// copied back, or gone.
func (v *VM) renewChanges(ctx context.Context) error {
	rec := v.Record()
	i := slices.IndexFunc(rec.Spec.Drives, func(d spec.Drive) bool { return d.DriveID == spec.ChangesDrive })
	if len(rec.Spec.Volumes) == 0 || i < 0 {
		return nil
	}
	f := &stage.File{Source: rec.Spec.Drives[i].PathOnHost, Target: rec.Staged[spec.ChangesDrive].Path, UID: -1}
	if rec.Jailer != "" {
		f.UID = rec.UID
	}
	if err := errors.Join(f.Revert(ctx), f.Apply(ctx)); err != nil || !share.Synced(rec.Spec.Volumes) {
		return err
	}
	return atomicfile.WriteJSON(v.Path(store.PendingFile), share.Pending{Taken: time.Now()})
}

// Bounds of how long copying back may take, and the boot of the VM for it.
const (
	syncTimeout = 15 * time.Minute
	syncBoot    = 2 * time.Minute
)

// syncBack copies back what the guest has changed in volumes, if that is not done. The VM has
// ended, and the caller has the lock.
func (v *VM) syncBack(ctx context.Context) error {
	pending, err := share.ReadPending(v.Path(store.PendingFile))
	if pending == nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, syncTimeout, fmt.Errorf("it takes more than %s", syncTimeout))
	defer cancel()
	rec := v.Record()
	changes := rec.Staged[spec.ChangesDrive].Path
	fi, err := os.Stat(changes)
	if err != nil {
		return fmt.Errorf("copy back: %w", err)
	}
	merge := share.Merge{
		Volumes: rec.Spec.Volumes, Told: rec.Boot.Guest.Volumes, Copied: v.Path(store.CopiedFile), Suffix: ".guest-" + rec.ID,
		MaxBytes: fi.Size(),
	}
	var report share.Report
	if err = merge.Check(); err == nil { // before a VM is made for it
		err = v.readChanges(ctx, changes, func(r io.Reader) (err error) {
			report, err = merge.Apply(ctx, r)
			return err
		})
	}
	report.Log(v.env.Log.With("vm", rec.ID))
	if err != nil {
		return hint.Add(fmt.Errorf("VM %s: %w", rec.ID, pending.Failed(v.Path(store.PendingFile), err)),
			"smartvm stop %s tries again; smartvm rm --discard %s does without what its guest has changed", rec.ID, rec.ID)
	}
	return v.forgetChanges()
}

func (v *VM) forgetChanges() error {
	return share.Forget(v.Path(store.PendingFile), v.Path(store.CopiedFile))
}

// Discard forgets what the guest of a VM that does not run has changed in volumes and could not be
// copied back.
func (v *VM) Discard() error {
	lock, err := v.env.Store.TryLock(v.Record().ID)
	if err != nil {
		return fmt.Errorf("discard changes of VM %s: %w: %w", v.Record().ID, status.ErrState, err)
	}
	return errors.Join(v.forgetChanges(), lock.Unlock())
}

// readChanges gives take, as an archive, what the guest has written on its drive of changes.
// Another VM reads that: what a guest has written is not for the host's kernel to mount.
func (v *VM) readChanges(ctx context.Context, changes string, take func(io.Reader) error) (err error) {
	in, err := v.env.Look(v.reader(changes))
	if err != nil {
		return err
	}
	helper, lock, err := v.env.Make(ctx, in)
	if err != nil {
		return err
	}
	down := context.WithoutCancel(ctx)
	run, err := helper.Start(ctx, lock, nil)
	if err != nil {
		return errors.Join(err, helper.RemoveIfThere(down))
	}
	defer func() {
		_, stopErr := helper.Stop(down, 0)
		err = errors.Join(err, stopErr, helper.RemoveIfThere(down))
	}()
	r, w := io.Pipe()
	go func() {
		up, cancel := context.WithTimeoutCause(ctx, syncBoot,
			fmt.Errorf("the VM that reads what has changed is not up within %s", syncBoot))
		defer cancel()
		err := run.onceUp(up, func(c *agent.Client) error { _, err := c.Stats(up); return err })
		if err == nil {
			err = helper.Agent().CopyFrom(ctx, guest.ChangesDir+"/.", "-", w, guest.CopyOptions{})
		}
		w.CloseWithError(err)
	}()
	defer r.Close()
	if err := take(r); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, r) // its end is that of the whole
	return err
}

// reader describes a VM that shows what is on a drive of changes: the image's, with no command in
// it and no network.
func (v *VM) reader(changes string) *plan.Record {
	was, no, yes := v.Record(), false, true
	scratch := was.Spec.Drives[slices.IndexFunc(was.Spec.Drives, func(d spec.Drive) bool {
		return d.DriveID == spec.ChangesDrive
	})]
	scratch.DriveID, scratch.Ephemeral = spec.ScratchDrive, &yes
	rec := plan.New("")
	rec.Attached, rec.Binary, rec.BinaryVersion, rec.Jailer, rec.Extract = true, was.Binary, was.BinaryVersion,
		was.Jailer, was.Extract
	rec.Spec = spec.Spec{
		ID: rec.ID, Labels: map[string]string{"reads": was.ID}, BootSource: was.Spec.BootSource,
		MachineConfig: was.Spec.MachineConfig,
		Vsock:         &spec.Vsock{GuestCID: plan.AgentCID},
		Drives: []spec.Drive{
			was.Spec.Drives[0], scratch,
			{DriveID: spec.ChangesDrive, PathOnHost: changes, Ephemeral: &no},
			{DriveID: spec.GuestDrive, PathOnHost: filepath.Join(v.env.Store.Dir(rec.ID), store.GuestFile), IsReadOnly: true},
		},
	}
	rec.Spec.MachineConfig.VCPUCount, rec.Spec.MachineConfig.SMT = 1, false
	rec.Boot = &plan.Boot{Users: was.Boot.Users, Guest: &guest.Boot{
		RootDevice: "/dev/vda", RootType: was.Boot.Guest.RootType, ScratchDevice: "/dev/vdb", ChangesDevice: "/dev/vdc",
		Command: []string{"-"}, Attach: true, // which is never asked for
	}}
	if was.Cgroup != "" {
		rec.Cgroup = filepath.Join(filepath.Dir(was.Cgroup), rec.ID+"-"+rec.Nonce)
	}
	return rec
}
