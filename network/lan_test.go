package network_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/rtnl"
)

// lan is a bridge that is not ours, with the host and another machine on it.
type lan struct {
	t       *testing.T
	dir     string
	config  network.Config
	machine *guest
}

const (
	peerHost, peerHost6       = "172.30.0.1", "2001:db8:5::1"
	peerMachine, peerMachine6 = "172.30.0.200", "2001:db8:5::200"
)

// newLAN makes br0, as configure has it.
func newLAN(t *testing.T, configure func(*netlink.Bridge)) *lan {
	t.Helper()
	l := &lan{t: t, dir: filepath.Join(t.TempDir(), store.NetworkDir), machine: &guest{Namespace: nettest.New(t)}}
	l.config = network.Config{
		Name: "lan", Bridge: "br0", Subnet: netip.MustParsePrefix("172.30.0.0/24"),
		LAN: &bridged.LAN{Gateway: netip.MustParseAddr(peerHost)},
	}
	l.make(configure)
	far := nettest.Link{
		Name: "eth0", Addresses: prefixes(peerMachine+"/24", peerMachine6+"/64"),
		Gateways: []netip.Addr{netip.MustParseAddr(peerHost)},
	}
	l.machine.Connect(nettest.Link{Name: "lan0"}, far)
	l.plug("lan0")
	return l
}

func (l *lan) make(configure func(*netlink.Bridge)) {
	l.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = l.config.Bridge
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if configure != nil {
		configure(bridge)
	}
	err := netlink.LinkAdd(bridge)
	if bridge.VlanFiltering != nil && errors.Is(err, unix.EOPNOTSUPP) {
		l.t.Log("this kernel's bridges tell no VLANs apart") // so none can be wrong
		bridge.VlanFiltering = nil
		err = netlink.LinkAdd(bridge)
	}
	if err == nil {
		err = nettest.Link{Name: l.config.Bridge, Addresses: prefixes(peerHost+"/24", peerHost6+"/64")}.Configure()
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lan) plug(port string) {
	l.t.Helper()
	link, err := netlink.LinkByName(port)
	if err != nil {
		l.t.Fatal(err)
	}
	bridge, err := netlink.LinkByName(l.config.Bridge)
	if err == nil {
		err = netlink.LinkSetMaster(link, bridge)
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// station is a guest on it.
type station struct {
	*guest
	ip6     netip.Addr // that it makes of its MAC
	effects []journal.Effect
	rules   *bridged.Guest
}

// guest connects the n-th. With an address of IP4 it may have no other.
func (l *lan) guest(n int, change func(*network.Tap, *bridged.Guest)) *station {
	l.t.Helper()
	name := string(rune('a' + n))
	vm := filepath.Join(l.t.TempDir(), name)
	if err := os.Mkdir(vm, 0o700); err != nil {
		l.t.Fatal(err)
	}
	ip4 := netip.AddrFrom4([4]byte{172, 30, 0, byte(n + 2)})
	tap := &network.Tap{Name: network.TapName("br0", name, l.dir, "eth0"), Bridge: "br0", LAN: true}
	s := &station{
		guest: &guest{Namespace: nettest.New(l.t), use: &network.Use{Dir: l.dir, Network: l.config, VM: name, VMDir: vm}},
	}
	s.rules = &bridged.Guest{Tap: tap.Name, Bridge: "br0", MAC: network.MAC(name, "eth0").String(), IP4: ip4}
	if change != nil {
		change(tap, s.rules)
	}
	s.effects = []journal.Effect{s.use, tap, s.rules}
	mac, err := net.ParseMAC(s.rules.MAC)
	if err != nil {
		l.t.Fatal(err)
	}
	ip6 := filter.LinkLocal(mac).As16()
	copy(ip6[:8], netip.MustParseAddr(peerHost6).AsSlice())
	s.ip6 = netip.AddrFrom16(ip6)
	if err := s.use.Apply(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
	s.Connect(nettest.Link{Name: tap.Name}, nettest.Link{Name: "eth0", MAC: mac})
	if err := errors.Join(tap.Join(), s.rules.Apply(l.t.Context())); err != nil {
		l.t.Fatal(err)
	}
	s.Must(nettest.Link{
		Name: "eth0", Addresses: []netip.Prefix{netip.PrefixFrom(ip4, 24), netip.PrefixFrom(s.ip6, 64)},
		Gateways: []netip.Addr{netip.MustParseAddr(peerHost)},
	}.Configure)
	return s
}

// remove undoes what guest did, the tap's cable included.
func (l *lan) remove(s *station) {
	l.t.Helper()
	ctx := l.t.Context()
	err := s.rules.Revert(ctx)
	if err == nil {
		err = rtnl.Remove(s.rules.Tap, func(netlink.Link) bool { return true })
	}
	if err = errors.Join(err, s.use.Revert(ctx)); err != nil {
		l.t.Error(err)
	}
}

// state is what a bridge is, with its ports, what it knows at them, and what else a guest might
// change of the host.
func (l *lan) state() (all []string) {
	l.t.Helper()
	bridge, err := netlink.LinkByName("br0")
	if err != nil {
		l.t.Fatal(err)
	}
	a := bridge.Attrs()
	all = append(hosts(l.t), fmt.Sprint(a.HardwareAddr, a.MTU, a.Flags, a.Group, a.Promisc))
	addresses, err := netlink.AddrList(bridge, netlink.FAMILY_ALL)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, a := range addresses {
		all = append(all, a.String())
	}
	for _, link := range allLinks(l.t) {
		if link.Attrs().MasterIndex == a.Index {
			all = append(all, "port "+link.Attrs().Name)
		}
	}
	known, err := netlink.NeighList(0, unix.AF_BRIDGE)
	if err != nil {
		l.t.Fatal(err)
	}
	for _, n := range known {
		// Groups that the host itself is in come and go with its own addresses.
		if n.State&netlink.NUD_PERMANENT != 0 && n.HardwareAddr[0]&1 == 0 {
			all = append(all, fmt.Sprint("entry ", n.LinkIndex, n.HardwareAddr, n.Vlan))
		}
	}
	settings, err := filepath.Glob("/sys/class/net/br0/bridge/*")
	if err != nil || len(settings) == 0 {
		l.t.Fatal("no settings of a bridge", err)
	}
	for _, path := range settings {
		data, err := os.ReadFile(path)
		if name := filepath.Base(path); err == nil && !strings.Contains(name, "timer") && name != "bridge" {
			all = append(all, name+" "+strings.TrimSpace(string(data)))
		}
	}
	for _, v := range []string{
		"ipv4/conf/br0/forwarding", "ipv4/conf/br0/route_localnet", "ipv4/conf/br0/arp_ignore",
		"ipv6/conf/br0/accept_ra",
	} {
		all = append(all, v+" "+variable(l.t, v))
	}
	slices.Sort(all)
	return all
}

// A guest on a bridge of somebody else's has an address of that LAN, and is reached there as any
// machine; the host is not, nor what is behind it.
func TestLAN_Reach(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	l := newLAN(t, nil)
	outside := nettest.New(t)
	outside.Connect(nettest.Link{Name: "uplink", Addresses: prefixes(uplink4 + "/24")},
		nettest.Link{Name: "eth0", Addresses: prefixes(world4 + "/24"), Gateways: []netip.Addr{netip.MustParseAddr(uplink4)}})
	setVariable(t, "ipv4/ip_forward", "1") // the host is a router
	outside.Serve(":80", "world")
	l.machine.Serve(":80", "machine")
	if err := nettest.Serve(t, ":80", "host"); err != nil {
		t.Fatal(err)
	}
	g, friend := l.guest(0, nil), l.guest(1, func(tap *network.Tap, g *bridged.Guest) { tap.Mutual, g.Host = true, true })
	third := l.guest(2, func(tap *network.Tap, _ *bridged.Guest) { tap.Mutual = true })
	alone := l.guest(3, nil)
	for name, s := range map[string]*station{"a": g, "b": friend, "c": third, "d": alone} {
		s.Serve(":80", name)
	}
	for _, on := range []bool{false, true} {
		nettest.BridgeNetfilter(t, on)
		for _, proto := range []string{"tcp", "udp"} {
			g.reaches(t, proto, peerMachine+":80", "machine from 172.30.0.2\n")
			g.reaches(t, proto, "["+peerMachine6+"]:80", "machine from "+g.ip6.String()+"\n")
			l.machine.reaches(t, proto, "172.30.0.2:80", "a from "+peerMachine+"\n")
			l.machine.reaches(t, proto, "["+g.ip6.String()+"]:80", "a from "+peerMachine6+"\n")
			// The host reaches the guest, the guest not the host, nor by way of it others: another machine
			// does.
			if got := nettest.Ask(proto, "172.30.0.2:80", 5*time.Second); got != "a from "+peerHost+"\n" {
				t.Errorf("%s: the host gets %q", proto, got)
			}
			for _, at := range []string{peerHost + ":80", "[" + peerHost6 + "]:80"} {
				g.misses(t, proto, at)
				if got := l.machine.Ask(proto, at); !strings.HasPrefix(got, "host from ") {
					t.Errorf("%s %s: the machine gets %q", proto, at, got)
				}
				if got := friend.Ask(proto, at); !strings.HasPrefix(got, "host from ") {
					t.Errorf("%s %s: the guest that may reach the host gets %q", proto, at, got)
				}
			}
			g.misses(t, proto, world4+":80")
			l.machine.reaches(t, proto, world4+":80", "world from "+peerMachine+"\n")
			friend.reaches(t, proto, world4+":80", "world from 172.30.0.3\n")
			// Guests reach each other where both may.
			friend.reaches(t, proto, "172.30.0.4:80", "c from 172.30.0.3\n")
			g.misses(t, proto, "172.30.0.5:80")
		}
	}
	// What the host sends to all, guests get; what they send to all, it does not.
	heard := listen(t, "0.0.0.0:9000")
	out, other := g.wire(t), l.machine.wire(t)
	if heard.heard("attack", "end", func() {
		out.send(frame(g.rules.MAC, unix.ETH_P_IP, datagram("172.30.0.2:1", "172.30.0.255:9000", "attack")))
		other.send(frame("02:00:00:00:00:11", unix.ETH_P_IP, datagram(peerMachine+":1", "172.30.0.255:9000", "end")))
	}) {
		t.Error("a guest reaches the host by a broadcast")
	}
}

// What a guest sends under another's MAC or address, or as a router, DHCP server or bridge, ends at
// its tap.
func TestLAN_Spoofing(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	rough(t)
	l := newLAN(t, func(b *netlink.Bridge) { b.MulticastSnooping = new(bool) })
	g := l.guest(0, nil)
	free := l.guest(1, func(_ *network.Tap, g *bridged.Guest) { g.IP4 = netip.Addr{} })
	machine := l.machine.wire(t)
	const otherMAC = "02:00:00:00:00:99"
	for who, s := range map[string]*station{"bound": g, "free": free} {
		mac, own4, own6 := s.rules.MAC, "172.30.0.2", s.ip6.String()
		out := s.wire(t)
		dhcp := func(client string) []byte {
			hw, _ := net.ParseMAC(client)
			b := udp4(own4, 68)
			b[23], b[25] = 67, 8+28+6+16
			b[3], b[10], b[11] = 20+8+28+6+16, 0, 0
			checksum4(b)
			return append(append(b, make([]byte, 28)...), hw...)
		}
		igmp := func(kind byte) []byte {
			b := udp4(own4, 0)[:20]
			b[9], b[10], b[11], b[3] = unix.IPPROTO_IGMP, 0, 0, 44
			checksum4(b)
			return append(b, kind, 0, 0, 0, 0, 0, 0, 0)
		}
		// An error about what one sent to another.
		error4 := func(kind byte, from, to string) []byte {
			b := packet4(unix.IPPROTO_ICMP, own4, peerMachine, nil, icmp4(kind, 3, [4]byte{}, datagram(from+":1", to+":2", "?")))
			b[3], b[10], b[11] = b[3]+16, 0, 0 // with the mark
			checksum4(b)
			return b
		}
		error6 := func(from, to string) []byte {
			about := slices.Concat([]byte{1, 4, 0, 0, 0, 0, 0, 0, 0x60, 0, 0, 0, 0, 8, 17, 64},
				netip.MustParseAddr(from).AsSlice(), netip.MustParseAddr(to).AsSlice())
			return packet6(own6, 58, append(about, 0, 1, 0, 2, 0, 8, 0, 0)...)
		}
		for _, tt := range []struct {
			name  string
			frame []byte
			want  bool
		}{
			// the other's address is not known
			{"error about own", frame(mac, unix.ETH_P_IP, error4(3, peerMachine, own4)), who == "bound"},
			{"error about oth", frame(mac, unix.ETH_P_IP, error4(3, peerHost, peerMachine)), false},
			{"redirect of oth", frame(mac, unix.ETH_P_IP, error4(5, peerHost, peerMachine)), false},
			{"expired of oth", frame(mac, unix.ETH_P_IP, error4(11, peerHost, peerMachine)), false},
			{"echo", frame(mac, unix.ETH_P_IP, error4(8, peerHost, peerMachine)), true},
			{"error6 own", frame(mac, unix.ETH_P_IPV6, error6(peerMachine6, own6)), true},
			{"error6 oth", frame(mac, unix.ETH_P_IPV6, error6(own6, peerMachine6)), false},
			{"error6 cut", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, 1, 4, 0, 0, 0, 0, 0, 0)), false},
			{"error6 hidden", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, error6(own6, peerMachine6)[40:], hopByHop)), false},
			{"arp", frame(mac, unix.ETH_P_ARP, arp(mac, own4, peerMachine)), true},
			{"arp probe", frame(mac, unix.ETH_P_ARP, arp(mac, "0.0.0.0", own4)), true},
			{"ip4", frame(mac, unix.ETH_P_IP, udp4(own4, 1000)), true},
			{"tcp", frame(mac, unix.ETH_P_IP, tcp4(own4)), true},
			{"dhcp client", frame(mac, unix.ETH_P_IP, dhcp(mac)), true},
			{"igmp report", frame(mac, unix.ETH_P_IP, igmp(0x16)), true},
			{"ip6", frame(mac, unix.ETH_P_IPV6, packet6(own6, 17, 0, 1, 0, 2, 0, 8, 0, 0)), true},
			{
				"ip6, another network",
				frame(mac, unix.ETH_P_IPV6,
					packet6(strings.Replace(own6, "2001:db8:5:", "fd00:5:5:", 1), 17, 0, 1, 0, 2, 0, 8, 0, 0)), true,
			},
			{"neighbour", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(136, own6)...)), true},
			{"router wanted", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(133, "::")...)), true},
			{"address check", frame(mac, unix.ETH_P_IPV6, packet6("::", 58, icmp6(135, own6)...)), true},
			{"group", frame(mac, unix.ETH_P_IPV6, extended("::", 58, icmp6(143, "::"), hopByHop)), true},
			{"fragment", frame(mac, unix.ETH_P_IPV6, extended(own6, 17, []byte{0, 1, 0, 2, 0, 99, 0, 0}, firstFragment)), true},
			{"fragment, later", frame(mac, unix.ETH_P_IPV6, extended(own6, 17, make([]byte, 32), laterFragment)), true},

			{"mac", frame(otherMAC, unix.ETH_P_IP, udp4(own4, 1000)), false},
			{"mac of the machine", frame("02:00:00:00:00:11", unix.ETH_P_IP, tcp4(own4)), false},
			{"dhcp server", frame(mac, unix.ETH_P_IP, udp4(own4, 67)), false},
			{"dhcp for another", frame(mac, unix.ETH_P_IP, dhcp(otherMAC)), false},
			{"igmp query", frame(mac, unix.ETH_P_IP, igmp(0x11)), false},
			{"arp with mac", frame(mac, unix.ETH_P_ARP, arp(otherMAC, own4, peerMachine)), false},
			{"other's ip6", frame(mac, unix.ETH_P_IPV6, packet6(peerMachine6, 17, 0, 1, 0, 2, 0, 8, 0, 0)), false},
			{"tcp6 of other", frame(mac, unix.ETH_P_IPV6, packet6(peerMachine6, unix.IPPROTO_TCP, tcp(1)...)), false},
			{"multicast query", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(130, "::"), hopByHop)), false},
			{"router", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(134, own6)...)), false},
			{"redirect", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(137, own6)...)), false},
			{"dhcp6 server", frame(mac, unix.ETH_P_IPV6, packet6(own6, 17, 2, 35, 2, 34, 0, 8, 0, 0)), false},
			{"neighbour other", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(136, peerMachine6)...)), false},
			{"check of other", frame(mac, unix.ETH_P_IPV6, packet6("::", 58, icmp6(135, peerMachine6)...)), false},
			{"lldp", frame(mac, 0x88cc), false},
			{"router, options", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(134, own6), hopByHop, options)), false},
			{"router, fragment", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(134, own6), firstFragment)), false},
			{"neighbour, atomic", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(136, own6), atomic)), false},
			{
				"hidden, second",
				frame(mac, unix.ETH_P_IPV6,
					extended(own6, 60, append([]byte{58, 0, 1, 4, 0, 0, 0, 0}, icmp6(134, own6)...), laterFragment)), false,
			},
			{"vlan", frame(mac, unix.ETH_P_8021Q, []byte{0, 1, 8, 0}, tcp4(own4)), false},
			{"vlan 0", frame(mac, unix.ETH_P_8021Q, []byte{0, 0, 8, 0}, udp4(own4, 1)), false},
			{"qinq", frame(mac, unix.ETH_P_8021AD, []byte{0, 1, 0x81, 0, 0, 2, 8, 0}, tcp4(own4)), false},
			// Of IPv4 only who has a known address is kept to it.
			{"4 other's ip4", frame(mac, unix.ETH_P_IP, udp4(peerMachine, 1000)), who == "free"},
			{"4 tcp of host", frame(mac, unix.ETH_P_IP, tcp4(peerHost)), who == "free"},
			{"4 no ip4", frame(mac, unix.ETH_P_IP, udp4("0.0.0.0", 68)), who == "free"},
			{"4 arp for host", frame(mac, unix.ETH_P_ARP, arp(mac, peerHost, peerMachine)), who == "free"},
			{"4 probe of other", frame(mac, unix.ETH_P_ARP, arp(mac, "0.0.0.0", peerMachine)), who == "free"},
		} {
			for _, on := range []bool{false, true} {
				nettest.BridgeNetfilter(t, on)
				want := tt.want && !(on && strings.HasPrefix(tt.name, "fragment")) // IP rules see whole packets
				end := who + fmt.Sprint(on) + "end"
				out.send(append(tt.frame[:len(tt.frame):len(tt.frame)], mark(tt.name)...),
					frame(mac, unix.ETH_P_IP, udp4(own4, 9), mark(end)))
				if passes := slices.Contains(machine.until(mark(end)), string(mark(tt.name))); passes != want {
					t.Errorf("%s, %s, bridge netfilter %v: passes %v, want %v", who, tt.name, on, passes, want)
				}
			}
		}
	}
}

// Neither spanning tree nor any other protocol of bridges is spoken to by a guest, and its port
// learns nothing.
func TestLAN_Reserved(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	rough(t)
	l := newLAN(t, func(b *netlink.Bridge) { b.MulticastSnooping = new(bool) })
	// where even the host is open
	g := l.guest(0, func(_ *network.Tap, g *bridged.Guest) { g.Host = true })
	// all but those that no bridge may pass on
	if err := os.WriteFile("/sys/class/net/br0/bridge/group_fwd_mask", []byte("65528"), 0); err != nil {
		t.Fatal(err)
	}
	host, machine := listen(t, ":9000"), l.machine.wire(t)
	out := g.wire(t)
	for n := range 16 {
		text, end := fmt.Sprint("attack ", n), fmt.Sprint("end ", n)
		for _, source := range []string{g.rules.MAC, "02:00:00:00:00:77"} {
			out.send(
				frameTo(reserved(n), source, unix.ETH_P_IP, datagram("172.30.0.2:1", peerHost+":9000", text)),
				frameTo(reserved(n), source, unix.ETH_P_ARP, arp(source, "172.30.0.2", peerMachine), mark(text)))
		}
		bridge, err := netlink.LinkByName("br0")
		if err != nil {
			t.Fatal(err)
		}
		if host.heard(text, end, func() {
			out.send(frameTo(bridge.Attrs().HardwareAddr.String(), g.rules.MAC, unix.ETH_P_IP,
				datagram("172.30.0.2:1", peerHost+":9000", end)))
		}) {
			t.Errorf("the host gets what is for %s", reserved(n))
		}
		out.send(frame(g.rules.MAC, unix.ETH_P_IP, udp4("172.30.0.2", 9), mark(end)))
		if slices.Contains(machine.until(mark(end)), string(mark(text))) {
			t.Errorf("the LAN gets what is for %s", reserved(n))
		}
	}
	// By a port without our rules they come.
	other := l.machine.wire(t)
	host.heard("", "plain", func() {
		other.send(frameTo(reserved(1), "02:00:00:00:00:11", unix.ETH_P_IP, nil),
			frameTo("ff:ff:ff:ff:ff:ff", "02:00:00:00:00:11", unix.ETH_P_IP,
				datagram(peerMachine+":1", "172.30.0.255:9000", "plain")))
	})
	if got := learned(t, g.rules.Tap); len(got) != 1 || got[0] != g.rules.MAC {
		t.Errorf("behind the guest's port are %q, want %s", got, g.rules.MAC)
	}
	if got := learned(t, "lan0"); !slices.Contains(got, "02:00:00:00:00:11") {
		t.Errorf("behind a plain port are %q, want what it sent from", got)
	}
}

// The bridge stays as its owner has set it up, while guests are on it and when they have gone: its
// MTU and MAC, too, which a bridge takes from its ports.
func TestLAN_Unchanged(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	l := newLAN(t, nil)
	port, err := netlink.LinkByName("lan0")
	if err == nil {
		err = netlink.LinkSetMTU(port, 9000)
	}
	if err != nil {
		t.Fatal(err)
	}
	l.machine.Serve(":80", "machine")
	before := l.state()
	if bridge, err := netlink.LinkByName("br0"); err != nil || bridge.Attrs().MTU != 9000 {
		t.Fatalf("the bridge does not follow its port: %v, %v", bridge.Attrs().MTU, err)
	}
	var all []*station
	for n := range 3 {
		all = append(all, l.guest(n, nil))
	}
	all[0].reaches(t, "tcp", peerMachine+":80", "machine from 172.30.0.2\n")
	now := slices.DeleteFunc(l.state(), func(s string) bool {
		return strings.HasPrefix(s, "table smartvm-sv") || strings.HasPrefix(s, "port sv") ||
			strings.HasPrefix(s, "entry ") && !slices.Contains(before, s)
	})
	if !slices.Equal(now, before) {
		t.Errorf("with guests:\n%s\nbefore:\n%s", strings.Join(now, "\n"), strings.Join(before, "\n"))
	}
	for _, s := range all {
		l.remove(s)
	}
	if after := l.state(); !slices.Equal(after, before) {
		t.Errorf("after:\n%s\nbefore:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
	if _, err := os.Stat(filepath.Join(l.dir, "lan")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the network's journal: %v", err)
	}
}

// What others have removed comes back, as far as it is ours; a bridge that is gone is for its owner
// to make again.
func TestLAN_Repair(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	l := newLAN(t, nil)
	l.machine.Serve(":80", "machine")
	g := l.guest(0, nil)
	const want = "machine from 172.30.0.2\n"
	g.reaches(t, "tcp", peerMachine+":80", want)
	keeper := new(upkeep.Upkeep)
	heal := func() error {
		for range 2 { // the second finds nothing to do
			if err := keeper.Heal(t.Context(), g.effects); err != nil {
				return err
			}
		}
		there, err := g.rules.There(t.Context())
		if err == nil && !there {
			err = errors.New("the rules are not there")
		}
		return err
	}
	forged, machine := g.wire(t), l.machine.wire(t)
	passes := func(name string) bool {
		t.Helper()
		forged.send(frame(g.rules.MAC, unix.ETH_P_IP, udp4(peerMachine, 1000), mark(name)),
			frame(g.rules.MAC, unix.ETH_P_IP, udp4("172.30.0.2", 9), mark(name+"end")))
		return slices.Contains(machine.until(mark(name+"end")), string(mark(name)))
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func(){
		"ruleset": conn.FlushRuleset,
		"rules": func() {
			conn.FlushTable(&nftables.Table{Name: bridged.Table(g.rules.Tap), Family: nftables.TableFamilyNetdev})
		},
	} {
		damage()
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		if !passes(name) {
			t.Errorf("%s: without rules a forged address does not pass", name)
		}
		if err := heal(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if passes(name + "healed") {
			t.Errorf("%s: a forged address passes", name)
		}
	}
	port, err := netlink.LinkByName(g.rules.Tap)
	if err == nil {
		err = netlink.LinkSetNoMaster(port)
	}
	if err == nil {
		err = heal()
	}
	if err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", peerMachine+":80", want)
	// A bridge that is called otherwise now keeps its ports; the rules do not hang on its name.
	rename := func(from, to string) {
		t.Helper()
		link, err := netlink.LinkByName(from)
		if err == nil {
			err = errors.Join(netlink.LinkSetDown(link), netlink.LinkSetName(link, to), netlink.LinkSetUp(link))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// where IP rules see bridged packets, those between ports of another name count as the host's
	nettest.BridgeNetfilter(t, false)
	rename("br0", "br1")
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := heal(); err == nil || !strings.Contains(err.Error(), "find bridge br0") {
		t.Errorf("renamed: %v", err)
	}
	if passes("renamed") {
		t.Error("by a bridge of another name a forged address passes")
	}
	if err := nettest.Serve(t, ":80", "host"); err != nil {
		t.Fatal(err)
	}
	g.misses(t, "tcp", peerHost+":80")
	l.machine.reaches(t, "tcp", peerHost+":80", "host from "+peerMachine+"\n")
	rename("br1", "br0")
	if err := heal(); err != nil {
		t.Fatal(err)
	}
	removeLink(t, "br0")
	if err := heal(); err == nil || !strings.Contains(err.Error(), "find bridge br0") {
		t.Errorf("without the bridge: %v", err)
	}
	if links := interfaces(t); slices.Contains(links, "br0") {
		t.Errorf("somebody made the bridge: %q", links)
	}
	l.make(nil)
	l.plug("lan0")
	if err := heal(); err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", peerMachine+":80", want)
	if passes("remade") {
		t.Error("on the new bridge a forged address passes")
	}
	if err := g.rules.Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
}

// A start says at once what is wrong with the bridge, and changes nothing.
func TestLAN_Refused(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	l := newLAN(t, nil)
	ours := network.New("own", "svbr7", netip.MustParsePrefix("10.77.0.0/24"))
	own := &network.Use{Dir: l.dir, Network: ours, VM: "own", VMDir: t.TempDir()}
	if err := own.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := hosts(t)
	for bridge, want := range map[string]string{
		"br9": "no such interface", "lan0": "is no bridge: it is of type veth",
		"svbr7": "is that of a network of smartvm",
	} {
		c := l.config
		c.Name, c.Bridge = "other", bridge
		u := &network.Use{Dir: l.dir, Network: c, VM: "x", VMDir: t.TempDir()}
		err := u.Apply(t.Context())
		var h interface{ Hint() string }
		if err == nil || !strings.Contains(err.Error(), want) || !errors.As(err, &h) || h.Hint() == "" {
			t.Errorf("%s: got %v", bridge, err)
		}
	}
	// A MAC that the host has on the bridge stays the host's.
	host, err := netlink.LinkByName("lan0")
	if err != nil {
		t.Fatal(err)
	}
	tap := &network.Tap{Name: "svtest", Bridge: "br0", LAN: true}
	nettest.New(t).Connect(nettest.Link{Name: tap.Name}, nettest.Link{Name: "eth0"})
	g := &bridged.Guest{Tap: tap.Name, Bridge: "br0", MAC: host.Attrs().HardwareAddr.String()}
	if err := errors.Join(tap.Join(), g.Apply(t.Context())); !errors.Is(err, bridged.ErrMAC) {
		t.Errorf("the MAC of another port: %v", err)
	}
	for range 2 { // what was begun is undone, and what is undone is no error
		if err := g.Revert(t.Context()); err != nil {
			t.Error(err)
		}
	}
	g.MAC = "06:00:00:00:00:77"
	if err := errors.Join(g.Apply(t.Context()), g.Revert(t.Context())); err != nil {
		t.Errorf("a MAC of its own: %v", err)
	}
	removeLink(t, tap.Name)
	if after := hosts(t); !slices.Equal(after, before) {
		t.Errorf("got %q, want %q", after, before)
	}
}

// Two hosts of ours, that know nothing of each other, share a bridge; one that goes takes nothing
// from the other. So it is where VLANs are told apart.
func TestLAN_Shared(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	on := true
	l := newLAN(t, func(b *netlink.Bridge) { b.VlanFiltering = &on })
	l.machine.Serve(":80", "machine")
	other := *l
	other.dir = filepath.Join(t.TempDir(), store.NetworkDir)
	mine, theirs := l.guest(0, nil), other.guest(1, nil)
	mine.reaches(t, "udp", peerMachine+":80", "machine from 172.30.0.2\n")
	l.remove(mine)
	theirs.reaches(t, "tcp", peerMachine+":80", "machine from 172.30.0.3\n")
	// An ordinary network beside it has the host forward, and gives that back while the guest on the
	// LAN stays.
	forwarding := func() string {
		return variable(t, "ipv4/conf/all/forwarding") + variable(t, "ipv4/conf/lan0/forwarding")
	}
	was := forwarding()
	own := &network.Use{
		Dir: other.dir, Network: network.New("own", "svbr7", netip.MustParsePrefix("10.77.0.0/24")),
		VM: "own", VMDir: t.TempDir(),
	}
	if err := own.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := own.Revert(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	if now := forwarding(); now != was {
		t.Errorf("forwarding is %s, was %s", now, was)
	}
	theirs.reaches(t, "tcp", peerMachine+":80", "machine from 172.30.0.3\n")
}
