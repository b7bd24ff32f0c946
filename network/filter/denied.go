package filter

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"

	"push.rocks/smartvm/network/conntrack"
	"push.rocks/smartvm/network/policy"
)

// forgetDenied ends the connections of guests that the network's policy does not allow: what is
// known is let through.
func (t *Tables) forgetDenied(conn *nftables.Conn, l *layout) error {
	if t.Egress == nil {
		return nil
	}
	allows, err := l.allows(conn, "", t.Egress)
	if err != nil {
		return err
	}
	within := func(a netip.Addr) bool { return t.Subnet.Contains(a) || t.Subnet6.Contains(a) }
	return conntrack.ForgetFlows(func(f conntrack.Flow) bool {
		return within(f.From) && (t.Routed || !within(f.To.Address)) && !allows(f)
	})
}

// forgetDenied ends those of the guest that its own policy does not allow, or that lead to it by
// ports that it has not published.
func (g *Guest) forgetDenied(conn *nftables.Conn, l *layout) error {
	own := g.Policy
	if own == nil {
		own = new(policy.Policy)
	}
	allows, err := l.allows(conn, g.Tap, own)
	if err != nil {
		return err
	}
	host, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("list the host's addresses: %w", err)
	}
	onHost := func(a netip.Addr) bool {
		return slices.ContainsFunc(host, func(of net.Addr) bool {
			n, ok := of.(*net.IPNet)
			return ok && n.IP.Equal(a.AsSlice())
		})
	}
	isMetadata := func(a netip.Addr) bool {
		return slices.ContainsFunc(policy.Metadata, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	isGuest := func(a netip.Addr) bool { return a == g.IP4 || a == g.IP6 }
	return conntrack.ForgetFlows(func(f conntrack.Flow) bool {
		if isGuest(f.To.Address) && f.Asked.Addr() != f.To.Address {
			return !slices.ContainsFunc(g.Ports, func(p Port) bool {
				return p.Host == f.Asked.Port() && p.Guest == f.To.Port && p.number() == f.To.Protocol
			})
		}
		if !isGuest(f.From) {
			return false
		}
		return !allows(f) || !own.AllowHost && onHost(f.To.Address) || !own.AllowMetadata && isMetadata(f.To.Address)
	})
}

// allows returns what a policy allows, with the names that guests have asked for: a guest's own, or
// with no tap the network's.
func (l *layout) allows(conn *nftables.Conn, tap string, p *policy.Policy) (func(conntrack.Flow) bool, error) {
	compiled, err := p.Compile()
	if err != nil {
		return nil, err
	}
	named := map[string]map[string]bool{} // by set, guest and address
	for _, s := range l.namesOf(tap, compiled) {
		elements, err := conn.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("look at set %s: %w", s.Name, err)
		}
		named[s.Name] = map[string]bool{}
		for _, e := range elements {
			named[s.Name][string(e.Key)] = true
		}
	}
	return func(f conntrack.Flow) bool {
		return policy.Allows(compiled, p.DefaultAction, f.To, func(domain string) bool {
			set, ip6 := nameSets(tap, domain)
			if f.To.Address.Is6() {
				set = ip6
			}
			return named[set][string(append(f.From.AsSlice(), f.To.Address.AsSlice()...))]
		})
	}, nil
}
