package network

import (
	"context"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/rtnl"
)

// Bridge is a network's bridge, as an effect on the host. Its MAC tells it from another of its
// name.
type Bridge struct {
	Name      string         `json:"name"`
	MAC       string         `json:"mac"`
	MTU       int            `json:"mtu,omitempty"`
	Addresses []netip.Prefix `json:"addresses"`
	Routed    bool           `json:"routed,omitempty"` // the host answers one guest for the others
}

// bridgeMAC draws a bridge's MAC from a random word.
func bridgeMAC(owner string) string { return MAC("bridge", owner).String() }

// Apply makes the bridge, and has done nothing where an interface of its name is there: then the
// error is fs.ErrExist and ErrTaken.
func (b *Bridge) Apply(context.Context) error {
	mac, err := net.ParseMAC(b.MAC)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.MTU, attrs.Group = b.Name, mac, b.MTU, filter.Group
	off := false
	link := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &off}
	switch err := netlink.LinkAdd(link); {
	case errors.Is(err, unix.EEXIST):
		return hint.Add(fmt.Errorf("make bridge %s: %w: %w", b.Name, ErrTaken, fs.ErrExist),
			"remove it (ip link delete %s), or name another bridge with --bridge", b.Name)
	case err != nil:
		return fmt.Errorf("make bridge %s: %w", b.Name, err)
	}
	_, err = b.configure(link)
	return err
}

// configure makes the bridge what it shall be, whatever of that it is already. It says whether the
// kernel had forgotten what guests' entries told it, as it does when a bridge goes down, or loses
// its last IPv4 address.
func (b *Bridge) configure(link netlink.Link) (forgotten bool, err error) {
	variables := [][3]string{
		// A router that a guest claims to be is not for the host.
		{"ipv6", "accept_ra", "0"},
		// Guests are not told which addresses the host has elsewhere.
		{"ipv4", "arp_ignore", "1"},
		// A packet that says itself by which addresses it goes would go on where rules have not seen that
		// it does. It has an effect only where the host accepts such everywhere.
		{"ipv4", "accept_source_route", "0"},
	}
	if b.Routed {
		variables = append(variables, [][3]string{
			{"ipv4", "proxy_arp_pvlan", "1"}, {"ipv6", "proxy_ndp", "1"}, // for IPv6, of those that Guest names
			{"ipv4", "proxy_delay", "0"}, {"ipv6", "proxy_delay", "0"},
		}...)
	}
	for _, v := range variables {
		if err := rtnl.SetVariable(b.Name, v[0], v[1], v[2]); err != nil {
			return false, fmt.Errorf("set up bridge %s: %w", b.Name, err)
		}
	}
	if now := link.Attrs().MTU; b.MTU != 0 && now != 0 && now != b.MTU {
		if err := netlink.LinkSetMTU(link, b.MTU); err != nil {
			return false, fmt.Errorf("set MTU of bridge %s: %w", b.Name, err)
		}
	}
	has, err := rtnl.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return false, fmt.Errorf("list addresses of bridge %s: %w", b.Name, err)
	}
	missing := slices.DeleteFunc(slices.Clone(b.Addresses), func(p netip.Prefix) bool {
		return slices.ContainsFunc(has, func(a netlink.Addr) bool { return a.IP.Equal(p.Addr().AsSlice()) })
	})
	if err := rtnl.AddAddresses(link, missing); err != nil {
		return false, fmt.Errorf("give bridge %s its %w", b.Name, err)
	}
	down := link.Attrs().Flags&net.FlagUp == 0
	if down {
		if err := netlink.LinkSetUp(link); err != nil {
			return false, fmt.Errorf("set bridge %s up: %w", b.Name, err)
		}
	}
	return down || slices.ContainsFunc(missing, func(p netip.Prefix) bool { return p.Addr().Is4() }), nil
}

// Revert removes the bridge.
func (b *Bridge) Revert(context.Context) error {
	return rtnl.Remove(b.Name, func(l netlink.Link) bool {
		return l.Type() == "bridge" && l.Attrs().HardwareAddr.String() == b.MAC
	})
}

// There says whether the bridge is, and is this one.
func (b *Bridge) There(context.Context) (bool, error) {
	mac, err := rtnl.MAC(b.Name)
	if err != nil {
		return false, fmt.Errorf("find bridge %s: %w", b.Name, err)
	}
	return mac.String() == b.MAC, nil
}

// Repair makes a bridge that is there what it shall be again, with its ports. It says whether
// guests must add their entries again.
func (b *Bridge) Repair() (forgotten bool, err error) {
	l, err := netlink.LinkByName(b.Name)
	if err != nil {
		return false, fmt.Errorf("find bridge %s: %w", b.Name, err)
	}
	return b.configure(l)
}

// Tap is a guest's interface on the host, a port of a bridge, as an effect on the host.
type Tap struct {
	Name   string `json:"name"` // of TapName, so that nobody else has it
	Bridge string `json:"bridge"`
	UID    int    `json:"uid"`              // who may open it
	MTU    int    `json:"mtu,omitempty"`    // 0: 1500
	Mutual bool   `json:"mutual,omitempty"` // it reaches the bridge's other ports, not the host alone
	// LAN says that the bridge is somebody else's: the tap has that one's MTU, and reaches all of its
	// ports but, unless Mutual, those of other guests.
	LAN bool `json:"lan,omitempty"`
}

// TapName draws a name from a VM's id, a word that tells the VM from another of its id, and the
// interface's id. It begins as those of all taps of its bridge do, and no others.
func TapName(bridge, vm, nonce, iface string) string {
	return tapPrefix(bridge) + word(9, vm, nonce, iface)
}

func tapPrefix(bridge string) string { return "sv" + word(4, bridge) }

// word makes n characters of strings.
func word(n int, of ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(of, "\x00")))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:])[:n])
}

// Apply makes the tap. Returns an error that is fs.ErrExist where an interface of its name is
// there.
func (t *Tap) Apply(context.Context) error {
	if err := t.create(); err != nil {
		return fmt.Errorf("make tap %s: %w", t.Name, err)
	}
	return t.Join()
}

// Join makes the tap a port of its bridge, and sets it up.
func (t *Tap) Join() error {
	link, err := netlink.LinkByName(t.Name)
	if err != nil {
		return fmt.Errorf("find tap %s: %w", t.Name, err)
	}
	bridge, err := netlink.LinkByName(t.Bridge)
	if err != nil {
		return fmt.Errorf("join tap %s to bridge %s: %w", t.Name, t.Bridge, err)
	}
	// The host speaks to the guest by the bridge alone.
	if err := rtnl.SetVariable(t.Name, "ipv6", "disable_ipv6", "1"); err != nil {
		return err
	}
	mtu := t.MTU
	if t.LAN {
		// A bridge takes the lowest MTU of its ports for its own, and the lowest MAC.
		mtu = bridge.Attrs().MTU
		if err := netlink.LinkSetHardwareAddr(link, append(net.HardwareAddr{0xfe}, MAC(t.Name, "port")[1:]...)); err != nil {
			return fmt.Errorf("set MAC of tap %s: %w", t.Name, err)
		}
	}
	if mtu != 0 {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("set MTU of tap %s: %w", t.Name, err)
		}
	}
	// One that was taken from it is up, and must not be while it is a port like any other. One that is
	// its port still stays up: to set it down is to cut a guest's cable, and what is behind it would
	// ask for its gateway again, perhaps before the rules let it.
	if link.Attrs().Flags&net.FlagUp != 0 && link.Attrs().MasterIndex != bridge.Attrs().Index {
		if err := netlink.LinkSetDown(link); err != nil {
			return fmt.Errorf("set tap %s down: %w", t.Name, err)
		}
	}
	if err := netlink.LinkSetMaster(link, bridge); err != nil {
		return fmt.Errorf("join tap %s to bridge %s: %w", t.Name, t.Bridge, err)
	}
	if err := rtnl.SetPort(link.Attrs().Index, t.flags()); err != nil {
		return fmt.Errorf("join tap %s to bridge %s: %w", t.Name, t.Bridge, err)
	}
	// Without ARP of its own: what a bridge passes by (see filter), the host's protocols would answer.
	if err := rtnl.SetUpNoARP(link.Attrs().Index); err != nil {
		return fmt.Errorf("set tap %s up: %w", t.Name, err)
	}
	return nil
}

// Repair makes the tap again what Join makes it, where it is not, or in any case. It says whether
// the bridge knows nothing of it any more, as it was no port.
func (t *Tap) Repair(always bool) (again bool, err error) {
	link, err := netlink.LinkByName(t.Name)
	if err != nil {
		return false, fmt.Errorf("find tap %s: %w", t.Name, err)
	}
	bridge, err := netlink.LinkByName(t.Bridge)
	if err != nil {
		return false, fmt.Errorf("find bridge %s: %w", t.Bridge, err)
	}
	again = always || link.Attrs().MasterIndex != bridge.Attrs().Index
	if !again {
		is, err := rtnl.Port(link.Attrs().Index)
		if err != nil {
			return false, fmt.Errorf("look at tap %s: %w", t.Name, err)
		}
		const flags = unix.IFF_UP | unix.IFF_NOARP
		changed := link.Attrs().RawFlags&flags != flags || t.MTU != 0 && link.Attrs().MTU != t.MTU
		for flag, on := range t.flags() {
			now, told := is[flag] // an older kernel has not all of them
			changed = changed || told && (now != 0) != on
		}
		if !changed {
			return false, rtnl.SetVariable(t.Name, "ipv6", "disable_ipv6", "1")
		}
	}
	return again, t.Join()
}

// flags keep a port to the addresses that its guest's entries give it (see Guest): the bridge
// learns none from what the guest sends, and sends it nothing that is for others.
func (t *Tap) flags() map[int]bool {
	flags := map[int]bool{
		nl.IFLA_BRPORT_LEARNING:      false,
		nl.IFLA_BRPORT_UNICAST_FLOOD: false,
		// Guests of a mutual network, and of a LAN, find others by these.
		nl.IFLA_BRPORT_MCAST_FLOOD: t.Mutual || t.LAN,
		nl.IFLA_BRPORT_BCAST_FLOOD: t.Mutual || t.LAN,
		nl.IFLA_BRPORT_ISOLATED:    !t.Mutual,
		// The bridge answers nothing for others, and sends nothing back.
		nl.IFLA_BRPORT_NEIGH_SUPPRESS: false,
		nl.IFLA_BRPORT_PROXYARP:       false,
		nl.IFLA_BRPORT_MODE:           false,
		nl.IFLA_BRPORT_LOCKED:         false,
	}
	if t.LAN { // nor does the LAN take it for a router of multicast, and send it all there is
		flags[nl.IFLA_BRPORT_MULTICAST_ROUTER] = false
	}
	return flags
}

// create makes a tap that outlives the descriptor, and belongs to a user before it does: one
// without an owner is everybody's.
func (t *Tap) create() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return hint.Add(fmt.Errorf("open /dev/net/tun: %w", err), "load the kernel module tun, or run the VM with --net none")
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(t.Name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EINVAL) {
		if _, there := netlink.LinkByName(t.Name); there == nil {
			return fs.ErrExist
		}
		return err
	} else if err != nil {
		return err
	}
	set := []struct {
		request uint
		value   int
	}{{unix.TUNSETOWNER, t.UID}, {unix.TUNSETGROUP, t.UID}, {unix.TUNSETPERSIST, 1}}
	if t.UID == anybody {
		set = set[2:]
	}
	for _, s := range set {
		if err := unix.IoctlSetInt(fd, s.request, s.value); err != nil {
			return err
		}
	}
	return nil
}

// anybody who is in its namespace may open a tap.
const anybody = -1

// Revert removes the tap.
func (t *Tap) Revert(ctx context.Context) error {
	if r := sharedOf(ctx).Reaper; r != nil {
		return r.taps.Do(t.Name, removeTaps)
	}
	return rtnl.Remove(t.Name, isTap)
}
