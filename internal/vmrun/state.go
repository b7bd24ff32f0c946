package vmrun

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/status"
)

// transitions is the one table of what may be done in which state.
var transitions = map[string][]status.State{
	"start":  {status.Stopped, status.Failed, status.Lost},
	"pause":  {status.Running},
	"resume": {status.Paused},
	// Of a VM that has ended there is nothing to do.
	"stop": {
		status.Stopped, status.Starting, status.Running, status.Paused, status.Stopping,
		status.Failed, status.Lost,
	},
	"remove": {status.Stopped, status.Failed, status.Lost},
	"call":   {status.Running, status.Paused}, // everything that talks to the VMM of a started VM
}

// Operations are the entries of the table of what may be done in which state.
func Operations() []string { return slices.Sorted(maps.Keys(transitions)) }

// Allow returns a *status.StateError if op, one of Operations, may not be done in a state. Call
// names it to the user.
func Allow(id, op, call string, s status.State) error {
	if want := transitions[op]; !slices.Contains(want, s) {
		return &status.StateError{ID: id, Op: call, State: s, Want: want}
	}
	return nil
}

// Allowed is Allow for the state that the VM is in.
func (v *VM) Allowed(ctx context.Context, op, call string) error {
	state, sure, err := v.Look(ctx)
	if err == nil && sure { // else the VMM will say what it thinks of it
		err = Allow(v.Record().ID, op, call, state)
	}
	return err
}

// State derives where the VM is. If its VMM does not answer within a second, it counts as Running,
// or as Starting where its guest is not known to have run. Returns ErrNotFound once it is removed.
func (v *VM) State(ctx context.Context) (status.State, error) {
	state, _, err := v.Look(ctx)
	return state, err
}

// Look is State, and whether the VMM, if there is one, has said so.
func (v *VM) Look(ctx context.Context) (state status.State, sure bool, err error) {
	v.mu.Lock()
	busy, r := v.busy, v.run
	v.mu.Unlock()
	switch {
	case busy != "":
		return busy, true, nil
	case r != nil:
		return v.ask(ctx, r.client, r.proc)
	}
	if err := v.Exists(); err != nil {
		return "", false, err
	}
	if _, err := os.Stat(v.Path(store.RunJournal)); err != nil {
		state, err = v.atRest()
		return state, true, err
	}
	p := v.Process()
	alive, err := p.Alive()
	if err != nil {
		return "", false, fmt.Errorf("VM %s: %w", v.Record().ID, err)
	}
	if alive {
		c := v.Dial()
		defer c.Close()
		return v.ask(ctx, c, p)
	}
	switch held, err := v.env.Store.Locked(v.Record().ID); {
	case err != nil:
		return "", false, fmt.Errorf("VM %s: %w", v.Record().ID, err)
	case !held:
		return status.Lost, true, nil
	}
	// A start deletes exit.json first; the end of a run writes it before any cleanup.
	if exit, err := v.Exit(); err == nil && exit != nil {
		return status.Stopping, true, nil
	}
	if _, err := os.Lstat(filepath.Join(v.Root(), store.SocketFile)); err != nil {
		return status.Starting, true, nil
	}
	return status.Stopping, true, nil
}

// Supervised says whether a process supervises the VM. Without one it goes on, but what its guest
// writes is lost.
func (v *VM) Supervised() (bool, error) {
	held, err := v.env.Store.Locked(v.Record().ID)
	if err != nil {
		return false, fmt.Errorf("VM %s: %w", v.Record().ID, err)
	}
	return held, nil
}

// atRest tells the states of a VM that has no run.
func (v *VM) atRest() (status.State, error) {
	exit, err := plan.ReadExit(v.env.Store, v.Record().ID)
	switch {
	case err != nil:
		return "", fmt.Errorf("VM %s: %w", v.Record().ID, err)
	case exit != nil && exit.Outcome == status.OutcomeFailed:
		return status.Failed, nil
	case exit != nil && exit.Outcome == status.OutcomeLost:
		return status.Lost, nil
	}
	return status.Stopped, nil
}

// askTimeout bounds how long State waits for a VMM that does not answer.
const askTimeout = time.Second

func (v *VM) ask(ctx context.Context, c *firecracker.Client, p *vmm.Process) (state status.State,
	sure bool, err error,
) {
	short, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	info, err := c.GetInstanceInfo(short)
	switch {
	case ctx.Err() != nil:
		return "", false, fmt.Errorf("VM %s: %w", v.Record().ID, context.Cause(ctx))
	case err != nil:
		if p.Hung(ctx) {
			_ = p.Revert(ctx) // the guest has ended; the process that supervises it sees the end now
		}
		if alive, err := p.Alive(); err == nil && !alive {
			return status.Stopping, true, nil
		}
		// Else it is too busy, or its host is; the queue of its socket may be full of calls that were
		// given up.
		sure = !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, syscall.EAGAIN)
		if v.ran() {
			return status.Running, sure, nil
		}
		return status.Starting, sure, nil
	case info.State == firecracker.StatePaused:
		return status.Paused, true, nil
	case info.State == firecracker.StateRunning:
		return status.Running, true, nil
	}
	return status.Starting, true, nil
}

// ran says whether the VM's run is known to have come so far that its guest ran.
func (v *VM) ran() bool {
	if v.current() != nil {
		return true
	}
	g, err := v.Guest()
	return err == nil && g != nil
}
