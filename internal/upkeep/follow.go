package upkeep

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/spec"
)

// Follow has a VM that runs, as its journal says, be as a spec says in what may be changed: its
// policy and its ports, all or nothing.
func (u *Upkeep) Follow(ctx context.Context, vm attach.VM, j *journal.Journal, s *spec.Spec) error {
	first := true
	for _, e := range j.Effects() {
		if b, ok := e.(*bridged.Guest); ok {
			b.Host = s.Policy != nil && s.Policy.AllowHost
			if err := b.Repair(ctx, false); err != nil {
				return err
			}
		}
		g, ok := e.(*network.Guest)
		if !ok {
			continue
		}
		var ports []spec.Port
		if first {
			ports, first = s.Ports, false
		}
		if err := u.followOne(ctx, vm, g, change{j, s, ports}); err != nil {
			return err
		}
	}
	return nil
}

// change is what a guest is to become.
type change struct {
	*journal.Journal
	spec  *spec.Spec
	ports []spec.Port
}

func (u *Upkeep) followOne(ctx context.Context, vm attach.VM, g *network.Guest, to change) error {
	now := network.Guest{Guest: g.Guest}
	now.Policy = to.spec.Policy
	stay, fresh := match(g.Ports, attach.Ports(&spec.Spec{Ports: to.ports}))
	if len(fresh) == 0 && len(stay) == len(g.Ports) && reflect.DeepEqual(now.Policy, g.Policy) {
		return nil
	}
	var taken []filter.Port
	undo := func(err error) error {
		for _, p := range taken {
			err = errors.Join(err, u.giveUp(ctx, vm, p))
		}
		return errors.Join(err, u.note(vm))
	}
	for _, p := range fresh {
		if err := u.leaseAndPublish(ctx, vm, g, &p, to.Do); err != nil {
			return undo(err)
		}
		taken = append(taken, p)
	}
	now.Ports = slices.Concat(stay, taken)
	if err := now.Replace(ctx); err != nil {
		return undo(err)
	}
	gone := slices.DeleteFunc(slices.Clone(g.Ports), func(p filter.Port) bool { return slices.Contains(stay, p) })
	g.Guest = now.Guest
	var err error
	for _, p := range gone {
		err = errors.Join(err, u.giveUp(ctx, vm, p))
	}
	if names := u.names[g.Tap]; names != nil {
		err = errors.Join(err, names.followOwn(g.Policy))
	}
	return errors.Join(err, u.note(vm))
}

// leaseAndPublish is publish of a port that was not leased before.
func (u *Upkeep) leaseAndPublish(ctx context.Context, vm attach.VM, g *network.Guest, p *filter.Port,
	do attach.Do,
) (err error) {
	if p.Host == 0 {
		return u.publish(ctx, vm, g, p, do)
	}
	if err = lease(ctx, vm, *p, do); err != nil {
		err = fmt.Errorf("publish port %s: %w", attach.Flag(*p), err)
	} else {
		err = u.publish(ctx, vm, g, p, do)
	}
	if err != nil {
		err = errors.Join(err, unlease(ctx, vm, *p))
	}
	return err
}

// giveUp is the opposite of leaseAndPublish.
func (u *Upkeep) giveUp(ctx context.Context, vm attach.VM, p filter.Port) error {
	for _, f := range u.kept[p] {
		f()
	}
	delete(u.kept, p)
	u.ports = slices.DeleteFunc(u.ports, func(q attach.Port) bool { return q.Filter() == p })
	return unlease(ctx, vm, p)
}

// unlease ends leases before the run does, for which they are no more then.
func unlease(ctx context.Context, vm attach.VM, p filter.Port) (err error) {
	for _, l := range attach.PortLeases(vm, p) {
		err = errors.Join(err, l.Revert(ctx))
	}
	return err
}

// match says which ports stay, of those that are published, and which are new. One of the host that
// is left open is that which was chosen.
func match(now, want []filter.Port) (stay, fresh []filter.Port) {
	left := slices.Clone(now)
	take := func(is func(filter.Port) bool) bool {
		n := slices.IndexFunc(left, is)
		if n < 0 {
			return false
		}
		stay = append(stay, left[n])
		left = slices.Delete(left, n, n+1)
		return true
	}
	open := []filter.Port{}
	for _, p := range want {
		if p.Host == 0 {
			open = append(open, p)
		} else if !take(func(q filter.Port) bool { return q == p }) {
			fresh = append(fresh, p)
		}
	}
	for _, p := range open {
		if !take(func(q filter.Port) bool {
			return q.Address == p.Address && q.Guest == p.Guest && q.Protocol == p.Protocol
		}) {
			fresh = append(fresh, p)
		}
	}
	return stay, fresh
}
