package guestagent

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/guestagent/rtnl"
	"push.rocks/smartvm/internal/testenv/nettest"
)

func networkBoot() *guest.Boot {
	return &guest.Boot{
		Interfaces: []guest.Interface{{
			MAC: "06:00:ac:10:00:02", Name: "eth0", MTU: 1400,
			Addresses: []netip.Prefix{netip.MustParsePrefix("172.30.0.2/23"), netip.MustParsePrefix("fd00::2/64")},
			Gateways:  []netip.Addr{netip.MustParseAddr("172.30.0.1"), netip.MustParseAddr("fd00::1")},
		}},
	}
}

func TestSetInterface(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	mac, err := net.ParseMAC("06:00:ac:10:00:02")
	if err != nil {
		t.Fatal(err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = "veth7", mac
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName("peer")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(peer); err != nil {
		t.Fatal(err)
	}
	for range 2 { // twice is as once
		link, err := awaitLink(networkBoot().Interfaces[0].MAC)
		if err != nil {
			t.Fatal(err)
		}
		if err := rtnl.With(func(c rtnl.Conn) error {
			return setInterface(c, link, networkBoot().Interfaces[0])
		}); err != nil {
			t.Fatal(err)
		}
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	got := []string{fmt.Sprint("mtu ", link.Attrs().MTU), fmt.Sprint("up ", link.Attrs().Flags&net.FlagUp != 0)}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if !a.IP.IsLinkLocalUnicast() {
			got = append(got, fmt.Sprint(a.IPNet, " broadcast ", a.Broadcast, " flags ", a.Flags))
		}
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		if r.Gw != nil {
			got = append(got, fmt.Sprint(r.Dst, " by ", r.Gw))
		}
	}
	ra, err := os.ReadFile("/proc/sys/net/ipv6/conf/eth0/accept_ra")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, "accept_ra "+strings.TrimSpace(string(ra)))
	slices.Sort(got)
	want := []string{
		"0.0.0.0/0 by 172.30.0.1", "172.30.0.2/23 broadcast 172.30.1.255 flags 128", "::/0 by fd00::1", "accept_ra 0",
		"fd00::2/64 broadcast <nil> flags 130", "mtu 1400", "up true",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
