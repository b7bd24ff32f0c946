package smartvm

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/status"
)

// Update changes a VM's Policy, Ports and the limits of its interfaces, for good: change gets a
// copy of its Spec, of which nothing else may become different. A VM that runs has it at once,
// policy and ports all or nothing, and connections end that are not allowed any more; another from
// its next start on. Returns what change does, *FieldErrors, ErrNotFound, ErrState while a snapshot
// of the VM is made, and what Start returns of ports that are taken.
func (m *Machine) Update(ctx context.Context, change func(*Spec) error) (err error) {
	hold, err := m.vm.Freeze("update")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hold.Release()) }()
	if err := m.vm.Exists(); err != nil {
		return err
	}
	was, err := plan.Read(m.host.env.Store, m.rec().ID)
	if err != nil {
		return err
	}
	now := *was
	if now.Spec, err = attach.Changed(was.Spec, was.Interfaces, change); err != nil {
		return fmt.Errorf("update VM %s: %w", was.ID, err)
	}
	if err := now.Write(m.host.env.Store); err != nil {
		return err
	}
	m.vm.SetRecord(&now)
	if err := m.vm.NotifySupervisor(ctx); err != nil {
		m.vm.SetRecord(was)
		return errors.Join(fmt.Errorf("update VM %s: %w", was.ID, err), was.Write(m.host.env.Store))
	}
	if changed := changedParts(&was.Spec, &now.Spec); changed != "" {
		m.vm.Event(status.EventUpdated, "changed", changed)
	}
	for i, n := range now.Spec.NetworkInterfaces {
		before := was.Spec.NetworkInterfaces[i]
		if reflect.DeepEqual(before, n) {
			continue
		}
		one := m.UpdateNetworkInterface(ctx, n.IfaceID, attach.Limit(before.RxRateLimiter, n.RxRateLimiter),
			attach.Limit(before.TxRateLimiter, n.TxRateLimiter))
		if !errors.Is(one, ErrState) { // it does not run
			err = errors.Join(err, one)
		}
	}
	return err
}

// changedParts names what is different of what Update changes.
func changedParts(was, now *Spec) string {
	var parts []string
	for _, p := range []struct {
		name     string
		was, now any
	}{
		{"policy", was.Policy, now.Policy},
		{"ports", was.Ports, now.Ports},
		{"interfaces", was.NetworkInterfaces, now.NetworkInterfaces},
	} {
		if !reflect.DeepEqual(p.was, p.now) {
			parts = append(parts, p.name)
		}
	}
	return strings.Join(parts, ",")
}
