package vmrun

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/secret"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/status"
)

// Start starts the VM and returns when its guest runs; the guest's own boot takes longer. This
// process supervises it from then on, until it ends or the Env is closed. It takes over the VM's
// lock. Console, if not nil, receives what the guest writes as it comes. If the start fails, all of
// it is undone.
func (v *VM) Start(ctx context.Context, lock *store.Lock, console io.Writer) (*Run, error) {
	if v.env.isClosed() {
		return nil, errors.Join(fmt.Errorf("start VM %s: %w", v.Record().ID, status.ErrClosed), lock.Unlock())
	}
	ctx = v.env.Context(ctx)
	v.set(status.Starting, nil)
	begun := time.Now()
	r := v.newRun(lock, begun.UTC())
	stage, err := r.launch(ctx, console)
	if err == nil {
		r.guest.Booted = time.Now()
		r.begin()
		v.env.Log.Info("started", "vm", v.Record().ID, "dur", time.Since(begun))
		v.Event(status.EventStarted)
		return r, nil
	}
	exit := &status.Exit{
		Outcome: status.OutcomeFailed, Code: -1, Started: r.started, Ended: time.Now().UTC(),
		Error: err.Error(),
	}
	var ended *status.Exit
	if r.proc != nil && r.proc.Linger(err) {
		ended = exitOf(r.proc.Exit())
	}
	v.Event(status.EventFailed, "error", err.Error())
	v.Provide(r.guest.Secrets) // from a pipe they come once, and the start may be tried again
	errs := []error{v.Fail(stage, err, ended), v.writeExit(exit)}
	_ = share.Forget(v.Path(store.PendingFile), v.Path(store.CopiedFile)) // no guest has written anything
	r.upkeep.Close()                                                      // before others can have its ports
	if r.journal != nil {
		errs = append(errs, r.journal.Revert(ctx))
	}
	errs = append(errs, r.memory.Close())
	if r.client != nil {
		errs = append(errs, r.client.Close()) // now that no answer can be under way, for which it would wait
	}
	v.set("", nil)
	return nil, errors.Join(append(errs, lock.Unlock())...)
}

// launch brings the VM up and says at which stage it failed. What it did is in r for the caller to
// undo.
func (r *Run) launch(ctx context.Context, console io.Writer) (stage string, err error) {
	v := r.vm
	if err := vmm.CheckKVM(); err != nil {
		return "start", err
	}
	if r.guest.Secrets, err = v.takeSecrets(); err != nil {
		return "read secrets", err
	}
	in, err := v.env.Look(v.Record())
	if err != nil {
		return "start", err
	}
	err = logfile.Remove(v.Dir(), store.ExitFile, store.GuestStateFile, store.ConsoleLog, store.VMMLog, store.CommandLog,
		store.LastSnapshot)
	if err != nil {
		return "start", err
	}
	if err := atomicfile.Reserve(v.Path(store.ExitFile), exitSize); err != nil {
		return "prepare", err
	}
	if err := v.renewChanges(ctx); err != nil {
		return "prepare", err
	}
	pl := in.Plan()
	if r.journal, err = journal.Create(v.Path(store.RunJournal), plan.Effects, v.env.Trace); err != nil {
		return "start", err
	}
	for _, e := range pl.Run {
		if e, err = r.complete(ctx, e); err != nil {
			return "prepare", err
		}
		if err := r.journal.Do(ctx, e); err != nil {
			return "prepare", err
		}
	}
	if pl.Config.Streams, err = v.streams(console); err != nil {
		return "open logs", err
	}
	r.proc = vmm.New(&pl.Config)
	if err := r.journal.Do(ctx, r.proc); err != nil {
		r.proc = nil
		return "start VMM", errors.Join(err, pl.Config.Streams.Close())
	}
	return r.configure(ctx, pl)
}

// configure tells the VMM what it shall be, and boots or restores its guest.
func (r *Run) configure(ctx context.Context, pl *plan.Plan) (stage string, err error) {
	v := r.vm
	ctx, cancel := context.WithTimeoutCause(ctx, v.env.StartTimeout,
		fmt.Errorf("the VMM did not take its configuration within %s", v.env.StartTimeout))
	defer cancel()
	if r.memory, err = v.serveMemory(); err != nil {
		return "serve memory", err
	}
	r.client = firecracker.New(func(ctx context.Context) (net.Conn, error) {
		return r.proc.Dial(ctx, store.SocketFile)
	}, v.Record().VMM())
	for _, c := range pl.Calls {
		v.TraceCall("PUT " + c.Path)
		if err := c.Send(ctx, r.client); err != nil {
			return "PUT " + c.Path, err
		}
	}
	if v.Record().Restored != nil {
		return "", nil
	}
	v.TraceCall("InstanceStart")
	return "boot", r.client.InstanceStart(ctx)
}

// complete adds to an effect what is known only now: which user has a file that is to be lent
// (until its lease was taken, another VM may have had it); where a guest's DNS proxy is, and at
// which ports it is published.
func (r *Run) complete(ctx context.Context, e journal.Effect) (journal.Effect, error) {
	v := r.vm
	switch e := e.(type) {
	case *stage.Owner:
		return stage.NewOwner(e.Path, e.File, e.UID)
	case *share.Image:
		e.Log = v.env.Log.With("vm", v.Record().ID)
	case *network.Guest:
		vm := attach.VM{ID: v.Record().ID, Store: v.env.Store}
		return e, errors.Join(r.upkeep.Publish(ctx, vm, e, r.journal.Do),
			r.upkeep.Add(v.Dir(), e, v.Record().Interfaces, v.env.Log))
	}
	return e, nil
}

// What is kept of the streams of a VM, in bytes.
const (
	consoleLimit = 2 << 20
	logLimit     = 1 << 20
	metricsLimit = 16 << 20
)

// streams opens the files that take what the VMM writes. Console, if not nil, receives the guest's
// part as it comes.
func (v *VM) streams(console io.Writer) (s vmm.Streams, err error) {
	if console == nil && v.env.Console != nil {
		console = v.env.Console(v.Record().ID)
	}
	files, metrics := make([]*logfile.Writer, 3), ""
	if v.Record().Spec.Metrics != nil {
		metrics = v.Record().Spec.Metrics.MetricsPath
	}
	for i, f := range []struct {
		path  string
		limit int64
	}{{v.Path(store.ConsoleLog), consoleLimit}, {v.VMMLog(), logLimit}, {metrics, metricsLimit}} {
		if f.path == "" {
			continue
		}
		create := logfile.Create
		if filepath.Dir(f.path) == v.Dir() {
			create = logfile.CreateTimed // elsewhere there shall be no more files than the one that was named
		}
		if files[i], err = create(f.path, f.limit); err != nil {
			for _, opened := range files[:i] {
				err = errors.Join(err, opened.Close())
			}
			return s, err
		}
	}
	s.Lost = func(path string, err error) {
		v.env.Log.Warn("output of the VMM is lost", "vm", v.Record().ID, "stream", filepath.Base(path), "err", err)
	}
	s.Console, s.Log = logfile.Tee{Writer: files[0], Live: console}, files[1]
	if files[2] != nil {
		s.Metrics = files[2]
	}
	return s, nil
}

// Secrets reads the files that the Spec's Secrets and EnvFiles name, nil if there are none. A start
// does so by itself.
func (v *VM) Secrets() (*guest.Secrets, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.secrets != nil {
		return v.secrets, nil // read when the VM was made: from a pipe they come once
	}
	return secret.Load(&v.Record().Spec, secret.Options{LookupEnv: v.env.LookupEnv})
}

// Provide gives the next start in this process what Secrets has returned in another.
func (v *VM) Provide(s *guest.Secrets) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.secrets = s
}

// takeSecrets returns the secrets of one start.
func (v *VM) takeSecrets() (*guest.Secrets, error) {
	s, err := v.Secrets()
	v.Provide(nil)
	return s, err
}

// Adopt supervises a VM that runs and whose supervisor has died. It takes over the VM's lock.
func (v *VM) Adopt(lock *store.Lock) (err error) {
	started := time.Now().UTC()
	if fi, err := os.Stat(v.Path(store.RunJournal)); err == nil {
		started = fi.ModTime().UTC()
	}
	r := v.newRun(lock, started)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("adopt VM %s: %w", v.Record().ID, err), lock.Unlock())
		}
	}()
	r.guest.Booted = r.started
	r.guest.Secrets, r.guest.NoSecrets = v.takeSecrets() // the process that died may not have sent them
	if r.journal, err = journal.Open(v.Path(store.RunJournal), plan.Effects, v.env.Trace); err != nil {
		return err
	}
	// No plan: what that looks at, as the files of drives, need not have a name any more.
	rec := v.Record()
	config := vmm.Config{ID: rec.ID, Binary: rec.Binary, Dir: v.Path(store.RunDir), Cgroup: rec.Cgroup}
	if rec.Jailer != "" {
		config.Jailer = &vmm.Jailer{Binary: rec.Jailer, UID: rec.UID}
	}
	if config.Streams, err = v.streams(nil); err != nil {
		return errors.Join(err, r.journal.Close())
	}
	if r.proc, err = vmm.Adopt(&config); err != nil {
		return errors.Join(err, config.Streams.Close(), r.journal.Close())
	}
	r.upkeep.Adopt(attach.VM{ID: rec.ID, Store: v.env.Store}, r.journal.Effects(), rec.Interfaces, v.env.Log)
	r.client = v.Dial()
	r.begin()
	v.env.Log.Info("adopted", "vm", rec.ID)
	v.Event(status.EventAdopted)
	return nil
}
