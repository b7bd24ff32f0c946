// Package upkeep is what the process that supervises a VM does for its networks while it runs.
package upkeep

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/control"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/flowlog"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/network/rtnl"
	"push.rocks/smartvm/network/watch"
)

// Upkeep is what the process that supervises a VM does for its networks: it answers DNS queries,
// keeps published ports from other programs, and repairs what others have removed. Its zero value
// serves.
type Upkeep struct {
	cancel   []context.CancelFunc
	work     sync.WaitGroup
	sockets  []socket
	ports    []attach.Port            // published
	kept     map[filter.Port][]func() // what gives up a port that is published
	lost     func() error             // looks again for those that could not be reserved; nil: there are none
	restored map[string]int           // how often the network of each tap was
	names    map[string]*names        // by tap
	guards   map[string]func()        // by user of a network, what lets go of its guard
	tried    *flowlog.Log             // what the guest tried; nil: that is not logged
	unsure   map[string]string        // by tap, its network, of which it is not known whether the kernel logs
}

// socket is a DNS proxy's, on a bridge.
type socket struct {
	bridge string
	syscall.Conn
}

// quietTime is how long after the first change it is told: somebody who removes a network removes
// more than one thing.
const quietTime = 5 * time.Millisecond

// partTime is how often a VM's own part is looked at, at most, where others change rules again and
// again, or undo what is repaired.
const partTime = time.Second

// Look tells when to Heal: at intervals, when somebody has changed something, and, with the VM's
// directory, when a process asks by that, until ctx ends. What comes by the first channel wants to
// know what came of it. By the second it tells when to HealPart.
func (u *Upkeep) Look(ctx context.Context, dir string, all []attach.Interface, every time.Duration,
	log *slog.Logger,
) (<-chan func(error), <-chan struct{}) {
	now, part := make(chan func(error), 1), make(chan struct{}, 1)
	tell := func() {
		select {
		case now <- func(error) {}:
		default: // it is told already
		}
	}
	if dir != "" {
		u.work.Go(func() {
			if err := control.Listen(ctx, dir, store.ControlSocket, func() error { return ask(ctx, now) }); err != nil {
				log.Warn("changes of the VM are seen later", "dir", dir, "err", err)
			}
		})
	}
	var of watch.Of
	for _, i := range all {
		table := i.Network.Table()
		if i.Network.LAN != nil {
			table = bridged.Table(i.Tap)
		}
		of.Tables, of.Bridges = append(of.Tables, table), append(of.Bridges, i.Network.Bridge)
		p := watch.Port{Name: i.Tap, Bridge: i.Network.Bridge}
		for _, a := range []netip.Addr{i.IP4, i.IP6} {
			if a.IsValid() {
				p.Addresses = append(p.Addresses, a)
			}
		}
		of.Ports = append(of.Ports, p)
	}
	changed := make(chan struct{}, 1)
	u.work.Go(func() { pace(ctx, changed, part) })
	u.work.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		var listen func(context.Context, func()) error
		if len(all) > 0 {
			listen = func(ctx context.Context, event func()) error {
				return watch.Watch(ctx, of, tell, event, func() { offer(changed) })
			}
		}
		for ctx.Err() == nil {
			if err := await(ctx, tick.C, listen, tell); err != nil && ctx.Err() == nil {
				log.Debug("watch networks: changes are seen later", "err", err)
				listen = nil
			}
		}
	})
	return now, part
}

// offer tells, unless it is told already.
func offer(to chan<- struct{}) {
	select {
	case to <- struct{}{}:
	default:
	}
}

// pace passes on that something has changed, so often at most.
func pace(ctx context.Context, changed <-chan struct{}, to chan<- struct{}) {
	wait := func(d time.Duration) {
		select {
		case <-ctx.Done():
		case <-time.After(d):
		}
	}
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		wait(quietTime)
		select { // what came meanwhile is looked at with it
		case <-changed:
		default:
		}
		offer(to)
		wait(partTime)
	}
}

// ask waits for what comes of it.
func ask(ctx context.Context, now chan<- func(error)) error {
	answer := make(chan error, 1)
	select {
	case now <- func(err error) { answer <- err }:
	case <-ctx.Done():
		return errors.New("the VM stops")
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return errors.New("the VM stops")
	}
}

// await tells at each tick, and when something has changed: then it is over, as a bridge that was
// removed will be another. Listen nil: no changes.
func await(ctx context.Context, tick <-chan time.Time, listen func(context.Context, func()) error, tell func()) error {
	var work sync.WaitGroup
	defer work.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	changed := time.NewTimer(quietTime)
	changed.Stop()
	done := make(chan error, 1)
	if listen != nil {
		work.Go(func() { done <- listen(ctx, func() { changed.Reset(quietTime) }) })
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick:
			tell()
		case <-changed.C:
			tell()
			return nil
		case err := <-done:
			return err
		}
	}
}

// Heal restores a VM's part in its networks when those had to be restored themselves, or when
// others have removed or changed it. Effects are those of its run.
func (u *Upkeep) Heal(ctx context.Context, effects []journal.Effect) error {
	return u.heal(ctx, effects, false)
}

// HealPart does so without a look at the networks themselves, for which it need not wait for those
// who do, unless more is amiss than the guest's own part.
func (u *Upkeep) HealPart(ctx context.Context, effects []journal.Effect) error {
	if u.heal(ctx, effects, true) == nil {
		return nil
	}
	return u.heal(ctx, effects, false)
}

func (u *Upkeep) heal(ctx context.Context, effects []journal.Effect, part bool) error {
	if u.restored == nil {
		u.restored = map[string]int{}
	}
	if u.lost != nil && !part {
		if err := u.lost(); err != nil {
			return err
		}
	}
	now, again := 0, false
	var gone error
	var of *policy.Policy
	for _, e := range effects {
		var err error
		switch e := e.(type) {
		case *network.Use:
			if part {
				continue
			}
			if err = u.hold(ctx, e); err == nil {
				now, of, err = e.Check(ctx)
			}
			if err == nil {
				err = u.rebind(e.Network.Bridge)
			}
		case *network.Tap:
			again, err = e.Repair(now > u.restored[e.Name])
			if err != nil && e.LAN { // a bridge that is gone is not ours to make, and the rules hold without it
				gone, err = errors.Join(gone, err), nil
			}
		case *network.Slot:
			again, err = e.Port().Repair(now > u.restored[e.Name])
		case *network.Guest:
			names := u.names[e.Tap]
			if again {
				err = e.Apply(ctx)
			} else {
				_, err = e.Repair(ctx)
			}
			if again && names != nil {
				names.forget()
			}
			if err == nil && names != nil && !part {
				err = names.follow(of, e.Policy)
			}
			if err == nil && !part {
				u.restored[e.Tap] = now
				err = u.sure(e)
			}
		case *bridged.Guest:
			err = e.Repair(ctx, again)
		}
		if err != nil {
			return errors.Join(gone, err)
		}
	}
	return gone
}

// hold keeps what guests send from passing while the rules of their network are gone.
func (u *Upkeep) hold(ctx context.Context, e *network.Use) error {
	release, err := e.Hold(ctx)
	if u.guards == nil {
		u.guards = map[string]func(){}
	}
	u.guards[e.VM] = release
	return err
}

// announce has the other guests of a network know where this one is. It does not hold up the start:
// without it they find it later.
func (u *Upkeep) announce(g *network.Guest, log *slog.Logger) {
	bridge, text, addresses := g.Bridge(), g.MAC, []netip.Addr{g.IP4, g.IP6}
	u.work.Go(func() {
		mac, err := net.ParseMAC(text)
		if err == nil {
			err = rtnl.Announce(bridge, mac, addresses...)
		}
		if err != nil {
			log.Debug("announce guest", "err", err)
		}
	})
}

// rebind has the DNS proxies on a bridge serve there again, if it is another of its name now.
func (u *Upkeep) rebind(bridge string) error {
	for _, s := range u.sockets {
		if s.bridge != bridge {
			continue
		}
		raw, err := s.SyscallConn()
		if err == nil {
			err = bindTo(bridge)("", "", raw)
		}
		if err != nil {
			return fmt.Errorf("serve DNS on bridge %s: %w", bridge, err)
		}
	}
	return nil
}

// Close ends the DNS proxies, gives up ports, and waits for Look to end. Names have no addresses
// then until another process supervises the VM.
func (u *Upkeep) Close() {
	for _, cancel := range u.cancel {
		cancel()
	}
	for _, release := range u.guards {
		release()
	}
	for _, all := range u.kept {
		for _, giveUp := range all {
			giveUp()
		}
	}
	u.work.Wait()
	for _, n := range u.names {
		n.guest.Close()
	}
	if u.tried != nil {
		_ = u.tried.Close() // whoever reads it sees what is missing
	}
}
