package wireguard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/rtnl"
)

// Egress leads what comes from a bridge to an interface and nowhere else, as an effect on the host.
// What WireGuard itself sends comes from no bridge, and goes by the host's own routes.
//
// When the interface goes, so does the route by it; what then stands in the table is that nothing
// can be reached. The network's tables must besides drop what would leave another way, since for a
// moment no route may be there at all.
type Egress struct {
	Bridge    string `json:"bridge"`
	Interface string `json:"interface"`
	Table     int    `json:"table"` // of routes, drawn for it
	// Local are the bridge's own subnets: what a guest has published leads others there.
	Local []netip.Prefix `json:"local,omitempty"`
}

const (
	// rulePriority is before those of the main table and of most others.
	rulePriority = 5210
	// routeProtocol marks our routes: it is nobody's in rtnetlink.h or iproute2's tables.
	routeProtocol = 0x53
	// lastMetric is what no other route is behind.
	lastMetric = 1<<32 - 2
)

func (e *Egress) routes(index int) (all []*netlink.Route) {
	for _, zero := range []*net.IPNet{
		{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
		{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
	} {
		all = append(all,
			&netlink.Route{Dst: zero, Table: e.Table, Protocol: routeProtocol, Type: unix.RTN_UNREACHABLE, Priority: lastMetric},
			&netlink.Route{
				Dst: zero, Table: e.Table, Protocol: routeProtocol, LinkIndex: index, Priority: 1,
				Scope: netlink.SCOPE_LINK,
			})
	}
	return all
}

func (e *Egress) rules() (all []*netlink.Rule) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		r := netlink.NewRule()
		r.Family, r.Priority, r.IifName, r.Table = family, rulePriority, e.Bridge, e.Table
		// What answers somebody who came to a published port goes where he is.
		answer := netlink.NewRule()
		answer.Family, answer.Priority, answer.IifName, answer.Mark, answer.Table = family, rulePriority-1, e.Bridge,
			filter.AnswerMark, unix.RT_TABLE_MAIN
		all = append(all, r, answer)
	}
	for _, p := range e.Local {
		r := netlink.NewRule()
		r.Family, r.Priority, r.IifName, r.Table = netlink.FAMILY_V6, rulePriority-1, e.Bridge, unix.RT_TABLE_MAIN
		if p.Addr().Is4() {
			r.Family = netlink.FAMILY_V4
		}
		r.Dst = &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
		all = append(all, r)
	}
	return all
}

// Apply makes the routes, then the rules that lead to them.
func (e *Egress) Apply(context.Context) error {
	link, err := netlink.LinkByName(e.Interface)
	if err != nil {
		return fmt.Errorf("find WireGuard interface %s: %w", e.Interface, err)
	}
	for _, r := range e.routes(link.Attrs().Index) {
		if err := netlink.RouteReplace(r); err != nil && !(r.Dst.IP.To4() == nil && rtnl.NoIPv6(err)) {
			return fmt.Errorf("make route by %s: %w", e.Interface, err)
		}
	}
	for _, r := range e.rules() {
		if err := netlink.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) &&
			!(r.Family == netlink.FAMILY_V6 && rtnl.NoIPv6(err)) {
			return fmt.Errorf("make rule for %s: %w", e.Bridge, err)
		}
	}
	return nil
}

// Revert removes them.
func (e *Egress) Revert(context.Context) error {
	gone := func(err error) bool {
		return err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || rtnl.NoIPv6(err)
	}
	for _, r := range e.rules() {
		if err := netlink.RuleDel(r); !gone(err) {
			return fmt.Errorf("remove rule for %s: %w", e.Bridge, err)
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: e.Table, Protocol: routeProtocol},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			if err := netlink.RouteDel(&r); !gone(err) {
				return fmt.Errorf("remove route by %s: %w", e.Interface, err)
			}
		}
	}
	return nil
}

// There says whether what comes from the bridge goes to the interface: systemd-networkd, when it
// starts, removes rules that are not its own.
func (e *Egress) There(context.Context) (bool, error) {
	link, err := netlink.LinkByName(e.Interface)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return true, nil // nothing can be done about it, and nothing leaves
	}
	if err != nil {
		return false, err
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4,
		&netlink.Route{Table: e.Table, LinkIndex: link.Attrs().Index}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF)
	if err != nil || len(routes) == 0 {
		return link.Attrs().Flags&net.FlagUp == 0, err // an interface that is down has no routes
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		is, err := rtnl.Whole(func() ([]netlink.Rule, error) { return netlink.RuleList(family) })
		if err != nil && family == netlink.FAMILY_V6 && rtnl.NoIPv6(err) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("list rules for %s: %w", e.Bridge, err)
		}
		for _, want := range e.rules() {
			if want.Family == family && !slices.ContainsFunc(is, func(r netlink.Rule) bool { return sameRule(&r, want) }) {
				return false, nil
			}
		}
	}
	return true, nil
}

func sameRule(a, b *netlink.Rule) bool {
	to := func(r *netlink.Rule) string {
		if r.Dst == nil {
			return ""
		}
		return r.Dst.String()
	}
	return a.Priority == b.Priority && a.IifName == b.IifName && a.Table == b.Table && a.Mark == b.Mark && to(a) == to(b)
}
