package smartvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/journal"
	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/network"
)

// Report is what Recover did, by VM id.
type Report struct {
	Adopted    []string `json:"adopted"`    // run on; this process looks after them now
	Unattended []string `json:"unattended"` // run on, and nobody looks after them; only Sweep leaves them so
	Recovered  []string `json:"recovered"`  // their run had ended unseen; it was undone
	Removed    []string `json:"removed"`    // half made, half removed, or their one call's process died
}

// Recover takes up what processes that died have left: it undoes runs that ended unseen, removes what was half made, and
// looks after VMs that run on. VMs that another process looks after are not touched.
func (h *Host) Recover(ctx context.Context) (*Report, error) {
	return h.recover(ctx, true)
}

// Sweep is Recover for a process that will not stay: VMs that run on are only reported.
func (h *Host) Sweep(ctx context.Context) (*Report, error) {
	return h.recover(ctx, false)
}

func (h *Host) recover(ctx context.Context, adopt bool) (*Report, error) {
	ids, err := h.store.List()
	if err != nil {
		return nil, err
	}
	report := &Report{Adopted: []string{}, Unattended: []string{}, Recovered: []string{}, Removed: []string{}}
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
	errs = append(errs, attach.SweepPools(h.networks(ctx), h.store, h.opts.trace))
	return report, errors.Join(append(errs, network.Sweep(h.networks(ctx), filepath.Join(h.RuntimeDir(), store.NetworkDir)))...)
}

func (h *Host) recoverOne(ctx context.Context, id string, adopt bool, report *Report) error {
	if err := h.releaseHold(ctx, id); err != nil {
		h.log.Warn("let a VM go on that was held", "vm", id, "err", err)
	}
	lock, err := h.store.TryLock(id)
	switch {
	case errors.Is(err, store.ErrLocked):
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return h.store.Reap(id)
	case err != nil:
		return err
	}
	rec, err := readRecord(h.store, id)
	if errors.Is(err, fs.ErrNotExist) {
		report.Removed = append(report.Removed, id)
		return h.machine(&record{ID: id}).erase(ctx, lock)
	}
	if err != nil {
		return errors.Join(err, lock.Unlock())
	}
	m := h.machine(rec)
	failed, later := share.PutOff(m.path(store.PendingFile), h.log.With("vm", id))
	if later {
		return lock.Unlock()
	}
	if rec.Attached {
		if err := m.conclude(ctx); err != nil {
			return errors.Join(err, lock.Unlock())
		}
		if failed { // the command that the hint names finds it; the next removes it
			report.Recovered = append(report.Recovered, id)
			return lock.Unlock()
		}
		report.Removed = append(report.Removed, id)
		return m.erase(ctx, lock)
	}
	if _, err := os.Stat(m.path(store.RunJournal)); err != nil {
		return lock.Unlock()
	}
	alive, err := m.attach().Alive()
	if err != nil {
		return errors.Join(err, lock.Unlock())
	}
	if alive && !adopt {
		report.Unattended = append(report.Unattended, id)
		return lock.Unlock()
	}
	if alive {
		report.Adopted = append(report.Adopted, id)
		return m.adopt(lock)
	}
	report.Recovered = append(report.Recovered, id)
	return errors.Join(m.conclude(ctx), lock.Unlock())
}

// Adopt looks after a VM that runs and whose process died. Returns ErrState if it does not run or somebody does.
func (m *Machine) Adopt(ctx context.Context) error {
	if err := m.allowed(ctx, "call", "adopt"); err != nil {
		return err
	}
	lock, err := m.host.store.TryLock(m.rec().ID)
	if err != nil {
		return fmt.Errorf("adopt VM %s: %w: %w", m.rec().ID, ErrState, err)
	}
	return m.adopt(lock)
}

// adopt takes over the lock.
func (m *Machine) adopt(lock *store.Lock) (err error) {
	r := &run{lock: lock, started: time.Now().UTC(), let: make(chan struct{}), done: make(chan struct{}), attended: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("adopt VM %s: %w", m.rec().ID, err), lock.Unlock())
		}
	}()
	if fi, err := os.Stat(m.path(store.RunJournal)); err == nil {
		r.started = fi.ModTime().UTC()
	}
	r.booted = r.started
	r.secrets, r.untold = m.takeSecrets() // whoever died may not have told them
	if r.journal, err = journal.Open(m.path(store.RunJournal), effects, m.host.opts.trace); err != nil {
		return err
	}
	// No plan: what that looks at, as the files of drives, need not have a name any more.
	config := vmm.Config{ID: m.rec().ID, Binary: m.rec().Binary, Dir: m.path(store.RunDir), Cgroup: m.rec().Cgroup}
	if m.rec().Jailer != "" {
		config.Jailer = &vmm.Jailer{Binary: m.rec().Jailer, UID: m.rec().UID}
	}
	if config.Streams, err = m.streams(nil); err != nil {
		return errors.Join(err, r.journal.Close())
	}
	if r.proc, err = vmm.Adopt(&config); err != nil {
		return errors.Join(err, config.Streams.Close(), r.journal.Close())
	}
	r.upkeep.Adopt(attach.VM{ID: m.rec().ID, Store: m.host.store}, r.journal.Effects(), m.rec().Interfaces, m.host.log)
	r.client = m.dialClient()
	m.host.mu.Lock()
	m.host.machines[m.rec().ID] = m
	m.host.mu.Unlock()
	m.set("", r)
	go m.watch(r)
	m.host.log.Info("adopted", "vm", m.rec().ID)
	return nil
}

// RunOptions are what Run needs besides a Spec.
type RunOptions struct {
	Console io.Writer // gets what the guest writes, as it comes; may be nil
	// Command, if not nil, has the streams of the image's command, and its terminal and signals; the command waits until the
	// guest is ready for that. Otherwise the command's streams are the console. Of an image with an init of its own it is ignored.
	Command *Cmd
	Stop    StopOptions // how to end the VM when the context ends
}

// Run makes and starts a VM, waits for its end and removes it. The call is the VM's life: when ctx ends, so does
// the VM, and if this process dies, the next Recover ends it. An error of the context is not returned once the VM has run. A
// VMM that gives up is a *MachineError, and the Exit comes with it.
func (h *Host) Run(ctx context.Context, spec Spec, opts RunOptions) (*Exit, error) {
	m, lock, err := h.create(ctx, spec, &opts)
	if err != nil {
		return nil, err
	}
	down := context.WithoutCancel(ctx)
	if m.hasAgent() && m.rec().Boot.Guest.Attach {
		opts.Console = nil // the command's streams are what counts
	}
	r, err := m.start(ctx, lock, opts.Console)
	if err != nil {
		return nil, errors.Join(err, m.vanish(down))
	}
	var commandErr error
	if m.hasAgent() && m.rec().Boot.Guest.Attach {
		commandErr = m.runCommand(ctx, r, *opts.Command)
		if commandErr != nil && ctx.Err() == nil {
			// Nobody takes what it puts out: it is not to go on.
			if _, err := m.Stop(down, opts.Stop); err != nil {
				commandErr = errors.Join(commandErr, err)
			}
		}
	}
	select {
	case <-r.done:
		err = r.err
	case <-ctx.Done():
		if _, err = m.Stop(down, opts.Stop); err != nil {
			return nil, errors.Join(err, m.vanish(down))
		}
		<-r.done
	}
	if commandErr != nil && ctx.Err() == nil {
		err = errors.Join(err, m.fail("run", commandErr, nil))
	}
	if r.exit != nil && r.exit.Outcome == OutcomeCrashed { // its log goes with the VM
		err = errors.Join(err, m.fail("run", errors.New("the VMM gave up"), r.exit))
	}
	if failed, _ := share.PutOff(m.path(store.PendingFile), h.log.With("vm", m.rec().ID)); failed {
		return r.exit, err // it cannot be removed, and another try would end alike
	}
	return r.exit, errors.Join(err, m.vanish(down))
}

// runCommand runs the image's command, and logs it.
func (m *Machine) runCommand(ctx context.Context, r *run, cmd Cmd) error {
	log, err := logfile.CreateTimed(m.CommandLog(), consoleLimit)
	if err != nil {
		return err
	}
	_, err = m.command(ctx, r, cmd.Tee(log))
	return errors.Join(err, log.Close())
}

// vanish removes a VM that the Recover of another process may be removing too.
func (m *Machine) vanish(ctx context.Context) error {
	if err := m.Remove(ctx); !errors.Is(err, ErrNotFound) {
		return err
	}
	return nil
}

// StopAll stops every VM of the runtime directory at once, in whichever process, and returns all that went wrong.
func (h *Host) StopAll(ctx context.Context, opts StopOptions) error {
	all, err := h.Machines(ctx)
	if err != nil {
		return err
	}
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, m := range all {
		wg.Go(func() { _, errs[i] = m.Stop(ctx, opts) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
