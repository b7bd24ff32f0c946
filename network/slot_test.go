package network_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/netns"
	"push.rocks/smartvm/network/policy"
)

// plugSlot puts a cable in the place of a slot's tap, whose other end is the guest's.
func plugSlot(t *testing.T, slot *network.Slot) *nettest.Namespace {
	t.Helper()
	inside, err := netns.Open(slot.File)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inside.Close() })
	mac, err := net.ParseMAC(network.InnerMAC)
	if err != nil {
		t.Fatal(err)
	}
	guest := nettest.New(t)
	err = inside.Do(func() error {
		tap, err := netlink.LinkByName(network.InnerTap)
		if err != nil {
			return err
		}
		if err := netlink.LinkDel(tap); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = network.InnerTap
		cable := &netlink.Veth{
			LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: mac,
			PeerNamespace: netlink.NsFd(guest.Fd()),
		}
		if err := netlink.LinkAdd(cable); err != nil {
			return err
		}
		gateways := nettest.Link{Name: network.InnerTap}
		for i, g := range network.InnerGateways {
			gateways.Addresses = append(gateways.Addresses, netip.PrefixFrom(g, network.InnerGuest[i].Bits()))
		}
		return gateways.Configure()
	})
	if err != nil {
		t.Fatal(err)
	}
	guest.Must(nettest.Link{Name: "eth0", Addresses: network.InnerGuest, Gateways: network.InnerGateways}.Configure)
	return guest
}

// A guest in a namespace is on the network as any other is, under the namespace's address; a warm
// slot forgets it.
func TestSlot(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	if err := nettest.Serve(t, ":22", "host"); err != nil {
		t.Fatal(err)
	}
	ip4, ip6 := s.config.Guest(0)
	gateway4, gateway6 := s.config.Gateway()
	slot := &network.Slot{
		Name: network.TapName(s.config.Bridge, "a", "", ""), File: filepath.Join(t.TempDir(), "netns"),
		Bridge: s.config.Bridge,
		MAC:    network.MAC("a", "").String(), IP4: netip.PrefixFrom(ip4, 24), IP6: netip.PrefixFrom(ip6, 64),
		Gateway: []netip.Addr{gateway4, gateway6},
	}
	use := s.use("a")
	part := &network.Guest{Guest: filter.Guest{
		Table: s.config.Table(), Tap: slot.Name, MAC: slot.MAC, IP4: ip4, IP6: ip6,
		Ports: []filter.Port{{Host: 8080, Guest: 80, Protocol: "tcp"}},
		Policy: &policy.Policy{
			Rules: []policy.Rule{{Action: policy.Deny, Destination: world4, Ports: policy.Ports{{First: 443, Last: 443}}}},
		},
	}}
	for _, apply := range []func() error{
		func() error {
			return use.Apply(t.Context())
		}, func() error { return slot.Apply(t.Context()) }, func() error { return part.Apply(t.Context()) },
	} {
		if err := apply(); err != nil {
			t.Fatal(err)
		}
	}
	g := &guest{Namespace: plugSlot(t, slot)}
	g.Serve(":80", "guest")
	s.outside.Serve(":443", "secure")
	// The guest reaches it, were it not for the rules: see the end.
	within, err := netns.Open(slot.File)
	if err == nil {
		err = within.Do(func() error { return nettest.Serve(t, ":22", "namespace") })
	}
	if err != nil {
		t.Fatal(err)
	}
	defer within.Close()
	for _, proto := range []string{"tcp", "udp"} {
		g.reaches(t, proto, world4+":80", "world from "+uplink4+"\n")
		g.reaches(t, proto, "["+world6+"]:80", "world from "+uplink6+"\n")
		for _, address := range []string{
			world4 + ":443", "172.30.0.1:22", uplink4 + ":22", "10.255.255.1:22",
			"[" + uplink6 + "]:22",
		} {
			g.misses(t, proto, address)
		}
	}
	if got := s.outside.Ask("tcp", uplink4+":8080"); got != "guest from "+world4+"\n" {
		t.Errorf("the published port: got %q", got)
	}
	if got := s.outside.Ask("tcp", "["+uplink6+"]:8080"); got != "guest from "+world6+"\n" {
		t.Errorf("the published port by IPv6: got %q", got)
	}
	// Another address than the guest's goes nowhere.
	g.Must(nettest.Link{Name: "eth0", Addresses: prefixes("10.9.9.9/32")}.Configure)
	g.Must(func() error {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("10.9.9.9")}, Timeout: 300 * time.Millisecond}
		if c, err := d.Dial("tcp", world4+":80"); err == nil {

			t.Error("a guest was heard from another address than its own")
			return c.Close()
		}
		return nil
	})
	warm := *slot
	warm.Warm = true
	connections := func() (n int) {
		inside, err := netns.Open(slot.File)
		if err != nil {
			t.Fatal(err)
		}
		defer inside.Close()
		err = inside.Do(func() error {
			for _, family := range []netlink.InetFamily{netlink.FAMILY_V4, netlink.FAMILY_V6} {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
				if err != nil {
					return err
				}
				n += len(flows)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if connections() == 0 {
		t.Error("the namespace knows no connections")
	}
	if err := warm.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := connections(); n > 0 {
		t.Errorf("the next guest finds %d connections", n)
	}
	err = within.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		conn.FlushRuleset()
		return conn.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", "10.255.255.1:22", "namespace from 10.255.255.2\n")
	if err := errors.Join(part.Revert(t.Context()), slot.Revert(t.Context()), use.Revert(t.Context())); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(slot.File); !os.IsNotExist(err) {
		t.Errorf("the namespace's file: %v", err)
	}
	if err := warm.Revert(t.Context()); err != nil {
		t.Errorf("of a slot that is gone: %v", err)
	}
}

// Of a warm slot what others have sent does not count.
func TestTraffic(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	addBridge(t, "br")
	slot := &network.Slot{
		Name: "svslot", File: filepath.Join(t.TempDir(), "netns"), Bridge: "br",
		MAC: "02:00:00:00:00:02", IP4: netip.MustParsePrefix("172.30.0.2/24"),
	}
	if err := slot.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	inside, err := netns.Open(slot.File)
	if err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	send := func() {
		t.Helper()
		err := inside.Do(func() error {
			neighbour, err := net.ParseMAC("02:00:00:00:00:09")
			if err != nil {
				return err
			}
			link, err := netlink.LinkByName("uplink")
			if err != nil {
				return err
			}
			err = netlink.NeighSet(
				&netlink.Neigh{
					LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP("172.30.0.9"),
					HardwareAddr: neighbour,
				})
			if err != nil {
				return err
			}
			c, err := net.Dial("udp", "172.30.0.9:9")
			if err != nil {
				return err
			}
			_, err = c.Write(make([]byte, 1000))
			return errors.Join(err, c.Close())
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	sent := func(file string) uint64 {
		t.Helper()
		sent, _, err := network.Traffic(slot.Name, file)
		if err != nil {
			t.Fatal(err)
		}
		return sent
	}
	// What is sent while the kernel still brings a new link up is dropped.
	for deadline := time.Now().Add(10 * time.Second); sent("") == 0 &&
		time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		send()
	}
	before := sent("")
	warm := *slot
	warm.Warm = true
	if err := warm.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	send()
	if got := sent(slot.File); before == 0 || got == 0 || got > sent("")-before {
		t.Errorf("sent %d, after %d by others: want no more than %d", got, before, sent("")-before)
	}
	if err := slot.Revert(t.Context()); err != nil {
		t.Error(err)
	}
}
