package filter

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/internal/nft"
	"push.rocks/smartvm/network/internal/sender"
	"push.rocks/smartvm/network/policy"
)

func (t *Tables) rules(l *layout) ([]nft.Ruled, error) {
	all := []nft.Ruled{
		nft.Chain(nft.Base(l.inet, "forward", nftables.ChainHookForward, nftables.ChainPriorityFilter),
			nft.Plain(t.forwarded()...)),
		// What is known goes first, whoever sends it: a rule that does not match costs each packet, and
		// what goes on here is accepted anyhow.
		nft.Chain(nft.Base(l.inet, "input", nftables.ChainHookInput, nftables.ChainPriorityFilter),
			nft.Plain(append([]nft.Exprs{
				nft.Join(nft.Iif(t.Bridge), nft.Pass(), nft.Known(), nft.Accept()),
				t.beside(),
				nft.Join(nft.Known(), nft.Accept()),
				nft.Join(nft.Iif(t.Bridge), nft.Jump(toHost)),
			}, t.tunnel()...)...)),
		// Before the chains of others, who may lead what goes to their ports on the host's loopback
		// elsewhere (Docker before 28).
		nft.Chain(nft.NAT(l.inet, "prerouting", nftables.ChainHookPrerouting,
			nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest-1)), nft.Plain(
			slices.Concat([]nft.Exprs{nft.Join(nft.Iif(t.Bridge), toLoopback(), nft.Drop())}, t.proxied(l),
				[]nft.Exprs{nft.Join(toLoopback(), nft.Accept())}, published(l))...)),
		nft.Chain(nft.NAT(l.inet, "output", nftables.ChainHookOutput, nftables.ChainPriorityNATDest),
			nft.Plain(append([]nft.Exprs{toLoopback6()}, published(l)...)...)),
		nft.Chain(nft.NAT(l.inet, "postrouting", nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource),
			nft.Plain(t.masqueraded()...)),
		nft.Chain(nftables.Chain{Table: l.inet, Name: fromGuest}, nft.Plain(t.leaving(l)...)),
		nft.Chain(nftables.Chain{Table: l.inet, Name: refused}, nft.Plain(nft.Refuse()...)),
		nft.Chain(nftables.Chain{Table: l.inet, Name: Narrow}, nil),
		nft.Chain(nftables.Chain{Table: l.inet, Name: toGuest},
			nft.Plain(append(t.answered(), nft.Join(nft.Redirected(), nft.Accept()), nft.Drop())...)),
		nft.Chain(nftables.Chain{Table: l.inet, Name: toHost}, nft.Plain(t.entering(l)...)),
		nft.Chain(nftables.Chain{Table: l.inet, Name: bounds}, t.bounded(l)),
		// What most of all traffic is goes first here too; only taps of the network are in these sets.
		nft.Chain(nft.Base(l.bridge, "prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityRef(-300)), nft.Plain(
			nft.Join(nft.Ether(unix.ETH_P_IP), nft.L4(unix.IPPROTO_TCP), sender.SentBy(l.senders4, nft.EtherSource, nft.Source4),
				nft.Accept()),
			nft.Join(nft.Ether(unix.ETH_P_IPV6), nft.L4(unix.IPPROTO_TCP),
				sender.SentBy(l.senders6, nft.EtherSource, nft.Source6), nft.Accept()),
			nft.Join(nft.IifPrefix(t.Taps), nft.Jump(fromGuest)))),
		nft.Chain(nftables.Chain{Table: l.bridge, Name: fromGuest}, nft.Plain(l.senders().Genuine(t.Routed)...)),
	}
	if !t.Mutual || t.Routed { // the kernel has isolated their ports, unless somebody undoes that
		all = append(all,
			nft.Chain(nft.Base(l.bridge, "forward", nftables.ChainHookForward, nftables.ChainPriorityFilter), nft.Plain(
				nft.Join(nft.IifPrefix(t.Taps), nft.Exprs{nft.Meta(expr.MetaKeyOIFNAME, nft.Reg), nft.Equal([]byte(t.Taps))},
					nft.Drop()))))
	}
	if t.Via != "" {
		all = append(all,
			nft.Chain(nft.Base(l.inet, "answers", nftables.ChainHookPrerouting, nftables.ChainPriorityMangle), nft.Plain(
				nft.Join(nft.Iif(t.Bridge), ofAnswer(expr.CmpOpEq),
					nft.Exprs{
						&expr.Immediate{Register: nft.Reg, Data: mark()},
						&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: nft.Reg},
					}))))
	}
	outward, err := t.outward(l)
	if err != nil {
		return nil, err
	}
	all = append(append(all, outward...), t.endings(l)...)
	settings, err := t.settings()
	if err != nil {
		return nil, err
	}
	for _, c := range all {
		if c.Chain.Name == entry(c.Chain.Table) {
			c.Rules[0].Text = ownerPrefix + t.Owner // for There
			c.Rules[len(c.Rules)-1].Text = versionPrefix + strconv.Itoa(version) + " " + settings
		}
	}
	return all, nil
}

// settings tells those that may be changed from others.
func (t *Tables) settings() (string, error) {
	data, err := json.Marshal([]any{t.Egress, t.Connections, t.NewConnections})
	if err != nil {
		return "", fmt.Errorf("make table %s: %w", t.Name, err)
	}
	return fmt.Sprintf("%.8x", sha256.Sum256(data)), nil
}

// outward is the network's policy. What it allows, a guest's own policy may still forbid.
func (t *Tables) outward(l *layout) ([]nft.Ruled, error) {
	chain := nft.Ruled{Chain: nftables.Chain{Table: l.inet, Name: egress}}
	if t.Inside {
		chain.Rules = nft.Plain(nft.Join(nft.OifNot(t.Bridge), l.ends(toOutside)))
	}
	if t.Egress == nil {
		return []nft.Ruled{chain}, nil
	}
	compiled, err := t.Egress.Compile()
	if err != nil {
		return nil, err
	}
	rules := policyRules{
		layout: l, chain: egress, allowed: t.Egress.DefaultAction != policy.Deny,
		allow: expr.VerdictReturn,
	}
	if t.Routed {
		rules.near = t.Bridge
	}
	all := rules.chains(compiled)
	all[0].Rules = append(chain.Rules, all[0].Rules...)
	return all, nil
}

// proxied sends a guest's queries to its DNS proxy, on the bridge's own address: all of them where
// its policy or the network's has names, else those to the gateway.
func (t *Tables) proxied(l *layout) (all []nft.Exprs) {
	for _, f := range []struct {
		subnet     netip.Prefix
		source     nft.Field
		named, any *nftables.Set
	}{{t.Subnet, nft.Source4, l.dns4, l.resolver4}, {t.Subnet6, nft.Source6, l.dns6, l.resolver6}} {
		if !f.subnet.IsValid() {
			continue
		}
		gateway := t.gateway(f.subnet)
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			to := func(s *nftables.Set) nft.Exprs {
				return nft.Exprs{nft.Load(f.source, nft.Reg), nft.Mapped(s), &expr.Redir{RegisterProtoMin: nft.Reg}}
			}
			query := nft.Join(nft.L4(proto), nft.Is(nft.DestPort, nft.Port(53)))
			asked := nft.ToPrefix(netip.PrefixFrom(gateway, gateway.BitLen()))
			if t.Egress.Names() {
				asked = nft.Family(gateway)
			}
			all = append(all, nft.Join(nft.Iif(t.Bridge), nft.Family(gateway), query, to(f.named)),
				nft.Join(nft.Iif(t.Bridge), asked, query, to(f.any)))
		}
	}
	return all
}

// published sends what comes to a published port of the host to its guest.
func published(l *layout) (all []nft.Exprs) {
	for _, f := range []struct {
		family      byte
		dest        nft.Field
		ports, at   *nftables.Set
		addressRegs uint32
	}{{unix.NFPROTO_IPV4, nft.Dest4, l.ports4, l.portsAt4, 1}, {unix.NFPROTO_IPV6, nft.Dest6, l.ports6, l.portsAt6, 4}} {
		nat := &expr.NAT{
			Type: expr.NATTypeDestNAT, Family: uint32(f.family), RegAddrMin: nft.Reg,
			RegProtoMin: nft.Reg + f.addressRegs, Specified: true,
		}
		all = append(all,
			nft.Join(nft.Nfproto(f.family), nft.IsLocal(),
				nft.Exprs{
					nft.Load(f.dest, nft.Reg), nft.Meta(expr.MetaKeyL4PROTO, nft.Reg+f.addressRegs),
					nft.Load(nft.DestPort, nft.Reg+f.addressRegs+1), nft.Mapped(f.at), nat,
				}),
			nft.Join(nft.Nfproto(f.family), nft.IsLocal(),
				nft.Exprs{nft.Meta(expr.MetaKeyL4PROTO, nft.Reg), nft.Load(nft.DestPort, nft.Reg+1), nft.Mapped(f.ports), nat}))
	}
	return all
}

// toLoopback matches what comes from outside for the host's loopback. Nothing that is published
// there is for those who send it: the kernel drops such a packet, but only after the chains for
// NAT, and not where it comes from our bridge. What the host sends there goes by output.
func toLoopback() nft.Exprs {
	return nft.Join(nft.Nfproto(unix.NFPROTO_IPV4), nft.Within(nft.Dest4, loopback4))
}

// toLoopback6 leaves what the host sends to ::1 to the process that supervises the VM. Led on by
// NAT its answers would be lost: they are for ::1, which the kernel has no route to from another
// interface than lo; and where IP rules see bridged packets (br_netfilter) it drops them before it
// looks for one.
func toLoopback6() nft.Exprs { return nft.Join(nft.ToPrefix(loopback6), nft.Accept()) }

// The kernel drops what comes for ::1 from elsewhere at once.
var loopback4, loopback6 = netip.MustParsePrefix("127.0.0.0/8"), netip.PrefixFrom(netip.IPv6Loopback(), 128)

// masqueraded gives what leaves the network, or comes from the host's loopback, an address to which
// answers come back.
func (t *Tables) masqueraded() []nft.Exprs {
	masquerade := nft.Exprs{&expr.Masq{}}
	all := []nft.Exprs{
		nft.Join(nft.OifNot(t.Bridge), nft.Nfproto(unix.NFPROTO_IPV4), nft.Within(nft.Source4, t.Subnet), masquerade),
		nft.Join(nft.Oif(t.Bridge), nft.Nfproto(unix.NFPROTO_IPV4), nft.Within(nft.Source4, loopback4), masquerade),
		// From guest to guest by a published port: the answer would go by the bridge alone, from an
		// address that was not asked.
		nft.Join(nft.Oif(t.Bridge), nft.Nfproto(unix.NFPROTO_IPV4), nft.Within(nft.Source4, t.Subnet),
			nft.Redirected(), masquerade),
	}
	if t.Subnet6.IsValid() {
		all = append(all,
			nft.Join(nft.OifNot(t.Bridge), nft.Nfproto(unix.NFPROTO_IPV6), nft.Within(nft.Source6, t.Subnet6), masquerade),
			nft.Join(nft.Oif(t.Bridge), nft.Nfproto(unix.NFPROTO_IPV6), nft.Within(nft.Source6, t.Subnet6),
				nft.Redirected(), masquerade))
	}
	return all
}

// beside drops what comes from a tap and not from its bridge. A bridge leaves frames for
// 01:80:c2:00:00:02 to :0f to the host's protocols, as they come, and without a look at the tables
// of the family bridge; a tap whose bridge is gone is an interface as any other.
func (t *Tables) beside() nft.Exprs { return nft.Join(nft.IifPrefix(t.Taps), nft.Drop()) }

// forwarded is what comes from guests and what goes to them.
func (t *Tables) forwarded() (all []nft.Exprs) {
	passes := nft.Join(nft.Iif(t.Bridge), nft.Pass())
	if t.Via == "" {
		all = append(all, nft.Join(passes, nft.Known(), nft.Accept()))
	} else { // known connections too: the way may have changed. Bridged frames come here where br_netfilter is loaded.
		all = append(all, passes,
			nft.Join(nft.Iif(t.Bridge), nft.OifNot(t.Via), nft.OifNot(t.Bridge), ofAnswer(expr.CmpOpNeq), nft.Drop()))
	}
	all = append(all, t.beside(), nft.Join(nft.Known(), nft.Accept()), nft.Join(nft.Iif(t.Bridge), nft.Jump(fromGuest)),
		nft.Join(nft.Iif(t.Bridge), nft.Drop()), // somebody has emptied a chain there, as each ends in a verdict
		nft.Join(nft.Oif(t.Bridge), nft.Jump(toGuest)))
	return append(append(all, t.tunnel()...), nft.Jump(Narrow))
}

// answered has what comes to a published port by another interface than that by which guests leave
// be answered where it came from.
func (t *Tables) answered() []nft.Exprs {
	if t.Via == "" {
		return nil
	}
	return []nft.Exprs{nft.Join(nft.MetaIsNot(expr.MetaKeyIIFNAME, nft.Ifname(t.Via)), nft.Redirected(),
		nft.Exprs{
			&expr.Immediate{Register: nft.Reg, Data: mark()},
			&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: nft.Reg},
		})}
}

// tunnel keeps who is at the other end of an interface of ours from all that is not published.
func (t *Tables) tunnel() []nft.Exprs {
	if !t.Tunnel {
		return nil
	}
	return []nft.Exprs{nft.Join(nft.Iif(t.Via), nft.Drop())}
}

// bounded refuses what begins one connection too many of a guest's, or too soon: the kernel knows
// so many of all together, and who takes them all, or the processor's time, takes the network from
// the others and the host.
func (t *Tables) bounded(l *layout) (all []nft.Rule) {
	for _, b := range []struct {
		most       int
		what       ending
		of         expr.Any // of one guest
		set4, set6 *nftables.Set
	}{
		{
			t.NewConnections, newConnections,
			&expr.Limit{
				Type: expr.LimitTypePkts, Rate: uint64(t.NewConnections), Unit: expr.LimitTimeSecond,
				Burst: uint32(t.NewConnections), Over: true,
			}, l.paced4, l.paced6,
		},
		{
			t.Connections, connections, &expr.Connlimit{Count: uint32(t.Connections), Flags: expr.NFT_CONNLIMIT_F_INV},
			l.counted4, l.counted6,
		},
	} {
		if b.most == 0 {
			continue
		}
		for _, f := range []struct {
			family byte
			source nft.Field
			set    *nftables.Set
		}{{unix.NFPROTO_IPV4, nft.Source4, b.set4}, {unix.NFPROTO_IPV6, nft.Source6, b.set6}} {
			count := &expr.Dynset{
				SrcRegKey: nft.Reg, SetName: f.set.Name, SetID: f.set.ID,
				Operation: uint32(unix.NFT_DYNSET_OP_ADD), Exprs: []expr.Any{b.of},
			}
			all = append(all,
				nft.Rule{
					Exprs: nft.Join(nft.Nfproto(f.family), nft.Exprs{nft.Load(f.source, nft.Reg), count}, l.ends(b.what)),
					Text:  fmt.Sprint(OverPrefix, b.most, " ", b.what),
				})
		}
	}
	return all
}

// leaving is what a guest may send through the host.
func (t *Tables) leaving(l *layout) (all []nft.Exprs) {
	within := l.ends(toGuests)
	if t.Mutual {
		within = l.ends(amongGuests)
	}
	all = []nft.Exprs{nft.Jump(bounds)}
	// What another guest has published is reached as anything outside: by the host, and as the
	// policies have it.
	if !t.Routed {
		all = append(all, nft.Join(nft.Oif(t.Bridge), nft.NotRedirected(), within))
	}
	for _, p := range policy.Metadata {
		for _, p := range append(policy.Embedding(p), p) {
			source, set := nft.Source6, l.metadata6
			if p.Addr().Is4() {
				source, set = nft.Source4, l.metadata4
			}
			all = append(all,
				nft.Join(nft.ToPrefix(p), nft.Exprs{nft.Load(source, nft.Reg), nft.NotInSet(set)}, l.ends(toMetadata)))
		}
	}
	all = append(all, nft.Jump(egress))
	// By its MAC, which the bridge table has seen to, a guest is one element for IPv4 and IPv6: the
	// kernel goes through all that a map leads to when any rule is added.
	rest := nft.Accept()
	if t.Egress == nil {
		rest = l.ends(unruled)
	}
	return append(all, nft.Join(nft.Exprs{nft.Load(nft.EtherSource, nft.Reg), nft.VerdictOf(l.policies)}, rest),
		nft.Goto(refused))
}

// entering is what a guest may send to the host itself: answers, echo requests, neighbour
// discovery, and to its DNS proxy.
func (t *Tables) entering(l *layout) []nft.Exprs {
	all := []nft.Exprs{
		nft.Jump(bounds),
		// also for those who may reach the host: what listens there listens to nobody else
		nft.Join(toLoopback(), nft.Drop()),
		nft.Join(nft.L4(unix.IPPROTO_ICMPV6), nft.Is(nft.ICMPType, []byte{135}), nft.Accept()),
		nft.Join(nft.L4(unix.IPPROTO_ICMPV6), nft.Is(nft.ICMPType, []byte{136}), nft.Accept()),
		nft.Join(nft.ToPrefix(netip.PrefixFrom(t.gateway(t.Subnet), 32)), nft.L4(unix.IPPROTO_ICMP),
			nft.Is(nft.ICMPType, []byte{8}), nft.Accept()),
		nft.Join(nft.ToPrefix(linkLocal6), nft.L4(unix.IPPROTO_ICMPV6), nft.Is(nft.ICMPType, []byte{128}), nft.Accept()),
	}
	if t.Subnet6.IsValid() {
		all = append(all,
			nft.Join(nft.ToPrefix(netip.PrefixFrom(t.gateway(t.Subnet6), 128)), nft.L4(unix.IPPROTO_ICMPV6),
				nft.Is(nft.ICMPType, []byte{128}), nft.Accept()))
	}
	return append(all,
		nft.Join(nft.Redirected(), nft.Accept()),
		nft.Join(nft.Nfproto(unix.NFPROTO_IPV4), nft.Exprs{nft.Load(nft.Source4, nft.Reg), nft.InSet(l.host4)},
			l.ends(toHostAllowed)),
		nft.Join(nft.Nfproto(unix.NFPROTO_IPV6), nft.Exprs{nft.Load(nft.Source6, nft.Reg), nft.InSet(l.host6)},
			l.ends(toHostAllowed)),
		l.ends(toHostDenied))
}

var linkLocal6 = netip.MustParsePrefix("fe80::/10")

// gateway is a subnet's first address.
func (t *Tables) gateway(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// AnswerMark is that of connections to what guests have published, on a network that leaves by one
// interface, and of what guests send in them.
const AnswerMark = 0x53560001

func mark() []byte { return binaryutil.NativeEndian.PutUint32(AnswerMark) }

// ofAnswer matches what belongs to such a connection, or does not.
func ofAnswer(op expr.CmpOp) nft.Exprs {
	return nft.Exprs{&expr.Ct{Key: expr.CtKeyMARK, Register: nft.Reg}, &expr.Cmp{Op: op, Register: nft.Reg, Data: mark()}}
}
