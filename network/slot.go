package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/conntrack"
	"push.rocks/smartvm/network/netns"
	"push.rocks/smartvm/network/rtnl"
	"push.rocks/smartvm/network/subnet"
)

// What is in every namespace of a VM's own: the same for all, so that a snapshot's clones find what
// they knew.
const (
	InnerTap    = "tap0"
	InnerMAC    = "06:00:0a:ff:ff:02"
	innerUplink = "uplink"
)

// The two ends of the cable between a guest and its namespace.
var (
	InnerGuest = []netip.Prefix{
		netip.PrefixFrom(subnet.Inner.Addr().Next().Next(), subnet.Inner.Bits()),
		netip.MustParsePrefix("fd00:ff:ff::2/64"),
	}
	InnerGateways = []netip.Addr{subnet.Inner.Addr().Next(), netip.MustParseAddr("fd00:ff:ff::1")}
)

// Slot is a namespace with a tap for one VM, joined to a bridge by a cable whose end there stands
// for the tap, as an effect on the host. The guest's addresses in it are InnerGuest; those of the
// cable's far end are what the network knows. The tap is for whoever is in the namespace: that is
// its VMM alone, and to change a tap's owner takes 15 ms.
//
// A warm slot was made before and stays: only what one VM left in it is undone.
type Slot struct {
	Name    string       `json:"name"` // of the cable's end at the bridge, of TapName
	File    string       `json:"file"` // the namespace's, absolute
	Bridge  string       `json:"bridge"`
	MAC     string       `json:"mac"` // of the cable's far end
	IP4     netip.Prefix `json:"ip4"`
	IP6     netip.Prefix `json:"ip6,omitzero"`
	Gateway []netip.Addr `json:"gateway"`
	MTU     int          `json:"mtu,omitempty"`
	Mutual  bool         `json:"mutual,omitempty"`
	Warm    bool         `json:"warm,omitempty"`
}

// Port is the cable's end at the bridge.
func (s *Slot) Port() *Tap { return &Tap{Name: s.Name, Bridge: s.Bridge, MTU: s.MTU, Mutual: s.Mutual} }

// Apply makes the namespace and what is in it; of a warm one it notes what has gone through it
// before. Returns an error that is fs.ErrExist where its file or an interface of its name is there.
func (s *Slot) Apply(ctx context.Context) error {
	if s.Warm {
		return s.note()
	}
	ns, err := netns.New()
	if err != nil {
		return err
	}
	defer ns.Close()
	mac, err := net.ParseMAC(s.MAC)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = s.Name, s.MTU
	cable := &netlink.Veth{
		LinkAttrs: attrs, PeerName: innerUplink, PeerHardwareAddr: mac,
		PeerNamespace: netlink.NsFd(ns.Fd()),
	}
	if err := netlink.LinkAdd(cable); errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make cable %s: %w", s.Name, fs.ErrExist)
	} else if err != nil {
		return fmt.Errorf("make cable %s: %w", s.Name, err)
	}
	if err := ns.Keep(s.File); err != nil {
		return errors.Join(err, s.cut()) // nothing is done where the file was there
	}
	if err := ns.Do(func() error { return s.furnish(ctx) }); err != nil {
		return fmt.Errorf("make namespace %s: %w", s.File, err)
	}
	return s.Port().Join()
}

// furnish makes what is in the namespace, on a thread that is there.
func (s *Slot) furnish(ctx context.Context) error {
	tap := &Tap{Name: InnerTap, UID: anybody}
	if err := tap.create(); err != nil {
		return fmt.Errorf("make tap: %w", err)
	}
	for _, v := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+v, []byte("1"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forward: %w", err)
		}
	}
	uplink := []netip.Prefix{s.IP4}
	if s.IP6.IsValid() {
		uplink = append(uplink, s.IP6)
	}
	for name, addresses := range map[string][]netip.Prefix{
		innerUplink: uplink,
		InnerTap: {
			netip.PrefixFrom(InnerGateways[0], InnerGuest[0].Bits()),
			netip.PrefixFrom(InnerGateways[1], InnerGuest[1].Bits()),
		},
	} {
		if err := rtnl.SetVariable(name, "ipv6", "accept_ra", "0"); err != nil {
			return err
		}
		link, err := netlink.LinkByName(name)
		if err == nil && s.MTU != 0 {
			err = netlink.LinkSetMTU(link, s.MTU)
		}
		if err == nil {
			err = rtnl.AddAddresses(link, addresses)
		}
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err != nil {
			return fmt.Errorf("set up %s: %w", name, err)
		}
	}
	inner := &netns.Inner{
		Tap: InnerTap, Uplink: innerUplink, Inside4: InnerGuest[0].Addr(), Inside6: InnerGuest[1].Addr(),
		IP4: s.IP4.Addr(), IP6: s.IP6.Addr(),
	}
	if err := inner.Apply(ctx); err != nil {
		return err
	}
	link, err := netlink.LinkByName(innerUplink)
	if err != nil {
		return err
	}
	for _, g := range s.Gateway {
		err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: g.AsSlice()})
		if err != nil && !(g.Is6() && rtnl.NoIPv6(err)) {
			return fmt.Errorf("route by %s: %w", g, err)
		}
	}
	return nil
}

// note notes what has gone through the cable.
func (s *Slot) note() error {
	sent, received, err := counters(s.Name)
	if err == nil {
		err = os.WriteFile(s.File+beforeSuffix, fmt.Appendln(nil, sent, received), 0o600)
	}
	if err != nil {
		return fmt.Errorf("take warm slot: %w", err)
	}
	return nil
}

// beforeSuffix is added to a slot's file: what had gone through it when a VM got it.
const beforeSuffix = ".before"

// counters are an interface's.
func counters(name string) (in, out uint64, err error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return 0, 0, err
	}
	if s := link.Attrs().Statistics; s != nil {
		in, out = s.RxBytes, s.TxBytes
	}
	return in, out, nil
}

// Traffic returns how many bytes the guest of a tap, or of a slot's cable, has sent and received.
// File is that of a warm slot, or "".
func Traffic(name, file string) (sent, received uint64, err error) {
	if sent, received, err = counters(name); err != nil || file == "" {
		return sent, received, err
	}
	data, err := os.ReadFile(file + beforeSuffix)
	if err != nil {
		return 0, 0, err
	}
	var s, r uint64
	if _, err := fmt.Sscan(string(data), &s, &r); err != nil {
		return 0, 0, fmt.Errorf("read %s: %w", file+beforeSuffix, err)
	}
	return sent - min(s, sent), received - min(r, received), nil
}

// Revert removes the namespace; of a warm one, what one VM left behind: connections, and who its
// neighbours were.
func (s *Slot) Revert(context.Context) error {
	if !s.Warm {
		return errors.Join(s.cut(), netns.Drop(s.File))
	}
	ns, err := netns.Open(s.File)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the slot is gone
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	err = ns.Do(func() error {
		if err := conntrack.ForgetAll(); err != nil {
			return err
		}
		link, err := netlink.LinkByName(InnerTap)
		if err != nil {
			return err
		}
		neighbours, err := rtnl.Whole(func() ([]netlink.Neigh, error) {
			return netlink.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
		})
		if err != nil {
			return err
		}
		for _, n := range neighbours {
			if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("reset namespace %s: %w", s.File, err)
	}
	return nil
}

// cut removes the cable, both ends.
func (s *Slot) cut() error {
	return rtnl.Remove(s.Name, func(l netlink.Link) bool { return l.Type() == "veth" })
}
