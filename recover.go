package smartvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/status"
)

// Report is what Recover did, by VM id.
type Report struct {
	Adopted    []string `json:"adopted"`    // run on; this process supervises them now
	Unattended []string `json:"unattended"` // run on unsupervised; only Sweep leaves them so
	Recovered  []string `json:"recovered"`  // their run had ended while it was unsupervised; it was undone
	Removed    []string `json:"removed"`    // half made, half removed, or of a Run whose process died
}

func newReport() *Report {
	return &Report{Adopted: []string{}, Unattended: []string{}, Recovered: []string{}, Removed: []string{}}
}

func (r *Report) empty() bool {
	return r == nil || len(r.Adopted)+len(r.Unattended)+len(r.Recovered)+len(r.Removed) == 0
}

// Recover takes up what processes that died have left: it undoes runs that ended while they were
// unsupervised, removes what was half made, and supervises VMs that run on. VMs that another
// process supervises are not touched.
func (h *Host) Recover(ctx context.Context) (*Report, error) {
	return h.recover(ctx, true)
}

// Sweep is Recover for a process that will not stay: VMs that run on are only reported.
func (h *Host) Sweep(ctx context.Context) (*Report, error) {
	return h.recover(ctx, false)
}

func (h *Host) recover(ctx context.Context, adopt bool) (*Report, error) {
	ids, err := h.env.Store.List()
	if err != nil {
		return nil, err
	}
	report := newReport()
	var errs []error
	for _, id := range ids {
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		if err := h.recoverOne(ctx, id, adopt, report); err != nil {
			errs = append(errs, fmt.Errorf("recover VM %s: %w", id, err))
		}
	}
	errs = append(errs, h.sweepSnapshots(ctx))
	errs = append(errs, attach.SweepPools(h.env.Context(ctx), h.env.Store, h.env.Trace))
	return report,
		errors.Join(append(errs, network.Sweep(h.env.Context(ctx), filepath.Join(h.RuntimeDir(), store.NetworkDir)))...)
}

func (h *Host) recoverOne(ctx context.Context, id string, adopt bool, report *Report) error {
	if err := h.env.Unfreeze(ctx, id); err != nil {
		h.env.Log.Warn("unfreeze VM", "vm", id, "err", err)
	}
	if !h.needsRecovery(id) {
		return nil
	}
	lock, err := h.env.Store.TryLock(id)
	switch {
	case errors.Is(err, store.ErrLocked):
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return h.env.Store.Reap(id)
	case err != nil:
		return err
	}
	note := func(list *[]string, err error) error {
		if err == nil {
			*list = append(*list, id)
		}
		return err
	}
	rec, err := plan.Read(h.env.Store, id)
	if errors.Is(err, fs.ErrNotExist) {
		return note(&report.Removed, h.env.VM(&plan.Record{ID: id}).Erase(ctx, lock))
	}
	if err != nil {
		return errors.Join(err, lock.Unlock())
	}
	vm := h.env.VM(rec)
	failed, later := share.PutOff(vm.Path(store.PendingFile), h.env.Log.With("vm", id))
	if later {
		return lock.Unlock()
	}
	if rec.Attached {
		if err := vm.FinishLost(ctx); err != nil {
			return errors.Join(err, lock.Unlock())
		}
		if failed { // the command that the hint names finds it; the next removes it
			return note(&report.Recovered, lock.Unlock())
		}
		err := vm.Erase(ctx, lock)
		if err == nil {
			vm.Event(status.EventRemoved)
		}
		return note(&report.Removed, err)
	}
	if _, err := os.Stat(vm.Path(store.RunJournal)); err != nil {
		return lock.Unlock()
	}
	alive, err := vm.Process().Alive()
	if err != nil {
		return errors.Join(err, lock.Unlock())
	}
	switch {
	case alive && adopt:
		return note(&report.Adopted, vm.Adopt(lock))
	case alive:
		return note(&report.Unattended, lock.Unlock())
	}
	return note(&report.Recovered, errors.Join(vm.FinishLost(ctx), lock.Unlock()))
}

// needsRecovery says whether recoverOne may have something to do, and takes no lock to see: other
// processes try it once.
func (h *Host) needsRecovery(id string) bool {
	if held, err := h.env.Store.Locked(id); err == nil && held {
		return false
	}
	rec, err := plan.Read(h.env.Store, id)
	if err != nil || rec.Attached {
		return true
	}
	for _, name := range []string{store.RunJournal, store.PendingFile} {
		if _, err := os.Lstat(filepath.Join(h.env.Store.Dir(id), name)); err == nil {
			return true
		}
	}
	return false
}
