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
	entries, err := g.entries()
	if err != nil {
		return err
	}
	for _, e := range entries {
		// That an interface has no IPv6 is an invalid argument here.
		if err := netlink.NeighSet(e); err != nil && !(e.Family == unix.AF_INET6 && (rtnl.NoIPv6(err) || errors.Is(err, unix.EINVAL))) {
			return fmt.Errorf("add guest %s to bridge %s: %w", g.Tap, g.Bridge(), err)
		}
	}
	return g.Guest.Apply(ctx)
}

// entries are where the bridge has the guest's MAC, and the host its addresses. They are empty where the bridge or its port is gone.
func (g *Guest) entries() ([]*netlink.Neigh, error) {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return nil, err
	}
	port, err := netlink.LinkByName(g.Tap)
	if err != nil {
		return nil, fmt.Errorf("find port %s of bridge %s: %w", g.Tap, g.Bridge(), err)
	}
	bridge, err := netlink.LinkByName(g.Bridge())
	if err != nil {
		return nil, fmt.Errorf("find bridge %s: %w", g.Bridge(), err)
	}
	all := []*netlink.Neigh{{
		LinkIndex: port.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER, HardwareAddr: mac,
	}}
	for _, a := range []netip.Addr{g.IP4, g.IP6} {
		if a.IsValid() {
			family := map[bool]int{true: unix.AF_INET, false: unix.AF_INET6}[a.Is4()]
			all = append(all, &netlink.Neigh{
				LinkIndex: bridge.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac,
			})
		}
	}
	return all, nil
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
		entries, err := g.entries()
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			continue // gone with its port or bridge
		}
		errs = append(errs, err)
		for _, e := range entries {
			if err := netlink.NeighDel(e); err != nil && !errors.Is(err, unix.ENOENT) && !(e.Family == unix.AF_INET6 && (rtnl.NoIPv6(err) || errors.Is(err, unix.EINVAL))) {
				errs = append(errs, fmt.Errorf("remove guest %s from bridge %s: %w", g.Tap, g.Bridge(), err))
			}
		}
	}
	return errors.Join(append(errs, filter.Remove(parts))...)
}
