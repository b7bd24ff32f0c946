package vmrun

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/spec"
	"push.rocks/smartvm/status"
)

// Make makes the VM that a record describes. It returns the new VM's lock. After an error nothing
// of it is left. Returns ErrExists where its id or another name is taken.
func (e *Env) Make(ctx context.Context, in *plan.Input) (*VM, *store.Lock, error) {
	v := e.VM(in.Record)
	lock, err := e.Store.Create(in.ID)
	if errors.Is(err, fs.ErrExist) {
		return nil, nil, fmt.Errorf("create VM %s: %w", in.ID, status.ErrExists)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("create VM %s: %w", in.ID, err)
	}
	if err := v.make(ctx, in); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("%w: %w", status.ErrExists, err)
		}
		return nil, nil, errors.Join(&status.MachineError{ID: in.ID, Stage: "create", Err: err}, v.Erase(ctx, lock))
	}
	return v, lock, nil
}

// make carries out the plan's part that lasts until Remove. The caller has the lock.
func (v *VM) make(ctx context.Context, in *plan.Input) (err error) {
	j, err := journal.Create(v.Path(store.CreateJournal), plan.Effects, v.env.Trace)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.Close()) }()
	if err := in.Lease(ctx, j.Do); err != nil {
		return err
	}
	pl := in.Plan()
	in.Staged = map[string]status.StagedDrive{}
	if in.HasAgent() {
		in.Staged[spec.RootDrive] = status.StagedDrive{Path: in.Spec.Drives[0].PathOnHost, Method: "overlay"}
	}
	for _, e := range pl.Create {
		file, isFile := e.(*stage.File)
		if isFile && v.env.Progress != nil {
			file.Progress = func(done, total int64) { v.env.Progress(filepath.Base(file.Target), done, total) }
		}
		if err := j.Do(ctx, e); errors.Is(err, unix.ENOSPC) {
			return hint.Add(err,
				"free space there, name another --runtime-dir, keep the image and --data-dir on one XFS or btrfs, or write in place with \"ephemeral\": false")
		} else if err != nil {
			return err
		}
		if isFile {
			in.Staged[filepath.Base(file.Target)] = status.StagedDrive{Path: file.Target, Method: file.Method}
			v.env.Log.Debug("staged", "vm", in.ID, "file", file.Target, "method", file.Method)
		}
	}
	for _, d := range in.Devices() {
		if d.Staged && in.Restored != nil { // by each start, to where it was to be at first
			method := stage.Copy
			if d.Reflinking {
				method = stage.Reflink
			}
			in.Staged[d.ID] = status.StagedDrive{Path: d.Source, Method: method}
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	v.TraceCall("record")
	return in.Write(v.env.Store)
}

// Remove deletes a VM that does not run, and its copies of drives.
func (v *VM) Remove(ctx context.Context) error {
	lock, err := v.Acquire(ctx, "remove")
	if err != nil {
		return err
	}
	v.set(status.Removing, nil)
	defer v.set("", nil)
	if err := v.Erase(ctx, lock); err != nil {
		return err
	}
	v.env.Log.Info("removed", "vm", v.Record().ID)
	v.Event(status.EventRemoved)
	return nil
}

// RemoveIfThere removes a VM that another process may be removing, too.
func (v *VM) RemoveIfThere(ctx context.Context) error {
	if err := v.Remove(ctx); !errors.Is(err, status.ErrNotFound) {
		return err
	}
	return nil
}

// Erase removes what Make made, and all else of the VM. The caller has the lock and gives it up.
func (v *VM) Erase(ctx context.Context, lock *store.Lock) error {
	id := v.Record().ID
	v.TraceCall("unrecord")
	// The VM is gone from here on, whatever happens; what is left is for Recover.
	err := os.Remove(v.Path(store.MachineFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("remove VM %s: %w", id, err), lock.Unlock())
	}
	if err := v.undo(ctx, store.CreateJournal); err != nil {
		return errors.Join(fmt.Errorf("remove VM %s: %w", id, err), lock.Unlock())
	}
	v.TraceCall("remove")
	return v.env.Store.Remove(id, lock)
}

// checkJournals says what keeps the VM's effects from being undone here: another version of smartvm
// may have made them.
func (v *VM) checkJournals() error {
	var errs []error
	for _, name := range []string{store.CreateJournal, store.RunJournal} {
		errs = append(errs, journal.Check(v.Path(name), plan.Effects))
	}
	return errors.Join(errs...)
}

// undo undoes a journal of the VM, if there is one. The caller has the lock.
func (v *VM) undo(ctx context.Context, name string) error {
	j, err := journal.Open(v.Path(name), plan.Effects, v.env.Trace)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(j.Revert(v.env.Context(ctx)), j.Close())
}
