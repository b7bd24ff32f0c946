package vmrun

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/status"
)

// poll is how often a VM is looked at again that another process has locked.
const poll = 10 * time.Millisecond

// acquireTimeout bounds how long an operation waits for another one on the same VM to be done.
const acquireTimeout = 10 * time.Second

// Acquire takes the VM's lock for op, if its state allows op, and finishes a run that ended while
// it was unsupervised.
func (v *VM) Acquire(ctx context.Context, op string) (*store.Lock, error) {
	id, call := v.Record().ID, ctx
	ctx, cancel := context.WithTimeoutCause(ctx, acquireTimeout, errors.New("another operation on it does not end"))
	defer cancel()
	for {
		lock, err := v.env.Store.TryLock(id)
		switch {
		case err == nil:
			return v.acquired(call, op, lock) // copying back may take longer
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("VM %s: %w", id, status.ErrNotFound)
		case !errors.Is(err, store.ErrLocked):
			return nil, fmt.Errorf("%s VM %s: %w", op, id, err)
		}
		state, err := v.State(ctx)
		if err != nil {
			return nil, err
		}
		// What is about to have stopped is worth the wait.
		if err := Allow(id, op, op, state); err != nil && state != status.Stopping {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%s VM %s: %w", op, id, context.Cause(ctx))
		case <-time.After(poll):
		}
	}
}

// acquired looks at the VM, now that no other process can change anything.
func (v *VM) acquired(ctx context.Context, op string, lock *store.Lock) (*store.Lock, error) {
	err := func() error {
		if err := v.Exists(); err != nil {
			return err
		}
		alive, err := v.Process().Alive()
		if err == nil && alive {
			err = &status.StateError{ID: v.Record().ID, Op: op, State: status.Running, Want: transitions[op]}
		}
		if err != nil {
			return err
		}
		return v.FinishLost(ctx)
	}()
	if err != nil {
		return nil, errors.Join(err, lock.Unlock())
	}
	return lock, nil
}

// Freeze keeps other processes from making a snapshot of the VM, pausing or resuming it meanwhile.
// Op is what for.
func (v *VM) Freeze(op string) (*store.Hold, error) {
	id := v.Record().ID
	hold, err := v.env.Store.Hold(id)
	switch {
	case errors.Is(err, store.ErrLocked):
		return nil, fmt.Errorf("%s VM %s: %w: a snapshot of it is being made", op, id, status.ErrState)
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("VM %s: %w", id, status.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("%s VM %s: %w", op, id, err)
	}
	return hold, nil
}

// freezeSoon is Freeze that waits until a snapshot is made: what it writes down must not change
// meanwhile.
func (v *VM) freezeSoon(ctx context.Context) (*store.Hold, error) {
	for {
		hold, err := v.Freeze("stop")
		if !errors.Is(err, status.ErrState) {
			return hold, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(poll):
		}
	}
}

// resumePatience bounds how long a VM is waited for that is to go on after a snapshot.
const resumePatience = time.Minute

// Unfreeze lets a VM go on that a process which has died froze for a snapshot.
func (e *Env) Unfreeze(ctx context.Context, id string) error {
	hold, err := e.Store.Abandoned(id)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, store.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	v, err := e.Open(id)
	if errors.Is(err, status.ErrNotFound) { // it is being removed
		return hold.Release()
	}
	if err != nil {
		return errors.Join(err, hold.Release())
	}
	state, sure, err := v.Look(ctx)
	if err != nil {
		return errors.Join(err, hold.Abandon())
	}
	if sure && state != status.Paused && state != status.Running {
		return hold.Release()
	}
	// A VMM that still writes the snapshot answers when it has done so.
	ctx, cancel := context.WithTimeout(ctx, resumePatience)
	defer cancel()
	c := v.Dial()
	if hold.Resumes() && (state == status.Paused || !sure) {
		if err = c.Resume(ctx); err == nil {
			e.Log.Warn("resumed after an abandoned snapshot", "vm", id)
		}
	}
	if mib, ok := hold.Deflates(); ok && err == nil {
		err = c.PatchBalloon(ctx, mib)
	}
	if g, guestErr := v.Guest(); hold.Resumes() && err == nil && guestErr == nil && v.Record().HasAgent() && g.Ready() {
		err = v.Agent().Thaw(ctx)
	}
	if err = errors.Join(err, c.Close()); err != nil {
		return errors.Join(err, hold.Abandon()) // it is tried again
	}
	return hold.Release()
}
