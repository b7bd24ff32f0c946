package netns

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/internal/nft"
)

// Inner is the table of a namespace with one guest in it, whose addresses there are always the
// same: outside it has others.
type Inner struct {
	Tap, Uplink      string
	Inside4, Inside6 netip.Addr
	IP4, IP6         netip.Addr // outside; no IP6: IPv6 ends in the namespace
}

// Apply makes the table in the network of the calling thread.
func (n *Inner) Apply(context.Context) error {
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	table := conn.AddTable(&nftables.Table{Name: "smartvm", Family: nftables.TableFamilyINet})
	var in, out, forward []nft.Exprs
	for _, a := range []struct {
		inside, outside netip.Addr
		source, dest    nft.Field
	}{{n.Inside4, n.IP4, nft.Source4, nft.Dest4}, {n.Inside6, n.IP6, nft.Source6, nft.Dest6}} {
		if !a.outside.IsValid() {
			continue
		}
		to := func(to netip.Addr, kind expr.NATType) nft.Exprs {
			fam := uint32(unix.NFPROTO_IPV4)
			if to.Is6() {
				fam = unix.NFPROTO_IPV6
			}
			return nft.Exprs{
				&expr.Immediate{Register: nft.Reg, Data: to.AsSlice()},
				&expr.NAT{Type: kind, Family: fam, RegAddrMin: nft.Reg},
			}
		}
		in = append(in,
			nft.Join(nft.Iif(n.Uplink), nft.Family(a.outside), nft.Is(a.dest, a.outside.AsSlice()),
				to(a.inside, expr.NATTypeDestNAT)))
		out = append(out,
			nft.Join(nft.Oif(n.Uplink), nft.Family(a.inside), nft.Is(a.source, a.inside.AsSlice()),
				to(a.outside, expr.NATTypeSourceNAT)))
		forward = append(forward,
			nft.Join(nft.Iif(n.Tap), nft.Oif(n.Uplink), nft.Family(a.inside), nft.Is(a.source, a.inside.AsSlice()),
				nft.Accept()))
	}
	forward = append(forward, nft.Join(nft.Iif(n.Uplink), nft.Known(), nft.Accept()),
		nft.Join(nft.Iif(n.Uplink), nft.Redirected(), nft.Accept()), nft.Drop())
	icmp := func(kind byte) nft.Exprs {
		return nft.Join(nft.L4(unix.IPPROTO_ICMPV6), nft.Is(nft.ICMPType, []byte{kind}), nft.Accept())
	}
	input := nft.Plain(
		nft.Join(nft.Known(), nft.Accept()),
		icmp(135), icmp(136), icmp(128), // neighbour discovery, echo
		nft.Join(nft.Nfproto(unix.NFPROTO_IPV4), nft.L4(unix.IPPROTO_ICMP), nft.Is(nft.ICMPType, []byte{8}), nft.Accept()),
		nft.Drop())
	err = nft.AddChains(conn, []nft.Ruled{
		nft.Chain(nft.NAT(table, "prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest),
			nft.Plain(in...)),
		nft.Chain(nft.NAT(table, "postrouting", nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource),
			nft.Plain(out...)),
		nft.Chain(nft.Base(table, "forward", nftables.ChainHookForward, nftables.ChainPriorityFilter), nft.Plain(forward...)),
		nft.Chain(nft.Base(table, "input", nftables.ChainHookInput, nftables.ChainPriorityFilter), input),
	})
	if err != nil {
		return err
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make rules of a namespace: %w", err)
	}
	return nil
}
