package filter

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Inner is the table of a namespace with one guest in it, whose addresses there are always the same: outside it has others.
type Inner struct {
	Tap, Uplink      string
	Inside4, Inside6 netip.Addr
	IP4, IP6         netip.Addr // outside; no IP6: IPv6 ends in the namespace
}

// Apply makes the table in the network of the calling thread.
func (n *Inner) Apply(context.Context) error {
	conn, err := open()
	if err != nil {
		return err
	}
	table := conn.AddTable(&nftables.Table{Name: "smartvm", Family: nftables.TableFamilyINet})
	var in, out, forward []exprs
	for _, a := range []struct {
		inside, outside netip.Addr
		source, dest    field
	}{{n.Inside4, n.IP4, source4, dest4}, {n.Inside6, n.IP6, source6, dest6}} {
		if !a.outside.IsValid() {
			continue
		}
		to := func(to netip.Addr, kind expr.NATType) exprs {
			fam := uint32(unix.NFPROTO_IPV4)
			if to.Is6() {
				fam = unix.NFPROTO_IPV6
			}
			return exprs{&expr.Immediate{Register: reg, Data: to.AsSlice()}, &expr.NAT{Type: kind, Family: fam, RegAddrMin: reg}}
		}
		in = append(in, join(iif(n.Uplink), family(a.outside), is(a.dest, a.outside.AsSlice()), to(a.inside, expr.NATTypeDestNAT)))
		out = append(out, join(oif(n.Uplink), family(a.inside), is(a.source, a.inside.AsSlice()), to(a.outside, expr.NATTypeSourceNAT)))
		forward = append(forward, join(iif(n.Tap), oif(n.Uplink), family(a.inside), is(a.source, a.inside.AsSlice()), accept()))
	}
	forward = append(forward, join(iif(n.Uplink), known(), accept()), join(iif(n.Uplink), redirected(), accept()), drop())
	icmp := func(kind byte) exprs { return join(l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{kind}), accept()) }
	input := plain(
		join(known(), accept()),
		icmp(135), icmp(136), icmp(128), // neighbour discovery, echo
		join(nfproto(unix.NFPROTO_IPV4), l4(unix.IPPROTO_ICMP), is(icmpType, []byte{8}), accept()),
		drop())
	err = addChains(conn, []ruled{
		{nat(table, "prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), plain(in...)},
		{nat(table, "postrouting", nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), plain(out...)},
		{base(table, "forward", nftables.ChainHookForward, nftables.ChainPriorityFilter), plain(forward...)},
		{base(table, "input", nftables.ChainHookInput, nftables.ChainPriorityFilter), input},
	})
	if err != nil {
		return err
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make rules of a namespace: %w", err)
	}
	return nil
}
