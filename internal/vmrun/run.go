package vmrun

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/guestwatch"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/uffd"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/status"
)

// Run is a VM's life from start to stop, in the process that supervises it. Its goroutine is
// supervise.
type Run struct {
	vm       *VM
	lock     *store.Lock
	journal  *journal.Journal
	proc     *vmm.Process
	client   *firecracker.Client
	started  time.Time
	released chan struct{} // closed, by release, to leave the VM running and to others
	release  func()
	done     chan struct{} // closed when all is undone, or the VM is released
	upkeep   upkeep.Upkeep
	followed time.Time // when the record was written that the run is after, zero: not looked at yet
	guest    guestwatch.Watch
	listened chan *guest.Exit // receives how the guest's command ended, or nil, when the guest has nothing more to say
	memory   *uffd.Recording  // of a restored VM whose page faults are served here, or nil

	exit *status.Exit // set before done is closed, nil if the VM was released
	err  error        // of undoing, or releasing; likewise
}

func (v *VM) newRun(lock *store.Lock, started time.Time) *Run {
	released := make(chan struct{})
	return &Run{
		vm: v, lock: lock, started: started, released: released, release: sync.OnceFunc(func() {
			close(released)
		}), done: make(chan struct{}),
		guest: guestwatch.Watch{
			Record: v.Record(), Agent: v.Agent(), File: v.Path(store.GuestStateFile), Log: v.env.Log,
			Started: started, Event: v.Event,
		},
		listened: make(chan *guest.Exit, 1),
	}
}

// begin has the run supervised, now that the VM runs; if the Env is closed by now, it is released
// at once.
func (r *Run) begin() {
	if !r.vm.env.supervising(r.vm, true) {
		r.release()
	}
	r.vm.set("", r)
	go r.supervise()
}

// Done is closed when the run has ended and is undone, or this process no longer supervises it.
// Then Result says how.
func (r *Run) Done() <-chan struct{} { return r.done }

// Result is how the run ended, and what went wrong with undoing it.
func (r *Run) Result() (*status.Exit, error) { return r.exit, r.err }

// supervise waits for the VM's end, or until it is released, and undoes the run.
func (r *Run) supervise() {
	defer close(r.done)
	v := r.vm
	ctx := v.env.Context(context.Background())
	listening, stopListening := context.WithCancel(ctx)
	defer stopListening()
	go func() { r.listened <- r.guest.Listen(listening, r.proc.Done()) }()
	if ended := r.attend(ctx); !ended {
		r.proc.Release() // a process that adopts the VM reads its streams
		v.env.supervising(v, false)
		v.set("", nil)
		stopListening()
		<-r.listened
		r.upkeep.Close()
		r.err = errors.Join(r.client.Close(), r.journal.Close(), r.lock.Unlock())
		return
	}
	v.set(status.Stopping, r)
	v.TraceCall("end")
	r.finish(ctx, stopListening)
	v.env.supervising(v, false)
	v.set("", nil)
	r.err = errors.Join(r.err, r.lock.Unlock())
}

// attend repairs what others damage until the VM has ended, or is released. A repair may take long:
// it is a goroutine of its own, and is cut short then.
func (r *Run) attend(ctx context.Context) (ended bool) {
	v := r.vm
	ctx, stop := context.WithCancel(ctx)
	var repaired chan struct{} // closed at the end of the repair under way; nil: there is none
	defer func() {
		stop()
		if repaired != nil {
			<-repaired
		}
	}()
	begin := func(repair func()) {
		done := make(chan struct{})
		repaired = done
		go func() { defer close(done); repair() }()
	}
	look, part := r.upkeep.Look(ctx, v.Dir(), v.Record().Interfaces, v.env.RepairEvery, v.env.Log)
	for {
		looks, parts := look, part
		if repaired != nil {
			looks, parts = nil, nil
		}
		select {
		case <-r.released:
			return false
		case <-r.proc.Done():
			return true
		case answer := <-looks:
			begin(func() { answer(r.repair(ctx)) })
		case <-parts:
			begin(func() { _ = r.upkeep.HealPart(ctx, r.journal.Effects()) }) // what it cannot do the next look tells
		case <-repaired:
			repaired = nil
		}
	}
}

// lastWords is how long an ended guest's last messages are waited for.
const lastWords = 100 * time.Millisecond

// finish undoes the run of a VM that has ended.
func (r *Run) finish(ctx context.Context, stopListening func()) {
	v := r.vm
	exit := exitOf(r.proc.Exit())
	exit.Started = r.started
	hurry := time.AfterFunc(lastWords, stopListening)
	exit.Command = <-r.listened
	hurry.Stop()
	stopListening()
	r.upkeep.Close() // before others can have its ports
	r.exit = exit
	v.env.Log.Info("ended", "vm", v.Record().ID, "outcome", exit.Outcome, "code", exit.Code)
	r.err = errors.Join(r.client.Close(), r.memory.Close(), v.writeExit(exit), v.syncBack(ctx), r.journal.Revert(ctx))
	if r.err != nil {
		v.env.Log.Warn("undo", "vm", v.Record().ID, "err", r.err)
	}
}

// repair mends what others have done to a VM that runs: the rules of its networks were flushed, or
// a process died while it had the VM frozen.
func (r *Run) repair(ctx context.Context) error {
	v := r.vm
	err := r.follow(ctx)
	if err == nil && len(v.Record().Interfaces) > 0 {
		err = r.upkeep.Heal(ctx, r.journal.Effects())
	}
	if err != nil {
		v.env.Log.Warn("repair", "vm", v.Record().ID, "err", err)
	}
	return errors.Join(err, v.env.Unfreeze(ctx, v.Record().ID))
}

// follow takes over what an update has changed of a VM that runs.
func (r *Run) follow(ctx context.Context) error {
	v := r.vm
	fi, err := os.Stat(v.Path(store.MachineFile))
	if err != nil || fi.ModTime().Equal(r.followed) {
		return err
	}
	rec, err := plan.Read(v.env.Store, v.Record().ID)
	if err == nil {
		err = r.upkeep.Follow(ctx, attach.VM{ID: rec.ID, Store: v.env.Store}, r.journal, &rec.Spec)
	}
	if err == nil {
		v.SetRecord(rec)
		r.followed = fi.ModTime()
	}
	return err
}

// SetRecord says what the VM is from now on.
func (v *VM) SetRecord(rec *plan.Record) { v.record.Store(rec) }

// release leaves the VM running and to others.
func (v *VM) release() error {
	r := v.current()
	if r == nil {
		return nil
	}
	r.release()
	<-r.done
	return r.err
}

func exitOf(e vmm.Exit) *status.Exit {
	exit := &status.Exit{Outcome: status.OutcomeExited, Code: e.Code, Ended: time.Now().UTC()}
	switch {
	case !e.Known:
		exit.Outcome, exit.Code = status.OutcomeLost, -1
	case e.Signal != 0:
		exit.Outcome, exit.Signal = status.OutcomeKilled, e.SignalName()
	case e.Code != 0:
		exit.Outcome = status.OutcomeCrashed
	}
	return exit
}
