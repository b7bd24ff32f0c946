package vmrun

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/status"
)

// AgentStop, CtrlAltDel and Killed are the ways in which Stop ends a VM.
const (
	AgentStop  = "agent"
	CtrlAltDel = "ctrl-alt-del"
	Killed     = vmm.Killed
)

// Stop ends the VM and waits until its run is cleaned up. It returns AgentStop, CtrlAltDel or
// Killed, or "" if the VM was not running. Timeout is how long the guest may take to shut down when
// it is asked to; 0: it is killed at once.
func (v *VM) Stop(ctx context.Context, timeout time.Duration) (string, error) {
	r := v.current()
	if r == nil {
		return v.stopForeign(ctx, timeout)
	}
	how, err := r.proc.Stop(ctx, timeout, v.askToStop)
	if err != nil {
		return how, v.Fail("stop", err, nil)
	}
	select {
	case <-r.done:
		return how, r.err
	case <-ctx.Done():
		return how, v.Fail("stop", context.Cause(ctx), nil)
	}
}

// stopForeign stops a VM that another process supervises, or none.
func (v *VM) stopForeign(ctx context.Context, timeout time.Duration) (how string, err error) {
	state, err := v.State(ctx)
	if err != nil {
		return "", err
	}
	if err := Allow(v.Record().ID, "stop", "stop", state); err != nil {
		return "", err
	}
	if err := v.checkJournals(); err != nil {
		return "", fmt.Errorf("stop VM %s: %w", v.Record().ID, err)
	}
	if how, err = v.Process().Stop(ctx, timeout, v.askToStop); err != nil {
		return how, v.Fail("stop", err, nil)
	}
	return how, v.awaitCleanup(ctx)
}

// askToStop has the guest shut down, by its agent or else by Ctrl-Alt-Del, within the time limit
// that ctx has. It returns which.
func (v *VM) askToStop(ctx context.Context) (how string, err error) {
	warn := func(err error) {
		if err != nil { // no reason to kill the guest instead
			v.env.Log.Warn("stop", "vm", v.Record().ID, "err", err)
		}
	}
	hold, err := v.freezeSoon(ctx)
	switch {
	case errors.Is(err, status.ErrState), errors.Is(err, status.ErrNotFound):
		return "", err
	case err != nil:
		warn(err)
	default:
		defer func() { warn(hold.Release()) }()
	}
	c := v.Dial()
	defer func() { warn(c.Close()) }()
	// A paused guest hears nothing.
	if err := c.Resume(ctx); err != nil {
		return "", err
	}
	if v.Record().Spec.Vsock != nil && v.askAgentToStop(ctx) == nil {
		return AgentStop, nil
	}
	return CtrlAltDel, c.SendCtrlAltDel(ctx)
}

// Of the time limit of a stop, the agent may take agentPart to answer, and the guest's shutdown has
// shutdownPart after the image's command was killed.
const (
	agentPart, maxAgentPart       = 4, 5 * time.Second
	shutdownPart, maxShutdownPart = 4, time.Second
)

func (v *VM) askAgentToStop(ctx context.Context) error {
	end, _ := ctx.Deadline()
	left := time.Until(end)
	asking, cancel := context.WithTimeout(ctx, min(left/agentPart, maxAgentPart))
	defer cancel()
	return v.Agent().Stop(asking, left-min(left/shutdownPart, maxShutdownPart))
}

// awaitCleanup waits until the supervisor of the ended VM has undone its run, and does it itself if
// there is none. A VMM that was only about to be started meanwhile is killed.
func (v *VM) awaitCleanup(ctx context.Context) error {
	for {
		if done, err := v.cleanUp(ctx); done || err != nil {
			return err
		}
		if err := v.Process().Revert(ctx); err != nil {
			return v.Fail("stop", err, nil)
		}
	}
}

// cleanUpWait is how long cleanUp waits for the process that has locked the VM.
const cleanUpWait = 100 * time.Millisecond

// cleanUp undoes the run of an ended VM unless another process has locked it, which may be starting
// it again.
func (v *VM) cleanUp(ctx context.Context) (done bool, err error) {
	patience, cancel := context.WithTimeout(ctx, cleanUpWait)
	defer cancel()
	lock, err := v.env.Store.Lock(patience, v.Record().ID)
	switch {
	case err == nil:
		return true, errors.Join(v.FinishLost(ctx), lock.Unlock())
	case errors.Is(err, fs.ErrNotExist):
		return true, nil // and removed it
	case ctx.Err() != nil || !errors.Is(err, store.ErrLocked):
		return false, fmt.Errorf("VM %s: %w", v.Record().ID, err)
	}
	return false, nil
}

// FinishLost undoes a run that ended while it was unsupervised, and copies back what its guest has
// changed. The caller has the lock. Nothing is done, and it returns ErrNotSupported, where only
// another version of smartvm can undo the VM's effects.
func (v *VM) FinishLost(ctx context.Context) error {
	if err := v.checkJournals(); err != nil {
		return fmt.Errorf("VM %s: %w", v.Record().ID, err)
	}
	return errors.Join(v.undoLost(ctx), v.syncBack(ctx))
}

// undoLost undoes a run that ended while it was unsupervised. The caller has the lock.
func (v *VM) undoLost(ctx context.Context) error {
	fi, err := os.Stat(v.Path(store.RunJournal))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if exit, err := v.Exit(); err != nil || exit == nil {
		lost := &status.Exit{Outcome: status.OutcomeLost, Code: -1, Started: fi.ModTime().UTC(), Ended: time.Now().UTC()}
		if err := v.writeExit(lost); err != nil {
			return err
		}
	}
	return v.undo(ctx, store.RunJournal)
}

// exitSize is the room that is reserved for exit.json, in bytes.
const exitSize = 4 << 10

// writeExit writes down how a run ended, also on a file system that has become full since it began.
func (v *VM) writeExit(exit *status.Exit) error {
	data, err := json.MarshalIndent(exit, "", "  ")
	if err != nil {
		return err
	}
	err = atomicfile.WriteReserved(v.Path(store.ExitFile), append(data, '\n'))
	if exit.Outcome != status.OutcomeFailed { // which has an event of its own
		code := exit.Code
		if exit.Command != nil {
			code = exit.Command.Code
		}
		v.Event(status.EventExited, "outcome", string(exit.Outcome), "code", strconv.Itoa(code), "signal", exit.Signal)
	}
	return err
}

// Wait returns when the VM's run has ended and is undone, how it ended, and what could not be
// undone. Returns at once if it does not run, ErrNotFound if it is removed meanwhile, ErrState if
// it has never run, ErrClosed if this process supervised it and its Env is closed.
func (v *VM) Wait(ctx context.Context) (*status.Exit, error) {
	if r := v.current(); r != nil {
		select {
		case <-r.done:
			if r.exit == nil {
				return nil, errors.Join(fmt.Errorf("wait for VM %s: %w", v.Record().ID, status.ErrClosed), r.err)
			}
			return r.exit, r.err
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for VM %s: %w", v.Record().ID, context.Cause(ctx))
		}
	}
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		if err := v.Process().Wait(ctx); err != nil {
			return nil, fmt.Errorf("wait for VM %s: %w", v.Record().ID, err)
		}
		state, err := v.State(ctx)
		switch {
		case err != nil:
			return nil, err
		case state == status.Stopped, state == status.Failed:
			return v.exited()
		case state == status.Lost:
			if done, err := v.cleanUp(ctx); err != nil {
				return nil, err
			} else if done {
				return v.exited()
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for VM %s: %w", v.Record().ID, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func (v *VM) exited() (*status.Exit, error) {
	exit, err := v.Exit()
	if err == nil && exit == nil {
		if err := v.Exists(); err != nil {
			return nil, err
		}
		err = fmt.Errorf("it never ran: %w", status.ErrState)
	}
	if err != nil {
		return nil, fmt.Errorf("wait for VM %s: %w", v.Record().ID, err)
	}
	return exit, nil
}
