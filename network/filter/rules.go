package filter

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/policy"
)

func (t *Tables) rules(l *layout) ([]ruled, error) {
	all := []ruled{
		{base(l.inet, "forward", nftables.ChainHookForward, nftables.ChainPriorityFilter), plain(t.forwarded()...)},
		// What is known goes first, whoever sends it: a rule that does not match costs each packet, and what goes on here is accepted anyhow.
		{base(l.inet, "input", nftables.ChainHookInput, nftables.ChainPriorityFilter), plain(append([]exprs{
			t.beside(),
			join(known(), accept()),
			join(iif(t.Bridge), jump(toHost)),
		}, t.tunnel()...)...)},
		// Before the chains of others, who may lead what goes to their ports on the host's loopback elsewhere (Docker before 28).
		{nat(l.inet, "prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest-1)), plain(
			slices.Concat([]exprs{join(iif(t.Bridge), toLoopback(), drop())}, t.proxied(l), []exprs{join(toLoopback(), accept())}, published(l))...)},
		{nat(l.inet, "output", nftables.ChainHookOutput, nftables.ChainPriorityNATDest), plain(published(l)...)},
		{nat(l.inet, "postrouting", nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), plain(t.masqueraded()...)},
		{nftables.Chain{Table: l.inet, Name: fromGuest}, plain(t.leaving(l)...)},
		{nftables.Chain{Table: l.inet, Name: refused}, plain(refusal()...)},
		{nftables.Chain{Table: l.inet, Name: narrow}, nil},
		{nftables.Chain{Table: l.inet, Name: toGuest}, plain(append(t.answered(), join(redirected(), accept()), drop())...)},
		{nftables.Chain{Table: l.inet, Name: toHost}, plain(t.entering(l)...)},
		// What most of all traffic is goes first here too; only taps of the network are in these sets.
		{base(l.bridge, "prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityRef(-300)), plain(
			join(ether(unix.ETH_P_IP), l4(unix.IPPROTO_TCP), sender(etherSource, source4), exprs{inSet(l.senders4)}, accept()),
			join(ether(unix.ETH_P_IPV6), l4(unix.IPPROTO_TCP), sender(etherSource, source6), exprs{inSet(l.senders6)}, accept()),
			join(tapOf(t.Taps), jump(fromGuest)))},
		{nftables.Chain{Table: l.bridge, Name: fromGuest}, plain(t.genuine(l)...)},
	}
	if t.Via != "" {
		all = append(all, ruled{base(l.inet, "answers", nftables.ChainHookPrerouting, nftables.ChainPriorityMangle), plain(
			join(iif(t.Bridge), ofAnswer(expr.CmpOpEq), exprs{&expr.Immediate{Register: reg, Data: mark()}, &expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: reg}}))})
	}
	for _, c := range all {
		if c.chain.Name == entry(c.chain.Table) {
			c.rules[0].text = ownerPrefix + t.Owner // for There
			c.rules[len(c.rules)-1].text = versionPrefix + strconv.Itoa(version)
		}
	}
	if t.Egress == nil {
		return all, nil
	}
	compiled, err := t.Egress.Compile()
	if err != nil {
		return nil, err
	}
	rules := policyRules{table: l.inet, allowed: t.Egress.DefaultAction != policy.Deny, allow: expr.VerdictReturn}
	if !t.Egress.Names() {
		return append(all, ruled{nftables.Chain{Table: l.inet, Name: egress}, rules.of(compiled)}), nil
	}
	for i := range len(compiled) + 1 {
		all = append(all, ruled{nftables.Chain{Table: l.inet, Name: egressEnd(i)}, []rule{rules.end(compiled, i)}})
	}
	return all, nil
}

// egressEnd is the chain in which the i-th rule of a network's policy ends that each guest has a copy of, so that it counts for all.
func egressEnd(i int) string { return egress + "-" + strconv.Itoa(i) }

// proxied sends a guest's queries to its DNS proxy, on the bridge's own address: all of them where its policies have names, else those to the
// gateway.
func (t *Tables) proxied(l *layout) (all []exprs) {
	for _, f := range []struct {
		subnet    netip.Prefix
		source    field
		all, some *nftables.Set
	}{{t.Subnet, source4, l.dns4, l.resolver4}, {t.Subnet6, source6, l.dns6, l.resolver6}} {
		if !f.subnet.IsValid() {
			continue
		}
		gateway := t.gateway(f.subnet)
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			to := func(s *nftables.Set) exprs {
				return exprs{load(f.source, reg), mapped(s), &expr.Redir{RegisterProtoMin: reg}}
			}
			query := join(l4(proto), is(destPort, port(53)))
			all = append(all,
				join(iif(t.Bridge), family(gateway), query, to(f.all)),
				join(iif(t.Bridge), toPrefix(netip.PrefixFrom(gateway, gateway.BitLen())), query, to(f.some)))
		}
	}
	return all
}

// published sends what comes to a published port of the host to its guest.
func published(l *layout) (all []exprs) {
	for _, f := range []struct {
		family      byte
		dest        field
		ports, at   *nftables.Set
		addressRegs uint32
	}{{unix.NFPROTO_IPV4, dest4, l.ports4, l.portsAt4, 1}, {unix.NFPROTO_IPV6, dest6, l.ports6, l.portsAt6, 4}} {
		nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.family), RegAddrMin: reg, RegProtoMin: reg + f.addressRegs, Specified: true}
		all = append(all,
			join(nfproto(f.family), isLocal(), exprs{load(f.dest, reg), meta(expr.MetaKeyL4PROTO, reg+f.addressRegs), load(destPort, reg+f.addressRegs+1), mapped(f.at), nat}),
			join(nfproto(f.family), isLocal(), exprs{meta(expr.MetaKeyL4PROTO, reg), load(destPort, reg+1), mapped(f.ports), nat}))
	}
	return all
}

// toLoopback matches what comes from outside for the host's loopback. Nothing that is published there is for those who send it: the kernel drops
// such a packet, but only after the chains for NAT, and not where it comes from our bridge. What the host sends there goes by output.
func toLoopback() exprs { return join(nfproto(unix.NFPROTO_IPV4), within(dest4, loopback4)) }

// loopback4 has no counterpart: the kernel drops what comes for ::1 at once.
var loopback4 = netip.MustParsePrefix("127.0.0.0/8")

// masqueraded gives what leaves the network, or comes from the host's loopback, an address to which answers come back.
func (t *Tables) masqueraded() []exprs {
	masquerade := exprs{&expr.Masq{}}
	all := []exprs{
		join(oifNot(t.Bridge), nfproto(unix.NFPROTO_IPV4), within(source4, t.Subnet), masquerade),
		join(oif(t.Bridge), nfproto(unix.NFPROTO_IPV4), within(source4, loopback4), masquerade),
		// From guest to guest by a published port: the answer would go by the bridge alone, from an address that was not asked.
		join(oif(t.Bridge), nfproto(unix.NFPROTO_IPV4), within(source4, t.Subnet), redirected(), masquerade),
	}
	if t.Subnet6.IsValid() {
		all = append(all,
			join(oifNot(t.Bridge), nfproto(unix.NFPROTO_IPV6), within(source6, t.Subnet6), masquerade),
			join(oif(t.Bridge), nfproto(unix.NFPROTO_IPV6), within(source6, t.Subnet6), redirected(), masquerade))
	}
	return all
}

// beside drops what comes from a tap and not from its bridge. A bridge leaves frames for 01:80:c2:00:00:02 to :0f to the host's protocols, as
// they come, and without a look at the tables of the family bridge; a tap whose bridge is gone is an interface as any other.
func (t *Tables) beside() exprs { return join(tapOf(t.Taps), drop()) }

// forwarded is what comes from guests and what goes to them.
func (t *Tables) forwarded() (all []exprs) {
	all = append(all, t.beside())
	if t.Via != "" { // known connections too: the way may have changed. Bridged frames come here where br_netfilter is loaded.
		all = append(all, join(iif(t.Bridge), oifNot(t.Via), oifNot(t.Bridge), ofAnswer(expr.CmpOpNeq), drop()))
	}
	all = append(all, join(known(), accept()), join(iif(t.Bridge), jump(fromGuest)), join(oif(t.Bridge), jump(toGuest)))
	return append(append(all, t.tunnel()...), jump(narrow))
}

// answered has what comes to a published port by another interface than that by which guests leave be answered where it came from.
func (t *Tables) answered() []exprs {
	if t.Via == "" {
		return nil
	}
	return []exprs{join(metaIsNot(expr.MetaKeyIIFNAME, ifname(t.Via)), redirected(),
		exprs{&expr.Immediate{Register: reg, Data: mark()}, &expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: reg}})}
}

// tunnel keeps who is at the other end of an interface of ours from all that is not published.
func (t *Tables) tunnel() []exprs {
	if !t.Tunnel {
		return nil
	}
	return []exprs{join(iif(t.Via), drop())}
}

// bounded drops what begins one connection too many of a guest's: the kernel knows so many of all together, and who takes them all takes the network
// from the others and the host.
func (t *Tables) bounded(l *layout) (all []exprs) {
	if t.Connections == 0 {
		return nil
	}
	for _, f := range []struct {
		family byte
		source field
		set    *nftables.Set
	}{{unix.NFPROTO_IPV4, source4, l.counted4}, {unix.NFPROTO_IPV6, source6, l.counted6}} {
		over := &expr.Connlimit{Count: uint32(t.Connections), Flags: expr.NFT_CONNLIMIT_F_INV}
		count := &expr.Dynset{SrcRegKey: reg, SetName: f.set.Name, SetID: f.set.ID, Operation: uint32(unix.NFT_DYNSET_OP_ADD), Exprs: []expr.Any{over}}
		all = append(all, join(nfproto(f.family), exprs{load(f.source, reg), count}, drop()))
	}
	return all
}

// refusal ends what is not allowed: at once, but for floods, which nobody is to be made to answer.
func refusal() []exprs {
	limited := &expr.Limit{Type: expr.LimitTypePkts, Rate: 1000, Unit: expr.LimitTimeSecond, Burst: 1000}
	return []exprs{
		join(l4(unix.IPPROTO_TCP), exprs{limited, &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}),
		{limited, &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}},
		verdict(expr.VerdictDrop),
	}
}

// leaving is what a guest may send through the host.
func (t *Tables) leaving(l *layout) (all []exprs) {
	within := refuse()
	if t.Mutual {
		within = accept()
	}
	all = t.bounded(l)
	// What another guest has published is reached as anything outside: by the host, and as the policies have it.
	all = append(all, join(oif(t.Bridge), notRedirected(), within))
	for _, p := range policy.Metadata {
		for _, p := range append(policy.Embedding(p), p) {
			source, set := source6, l.metadata6
			if p.Addr().Is4() {
				source, set = source4, l.metadata4
			}
			all = append(all, join(toPrefix(p), exprs{load(source, reg), notInSet(set)}, refuse()))
		}
	}
	if t.Inside {
		return append(all, refuse())
	}
	last := accept()
	switch {
	case t.Egress.Names(): // each guest has a chain
		last = refuse()
	case t.Egress != nil: // what the network allows, a guest's own policy may still forbid
		all = append(all, jump(egress))
	}
	// By its MAC, which the bridge table has seen to, a guest is one element for IPv4 and IPv6: the kernel goes through all that a map
	// leads to when any rule is added.
	return append(all, exprs{load(etherSource, reg), verdictOf(l.policies)}, last)
}

// entering is what a guest may send to the host itself: answers, echo requests, neighbour discovery, and to its DNS proxy.
func (t *Tables) entering(l *layout) []exprs {
	all := append(t.bounded(l),
		join(toLoopback(), drop()), // also for those who may reach the host: what listens there listens to nobody else
		join(l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{135}), accept()),
		join(l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{136}), accept()),
		join(toPrefix(netip.PrefixFrom(t.gateway(t.Subnet), 32)), l4(unix.IPPROTO_ICMP), is(icmpType, []byte{8}), accept()),
		join(toPrefix(linkLocal6), l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{128}), accept()))
	if t.Subnet6.IsValid() {
		all = append(all, join(toPrefix(netip.PrefixFrom(t.gateway(t.Subnet6), 128)), l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{128}), accept()))
	}
	return append(all,
		join(redirected(), accept()),
		join(nfproto(unix.NFPROTO_IPV4), exprs{load(source4, reg), inSet(l.host4)}, accept()),
		join(nfproto(unix.NFPROTO_IPV6), exprs{load(source6, reg), inSet(l.host6)}, accept()),
		refuse())
}

var linkLocal6 = netip.MustParsePrefix("fe80::/10")

// gateway is a subnet's first address.
func (t *Tables) gateway(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// Where the key of a set of senders is put together: the tap takes four registers, a MAC two.
const atMAC, atAddress = reg + 4, reg + 6

// sender loads who sends a frame.
func sender(mac, address field) exprs {
	return exprs{meta(expr.MetaKeyIIFNAME, reg), load(mac, atMAC), load(address, atAddress)}
}

// genuine is what a guest's frames must look like.
func (t *Tables) genuine(l *layout) []exprs {
	tap := exprs{meta(expr.MetaKeyIIFNAME, reg)}
	udpFrom := func(n uint16) exprs { return join(l4(unix.IPPROTO_UDP), is(sourcePort, port(n))) }
	icmp := func(kind byte) exprs { return join(l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{kind})) }
	unspecified := is(source6, make([]byte, 16))
	v6 := ether(unix.ETH_P_IPV6)
	return []exprs{
		join(tap, exprs{load(etherSource, atMAC), notInSet(l.macs)}, drop()),

		join(ether(unix.ETH_P_ARP), is(arpFormat, []byte{0, 1, 8, 0, 6, 4}), sender(arpMAC, arpIP), exprs{inSet(l.senders4)}, accept()),
		// Who looks whether its address is in use has none yet. To look for another's would be to deny it.
		join(ether(unix.ETH_P_ARP), is(arpFormat, []byte{0, 1, 8, 0, 6, 4}), is(arpIP, make([]byte, 4)), sender(arpMAC, arpTarget),
			exprs{inSet(l.senders4)}, accept()),

		join(ether(unix.ETH_P_IP), udpFrom(67), drop()),
		join(ether(unix.ETH_P_IP), sender(etherSource, source4), exprs{inSet(l.senders4)}, accept()),

		join(v6, icmp(134), drop()),    // router advertisement
		join(v6, icmp(137), drop()),    // redirect
		join(v6, udpFrom(547), drop()), // DHCP server
		// In fragments neighbour discovery has no place (RFC 6980), and not all there is of it to look at.
		join(v6, fragment(), icmp(133), drop()), join(v6, fragment(), icmp(135), drop()), join(v6, fragment(), icmp(136), drop()),
		join(v6, icmp(136), sender(etherSource, ndTarget), exprs{notInSet(l.senders6)}, drop()),
		join(v6, unspecified, icmp(135), sender(etherSource, ndTarget), exprs{inSet(l.senders6)}, accept()),
		join(v6, unspecified, icmp(143), accept()),
		// A fragment that does not say what it is of matches no rule that asks, this one neither.
		join(v6, metaIsNot(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_RAW}), sender(etherSource, source6), exprs{inSet(l.senders6)}, accept()),
		drop(),
	}
}
