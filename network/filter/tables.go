package filter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/policy"
)

// Tables are those of one network, as an effect on the host: its interface is a bridge.
type Tables struct {
	Name    string         `json:"name"`  // of both tables, at most 32 bytes
	Owner   string         `json:"owner"` // a random word, by which they are known again
	Bridge  string         `json:"bridge"`
	Taps    string         `json:"taps"`               // how the names of all its guests' taps begin, and of no others
	Subnet  netip.Prefix   `json:"subnet"`             // IPv4
	Subnet6 netip.Prefix   `json:"subnet6,omitzero"`   // zero: no IPv6
	Mutual  bool           `json:"mutual,omitempty"`   // guests reach each other
	Inside  bool           `json:"internal,omitempty"` // nothing leaves the network
	Via     string         `json:"via,omitempty"`      // the one interface by which guests leave; "": any
	Egress  *policy.Policy `json:"policy,omitempty"`   // what all guests may reach at most; where it has names, each guest has a copy
}

// ErrTooOld says that the kernel's nftables lacks what is needed.
var ErrTooOld = errors.New("nftables of this kernel is too old or not there: Linux 5.10 with nf_tables is needed")

// Names of chains and sets in both tables.
const (
	ownerPrefix = "owner-"
	fromGuest   = "from-guest"
	toGuest     = "to-guest"
	toHost      = "to-host"
	egress      = "egress"
)

// layout is a network's tables, with the sets that guests have elements in.
type layout struct {
	inet, bridge *nftables.Table

	macs                 *nftables.Set // bridge: tap . MAC that a guest may send from
	senders4, senders6   *nftables.Set // bridge: tap . MAC . address, likewise
	policies             *nftables.Set // MAC -> the chain of its policies
	host4, host6         *nftables.Set // sources that may reach the host
	metadata4, metadata6 *nftables.Set // sources that may reach link-local and metadata addresses
	dns4, dns6           *nftables.Set // source -> the port of its DNS proxy
	ports4, ports6       *nftables.Set // protocol . port -> guest . port
	portsAt4, portsAt6   *nftables.Set // address . protocol . port -> guest . port
}

func newLayout(name string) *layout {
	l := &layout{
		inet:   &nftables.Table{Name: name, Family: nftables.TableFamilyINet},
		bridge: &nftables.Table{Name: name, Family: nftables.TableFamilyBridge},
	}
	addr4, addr6 := nftables.TypeIPAddr, nftables.TypeIP6Addr
	proto, service := nftables.TypeInetProto, nftables.TypeInetService
	key := nftables.MustConcatSetType
	for _, s := range []struct {
		set       **nftables.Set
		table     *nftables.Table
		name      string
		key, data nftables.SetDatatype
	}{
		{&l.macs, l.bridge, "macs", key(nftables.TypeIFName, nftables.TypeEtherAddr), nftables.SetDatatype{}},
		{&l.senders4, l.bridge, "senders4", key(nftables.TypeIFName, nftables.TypeEtherAddr, addr4), nftables.SetDatatype{}},
		{&l.senders6, l.bridge, "senders6", key(nftables.TypeIFName, nftables.TypeEtherAddr, addr6), nftables.SetDatatype{}},
		{&l.policies, l.inet, "policies", nftables.TypeEtherAddr, nftables.TypeVerdict},
		{&l.host4, l.inet, "host4", addr4, nftables.SetDatatype{}},
		{&l.host6, l.inet, "host6", addr6, nftables.SetDatatype{}},
		{&l.metadata4, l.inet, "metadata4", addr4, nftables.SetDatatype{}},
		{&l.metadata6, l.inet, "metadata6", addr6, nftables.SetDatatype{}},
		{&l.dns4, l.inet, "dns4", addr4, service},
		{&l.dns6, l.inet, "dns6", addr6, service},
		{&l.ports4, l.inet, "ports4", key(proto, service), key(addr4, service)},
		{&l.ports6, l.inet, "ports6", key(proto, service), key(addr6, service)},
		{&l.portsAt4, l.inet, "ports-at4", key(addr4, proto, service), key(addr4, service)},
		{&l.portsAt6, l.inet, "ports-at6", key(addr6, proto, service), key(addr6, service)},
	} {
		*s.set = &nftables.Set{Table: s.table, Name: s.name, KeyType: s.key, DataType: s.data, IsMap: s.data.Bytes > 0 || s.data.Name != ""}
	}
	return l
}

func (l *layout) sets() []*nftables.Set {
	return []*nftables.Set{
		l.macs, l.senders4, l.senders6, l.policies, l.host4, l.host6, l.metadata4, l.metadata6, l.dns4, l.dns6,
		l.ports4, l.ports6, l.portsAt4, l.portsAt6,
	}
}

// Apply makes both tables at once. Returns an error that is fs.ErrExist if either is there, ErrTooOld where the kernel lacks
// something.
func (t *Tables) Apply(context.Context) error {
	conn, err := open()
	if err != nil {
		return err
	}
	l := newLayout(t.Name)
	for _, table := range []*nftables.Table{l.inet, l.bridge} {
		conn.CreateTable(table)
		conn.AddChain(&nftables.Chain{Table: table, Name: ownerPrefix + t.Owner})
	}
	for _, s := range l.sets() {
		if err := conn.AddSet(s, nil); err != nil {
			return fmt.Errorf("make table %s: set %s: %w", t.Name, s.Name, err)
		}
	}
	rules, err := t.rules(l)
	if err != nil {
		return err
	}
	if err := addChains(conn, rules); err != nil {
		return fmt.Errorf("make table %s: %w", t.Name, err)
	}
	switch err := conn.Flush(); {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("make table %s: %w", t.Name, fs.ErrExist)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("make table %s: %w: %w", t.Name, ErrTooOld, err)
	case err != nil:
		return fmt.Errorf("make table %s: %w", t.Name, err)
	}
	return nil
}

// Revert removes those of the two tables that are this network's.
func (t *Tables) Revert(context.Context) error {
	conn, err := open()
	if err != nil {
		return err
	}
	l := newLayout(t.Name)
	for _, table := range []*nftables.Table{l.inet, l.bridge} {
		ours, err := t.owns(conn, table)
		if err != nil {
			return err
		}
		if ours {
			conn.DelTable(table)
		}
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove table %s: %w", t.Name, err)
	}
	return nil
}

func (t *Tables) owns(conn *nftables.Conn, table *nftables.Table) (bool, error) {
	chains, err := conn.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return false, fmt.Errorf("look at table %s: %w", t.Name, err)
	}
	return slices.ContainsFunc(chains, func(c *nftables.Chain) bool {
		return c.Table.Name == table.Name && c.Name == ownerPrefix+t.Owner
	}), nil
}

// There says whether both tables are, and are this network's.
func (t *Tables) There(context.Context) (bool, error) {
	conn, err := open(nftables.AsLasting())
	if err != nil {
		return false, err
	}
	defer conn.CloseLasting()
	l := newLayout(t.Name)
	for _, table := range []*nftables.Table{l.inet, l.bridge} {
		// A flush leaves tables and chains: a table without rules lets everything through. That the first rule names the owner is
		// quick to see: other chains are many, or long.
		rules, err := conn.GetRules(table, &nftables.Chain{Table: table, Name: entry(table)})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return false, fmt.Errorf("look at table %s: %w", t.Name, err)
		}
		if len(rules) == 0 {
			return false, nil
		}
		if owner, _ := userdata.GetString(rules[0].UserData, userdata.TypeComment); owner != ownerPrefix+t.Owner {
			return false, nil
		}
	}
	return true, nil
}

// entry is the chain by which a guest's packets come in.
func entry(t *nftables.Table) string {
	if t.Family == nftables.TableFamilyBridge {
		return "prerouting"
	}
	return "forward"
}

// ruled is a chain with its rules. Hook nil: one that others jump to.
type ruled struct {
	chain nftables.Chain
	rules []rule
}

type rule struct {
	exprs exprs
	text  string  // for Counters
	ports *member // an anonymous set that exprs look into
}

func plain(all ...exprs) (rules []rule) {
	for _, e := range all {
		rules = append(rules, rule{exprs: e})
	}
	return rules
}

// maxComment is what nft shows of one, in bytes.
const maxComment = 128

func addChains(conn *nftables.Conn, chains []ruled) error {
	for i := range chains {
		conn.AddChain(&chains[i].chain)
	}
	for i := range chains {
		if err := chains[i].addRules(conn); err != nil {
			return err
		}
	}
	return nil
}

// addRules adds the rules of a chain that is there. To add the chain twice would make the kernel wait for 10 ms.
func (c *ruled) addRules(conn *nftables.Conn) error {
	for _, rule := range c.rules {
		if rule.ports != nil {
			if err := conn.AddSet(rule.ports.set, rule.ports.elements); err != nil {
				return err
			}
			for _, e := range rule.exprs {
				if lookup, ok := e.(*expr.Lookup); ok && lookup.SetName == "" {
					lookup.SetName, lookup.SetID = rule.ports.set.Name, rule.ports.set.ID
				}
			}
		}
		var comment []byte
		if rule.text != "" {
			comment = userdata.AppendString(nil, userdata.TypeComment, rule.text[:min(len(rule.text), maxComment)])
		}
		conn.AddRule(&nftables.Rule{Table: c.chain.Table, Chain: &c.chain, Exprs: rule.exprs, UserData: comment})
	}
	return nil
}

func base(t *nftables.Table, name string, hook *nftables.ChainHook, priority *nftables.ChainPriority) nftables.Chain {
	c := nftables.Chain{Table: t, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: priority}
	if priority == nftables.ChainPriorityNATDest || priority == nftables.ChainPriorityNATSource {
		c.Type = nftables.ChainTypeNAT
	}
	return c
}

func (t *Tables) rules(l *layout) ([]ruled, error) {
	all := []ruled{
		{base(l.inet, "forward", nftables.ChainHookForward, nftables.ChainPriorityFilter), plain(t.forwarded()...)},
		// What is known goes first, whoever sends it: a rule that does not match costs each packet, and what goes on here is accepted anyhow.
		{base(l.inet, "input", nftables.ChainHookInput, nftables.ChainPriorityFilter), plain(
			join(known(), accept()),
			join(iif(t.Bridge), jump(toHost)))},
		{base(l.inet, "prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest), plain(
			append(t.proxied(l), append([]exprs{foreign()}, published(l)...)...)...)},
		{base(l.inet, "output", nftables.ChainHookOutput, nftables.ChainPriorityNATDest), plain(published(l)...)},
		{base(l.inet, "postrouting", nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource), plain(t.masqueraded()...)},
		{nftables.Chain{Table: l.inet, Name: fromGuest}, plain(t.leaving(l)...)},
		{nftables.Chain{Table: l.inet, Name: toGuest}, plain(join(redirected(), accept()), drop())},
		{nftables.Chain{Table: l.inet, Name: toHost}, plain(t.entering(l)...)},
		// What most of all traffic is goes first here too; only taps of the network are in these sets.
		{base(l.bridge, "prerouting", nftables.ChainHookPrerouting, nftables.ChainPriorityRef(-300)), plain(
			join(ether(unix.ETH_P_IP), l4(unix.IPPROTO_TCP), sender(etherSource, source4), exprs{inSet(l.senders4)}, accept()),
			join(ether(unix.ETH_P_IPV6), l4(unix.IPPROTO_TCP), sender(etherSource, source6), exprs{inSet(l.senders6)}, accept()),
			join(tapOf(t.Taps), jump(fromGuest)))},
		{nftables.Chain{Table: l.bridge, Name: fromGuest}, plain(t.genuine(l)...)},
	}
	for _, c := range all {
		if c.chain.Name == entry(c.chain.Table) {
			c.rules[0].text = ownerPrefix + t.Owner // for There
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

// proxied sends a guest's queries to its DNS proxy, on the bridge's own address.
func (t *Tables) proxied(l *layout) (all []exprs) {
	for _, f := range []struct {
		family byte
		source field
		set    *nftables.Set
	}{{unix.NFPROTO_IPV4, source4, l.dns4}, {unix.NFPROTO_IPV6, source6, l.dns6}} {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			all = append(all, join(iif(t.Bridge), nfproto(f.family), l4(proto), is(destPort, port(53)),
				exprs{load(f.source, reg), mapped(f.set), &expr.Redir{RegisterProtoMin: reg}}))
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

// foreign keeps who is not the host itself from what is published on its loopback: the kernel drops what is sent to such an address from
// outside, but only after this. What the host sends there goes by output.
func foreign() exprs { return join(nfproto(unix.NFPROTO_IPV4), within(dest4, loopback4), accept()) }

// loopback4 has no counterpart: the kernel drops what comes for ::1 at once.
var loopback4 = netip.MustParsePrefix("127.0.0.0/8")

// masqueraded gives what leaves the network, or comes from the host's loopback, an address to which answers come back.
func (t *Tables) masqueraded() []exprs {
	masquerade := exprs{&expr.Masq{}}
	all := []exprs{
		join(oifNot(t.Bridge), nfproto(unix.NFPROTO_IPV4), within(source4, t.Subnet), masquerade),
		join(oif(t.Bridge), nfproto(unix.NFPROTO_IPV4), within(source4, loopback4), masquerade),
	}
	if t.Subnet6.IsValid() {
		all = append(all, join(oifNot(t.Bridge), nfproto(unix.NFPROTO_IPV6), within(source6, t.Subnet6), masquerade))
	}
	return all
}

// forwarded is what comes from guests and what goes to them.
func (t *Tables) forwarded() (all []exprs) {
	if t.Via != "" { // known connections too: the way may have changed. Bridged frames come here where br_netfilter is loaded.
		all = append(all, join(iif(t.Bridge), oifNot(t.Via), oifNot(t.Bridge), drop()))
	}
	return append(all, join(known(), accept()), join(iif(t.Bridge), jump(fromGuest)), join(oif(t.Bridge), jump(toGuest)))
}

// leaving is what a guest may send through the host.
func (t *Tables) leaving(l *layout) (all []exprs) {
	within := drop()
	if t.Mutual {
		within = accept()
	}
	all = append(all, join(oif(t.Bridge), within),
		join(toPrefix(netip.MustParsePrefix("169.254.0.0/16")), exprs{load(source4, reg), notInSet(l.metadata4)}, drop()),
		join(toPrefix(netip.MustParsePrefix("fd00:ec2::254/128")), exprs{load(source6, reg), notInSet(l.metadata6)}, drop()))
	if t.Inside {
		return append(all, drop())
	}
	last := accept()
	switch {
	case t.Egress.Names(): // each guest has a chain
		last = drop()
	case t.Egress != nil: // what the network allows, a guest's own policy may still forbid
		all = append(all, jump(egress))
	}
	// By its MAC, which the bridge table has seen to, a guest is one element for IPv4 and IPv6: the kernel goes through all that a map
	// leads to when any rule is added.
	return append(all, exprs{load(etherSource, reg), verdictOf(l.policies)}, last)
}

// entering is what a guest may send to the host itself: answers, echo requests, neighbour discovery, and to its DNS proxy.
func (t *Tables) entering(l *layout) []exprs {
	return []exprs{
		join(l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{135}), accept()),
		join(l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{136}), accept()),
		join(nfproto(unix.NFPROTO_IPV4), within(dest4, netip.PrefixFrom(t.gateway(t.Subnet), 32)), l4(unix.IPPROTO_ICMP), is(icmpType, []byte{8}), accept()),
		join(l4(unix.IPPROTO_ICMPV6), is(icmpType, []byte{128}), accept()),
		join(redirected(), accept()),
		join(nfproto(unix.NFPROTO_IPV4), exprs{load(source4, reg), inSet(l.host4)}, accept()),
		join(nfproto(unix.NFPROTO_IPV6), exprs{load(source6, reg), inSet(l.host6)}, accept()),
		drop(),
	}
}

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
		// Who looks whether its address is in use has none yet.
		join(ether(unix.ETH_P_ARP), is(arpFormat, []byte{0, 1, 8, 0, 6, 4}), is(arpIP, make([]byte, 4)), tap,
			exprs{load(arpMAC, atMAC), inSet(l.macs)}, accept()),

		join(ether(unix.ETH_P_IP), udpFrom(67), drop()),
		join(ether(unix.ETH_P_IP), sender(etherSource, source4), exprs{inSet(l.senders4)}, accept()),

		join(v6, icmp(134), drop()),    // router advertisement
		join(v6, icmp(137), drop()),    // redirect
		join(v6, udpFrom(547), drop()), // DHCP server
		join(v6, icmp(136), sender(etherSource, ndTarget), exprs{notInSet(l.senders6)}, drop()),
		join(v6, unspecified, icmp(135), accept()),
		join(v6, unspecified, icmp(143), accept()),
		join(v6, sender(etherSource, source6), exprs{inSet(l.senders6)}, accept()),
		drop(),
	}
}
