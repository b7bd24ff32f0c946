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

// Guest is an interface's part in its network, as an effect on the host: at which port of the
// bridge it is found, and its part in the network's tables. The bridge and the host learn nothing
// of a guest from what it sends.
type Guest struct{ filter.Guest }

// Apply adds it. Returns an error that is fs.ErrNotExist where the tables are gone.
func (g *Guest) Apply(ctx context.Context) error {
	if err := g.enter(); err != nil {
		return err
	}
	return errors.Join(g.Loopback(), g.Guest.Apply(ctx))
}

// Repair adds what somebody has removed of it, and puts right what is another, and says whether the
// tables had to be changed. An entry that is as it shall be is not touched by making it again.
func (g *Guest) Repair(ctx context.Context) (done bool, err error) {
	if err = errors.Join(g.enter(), g.Loopback()); err != nil {
		return false, err
	}
	return g.Guest.Repair(ctx)
}

func (g *Guest) enter() error {
	err := g.eachEntry(func(h *netlink.Handle, e *netlink.Neigh) error {
		if e.LinkIndex == 0 {
			return errors.New("its port or the bridge is gone")
		}
		return h.NeighSet(e)
	})
	if err != nil {
		return fmt.Errorf("add guest %s to bridge %s: %w", g.Tap, g.Bridge(), err)
	}
	return nil
}

// Replace puts what the guest is now in place of what it was: see filter.Guest.
func (g *Guest) Replace(ctx context.Context) error {
	return errors.Join(g.Loopback(), g.Guest.Replace(ctx))
}

// Loopback has ports that are published be reached by 127.0.0.1. What comes from a guest for such
// an address is dropped by the tables.
func (g *Guest) Loopback() error {
	if len(g.Ports) == 0 {
		return nil
	}
	if err := rtnl.SetVariable(g.Bridge(), "ipv4", "route_localnet", "1"); err != nil {
		return fmt.Errorf("publish ports on the loopback: %w", err)
	}
	return nil
}

// eachEntry calls f for what says at which port the bridge has the guest's MAC, and where the host
// has its addresses. The index of an interface that is gone is 0.
func (g *Guest) eachEntry(f func(*netlink.Handle, *netlink.Neigh) error) error {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return err
	}
	port, err := rtnl.Index(g.Tap)
	if err != nil {
		return err
	}
	bridge, err := rtnl.Index(g.Bridge())
	if err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	entries := []*netlink.Neigh{
		{
			LinkIndex: port, Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER | rtnl.Sticky,
			HardwareAddr: mac,
		},
	}
	for _, a := range []netip.Addr{g.IP4, g.IP6} {
		if a.IsValid() {
			family := map[bool]int{true: unix.AF_INET, false: unix.AF_INET6}[a.Is4()]
			entries = append(entries,
				&netlink.Neigh{LinkIndex: bridge, Family: family, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac})
			if g.Routed && a.Is6() {
				entries = append(entries,
					&netlink.Neigh{LinkIndex: bridge, Family: family, Flags: netlink.NTF_PROXY, IP: a.AsSlice()})
			}
		}
	}
	var errs []error
	for _, e := range entries {
		if err := f(h, e); err != nil && !without(e, err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// without says whether there is no such entry as the interface has no IPv6, which is an invalid
// argument here.
func without(e *netlink.Neigh, err error) bool {
	return e.Family == unix.AF_INET6 && (rtnl.NoIPv6(err) || errors.Is(err, unix.EINVAL))
}

// Revert takes it out, with others whose turn it is too.
func (g *Guest) Revert(ctx context.Context) error {
	if r := sharedOf(ctx).Reaper; r != nil {
		return r.guests.Do(g, removeGuests)
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
	err := g.eachEntry(func(h *netlink.Handle, e *netlink.Neigh) error {
		if e.LinkIndex == 0 {
			return nil
		}
		err := h.NeighDel(e)
		// What a bridge knows of a port goes when it is none any more.
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || e.Family == unix.AF_BRIDGE &&
			errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("remove guest %s from bridge %s: %w", g.Tap, g.Bridge(), err)
	}
	return nil
}
