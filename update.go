package smartvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"time"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/control"
	"push.rocks/smartvm/internal/store"
)

// Update changes a VM's Policy, Ports and the limits of its interfaces, for good: change gets a copy of its Spec, of which nothing else may become
// different. A VM that runs has it at once, policy and ports all or nothing, and connections end that are not allowed any more; another from its next start
// on. Returns what change does, *FieldErrors, ErrNotFound, ErrState while a snapshot of the VM is made, and what Start returns of ports that are taken.
func (m *Machine) Update(ctx context.Context, change func(*Spec) error) (err error) {
	hold, err := m.hold("update")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hold.Release()) }()
	if err := m.exists(); err != nil {
		return err
	}
	was, err := readRecord(m.host.store, m.rec().ID)
	if err != nil {
		return err
	}
	now := *was
	if now.Spec, err = attach.Changed(was.Spec, was.Interfaces, change); err != nil {
		return fmt.Errorf("update VM %s: %w", was.ID, err)
	}
	if err := now.write(m.host.store); err != nil {
		return err
	}
	m.record.Store(&now)
	if err := m.tellSupervisor(ctx); err != nil {
		m.record.Store(was)
		return errors.Join(fmt.Errorf("update VM %s: %w", was.ID, err), was.write(m.host.store))
	}
	for i, n := range now.Spec.NetworkInterfaces {
		before := was.Spec.NetworkInterfaces[i]
		if reflect.DeepEqual(before, n) {
			continue
		}
		one := m.UpdateNetworkInterface(ctx, n.IfaceID, attach.Limit(before.RxRateLimiter, n.RxRateLimiter), attach.Limit(before.TxRateLimiter, n.TxRateLimiter))
		if !errors.Is(one, ErrState) { // it does not run
			err = errors.Join(err, one)
		}
	}
	return err
}

// listenTime is how long a process that has just begun to supervise a VM may take until it can be asked.
const listenTime = 5 * time.Second

// tellSupervisor has the process that supervises the VM, if one does, look at its record, and returns what came of it.
func (m *Machine) tellSupervisor(ctx context.Context) error {
	for begun := time.Now(); ; {
		err := control.Ask(ctx, m.RuntimeDir(), store.ControlSocket)
		if !errors.Is(err, control.ErrNobody) {
			return err
		}
		if supervised, err := m.Supervised(); !supervised || time.Since(begun) > listenTime {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(waitPoll):
		}
	}
}

// follow takes over what Update has changed of a VM that runs.
func (m *Machine) follow(ctx context.Context, r *run) error {
	fi, err := os.Stat(m.path(store.MachineFile))
	if err != nil || fi.ModTime().Equal(r.followed) {
		return err
	}
	rec, err := readRecord(m.host.store, m.rec().ID)
	if err == nil {
		err = r.upkeep.Follow(ctx, attach.VM{ID: rec.ID, Store: m.host.store}, r.journal, &rec.Spec)
	}
	if err == nil {
		m.record.Store(rec)
		r.followed = fi.ModTime()
	}
	return err
}
