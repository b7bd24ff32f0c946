package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/rtnl"
)

// Guest is an interface's part in its network, as an effect on the host: at which port of the bridge it is found, and its part in the
// network's tables. The bridge and the host learn nothing of a guest from what it sends.
type Guest struct{ filter.Guest }

// Apply adds it. Returns an error that is fs.ErrNotExist where the tables are gone.
func (g *Guest) Apply(ctx context.Context) error {
	port, err := netlink.LinkByName(g.Tap)
	if err != nil {
		return fmt.Errorf("find port %s of bridge %s: %w", g.Tap, g.Bridge(), err)
	}
	bridge, err := netlink.LinkByName(g.Bridge())
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", g.Bridge(), err)
	}
	entries, err := g.entries(port, bridge)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := netlink.NeighSet(e); err != nil && !without(e, err) {
			return fmt.Errorf("add guest %s to bridge %s: %w", g.Tap, g.Bridge(), err)
		}
	}
	return g.Guest.Apply(ctx)
}

// entries are at which port a bridge has the guest's MAC, and where the host has its addresses. Either link may be nil.
func (g *Guest) entries(port, bridge netlink.Link) (all []*netlink.Neigh, err error) {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return nil, err
	}
	if port != nil {
		all = append(all, &netlink.Neigh{
			LinkIndex: port.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER, HardwareAddr: mac,
		})
	}
	for _, a := range []netip.Addr{g.IP4, g.IP6} {
		if a.IsValid() && bridge != nil {
			family := map[bool]int{true: unix.AF_INET, false: unix.AF_INET6}[a.Is4()]
			all = append(all, &netlink.Neigh{
				LinkIndex: bridge.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac,
			})
		}
	}
	return all, nil
}

// without says whether there is no such entry as the interface has no IPv6, which is an invalid argument here.
func without(e *netlink.Neigh, err error) bool {
	return e.Family == unix.AF_INET6 && (rtnl.NoIPv6(err) || errors.Is(err, unix.EINVAL))
}

// Revert takes it out, with others whose turn it is too.
func (g *Guest) Revert(ctx context.Context) error {
	if r := sharedOf(ctx).Reaper; r != nil {
		return r.guests.do(g, removeGuests)
	}
	return removeGuests([]*Guest{g})
}

func removeGuests(guests []*Guest) error {
	var errs []error
	parts := make([]*filter.Guest, len(guests))
	for i, g := range guests {
		parts[i] = &g.Guest
		errs = append(errs, g.removeEntries())
	}
	return errors.Join(append(errs, filter.Remove(parts))...)
}

func (g *Guest) removeEntries() error {
	var links [2]netlink.Link
	for i, name := range []string{g.Tap, g.Bridge()} {
		var missing netlink.LinkNotFoundError
		l, err := netlink.LinkByName(name)
		if err != nil && !errors.As(err, &missing) {
			return fmt.Errorf("find interface %s: %w", name, err)
		}
		if err == nil {
			links[i] = l
		}
	}
	if port, bridge := links[0], links[1]; port != nil && (bridge == nil || port.Attrs().MasterIndex != bridge.Attrs().Index) {
		links[0] = nil // what a bridge knows of a port goes when it is none any more
	}
	entries, err := g.entries(links[0], links[1])
	errs := []error{err}
	for _, e := range entries {
		if err := netlink.NeighDel(e); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) && !without(e, err) {
			errs = append(errs, fmt.Errorf("remove guest %s from bridge %s: %w", g.Tap, g.Bridge(), err))
		}
	}
	return errors.Join(errs...)
}
