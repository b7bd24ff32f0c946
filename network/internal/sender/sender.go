// Package sender makes the rules by which a guest sends with its own addresses alone.
package sender

import (
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/internal/nft"
)

// Sets hold whose frames are let through.
type Sets struct {
	MACs       *nftables.Set // of taps and MACs
	IPv4, IPv6 *nftables.Set // of taps, MACs and addresses
}

// Where the key of a set of senders is put together: the tap takes four registers, a MAC two.
const atMAC, atAddress = nft.Reg + 4, nft.Reg + 6

// load loads the sender of a frame.
func load(mac, address nft.Field) nft.Exprs {
	return nft.Exprs{nft.Meta(expr.MetaKeyIIFNAME, nft.Reg), nft.Load(mac, atMAC), nft.Load(address, atAddress)}
}

// SentBy matches frames whose sender is in a set.
func SentBy(set *nftables.Set, mac, address nft.Field) nft.Exprs {
	return append(load(mac, address), nft.InSet(set))
}

// Genuine decides on each frame of a guest: it must have the guest's addresses, and be nothing that
// only routers and servers send. Of a routed network the host answers for the guests.
func (s Sets) Genuine(routed bool) []nft.Exprs {
	tap := nft.Exprs{nft.Meta(expr.MetaKeyIIFNAME, nft.Reg)}
	udpFrom := func(n uint16) nft.Exprs {
		return nft.Join(nft.L4(unix.IPPROTO_UDP), nft.Is(nft.SourcePort, nft.Port(n)))
	}
	icmp := func(kind byte) nft.Exprs {
		return nft.Join(nft.L4(unix.IPPROTO_ICMPV6), nft.Is(nft.ICMPType, []byte{kind}))
	}
	unspecified := nft.Is(nft.Source6, make([]byte, 16))
	v6 := nft.Ether(unix.ETH_P_IPV6)
	// Who looks whether its address is in use has none yet. The host, which answers for guests of a
	// routed network, would say that it is.
	free := nft.Join(v6, unspecified, icmp(135), SentBy(s.IPv6, nft.EtherSource, nft.NDTarget), nft.Accept())
	if routed {
		free = nft.Join(v6, unspecified, icmp(135), nft.Drop())
	}
	return slices.Concat([]nft.Exprs{
		nft.Join(tap, nft.Exprs{nft.Load(nft.EtherSource, atMAC), nft.NotInSet(s.MACs)}, nft.Drop()),
	}, s.errors(), []nft.Exprs{
		nft.Join(nft.Ether(unix.ETH_P_ARP), nft.Is(nft.ArpFormat, []byte{0, 1, 8, 0, 6, 4}),
			SentBy(s.IPv4, nft.ArpMAC, nft.ArpIP), nft.Accept()),
		// Who looks whether its address is in use has none yet. To look for another's would be to deny
		// it.
		nft.Join(nft.Ether(unix.ETH_P_ARP), nft.Is(nft.ArpFormat, []byte{0, 1, 8, 0, 6, 4}),
			nft.Is(nft.ArpIP, make([]byte, 4)), SentBy(s.IPv4, nft.ArpMAC, nft.ArpTarget), nft.Accept()),

		nft.Join(nft.Ether(unix.ETH_P_IP), udpFrom(67), nft.Drop()),
		nft.Join(nft.Ether(unix.ETH_P_IP), SentBy(s.IPv4, nft.EtherSource, nft.Source4), nft.Accept()),

		nft.Join(v6, icmp(134), nft.Drop()),    // router advertisement
		nft.Join(v6, icmp(137), nft.Drop()),    // redirect
		nft.Join(v6, udpFrom(547), nft.Drop()), // DHCP server
		// In fragments neighbour discovery has no place (RFC 6980), and not all there is of it to look
		// at.
		nft.Join(v6, nft.Fragment(), icmp(133), nft.Drop()), nft.Join(v6, nft.Fragment(), icmp(135), nft.Drop()),
		nft.Join(v6, nft.Fragment(), icmp(136), nft.Drop()),
		nft.Join(v6, icmp(136), load(nft.EtherSource, nft.NDTarget), nft.Exprs{nft.NotInSet(s.IPv6)}, nft.Drop()),
		free,
		nft.Join(v6, unspecified, icmp(143), nft.Accept()),
		// A fragment that does not say what it is of matches no rule that asks, this one neither.
		nft.Join(v6, nft.MetaIsNot(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_RAW}),
			SentBy(s.IPv6, nft.EtherSource, nft.Source6), nft.Accept()),
		nft.Drop(),
	})
}

// errors are the errors of ICMP that a guest may send: about what was sent to itself. The kernel
// takes one for a part of the connection that it is about, whoever sends it, and what is known is
// let through, to other guests too.
func (s Sets) errors() (all []nft.Exprs) {
	of := func(is nft.Exprs, source, about nft.Field, senders *nftables.Set) {
		from := func(f nft.Field) nft.Exprs { return SentBy(senders, nft.EtherSource, f) }
		// One that is cut before it says what it is about passes no rule that looks there.
		all = append(all, nft.Join(is, from(about), from(source), nft.Accept()), nft.Join(is, nft.Drop()))
	}
	icmp := func(ether uint16, protocol, first, last byte) nft.Exprs {
		return nft.Join(nft.Ether(ether), nft.L4(protocol), nft.InRange(nft.ICMPType, []byte{first}, []byte{last}))
	}
	of(icmp(unix.ETH_P_IP, unix.IPPROTO_ICMP, 3, 5), nft.Source4, nft.ICMPAbout4, s.IPv4)
	of(icmp(unix.ETH_P_IP, unix.IPPROTO_ICMP, 11, 12), nft.Source4, nft.ICMPAbout4, s.IPv4)
	of(icmp(unix.ETH_P_IPV6, unix.IPPROTO_ICMPV6, 1, 127), nft.Source6, nft.ICMPAbout6, s.IPv6)
	return all
}
