package upkeep

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
)

// Publish takes the ports of a guest from the host's other programs until Close, and chooses those
// that are 0. Leases of the others have been taken. Where the guest's network is up it leads what
// comes to ::1 on to the guest. Returns an error that is EADDRINUSE where something listens at a
// port.
func (u *Upkeep) Publish(ctx context.Context, vm attach.VM, g *network.Guest, do attach.Do) error {
	if len(g.Ports) == 0 {
		return nil
	}
	var errs []error
	for i := range g.Ports {
		errs = append(errs, u.publish(ctx, vm, g, &g.Ports[i], do))
	}
	return errors.Join(append(errs, u.note(vm))...)
}

// publish takes one port, or chooses it.
func (u *Upkeep) publish(ctx context.Context, vm attach.VM, g *network.Guest, p *filter.Port,
	do attach.Do,
) (err error) {
	switch {
	case p.Address.Is6() && !p.Address.IsLoopback() && !g.IP6.IsValid():
		err = errors.New("the VM's network has no IPv6")
	case p.Host == 0:
		err = u.choose(ctx, vm, g, p, do)
	default:
		err = u.take(vm, g, *p)
	}
	if err != nil {
		return fmt.Errorf("publish port %s: %w", attach.Flag(*p), err)
	}
	return nil
}

// take keeps a port from others.
func (u *Upkeep) take(vm attach.VM, g *network.Guest, p filter.Port) error {
	if owner, at := attach.Overlapping(vm, p); owner != "" {
		return fmt.Errorf("it is taken by VM %s, at %s: %w", owner, at, unix.EADDRINUSE)
	}
	sockets, err := reserve(p)
	if err != nil {
		release(sockets)
		return hint.Add(err, "stop what listens there (ss -ltnup), or publish another port: -p HOST:%d", p.Guest)
	}
	u.keep(g, p, sockets)
	return nil
}

// maxTries is how many free ports are tried: one may be free for one address or protocol and not
// for the other, or be a stopped host's VM's.
const maxTries = 32

// choose takes a port that is free, of those that the kernel gives programs which ask for none.
func (u *Upkeep) choose(ctx context.Context, vm attach.VM, g *network.Guest, p *filter.Port, do attach.Do) error {
	var tried []reserved // the kernel is not to give them again
	defer func() { release(tried) }()
	var last error
	for range maxTries {
		now := *p
		sockets, err := reserve(now)
		tried = append(tried, sockets...)
		if errors.Is(err, unix.EADDRINUSE) && len(sockets) > 0 {
			last = err
			continue
		}
		if err != nil {
			last = err
			break
		}
		last = fs.ErrExist
		if now.Host = sockets[0].port; !isLeased(vm, now) {
			last = lease(ctx, vm, now, do)
		}
		if last == nil {
			*p, tried = now, tried[:len(tried)-len(sockets)]
			u.keep(g, now, sockets)
			return nil
		}
		if !errors.Is(last, fs.ErrExist) {
			return last
		}
	}
	return fmt.Errorf("no port of the host is free: %w", last)
}

func lease(ctx context.Context, vm attach.VM, p filter.Port, do attach.Do) error {
	for _, l := range attach.PortLeases(vm, p) {
		if err := do(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

func isLeased(vm attach.VM, p filter.Port) bool {
	owner, _ := attach.Overlapping(vm, p)
	return owner != ""
}
