package filter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

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
	// Network is the policy of the network where that has names, whose addresses are each guest's own. It goes before Policy.
	Network *policy.Policy `json:"networkPolicy,omitempty"`
	Policy  *policy.Policy `json:"policy,omitempty"`
	DNS     uint16         `json:"dns,omitempty"` // the port of its proxy on the bridge; 0: it has none
}

// Bridge is that of the guest's network.
func (g *Guest) Bridge() string { return strings.TrimPrefix(g.Table, TablePrefix) }

// Port is a port of the host that leads to one of a guest's.
type Port struct {
	Address  netip.Addr `json:"address,omitzero"` // of the host; zero: all, 0.0.0.0 or ::: all of that family
	Host     uint16     `json:"host"`
	Guest    uint16     `json:"guest"`
	Protocol string     `json:"protocol"` // "tcp" or "udp"
}

// String is the port as -p takes it.
func (p Port) String() string {
	text := fmt.Sprintf("%d:%d", p.Host, p.Guest)
	if p.Address.IsValid() {
		text = netip.AddrPortFrom(p.Address, p.Host).String() + ":" + strconv.Itoa(int(p.Guest))
	}
	if p.Protocol == "udp" {
		text += "/udp"
	}
	return text
}

// member is elements of one set.
type member struct {
	set      *nftables.Set
	elements []nftables.SetElement
}

// Apply adds the guest's elements and chain, all or none. Returns an error that is fs.ErrNotExist where the tables are
// gone.
func (g *Guest) Apply(context.Context) error {
	conn, err := open()
	if err != nil {
		return err
	}
	if err := g.add(conn, newLayout(g.Table)); err != nil {
		return fmt.Errorf("add guest %s to table %s: %w", g.Tap, g.Table, err)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("add guest %s to table %s: %w", g.Tap, g.Table, err)
	}
	return nil
}

func (g *Guest) add(conn *nftables.Conn, l *layout) error {
	parts, err := g.parts()
	if err != nil {
		return err
	}
	for _, p := range parts {
		for _, s := range p.sets(l) {
			if err := conn.AddSet(s, nil); err != nil {
				return err
			}
		}
	}
	chains := g.chains(l, parts)
	for i := range chains {
		conn.AddChain(&chains[i].chain)
		conn.FlushChain(&chains[i].chain) // it may be half of an earlier life
	}
	for i := range chains {
		if err := chains[i].addRules(conn); err != nil {
			return err
		}
	}
	members, err := g.members(l)
	if err != nil {
		return err
	}
	for _, m := range members {
		if err := conn.SetAddElements(m.set, m.elements); err != nil {
			return err
		}
	}
	return nil
}

// Revert removes what Apply added, as far as it is there.
func (g *Guest) Revert(context.Context) error { return Remove([]*Guest{g}) }

// maxBatch is how many guests go into one message: a socket takes some 200 KiB.
const maxBatch = 64

// Remove removes guests at once: the kernel takes as long for one as for many.
func Remove(guests []*Guest) error {
	var errs []error
	for some := range slices.Chunk(guests, maxBatch) {
		errs = append(errs, removeAll(some))
	}
	return errors.Join(errs...)
}

func removeAll(guests []*Guest) error {
	conn, err := open()
	if err != nil {
		return err
	}
	layouts := map[string]*layout{}
	for _, g := range guests {
		if _, asked := layouts[g.Table]; asked {
			continue
		}
		l := newLayout(g.Table)
		there, err := complete(conn, l)
		if err != nil {
			return err
		}
		if !there {
			l = nil
		}
		layouts[g.Table] = l
	}
	present := slices.DeleteFunc(slices.Clone(guests), func(g *Guest) bool { return layouts[g.Table] == nil })
	if err := remove(conn, layouts, present); err != nil {
		return fmt.Errorf("remove guests: %w", err)
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove guests: %w", err)
	}
	return forgetGuests(guests)
}

// remove adds all before it removes it: what is not there cannot be removed, and would undo the whole batch. The elements of
// all guests go together, as the kernel acknowledges each message, and a socket takes only so many of those.
func remove(conn *nftables.Conn, layouts map[string]*layout, guests []*Guest) error {
	elements := map[*nftables.Set][]nftables.SetElement{}
	var chains []*nftables.Chain
	var sets []*nftables.Set
	for _, g := range guests {
		l := layouts[g.Table]
		members, err := g.members(l)
		if err != nil {
			return err
		}
		for _, m := range members {
			elements[m.set] = append(elements[m.set], m.elements...)
		}
		parts, err := g.parts()
		if err != nil {
			return err
		}
		for _, c := range g.chains(l, parts) {
			chains = append(chains, conn.AddChain(&c.chain))
		}
		for _, p := range parts {
			for _, s := range p.sets(l) {
				if err := conn.AddSet(s, nil); err != nil {
					return err
				}
				sets = append(sets, s)
			}
		}
	}
	for set, all := range elements {
		if err := errors.Join(conn.SetAddElements(set, all), conn.SetDeleteElements(set, all)); err != nil {
			return err
		}
	}
	for _, c := range chains {
		conn.FlushChain(c)
		conn.DelChain(c)
	}
	for _, s := range sets {
		conn.DelSet(s)
	}
	return nil
}

// complete says whether both tables are there.
func complete(conn *nftables.Conn, l *layout) (bool, error) {
	for _, t := range []*nftables.Table{l.inet, l.bridge} {
		_, err := conn.ListTableOfFamily(t.Name, t.Family)
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look at table %s: %w", t.Name, err)
		}
	}
	return true, nil
}

func (g *Guest) members(l *layout) ([]member, error) {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return nil, err
	}
	sender := append(ifname(g.Tap), mac...)
	sender = append(sender, 0, 0) // to whole registers
	element := func(key []byte) []nftables.SetElement { return []nftables.SetElement{{Key: key}} }
	from := func(a netip.Addr) []nftables.SetElement {
		return element(append(sender[:len(sender):len(sender)], a.AsSlice()...))
	}
	all := []member{{l.macs, element(sender)}, {l.senders4, from(g.IP4)}, {l.senders6, from(LinkLocal(mac))}}
	addresses := []netip.Addr{g.IP4}
	if g.IP6.IsValid() {
		all = append(all, member{l.senders6, from(g.IP6)})
		addresses = append(addresses, g.IP6)
	}
	if g.Policy != nil || g.Network != nil {
		all = append(all, member{l.policies, []nftables.SetElement{{Key: mac, VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: g.chain(Own)}}}})
	}
	for _, a := range addresses {
		hosts, metadata, dns, resolver := l.host4, l.metadata4, l.dns4, l.resolver4
		if a.Is6() {
			hosts, metadata, dns, resolver = l.host6, l.metadata6, l.dns6, l.resolver6
		}
		if !g.Network.Names() && !g.Policy.Names() {
			dns = resolver
		}
		if g.DNS != 0 {
			all = append(all, member{dns, []nftables.SetElement{{Key: a.AsSlice(), Val: port(g.DNS)}}})
		}
		if g.Policy == nil {
			continue
		}
		if g.Policy.AllowHost {
			all = append(all, member{hosts, element(a.AsSlice())})
		}
		if g.Policy.AllowMetadata {
			all = append(all, member{metadata, element(a.AsSlice())})
		}
	}
	for _, p := range g.Ports {
		for _, a := range addresses {
			if p.Address.IsValid() && p.Address.Is4() != a.Is4() {
				continue
			}
			all = append(all, p.member(l, a))
		}
	}
	return all, nil
}

// member leads a port to a guest's address of the same family.
func (p Port) member(l *layout, to netip.Addr) member {
	proto := map[string]byte{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP}[p.Protocol]
	padded := func(b ...byte) []byte { return append(b, make([]byte, -len(b)&3)...) }
	e := nftables.SetElement{Val: append(to.AsSlice(), padded(port(p.Guest)...)...)}
	e.Key = append(padded(proto), padded(port(p.Host)...)...)
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
	return member{set, []nftables.SetElement{e}}
}

// LinkLocal is the address that a guest's kernel makes from a MAC (RFC 4291, appendix A).
func LinkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}
