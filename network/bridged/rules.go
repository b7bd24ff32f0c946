package bridged

import (
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/internal/nft"
)

// tables are those of a guest: what its tap takes from it, before any bridge, and what the host
// does.
func (g *Guest) tables() []*nftables.Table {
	return []*nftables.Table{
		{Name: Table(g.Tap), Family: nftables.TableFamilyNetdev},
		{Name: Table(g.Tap), Family: nftables.TableFamilyINet},
	}
}

// chain is one with all its rules.
type chain struct {
	nftables.Chain
	rules []nft.Exprs
	text  string // of each rule
}

func (g *Guest) chains(mac net.HardwareAddr) ([]chain, error) {
	text, err := g.text()
	if err != nil {
		return nil, err
	}
	tables := g.tables()
	base := func(t *nftables.Table, name string, hook *nftables.ChainHook) nftables.Chain {
		return nftables.Chain{
			Table: t, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook,
			Priority: nftables.ChainPriorityFilter,
		}
	}
	ingress := base(tables[0], "ingress", nftables.ChainHookIngress)
	ingress.Device = g.Tap
	all := []chain{{ingress, g.genuine(mac), text}}
	if !g.Host {
		all = append(all,
			chain{base(tables[1], "input", nftables.ChainHookInput), g.toHost(mac), text},
			chain{base(tables[1], "forward", nftables.ChainHookForward), g.byHost(mac), text})
	}
	return all, nil
}

// reserved are the destinations that a bridge does not pass on (IEEE 802.1Q, 8.6.3) but hands to
// the host: spanning tree and its kind.
var reserved, reservedMask = []byte{0x01, 0x80, 0xc2, 0, 0, 0}, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xf0}

var loopback = netip.MustParsePrefix("127.0.0.0/8")

// genuine is what the guest's frames must look like. It is looked at where they come in, so that
// the bridge, which another has set up, sees no others, whatever is switched on there.
func (g *Guest) genuine(mac net.HardwareAddr) []nft.Exprs {
	arp, v4, v6 := nft.Join(nft.Ether(unix.ETH_P_ARP), nft.Is(nft.ArpFormat, []byte{0, 1, 8, 0, 6, 4}),
		nft.Is(nft.ArpMAC, mac)), nft.Ether(unix.ETH_P_IP), nft.Ether(unix.ETH_P_IPV6)
	udpFrom := func(n uint16) nft.Exprs {
		return nft.Join(nft.L4(unix.IPPROTO_UDP), nft.Is(nft.SourcePort, nft.Port(n)))
	}
	icmp := func(kind byte) nft.Exprs {
		return nft.Join(nft.L4(unix.IPPROTO_ICMPV6), nft.Is(nft.ICMPType, []byte{kind}))
	}
	own := filter.LinkLocal(mac).As16()
	id, unspecified := own[8:], nft.Is(nft.Source6, make([]byte, 16))
	all := []nft.Exprs{
		nft.Join(nft.IsNot(nft.EtherSource, mac), nft.Drop()),
		nft.Join(nft.Masked(nft.EtherDest, reservedMask, reserved), nft.Drop()),
		nft.Join(v4, nft.Within(nft.Dest4, loopback), nft.Drop()),
		nft.Join(v4, udpFrom(67), nft.Drop()), // DHCP server
		// Who asks for others' MACs takes all addresses that the LAN's server has.
		nft.Join(v4, nft.L4(unix.IPPROTO_UDP), nft.Is(nft.DestPort, nft.Port(67)),
			nft.IsNot(nft.DHCPClient, mac), nft.Drop()),
		// a query: it would be the LAN's querier
		nft.Join(v4, nft.L4(unix.IPPROTO_IGMP), nft.Is(nft.ICMPType, []byte{0x11}), nft.Drop()),
	}
	// An error of ICMP is taken for a part of the connection that it is about, whoever sends it: it
	// must be about what was sent to the guest. One that is cut before it says so passes no rule that
	// looks there. Where its address is not known, that cannot be seen.
	errors4 := func(first, last byte) nft.Exprs {
		return nft.Join(v4, nft.L4(unix.IPPROTO_ICMP), nft.InRange(nft.ICMPType, []byte{first}, []byte{last}))
	}
	errors6 := nft.Join(v6, nft.L4(unix.IPPROTO_ICMPV6), nft.InRange(nft.ICMPType, []byte{1}, []byte{127}))
	for _, is := range []nft.Exprs{errors4(3, 5), errors4(11, 12)} {
		if g.IP4.IsValid() {
			all = append(all,
				nft.Join(is, nft.Is(nft.Source4, g.IP4.AsSlice()), nft.Is(nft.ICMPAbout4, g.IP4.AsSlice()), nft.Accept()))
		}
		all = append(all, nft.Join(is, nft.Drop()))
	}
	all = append(all, nft.Join(errors6, nft.Is(nft.SourceID6, id), nft.Is(nft.ICMPAboutID6, id), nft.Accept()),
		nft.Join(errors6, nft.Drop()))
	if g.IP4.IsValid() {
		ip4 := g.IP4.AsSlice()
		all = append(all,
			nft.Join(v4, nft.Is(nft.Source4, ip4), nft.Accept()),
			nft.Join(arp, nft.Is(nft.ArpIP, ip4), nft.Accept()),
			nft.Join(arp, nft.Is(nft.ArpIP, make([]byte, 4)), nft.Is(nft.ArpTarget, ip4), nft.Accept())) // whether it is in use
	} else {
		all = append(all, nft.Join(v4, nft.Accept()), nft.Join(arp, nft.Accept()))
	}
	for _, kind := range []byte{130, 134, 137} { // multicast query, router advertisement, redirect
		all = append(all, nft.Join(v6, icmp(kind), nft.Drop()))
	}
	for _, kind := range []byte{133, 135, 136} { // in fragments neighbour discovery has no place (RFC 6980)
		all = append(all, nft.Join(v6, nft.Fragment(), icmp(kind), nft.Drop()))
	}
	return append(all,
		nft.Join(v6, udpFrom(547), nft.Drop()), // DHCP server
		nft.Join(v6, icmp(136), nft.IsNot(nft.NDTargetID, id), nft.Drop()),
		nft.Join(v6, unspecified, icmp(135), nft.Is(nft.NDTargetID, id), nft.Accept()),
		nft.Join(v6, unspecified, icmp(143), nft.Accept()),
		// A fragment that does not say what it is of matches no rule that asks, this one neither.
		nft.Join(v6, nft.MetaIsNot(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_RAW}), nft.Is(nft.SourceID6, id), nft.Accept()),
		nft.Drop())
}

// toHost is what the guest may send to the host: answers, and where it is. It is known by its MAC,
// which no other port of ours has; by what interface it comes in does not matter, as the bridge may
// be renamed, or have others upon it.
func (g *Guest) toHost(mac net.HardwareAddr) []nft.Exprs {
	from := nft.Is(nft.EtherSource, mac)
	neighbour := func(kind byte) nft.Exprs {
		return nft.Join(from, nft.L4(unix.IPPROTO_ICMPV6), nft.Is(nft.ICMPType, []byte{kind}), nft.Accept())
	}
	return []nft.Exprs{
		neighbour(135), neighbour(136), nft.Join(from, nft.Known(), nft.Accept()),
		nft.Join(from, nft.Drop()),
	}
}

// byHost is what it may send by way of the host: answers. Where IP rules see what the bridge passes
// on (br_netfilter), that is none of it.
func (g *Guest) byHost(mac net.HardwareAddr) []nft.Exprs {
	from := nft.Is(nft.EtherSource, mac)
	return []nft.Exprs{
		nft.Join(from, nft.Oif(g.Bridge), nft.Accept()), nft.Join(from, nft.Known(), nft.Accept()),
		nft.Join(from, nft.Drop()),
	}
}
