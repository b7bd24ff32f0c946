package smartvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"runtime"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/journal"
	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/network"
)

// Start starts the VM and returns when its guest runs; the guest's own boot takes longer. This process looks
// after it from then on, until it ends or the Host is closed. If the start fails, all of it is undone, the error is a
// *MachineError, and Start may be called again.
func (m *Machine) Start(ctx context.Context) error {
	lock, err := m.acquire(ctx, "start")
	if err != nil {
		return err
	}
	_, err = m.start(ctx, lock, nil)
	return err
}

// start takes over the lock. Console, if not nil, gets what the guest writes as it comes.
func (m *Machine) start(ctx context.Context, lock *store.Lock, console io.Writer) (*run, error) {
	ctx = m.host.networks(ctx)
	m.set(Starting, nil)
	begun := time.Now()
	r := &run{lock: lock, started: begun.UTC(), let: make(chan struct{}), done: make(chan struct{}), attended: make(chan struct{})}
	stage, err := m.launch(ctx, r, console)
	if err == nil {
		m.host.mu.Lock()
		m.host.machines[m.rec().ID] = m
		m.host.mu.Unlock()
		r.booted = time.Now()
		m.set("", r)
		go m.watch(r)
		m.host.log.Info("started", "vm", m.rec().ID, "dur", time.Since(begun))
		return r, nil
	}
	exit := &Exit{Outcome: OutcomeFailed, Code: -1, Started: r.started, Ended: time.Now().UTC(), Error: err.Error()}
	var ended *Exit
	if r.proc != nil && r.proc.Linger(err) {
		ended = exitOf(r.proc.Exit())
	}
	errs := []error{m.fail(stage, err, ended), atomicfile.WriteJSON(m.path(store.ExitFile), exit)}
	_ = share.Forget(m.path(store.PendingFile), m.path(store.CopiedFile)) // no guest has written anything
	r.upkeep.Close()                                                      // before others can have its ports
	if r.journal != nil {
		errs = append(errs, r.journal.Revert(ctx))
	}
	errs = append(errs, r.endMemory())
	if r.client != nil {
		errs = append(errs, r.client.Close()) // now that no answer can be under way, for which it would wait
	}
	m.set("", nil)
	return nil, errors.Join(append(errs, lock.Unlock())...)
}

// launch brings the VM up and says at which stage it failed. What it did is in r for the caller to undo.
func (m *Machine) launch(ctx context.Context, r *run, console io.Writer) (stage string, err error) {
	if err := vmm.CheckKVM(); err != nil {
		return "start", err
	}
	if r.secrets, err = m.takeSecrets(); err != nil {
		return "read secrets", err
	}
	p, err := m.host.proposal(m.rec())
	if err != nil {
		return "start", err
	}
	err = logfile.Remove(m.RuntimeDir(), store.ExitFile, store.GuestStateFile, store.ConsoleLog, store.VMMLog, store.CommandLog, store.LastSnapshot)
	if err != nil {
		return "start", err
	}
	if err := m.renewChanges(ctx); err != nil {
		return "prepare", err
	}
	pl := makePlan(&m.rec().Spec, p)
	if r.journal, err = journal.Create(m.path(store.RunJournal), effects, m.host.opts.trace); err != nil {
		return "start", err
	}
	for _, e := range pl.Run {
		if e, err = m.asOfNow(ctx, r, e); err != nil {
			return "prepare", err
		}
		if err := r.journal.Do(ctx, e); err != nil {
			return "prepare", err
		}
	}
	if pl.config.Streams, err = m.streams(console); err != nil {
		return "open logs", err
	}
	r.proc = vmm.New(&pl.config)
	if err := r.journal.Do(ctx, r.proc); err != nil {
		r.proc = nil
		return "start VMM", errors.Join(err, pl.config.Streams.Close())
	}
	ctx, cancel := context.WithTimeoutCause(ctx, m.host.opts.StartTimeout,
		fmt.Errorf("the VMM did not take its configuration within %s", m.host.opts.StartTimeout))
	defer cancel()
	if err := m.serveMemory(r); err != nil {
		return "serve memory", err
	}
	r.client = firecracker.New(func(ctx context.Context) (net.Conn, error) { return r.proc.Dial(ctx, store.SocketFile) }, m.version())
	for _, c := range pl.Calls {
		m.trace("PUT " + c.Path)
		if err := c.Send(ctx, r.client); err != nil {
			return "PUT " + c.Path, err
		}
	}
	if m.rec().Restored != nil {
		return "", nil
	}
	m.trace("InstanceStart")
	return "boot", r.client.InstanceStart(ctx)
}

// asOfNow completes an effect: whose a file is that is to be lent, until its lease was taken it may have been another VM's;
// where a guest's DNS proxy is, and at which ports it is published.
func (m *Machine) asOfNow(ctx context.Context, r *run, e journal.Effect) (journal.Effect, error) {
	switch e := e.(type) {
	case *stage.Owner:
		return stage.NewOwner(e.Path, e.UID, e.GID)
	case *share.Image:
		e.Log = m.host.log.With("vm", m.rec().ID)
	case *network.Guest:
		vm := attach.VM{ID: m.rec().ID, Store: m.host.store}
		return e, errors.Join(r.upkeep.Publish(ctx, vm, e, r.journal.Do), r.upkeep.Add(m.RuntimeDir(), e, m.rec().Interfaces, m.host.log))
	}
	return e, nil
}

// trace lets the crash matrix strike between requests too.
func (m *Machine) trace(step string) {
	if m.host.opts.trace != nil {
		m.host.opts.trace(journal.Step{Op: "call", Kind: step})
	}
}

// watch waits for the VM's end, or until it is let go, and undoes the run.
func (m *Machine) watch(r *run) {
	defer close(r.done)
	ctx := m.host.networks(context.Background())
	listening, stopListening := context.WithCancel(ctx)
	look, part := r.upkeep.Look(listening, m.RuntimeDir(), m.rec().Interfaces, cmp.Or(m.host.opts.healInterval, defaultHealInterval), m.host.log)
	go m.attend(listening, r)
	for ended := false; !ended; {
		select {
		case <-r.let:
			m.set("", nil)
			stopListening()
			<-r.attended
			r.upkeep.Close()
			r.err = errors.Join(r.client.Close(), r.journal.Close(), r.lock.Unlock())
			return
		case answer := <-look:
			answer(m.heal(ctx, r))
		case <-part:
			_ = r.upkeep.HealPart(ctx, r.journal.Effects()) // what it cannot do the next look tells
		case <-r.proc.Done():
			ended = true
		}
	}
	m.set(Stopping, r)
	m.trace("end")
	exit := exitOf(r.proc.Exit())
	exit.Started = r.started
	// What the guest said last has come, and is heard.
	hurry := time.AfterFunc(hearTime, stopListening)
	<-r.attended
	hurry.Stop()
	stopListening()
	r.upkeep.Close() // before others can have its ports
	exit.Command = r.command
	r.exit = exit
	m.host.log.Info("ended", "vm", m.rec().ID, "outcome", exit.Outcome, "code", exit.Code)
	r.err = errors.Join(r.client.Close(), r.endMemory(), atomicfile.WriteJSON(m.path(store.ExitFile), exit), m.syncBack(ctx), r.journal.Revert(ctx))
	if r.err != nil {
		m.host.log.Warn("undo", "vm", m.rec().ID, "err", r.err)
	}
	m.host.mu.Lock()
	delete(m.host.machines, m.rec().ID)
	m.host.mu.Unlock()
	m.set("", nil)
	r.err = errors.Join(r.err, r.lock.Unlock())
}

// hearTime is how long an ended guest's last words are waited for.
const hearTime = 100 * time.Millisecond

// heal mends what others have done to a VM that runs: flushed rules of its networks, or died while they held it still.
func (m *Machine) heal(ctx context.Context, r *run) error {
	err := m.follow(ctx, r)
	if err == nil && len(m.rec().Interfaces) > 0 {
		err = r.upkeep.Heal(ctx, r.journal.Effects())
	}
	if err != nil {
		m.host.log.Warn("heal", "vm", m.rec().ID, "err", err)
	}
	return errors.Join(err, m.host.releaseHold(ctx, m.rec().ID))
}

// release leaves the VM running and to others.
func (m *Machine) release() error {
	m.mu.Lock()
	r := m.run
	m.mu.Unlock()
	if r == nil {
		return nil
	}
	close(r.let)
	<-r.done
	return r.err
}

func (m *Machine) set(busy State, r *run) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy, m.run = busy, r
}

func exitOf(e vmm.Exit) *Exit {
	exit := &Exit{Outcome: OutcomeExited, Code: e.Code, Ended: time.Now().UTC()}
	switch {
	case !e.Known:
		exit.Outcome, exit.Code = OutcomeLost, -1
	case e.Signal != 0:
		exit.Outcome, exit.Signal = OutcomeKilled, e.SignalName()
	case e.Code != 0:
		exit.Outcome = OutcomeCrashed
	}
	return exit
}

// DefaultStopTimeout is how long a guest may take to shut down before it is killed.
const DefaultStopTimeout = 10 * time.Second

// StopOptions say how to end a VM.
type StopOptions struct {
	// Timeout is how long the guest may take to shut down after Ctrl-Alt-Del (x86_64; elsewhere there is no
	// such key). 0: it is killed at once.
	Timeout time.Duration
}

// CtrlAltDel and Killed are the ways in which Stop ends a VM.
const (
	CtrlAltDel = "ctrl-alt-del"
	Killed     = vmm.Killed
)

// Stop ends the VM and returns when nothing of its run is left, and what ended it: CtrlAltDel, Killed or "" if
// it had ended. It works from any process. The VM's copies of drives stay until Remove.
func (m *Machine) Stop(ctx context.Context, opts StopOptions) (string, error) {
	m.mu.Lock()
	r := m.run
	m.mu.Unlock()
	if r == nil {
		return m.stopForeign(ctx, opts)
	}
	how, err := r.proc.Stop(ctx, m.stopSteps(opts)...)
	if err != nil {
		return how, m.fail("stop", err, nil)
	}
	select {
	case <-r.done:
		return how, r.err
	case <-ctx.Done():
		return how, m.fail("stop", context.Cause(ctx), nil)
	}
}

// stopForeign stops a VM that another process looks after, or nobody.
func (m *Machine) stopForeign(ctx context.Context, opts StopOptions) (how string, err error) {
	state, err := m.State(ctx)
	if err != nil {
		return "", err
	}
	if err := allow(m.rec().ID, "stop", "stop", state); err != nil {
		return "", err
	}
	if how, err = m.attach().Stop(ctx, m.stopSteps(opts)...); err != nil {
		return how, m.fail("stop", err, nil)
	}
	return how, m.settle(ctx)
}

func (m *Machine) stopSteps(opts StopOptions) []vmm.Step {
	if runtime.GOARCH != "amd64" {
		return nil
	}
	return []vmm.Step{{Name: CtrlAltDel, Timeout: opts.Timeout, Ask: func(ctx context.Context) error {
		hold, err := m.holdSoon(ctx)
		if err != nil {
			return err
		}
		c := m.dialClient()
		// A paused guest sees no keys.
		if err = c.Resume(ctx); err == nil {
			err = c.SendCtrlAltDel(ctx)
		}
		return errors.Join(err, hold.Release(), c.Close())
	}}}
}

// Remove deletes a VM that does not run, and its copies of drives.
func (m *Machine) Remove(ctx context.Context) error {
	lock, err := m.acquire(ctx, "remove")
	if err != nil {
		return err
	}
	m.set(Removing, nil)
	defer m.set("", nil)
	if err := m.erase(ctx, lock); err != nil {
		return err
	}
	m.host.log.Info("removed", "vm", m.rec().ID)
	return nil
}

// acquireTimeout bounds how long an operation waits for another one on the same VM to be done.
const acquireTimeout = 10 * time.Second

// acquire takes the VM's lock for op, if its state allows op, and undoes a run that was left behind.
func (m *Machine) acquire(ctx context.Context, op string) (*store.Lock, error) {
	call := ctx
	ctx, cancel := context.WithTimeoutCause(ctx, acquireTimeout, errors.New("another operation on it does not end"))
	defer cancel()
	for {
		lock, err := m.host.store.TryLock(m.rec().ID)
		switch {
		case err == nil:
			return m.acquired(call, op, lock) // copying back may take longer
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("VM %s: %w", m.rec().ID, ErrNotFound)
		case !errors.Is(err, store.ErrLocked):
			return nil, fmt.Errorf("%s VM %s: %w", op, m.rec().ID, err)
		}
		state, err := m.State(ctx)
		if err != nil {
			return nil, err
		}
		// What is about to have stopped is worth the wait.
		if err := allow(m.rec().ID, op, op, state); err != nil && state != Stopping {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%s VM %s: %w", op, m.rec().ID, context.Cause(ctx))
		case <-time.After(waitPoll):
		}
	}
}

// acquired looks at the VM, now that nobody else can change anything.
func (m *Machine) acquired(ctx context.Context, op string, lock *store.Lock) (*store.Lock, error) {
	err := func() error {
		if err := m.exists(); err != nil {
			return err
		}
		alive, err := m.attach().Alive()
		if err == nil && alive {
			err = &StateError{ID: m.rec().ID, Op: op, State: Running, Want: transitions[op]}
		}
		if err != nil {
			return err
		}
		return m.conclude(ctx)
	}()
	if err != nil {
		return nil, errors.Join(err, lock.Unlock())
	}
	return lock, nil
}
