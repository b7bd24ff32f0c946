package smartvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/store"
)

// settle waits until whoever looks after the ended VM has undone its run, and does it itself if nobody does. A
// VMM that was only about to be started meanwhile is killed.
func (m *Machine) settle(ctx context.Context) error {
	for {
		if done, err := m.settled(ctx); done || err != nil {
			return err
		}
		if err := m.attach().Revert(ctx); err != nil {
			return m.fail("stop", err, nil)
		}
	}
}

// settled undoes the run of an ended VM unless somebody else has it in hand, who may be starting it again.
func (m *Machine) settled(ctx context.Context) (done bool, err error) {
	patience, cancel := context.WithTimeout(ctx, settlePoll)
	defer cancel()
	lock, err := m.host.store.Lock(patience, m.rec().ID)
	switch {
	case err == nil:
		return true, errors.Join(m.conclude(ctx), lock.Unlock())
	case errors.Is(err, fs.ErrNotExist):
		return true, nil // and removed it
	case ctx.Err() != nil || !errors.Is(err, store.ErrLocked):
		return false, fmt.Errorf("VM %s: %w", m.rec().ID, err)
	}
	return false, nil
}

// settlePoll is how long settled waits for who has the VM in hand.
const settlePoll = 100 * time.Millisecond

// mourn undoes a run that nobody watched to its end. The caller has the lock.
func (m *Machine) mourn(ctx context.Context) error {
	fi, err := os.Stat(m.path(store.RunJournal))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if exit, err := m.Exit(); err != nil || exit == nil {
		lost := &Exit{Outcome: OutcomeLost, Code: -1, Started: fi.ModTime().UTC(), Ended: time.Now().UTC()}
		if err := atomicfile.WriteJSON(m.path(store.ExitFile), lost); err != nil {
			return err
		}
	}
	return m.replay(ctx, store.RunJournal)
}

// Wait returns when the VM's run has ended and is undone, and how it ended. Returns at once if it does not
// run, ErrNotFound if it is removed meanwhile.
func (m *Machine) Wait(ctx context.Context) (*Exit, error) {
	m.mu.Lock()
	r := m.run
	m.mu.Unlock()
	if r != nil {
		select {
		case <-r.done:
			return m.exited()
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for VM %s: %w", m.rec().ID, context.Cause(ctx))
		}
	}
	tick := time.NewTicker(waitPoll)
	defer tick.Stop()
	for {
		if err := m.attach().Wait(ctx); err != nil {
			return nil, fmt.Errorf("wait for VM %s: %w", m.rec().ID, err)
		}
		state, err := m.State(ctx)
		switch {
		case err != nil:
			return nil, err
		case state == Stopped, state == Failed:
			return m.exited()
		case state == Lost:
			if done, err := m.settled(ctx); err != nil {
				return nil, err
			} else if done {
				return m.exited()
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for VM %s: %w", m.rec().ID, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// waitPoll is how often Wait looks at a VM between its process's end and the end of its run.
const waitPoll = 10 * time.Millisecond

func (m *Machine) exited() (*Exit, error) {
	exit, err := m.Exit()
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", m.rec().ID, err)
	}
	if exit == nil {
		if _, err := os.Stat(m.path(store.MachineFile)); err != nil {
			return nil, fmt.Errorf("VM %s: %w", m.rec().ID, ErrNotFound)
		}
	}
	return exit, nil
}
