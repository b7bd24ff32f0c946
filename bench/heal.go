package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/netns"
	"push.rocks/smartvm/network/policy"
)

// healMany is how many guests are on the network when there are many. Each has a process that
// repairs its part, which here is a goroutine.
const healMany = 100

// healRounds is how often the rules are flushed.
const healRounds = 20

// How guests are repaired.
const (
	healInterval = 5 * time.Second        // as hosts have it: what is repaired sooner, the kernel told of
	healQuiet    = 200 * time.Millisecond // without a repair: then all guests are as they were
	healLimit    = 30 * time.Second       // for one repair
)

// heal measures from the flush of all rules of the host until they are back: a packet that the
// first guest's policy allows gets through and one that it denies does not, and every guest has its
// part. What is denied gets through for a shorter time: there are rules before guests have their
// parts.
func (s *networkSite) heal() error {
	p := &probe{}
	if err := p.start(s.ctx, s.guest, s.world); err != nil {
		return err
	}
	defer p.stop()
	plain := s.cable
	s.cable.Policy = &policy.Policy{
		DefaultAction: policy.Allow,
		Rules:         []policy.Rule{{Action: policy.Deny, Destination: probeDenied}},
	}
	if err := errors.Join(plain.Revert(s.ctx), s.cable.Apply(s.ctx)); err != nil {
		return err
	}
	for _, beside := range []struct {
		name  string
		count int
	}{{"-1", 1}, {"-100", healMany}} {
		all := []network.Guest{s.cable}
		for n := 1; n < beside.count; n++ {
			part := s.part(n)
			part.Policy = s.cable.Policy
			if err := errors.Join(s.tap(n).Apply(s.ctx), part.Apply(s.ctx)); err != nil {
				return err
			}
			all = append(all, part)
		}
		if err := s.flushes(beside.name, p, all); err != nil {
			return fmt.Errorf("heal%s: %w", beside.name, err)
		}
		for _, g := range all[1:] {
			tap := network.Tap{Name: g.Tap, Bridge: s.config.Bridge}
			if err := errors.Join(g.Revert(s.ctx), tap.Revert(s.ctx)); err != nil {
				return err
			}
		}
	}
	err := s.cable.Revert(s.ctx)
	s.cable = plain
	return errors.Join(err, s.cable.Apply(s.ctx))
}

// flushes removes all rules, while guests are repaired.
func (s *networkSite) flushes(suffix string, p *probe, guests []network.Guest) error {
	ctx, stop := context.WithCancel(s.ctx)
	h := &healers{}
	defer h.work.Wait()
	defer stop()
	for _, g := range guests {
		h.start(ctx, attach.Interface{Tap: g.Tap, Network: s.config},
			[]journal.Effect{s.use, &network.Tap{Name: g.Tap, Bridge: s.config.Bridge}, &g})
	}
	// to close one waits for the kernel, and the kernel's next change with it
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return err
	}
	defer func() { _ = conn.CloseLasting() }()
	parts := &nftables.Set{
		Table: &nftables.Table{Name: s.config.Table(), Family: nftables.TableFamilyBridge},
		Name:  "macs",
	}
	for range healRounds {
		if err := h.quiet(ctx); err != nil {
			return err
		}
		p.expect()
		begun := time.Now()
		conn.FlushRuleset()
		if err := conn.Flush(); err != nil {
			return err
		}
		for {
			there, _ := conn.GetSetElements(parts) // there is none at first
			if len(there) == len(guests) {
				break
			}
			if time.Since(begun) > healLimit {
				return fmt.Errorf("%d of %d guests are repaired after %v: %w", len(there), len(guests), healLimit, h.err())
			}
			nap(time.Millisecond)
		}
		all := time.Now()
		if err := h.quiet(ctx); err != nil {
			return err
		}
		denied, allowed, err := p.repaired()
		if err != nil {
			return err
		}
		if allowed.After(all) {
			all = allowed
		}
		s.samples.time("heal"+suffix, all.Sub(begun))
		s.samples.time("heal-open"+suffix, denied.Sub(begun))
	}
	return nil
}

// healers repair guests, as the processes do that supervise their VMs.
type healers struct {
	work sync.WaitGroup
	busy atomic.Int32
	last atomic.Int64 // when one was done, in nanoseconds

	mu   sync.Mutex
	errs []error
}

func (h *healers) start(ctx context.Context, i attach.Interface, effects []journal.Effect) {
	h.work.Go(func() {
		upkeep := new(upkeep.Upkeep)
		defer upkeep.Close()
		look, part := upkeep.Look(ctx, "", []attach.Interface{i}, healInterval, slog.New(slog.DiscardHandler))
		for {
			var heal func(context.Context, []journal.Effect) error
			select {
			case <-ctx.Done():
				return
			case answer := <-look:
				answer(nil)
				heal = upkeep.Heal
			case <-part:
				heal = upkeep.HealPart
			}
			h.busy.Add(1)
			err := heal(ctx, effects)
			h.last.Store(time.Now().UnixNano())
			h.busy.Add(-1)
			if err != nil { // it is tried again, at the next look
				h.mu.Lock()
				h.errs = append(h.errs, err)
				h.mu.Unlock()
			}
		}
	})
}

// quiet waits until nothing is repaired.
func (h *healers) quiet(ctx context.Context) error {
	for begun := time.Now(); time.Since(begun) < healLimit; nap(10 * time.Millisecond) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if h.busy.Load() == 0 && time.Since(begun) > healQuiet && time.Since(time.Unix(0, h.last.Load())) > healQuiet {
			return nil
		}
	}
	return fmt.Errorf("guests are repaired without end: %w", h.err())
}

func (h *healers) err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return errors.Join(h.errs...)
}

// Where a guest's packets go, by its policy.
const (
	probeAllowed = benchWorld
	probeDenied  = "198.51.100.3"
	probePort    = 9
)

// probe sends from a guest, all the time, a packet that its policy denies and then one that it
// allows.
type probe struct {
	work    sync.WaitGroup
	halt    context.CancelFunc
	arrives net.PacketConn

	mu      sync.Mutex
	last    uint32    // number of the last denied one that arrived
	denied  time.Time // when that was, since expect
	allowed time.Time // when the first allowed one arrived that nothing denied came with, or after
}

func (p *probe) start(ctx context.Context, guest, world *netns.Namespace) error {
	ctx, p.halt = context.WithCancel(ctx)
	err := world.Do(func() (err error) {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(probeDenied + "/24")
		if err == nil {
			err = netlink.AddrAdd(link, a)
		}
		if err == nil {
			p.arrives, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", probePort)) // one, so that they stay in order
		}
		return err
	})
	if err != nil {
		return err
	}
	var c net.PacketConn
	if err := guest.Do(func() (err error) { c, err = net.ListenPacket("udp4", ":0"); return err }); err != nil {
		return errors.Join(err, p.arrives.Close())
	}
	to := func(address string) net.Addr {
		return net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(address), probePort))
	}
	denied, allowed := to(probeDenied), to(probeAllowed)
	p.work.Go(func() {
		defer c.Close()
		for n := uint32(1); ctx.Err() == nil; n++ {
			message := binary.BigEndian.AppendUint32(nil, n)
			_, _ = c.WriteTo(append(message, 'd'), denied)
			_, _ = c.WriteTo(append(message, 'a'), allowed)
			nap(200 * time.Microsecond)
		}
	})
	p.work.Go(func() {
		buf := make([]byte, 16)
		for {
			k, _, err := p.arrives.ReadFrom(buf)
			if err != nil {
				return
			}
			if k == 5 {
				p.arrived(binary.BigEndian.Uint32(buf), buf[4] == 'd')
			}
		}
	})
	return nil
}

func (p *probe) arrived(n uint32, denied bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case denied:
		p.last, p.denied, p.allowed = n, time.Now(), time.Time{}
	case !p.denied.IsZero() && n > p.last && p.allowed.IsZero():
		p.allowed = time.Now()
	}
}

// expect begins to look for what is denied.
func (p *probe) expect() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.denied, p.allowed = time.Time{}, time.Time{}
}

// repaired is when something denied arrived last, and since when what is allowed arrives without
// it.
func (p *probe) repaired() (denied, allowed time.Time, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.denied.IsZero():
		err = errors.New("without rules nothing arrives that they deny")
	case p.allowed.IsZero():
		err = errors.New("what the rules deny arrives, or what they allow does not")
	}
	return p.denied, p.allowed, err
}

func (p *probe) stop() {
	p.halt()
	_ = p.arrives.Close()
	p.work.Wait()
}
