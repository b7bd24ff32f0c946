// Package conntrack has the kernel forget connections that it knows: what it knows is let through, whatever rules there are now.
package conntrack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/policy"
)

// Flow is a connection: who began it, to whom it leads, and whom that asked for: another, where it was led elsewhere.
type Flow struct {
	From  netip.Addr
	To    policy.Target
	Asked netip.AddrPort
}

// Forget has the kernel forget the connections that one of some addresses has a part in.
func Forget(of func(netip.Addr) bool) error {
	return forget(func(f *netlink.ConntrackFlow) bool {
		for _, ip := range []net.IP{f.Forward.SrcIP, f.Forward.DstIP, f.Reverse.SrcIP, f.Reverse.DstIP} {
			if a, ok := netip.AddrFromSlice(ip); ok && of(a.Unmap()) {
				return true
			}
		}
		return false
	})
}

// ForgetFlows has the kernel forget some connections. Of one that is not, but goes on, the next packet is one that begins a connection.
func ForgetFlows(some func(Flow) bool) error {
	return forget(func(f *netlink.ConntrackFlow) bool {
		from, okFrom := netip.AddrFromSlice(f.Forward.SrcIP)
		to, okTo := netip.AddrFromSlice(f.Reverse.SrcIP)
		asked, _ := netip.AddrFromSlice(f.Forward.DstIP)
		target := policy.Target{Address: to.Unmap(), Protocol: f.Forward.Protocol, Port: f.Reverse.SrcPort}
		return okFrom && okTo && some(Flow{from.Unmap(), target, netip.AddrPortFrom(asked.Unmap(), f.Forward.DstPort)})
	})
}

// which says which connections are meant.
type which func(*netlink.ConntrackFlow) bool

// MatchConntrackFlow says whether one is.
func (w which) MatchConntrackFlow(f *netlink.ConntrackFlow) bool { return w(f) }

func forget(of which) error {
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		// What comes and goes during the dump may be missing from it.
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, of)
		if cannotBeAsked(err) {
			return nil
		}
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("forget connections: %w", err)
		}
	}
	return nil
}

// ForgetAll has the kernel forget all connections of the calling thread's network.
func ForgetAll() error {
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil && !cannotBeAsked(err) {
		return fmt.Errorf("forget connections: %w", err)
	}
	return nil
}

// cannotBeAsked says that a kernel does not tell of connections (no NF_CT_NETLINK): a guest must go all the same.
func cannotBeAsked(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)
}
