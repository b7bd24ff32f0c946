package filter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/conntrack"
	"push.rocks/smartvm/network/internal/nft"
	"push.rocks/smartvm/network/policy"
)

// Guest is one interface of a guest in its network's tables, as an effect on the host.
type Guest struct {
	Table string     `json:"table"`
	Tap   string     `json:"tap"`
	MAC   string     `json:"mac"` // as net.ParseMAC takes it
	IP4   netip.Addr `json:"ip4"`
	IP6   netip.Addr `json:"ip6,omitzero"`
	Ports []Port     `json:"ports,omitempty"`
	// Policy is the guest's own. What it sends must pass that of its network, too.
	Policy *policy.Policy `json:"policy,omitempty"`
	Routed bool           `json:"routed,omitempty"` // its network is
	DNS    uint16         `json:"dns,omitempty"`    // the port of its proxy on the bridge; 0: it has none
}

// Bridge is that of the guest's network.
func (g *Guest) Bridge() string { return strings.TrimPrefix(g.Table, TablePrefix) }

// Port is a port of the host that leads to one of a guest's.
type Port struct {
	Address  netip.Addr `json:"address,omitzero"` // of the host; zero: all, 0.0.0.0 or ::: all of that family
	Host     uint16     `json:"host"`             // 0: yet to be chosen
	Guest    uint16     `json:"guest"`
	Protocol string     `json:"protocol"` // "tcp" or "udp"
}

// member is elements of one set.
type member struct {
	set      *nftables.Set
	elements []nftables.SetElement
	absent   bool // they are not there, as the guest is now
}

// Apply adds the guest's elements and chain, all or none. Returns an error that is fs.ErrNotExist
// where the tables are gone.
func (g *Guest) Apply(context.Context) error {
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	err = withLog(g.Table, func(l *layout) error {
		if err := g.add(conn, l); err != nil {
			return err
		}
		return conn.Flush()
	})
	if err != nil {
		return fmt.Errorf("add guest %s to table %s: %w", g.Tap, g.Table, err)
	}
	return nil
}

// Replace puts what the guest is now in place of what it was, at once. Connections end that are not
// allowed any more. Returns what Apply does.
func (g *Guest) Replace(context.Context) error {
	conn, closeLater, err := nft.OpenOnce()
	if err != nil {
		return err
	}
	defer closeLater()
	compiled, err := g.compile()
	if err != nil {
		return err
	}
	err = withLog(g.Table, func(l *layout) error {
		keep := append([]*nftables.Set{}, l.namesOf(g.Tap, compiled)...) // and the addresses of the network's names
		if err := remove(conn, map[string]*layout{g.Table: l}, []*Guest{g}, keep); err != nil {
			return err
		}
		if err := g.add(conn, l); err != nil {
			return err
		}
		return conn.Flush()
	})
	if err == nil {
		err = g.forgetDenied(conn, newLayout(g.Table))
	}
	if err != nil {
		return fmt.Errorf("change guest %s in table %s: %w", g.Tap, g.Table, err)
	}
	return nil
}

// compile returns the rules of the guest's own policy.
func (g *Guest) compile() ([]policy.Compiled, error) {
	if g.Policy == nil {
		return nil, nil
	}
	return g.Policy.Compile()
}

// chain is that of the guest's own policy.
func (g *Guest) chain() string { return "guest-" + g.Tap }

// chains are those of the guest's own policy, none without one.
func (g *Guest) chains(l *layout, compiled []policy.Compiled) []nft.Ruled {
	if g.Policy == nil {
		return nil
	}
	rules := policyRules{
		layout: l, chain: g.chain(), tap: g.Tap, allowed: g.Policy.DefaultAction != policy.Deny,
		allow: expr.VerdictAccept,
	}
	if g.Routed {
		rules.near = g.Bridge()
	}
	return rules.chains(compiled)
}

func (g *Guest) add(conn *nftables.Conn, l *layout) error {
	compiled, err := g.compile()
	if err != nil {
		return err
	}
	for _, s := range l.namesOf(g.Tap, compiled) {
		if err := conn.AddSet(s, nil); err != nil {
			return err
		}
	}
	own := g.chains(l, compiled)
	for i := range own {
		conn.AddChain(&own[i].Chain)
		conn.FlushChain(&own[i].Chain) // it may be half of an earlier life
	}
	for i := range own {
		if err := own[i].AddRules(conn); err != nil {
			return err
		}
	}
	members, err := g.members(l)
	if err != nil {
		return err
	}
	for _, m := range append(members, g.published(l)...) {
		if m.absent {
			continue
		}
		if err := conn.SetAddElements(m.set, m.elements); err != nil {
			return err
		}
	}
	return nil
}

// Revert removes what Apply or Replace added, as far as it is there.
func (g *Guest) Revert(context.Context) error { return Remove([]*Guest{g}) }

// Remove removes guests at once: the kernel takes as long for one as for many. What they had is
// looked for: it may have been replaced.
func Remove(guests []*Guest) error {
	conn, closeLater, err := nft.OpenOnce()
	if err != nil {
		return err
	}
	defer closeLater()
	layouts := map[string]*layout{}
	for _, g := range guests {
		if _, asked := layouts[g.Table]; asked {
			continue
		}
		l := newLayout(g.Table)
		there, err := nft.TablesExist(conn, l.inet, l.bridge)
		if err != nil {
			return err
		}
		if !there {
			l = nil
		}
		layouts[g.Table] = l
	}
	present := slices.DeleteFunc(slices.Clone(guests), func(g *Guest) bool { return layouts[g.Table] == nil })
	err = remove(conn, layouts, present, nil)
	if err == nil {
		err = conn.Flush()
	}
	if errors.Is(err, unix.EEXIST) { // something is other than it was added
		if err = clear(conn, present); err == nil {
			err = remove(conn, layouts, present, nil)
		}
		if err == nil {
			err = conn.Flush()
		}
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove guests: %w", err)
	}
	// Whoever has the address next is neither to go on with a connection nor to be reached by it.
	addresses := map[netip.Addr]bool{}
	for _, g := range guests {
		addresses[g.IP4], addresses[g.IP6] = true, true
	}
	return conntrack.Forget(func(a netip.Addr) bool { return addresses[a] })
}

// remove adds all before it removes it: what is not there cannot be removed, and would undo the
// whole batch. Sets of names to keep stay.
func remove(conn *nftables.Conn, layouts map[string]*layout, guests []*Guest, keep []*nftables.Set) error {
	elements := map[*nftables.Set][]nftables.SetElement{}
	addresses := map[string][]netip.Addr{} // by table
	chains := map[*nftables.Table][]string{}
	var sets []*nftables.Set
	for _, g := range guests {
		l := layouts[g.Table]
		chain := &nftables.Chain{Table: l.inet, Name: g.chain()}
		rules, err := nft.RulesOf(conn, chain)
		if err != nil {
			return err
		}
		if g.Policy != nil || len(rules) > 0 {
			conn.AddChain(chain)
			chains[l.inet] = append(append(chains[l.inet], chain.Name), nft.ChainsIn(rules, chain.Name+".")...)
		}
		for _, name := range nft.SetsIn(rules, "names-") {
			if !slices.ContainsFunc(keep, func(s *nftables.Set) bool { return s.Name == name }) {
				sets = append(sets, &nftables.Set{Table: l.inet, Name: name})
			}
		}
		members, err := g.members(l)
		if err != nil {
			return err
		}
		for _, m := range members {
			if m.set == l.policies { // it is as the guest's chain is, and not as its policy is to be
				m.elements = g.decided(m.elements[0].Key, len(rules) > 0)
			}
			elements[m.set] = append(elements[m.set], m.elements...)
		}
		addresses[g.Table] = append(addresses[g.Table], g.IP4, g.IP6)
	}
	for table, of := range addresses {
		members, err := layouts[table].theirs(conn, of, keep == nil)
		if err != nil {
			return err
		}
		for _, m := range members {
			elements[m.set] = append(elements[m.set], m.elements...)
		}
	}
	for set, all := range elements {
		for some := range slices.Chunk(all, nft.MaxElements) {
			if err := errors.Join(conn.SetAddElements(set, some), conn.SetDeleteElements(set, some)); err != nil {
				return err
			}
		}
	}
	for table, names := range chains {
		nft.RemoveChains(conn, table, names)
	}
	for _, s := range sets {
		conn.DelSet(s)
	}
	return nil
}

// theirs are the elements of guests that come and go while they run: published ports, and with
// names the addresses of the network's names.
func (l *layout) theirs(conn *nftables.Conn, addresses []netip.Addr, names bool) (all []member, err error) {
	find := func(set *nftables.Set, of func(nftables.SetElement) []byte, bytes int) error {
		elements, err := conn.GetSetElements(set)
		if err != nil {
			return fmt.Errorf("look at set %s: %w", set.Name, err)
		}
		elements = slices.DeleteFunc(elements, func(e nftables.SetElement) bool {
			a, ok := netip.AddrFromSlice(of(e)[:min(bytes, len(of(e)))])
			return !ok || !slices.Contains(addresses, a)
		})
		if len(elements) > 0 {
			all = append(all, member{set: set, elements: elements})
		}
		return nil
	}
	leadsTo := func(e nftables.SetElement) []byte { return e.Val }
	from := func(e nftables.SetElement) []byte { return e.Key }
	err = errors.Join(find(l.ports4, leadsTo, 4), find(l.portsAt4, leadsTo, 4), find(l.ports6, leadsTo, 16),
		find(l.portsAt6, leadsTo, 16))
	if err != nil || !names {
		return all, err
	}
	rules, err := nft.RulesOf(conn, &nftables.Chain{Table: l.inet, Name: egress})
	for _, name := range nft.SetsIn(rules, networkNames) {
		kind, bytes := nftables.TypeIPAddr, 4
		if strings.HasSuffix(name, "-6") {
			kind, bytes = nftables.TypeIP6Addr, 16
		}
		err = errors.Join(err, find(l.names("", name, kind), from, bytes))
	}
	return all, err
}

func (g *Guest) members(l *layout) ([]member, error) {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return nil, err
	}
	sender := append(nft.Ifname(g.Tap), mac...)
	sender = append(sender, 0, 0) // to whole registers
	element := func(key []byte) []nftables.SetElement { return []nftables.SetElement{{Key: key}} }
	from := func(of ...netip.Addr) (elements []nftables.SetElement) {
		for _, a := range of {
			elements = append(elements, element(append(sender[:len(sender):len(sender)], a.AsSlice()...))...)
		}
		return elements
	}
	addresses, addresses6 := []netip.Addr{g.IP4}, []netip.Addr{LinkLocal(mac)}
	if g.IP6.IsValid() {
		addresses, addresses6 = append(addresses, g.IP6), append(addresses6, g.IP6)
	}
	all := []member{
		{l.macs, element(sender), false},
		{l.senders4, from(g.IP4), false},
		{l.senders6, from(addresses6...), false},
	}
	all = append(all, member{l.policies, g.decided(mac, g.Policy != nil), false})
	for _, a := range addresses {
		hosts, metadata, dns, resolver := l.host4, l.metadata4, l.dns4, l.resolver4
		if a.Is6() {
			hosts, metadata, dns, resolver = l.host6, l.metadata6, l.dns6, l.resolver6
		}
		if g.DNS != 0 {
			proxy := []nftables.SetElement{{Key: a.AsSlice(), Val: nft.Port(g.DNS)}}
			all = append(all, member{resolver, proxy, false}, member{dns, proxy, !g.Policy.Names()})
		}
		all = append(all,
			member{hosts, element(a.AsSlice()), g.Policy == nil || !g.Policy.AllowHost},
			member{metadata, element(a.AsSlice()), g.Policy == nil || !g.Policy.AllowMetadata})
	}
	return all, nil
}

// decided is the element that says which policy decides about a guest: its own, or none. Of whom
// there is none nothing passes.
func (g *Guest) decided(mac []byte, own bool) []nftables.SetElement {
	verdict := &expr.Verdict{Kind: expr.VerdictContinue}
	if own {
		verdict = &expr.Verdict{Kind: expr.VerdictGoto, Chain: g.chain()}
	}
	return []nftables.SetElement{{Key: mac, VerdictData: verdict}}
}

// published are the elements of its ports.
func (g *Guest) published(l *layout) (all []member) {
	for _, p := range g.Ports {
		for _, a := range []netip.Addr{g.IP4, g.IP6} {
			if a.IsValid() && !(p.Address.IsValid() && p.Address.Is4() != a.Is4()) {
				all = append(all, p.member(l, a))
			}
		}
	}
	return all
}

// number is that of its protocol.
func (p Port) number() uint8 {
	return map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}[p.Protocol]
}

// member leads a port to a guest's address of the same family.
func (p Port) member(l *layout, to netip.Addr) member {
	padded := func(b ...byte) []byte { return append(b, make([]byte, -len(b)&3)...) }
	e := nftables.SetElement{Val: append(to.AsSlice(), padded(nft.Port(p.Guest)...)...)}
	e.Key = append(padded(p.number()), padded(nft.Port(p.Host)...)...)
	set := l.ports4
	one := p.Address.IsValid() && !p.Address.IsUnspecified()
	switch {
	case one && to.Is4():
		set = l.portsAt4
	case one:
		set = l.portsAt6
	case to.Is6():
		set = l.ports6
	}
	if one {
		e.Key = append(p.Address.AsSlice(), e.Key...)
	}
	return member{set: set, elements: []nftables.SetElement{e}}
}

// LinkLocal is the address that a guest's kernel makes from a MAC (RFC 4291, appendix A).
func LinkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16(
		[16]byte{
			0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3],
			14: mac[4], 15: mac[5],
		})
}
