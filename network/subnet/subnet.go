// Package subnet knows which addresses a host needs for something else than our networks.
package subnet

import (
	"crypto/sha256"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/resolvconf"
	"push.rocks/smartvm/network/rtnl"
)

// OverlapError says that an address of a network leads elsewhere.
type OverlapError struct {
	Subnet string
	Route  string // what of the host's is in it: a route, a gateway or a DNS server
	// Interface is that of the route.
	Interface string
}

func (e *OverlapError) Error() string {
	by := ""
	if e.Interface != "" {
		by = " by " + e.Interface
	}
	return fmt.Sprintf("subnet %s overlaps the host's %s%s", e.Subnet, e.Route, by)
}

// Code is the original's word for it.
func (*OverlapError) Code() string { return "INVALID_SUBNET" }

// Free says whether a host, but for one of its bridges, needs addresses of subnets for something
// else: routes into them, neighbours, gateways, DNS servers. Then it returns an *OverlapError.
// Routes to more than that by way of gateways (a VPN's, a company's) serve for all else as before;
// they are returned as shadowed.
func Free(bridge string, subnets ...netip.Prefix) (shadowed []string, err error) {
	host, err := lookAtHost(bridge)
	if err != nil {
		return nil, err
	}
	for _, subnet := range subnets {
		if !subnet.IsValid() {
			continue
		}
		s, err := host.free(subnet)
		if err != nil {
			return nil, hint.Add(err,
				"name another subnet with --subnet, such as 172.30.77.0/24, or use a network of your own: smartvm network create")
		}
		shadowed = append(shadowed, s...)
	}
	return shadowed, nil
}

// destinations are what a host reaches, and how.
type destinations struct {
	routes  []destination
	servers map[netip.Addr]string // which stand in no route: gateways and DNS servers
}

type destination struct {
	to       netip.Prefix
	by       string // an interface
	directly bool   // its neighbours are there
}

// lookAtHost lists the host's, of all tables, but for what a bridge has, if it is there already:
// that is said better elsewhere.
func lookAtHost(bridge string) (*destinations, error) {
	routes, err := rtnl.Whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC},
			netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("look at routes: %w", err)
	}
	h := &destinations{servers: map[netip.Addr]string{}}
	for _, path := range []string{resolvconf.Path, resolvconf.Stub} {
		for _, a := range resolvconf.Servers(path) {
			h.servers[a.WithZone("")] = "DNS server"
		}
	}
	links := map[int]netlink.LinkAttrs{}
	for _, r := range routes {
		link, known := links[r.LinkIndex]
		if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil && !known {
			link = *l.Attrs()
			links[r.LinkIndex] = link
		}
		if link.Name == bridge && bridge != "" {
			continue
		}
		if a, ok := netip.AddrFromSlice(r.Gw); ok {
			h.servers[a.Unmap()] = "gateway"
		}
		for _, hop := range r.MultiPath {
			if a, ok := netip.AddrFromSlice(hop.Gw); ok {
				h.servers[a.Unmap()] = "gateway"
			}
		}
		if r.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		if bits, _ := r.Dst.Mask.Size(); ok && bits > 0 {
			directly := r.Gw == nil && len(r.MultiPath) == 0 && r.Type == unix.RTN_UNICAST &&
				link.Flags&net.FlagPointToPoint == 0
			h.routes = append(h.routes, destination{netip.PrefixFrom(a.Unmap(), bits), link.Name, directly})
		}
	}
	return h, nil
}

// free returns the routes that lead to more than a subnet, or an *OverlapError.
func (h *destinations) free(subnet netip.Prefix) (shadowed []string, err error) {
	for a, what := range h.servers {
		if subnet.Contains(a) {
			return nil, &OverlapError{Subnet: subnet.String(), Route: what + " " + a.String()}
		}
	}
	for _, r := range h.routes {
		switch {
		case !r.to.Overlaps(subnet):
		case r.to.Bits() >= subnet.Bits() || r.directly:
			return nil, &OverlapError{subnet.String(), "route to " + r.to.String(), r.by}
		default:
			shadowed = append(shadowed, r.to.String()+" by "+r.by)
		}
	}
	return shadowed, nil
}

// Choose finds a /24 that is not taken and that the host does not need: below 172.30.0.0/16, far
// from those that clouds give their networks (172.31.0.0/16 is AWS's, and has its DNS server). It
// shadows a route of the host's only if there is no other. It is invalid if there is none.
func Choose(taken func(netip.Prefix) bool) (netip.Prefix, error) {
	host, err := lookAtHost("")
	if err != nil {
		return netip.Prefix{}, err
	}
	var second netip.Prefix
	for n := range 255 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 30, byte(n + 1), 0}), 24)
		if taken(p) {
			continue
		}
		shadowed, err := host.free(p)
		if err == nil && shadowed == nil {
			return p, nil
		}
		if err == nil && !second.IsValid() {
			second = p
		}
	}
	return second, nil
}

// Error says what is wrong with a subnet. Its Code is INVALID_SUBNET.
type Error struct {
	Subnet string
	Reason string
}

func (e *Error) Error() string { return fmt.Sprintf("subnet %s: %s", e.Subnet, e.Reason) }

// Code is the original's word for it.
func (*Error) Code() string { return "INVALID_SUBNET" }

// Local is the unique local IPv6 subnet (RFC 4193) of a bridge: always the same for one name.
func Local(bridge string) netip.Prefix {
	sum := sha256.Sum256([]byte("smartvm network " + bridge))
	a := [16]byte{0: 0xfd}
	copy(a[1:8], sum[:])
	return netip.PrefixFrom(netip.AddrFrom16(a), 64)
}

// Inner is what a guest in a namespace of its own is in, with its gateway there: where that were
// the network's too, it would not be reached.
var Inner = netip.MustParsePrefix("10.255.255.0/30")

// Validate returns a *Error if guests cannot have addresses of p.
func Validate(p netip.Prefix) error {
	reason := ""
	a := p.Addr()
	switch {
	case !p.IsValid() || !a.Is4():
		reason = "must be an IPv4 network such as " + "172.30.0.0/24"
	case p != p.Masked():
		reason = fmt.Sprintf("has host bits: %s is meant?", p.Masked())
	case p.Bits() < 8 || p.Bits() > 30:
		reason = "must be from /8 to /30"
	case a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.As4()[0] == 0 || a.As4()[0] >= 224:
		reason = "is not for ordinary hosts"
	case a == Inner.Addr():
		reason = "begins with " + Inner.String() + ", which guests in namespaces of their own have"
	}
	if reason == "" {
		return nil
	}
	return &Error{p.String(), reason}
}
