package network_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// sum is the checksum of the internet protocols (RFC 1071), over whole words.
func sum(b []byte) uint16 {
	var s uint32
	for i := 0; i < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for s>>16 > 0 {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// packet4 is an IPv4 packet. Options are of whole words.
func packet4(proto byte, from, to string, options, payload []byte) []byte {
	b := make([]byte, 12, 20)
	b[0], b[8], b[9] = byte(0x45+len(options)/4), 64, proto
	binary.BigEndian.PutUint16(b[2:], uint16(20+len(options)+len(payload)))
	b = slices.Concat(b, netip.MustParseAddr(from).AsSlice(), netip.MustParseAddr(to).AsSlice(), options)
	binary.BigEndian.PutUint16(b[10:], sum(b))
	return append(b, payload...)
}

// fragment4 is a part of one, which begins at so many bytes of its payload.
func fragment4(from, to string, at int, more bool, payload []byte) []byte {
	b := packet4(unix.IPPROTO_UDP, from, to, nil, payload)
	binary.BigEndian.PutUint16(b[4:], 0x4242)
	binary.BigEndian.PutUint16(b[6:], uint16(at/8)|map[bool]uint16{true: 1 << 13}[more])
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], sum(b[:20]))
	return b
}

// segment is a TCP segment with flags and a text, and its checksum.
func segment(from, to netip.AddrPort, flags byte, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = append(b, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0)
	b = append(b, text...)
	pseudo := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, unix.IPPROTO_TCP, 0, byte(len(b))}, b)
	binary.BigEndian.PutUint16(b[16:], sum(append(pseudo, make([]byte, len(pseudo)%2)...)))
	return b
}

// bridgeMAC is where guests send what is for their gateway.
func (s *site) bridgeMAC() string {
	s.t.Helper()
	bridge, err := netlink.LinkByName(s.config.Bridge)
	if err != nil {
		s.t.Fatal(err)
	}
	return bridge.Attrs().HardwareAddr.String()
}

// plainPort is a cable to the host that is in no network: what it sends is judged by nobody but the
// kernel.
func plainPort(t *testing.T) (w *wire, mac string) {
	t.Helper()
	plain := nettest.New(t)
	plain.Connect(nettest.Link{Name: "plain", Addresses: prefixes("172.29.0.1/24")}, nettest.Link{Name: "eth0"})
	near, err := netlink.LinkByName("plain")
	if err != nil {
		t.Fatal(err)
	}
	plain.Must(func() error { w = openWire(t, "eth0"); return nil })
	return w, near.Attrs().HardwareAddr.String()
}

// seen says which of some texts come by a wire before the last does. It sends them again until
// then: while a link comes up the kernel loses some.
func (w *wire) seen(texts []string, end string, send func()) (got []string) {
	w.t.Helper()
	buf := make([]byte, 4096)
	if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		w.t.Fatal(err)
	}
	for range 100 {
		send()
		for {
			n, _, err := unix.Recvfrom(w.fd, buf, 0)
			if err != nil {
				break
			}
			f := string(buf[:n])
			if strings.Contains(f, end) {
				return got
			}
			for _, text := range texts {
				if strings.Contains(f, text) && !slices.Contains(got, text) {
					got = append(got, text)
				}
			}
		}
	}
	w.t.Fatalf("%q does not arrive", end)
	return nil
}

// Frames for a neighbour, and for all, reach nobody on a network whose guests do not reach each
// other, whatever they carry; and a port has one address, whatever comes by it.
func TestAttack_Neighbour(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	for _, mutual := range []bool{false, true} {
		s := newSite(t, func(c *network.Config) { c.Mutual = mutual })
		attacker, victim := s.guest(0, nil), s.guest(1, nil)
		other := s.stranger(t)
		mac := attacker.filter.MAC
		out, at, strange := attacker.wire(t), victim.wire(t), other.wire(t)
		frames := map[string][]byte{
			"to its MAC": frameTo(victim.filter.MAC, mac, unix.ETH_P_IP, datagram("172.30.0.2:1", "172.30.0.3:9", "to its MAC")),
			// The host has it go back by the bridge, whose ports are apart for what comes by one alone.
			"by gateway": frameTo(s.bridgeMAC(), mac, unix.ETH_P_IP, datagram("172.30.0.2:1", "172.30.0.3:9", "by gateway")),
			"to all":     frame(mac, unix.ETH_P_IP, datagram("172.30.0.2:1", "172.30.0.255:9", "to all")),
			"to many": frameTo("01:00:5e:00:00:fb", mac, unix.ETH_P_IP,
				datagram("172.30.0.2:1", "224.0.0.251:5353", "to many")),
			"to many, 6": frameTo("33:33:00:00:00:01", mac, unix.ETH_P_IPV6,
				packet6(attacker.filter.IP6.String(), unix.IPPROTO_UDP, 0, 1, 0, 2, 0, 24, 0, 0), mark("to many, 6")),
		}
		end := fmt.Sprint("end ", mutual)
		got := at.seen([]string{"to its MAC", "by gateway", "to all", "to many", "to many, 6"}, end, func() {
			for _, f := range frames {
				out.send(f)
			}
			openWire(t, s.config.Bridge).send(
				frameTo(victim.filter.MAC, s.bridgeMAC(), unix.ETH_P_IP, datagram("172.30.0.1:1", "172.30.0.3:9", end)))
		})
		if want := map[bool]int{true: 5, false: 0}[mutual]; len(got) != want {
			t.Errorf("mutual %v: the neighbour gets %q, want %d", mutual, got, want)
		}
		// A storm from ever other addresses, and the same from a port without our rules.
		for n := range 1000 {
			from := fmt.Sprintf("02:00:00:01:%02x:%02x", n>>8, n&255)
			out.send(frame(from, unix.ETH_P_IP, datagram("172.30.0.2:1", "172.30.0.255:9", "storm")))
			if n < 100 {
				strange.send(frame(from, unix.ETH_P_IP, datagram("172.30.0.200:1", "172.30.0.255:9", "storm")))
			}
		}
		if got := learned(t, attacker.filter.Tap); len(got) != 1 || got[0] != mac {
			t.Errorf("mutual %v: behind the attacker's port are %d, want %s", mutual, len(got), mac)
		}
		if got := learned(t, "stranger"); len(got) < 100 {
			t.Errorf("behind a plain port are %d, want 100", len(got))
		}
		s.remove(attacker)
		s.remove(victim)
		clearNetwork(t)
		cutCables(t)
	}
}

// A tap whose bridge is gone is one more interface of the host: neither the host nor what is behind
// it is reached by that, until it is a port again.
func TestAttack_Unbridged(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	setVariable(t, "ipv4/ip_forward", "1")
	s := newSite(t, nil)
	g := s.guest(0, func(g *filter.Guest) { g.Policy = allowHost })
	world, host := s.outsideEar(world4+":9"), listen(t, ":9")
	plain, near := plainPort(t)
	out := g.wire(t)
	for _, removed := range []bool{false, true} {
		tap, err := netlink.LinkByName(g.filter.Tap)
		if err == nil && removed {
			removeLink(t, s.config.Bridge)
		} else if err == nil {
			err = netlink.LinkSetNoMaster(tap)
		}
		if err != nil {
			t.Fatal(err)
		}
		mac := macOf(t, g.filter.Tap)
		for to, e := range map[string]*ear{world4: world, uplink4: host, "127.0.0.1": host} {
			end := fmt.Sprint("end ", to, removed)
			if e.heard("attack", end, func() {
				for _, from := range []string{"172.30.0.2:1", "198.51.100.77:1"} {
					out.send(frameTo(mac, g.filter.MAC, unix.ETH_P_IP, datagram(from, to+":9", "attack")))
				}
				if to == "127.0.0.1" {
					to = uplink4 // the kernel itself takes no such packet from outside
				}
				plain.send(frameTo(near, "02:00:00:00:00:55", unix.ETH_P_IP, datagram("172.29.0.2:1", to+":9", end)))
			}) {
				t.Errorf("bridge removed %v: %s is reached by a tap that is no port", removed, to)
			}
		}
	}
}

// A packet that says by which addresses it wants to go, where the host takes such, leads past no
// policy.
func TestAttack_SourceRoute(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	for _, of := range []string{"all", "default"} {
		setVariable(t, "ipv4/conf/"+of+"/accept_source_route", "1")
	}
	s := newSite(t, nil)
	g := s.guest(0, func(g *filter.Guest) { g.Policy = deny(world4) })
	other := s.guest(1, nil)
	at := openWireIn(t, s.outside)
	plain, near := plainPort(t)
	setVariable(t, "ipv4/conf/plain/forwarding", "1")
	routed := func(from, by, text string) []byte {
		route := append([]byte{131, 7, 4}, netip.MustParseAddr(world4).AsSlice()...)
		return packet4(unix.IPPROTO_UDP, from, by, append(route, 0), datagram("0.0.0.0:1", "0.0.0.0:9", text)[20:])
	}
	out, beside := g.wire(t), other.wire(t)
	if got := at.seen([]string{"by the gateway", "by the uplink", "neighbour"}, "plain", func() {
		out.send(frameTo(s.bridgeMAC(), g.filter.MAC, unix.ETH_P_IP, routed("172.30.0.2", "172.30.0.1", "by the gateway")))
		out.send(frameTo(s.bridgeMAC(), g.filter.MAC, unix.ETH_P_IP, routed("172.30.0.2", uplink4, "by the uplink")))
		beside.send(frameTo(s.bridgeMAC(), other.filter.MAC, unix.ETH_P_IP, routed("172.30.0.3", "172.30.0.1", "neighbour")))
		plain.send(frameTo(near, "02:00:00:00:00:55", unix.ETH_P_IP, routed("172.29.0.2", "172.29.0.1", "plain")))
	}); len(got) > 0 {
		t.Errorf("packets with a route of their own come %q", got)
	}
}

// openWireIn opens a socket on a namespace's interface.
func openWireIn(t *testing.T, n *nettest.Namespace) (w *wire) {
	t.Helper()
	n.Must(func() error { w = openWire(t, "eth0"); return nil })
	return w
}

// What is no beginning of a connection, as the kernel does or does not take it for one, and what is
// in pieces, goes nowhere that is denied.
func TestAttack_Denied(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	g := s.guest(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{Rules: []policy.Rule{
			{Action: policy.Deny, Protocol: "tcp", Destination: world4},
			{Action: policy.Deny, Protocol: "udp", Destination: world4, Ports: policy.Ports{{First: 81, Last: 81}}},
		}}
	})
	other := s.guest(1, nil)
	at := openWireIn(t, s.outside)
	out, beside := g.wire(t), other.wire(t)
	ear81 := s.outsideEar(world4 + ":81")
	ear80 := s.outsideEar(world4 + ":80")
	for _, loose := range []string{"0", "1"} {
		setVariable(t, "netfilter/nf_conntrack_tcp_loose", loose)
		for flags, name := range map[byte]string{
			0: "null", 1: "fin", 2: "syn", 4: "rst", 0x10: "ack", 0x12: "syn ack",
			0x29: "xmas", 0x18: "push",
		} {
			from, to := netip.MustParseAddrPort("172.30.0.2:1000"), netip.MustParseAddrPort(world4+":80")
			text, end := fmt.Sprint("denied ", name, loose), fmt.Sprint("allowed ", name, loose)
			if got := at.seen([]string{text}, end, func() {
				out.send(frameTo(s.bridgeMAC(), g.filter.MAC, unix.ETH_P_IP,
					packet4(unix.IPPROTO_TCP, "172.30.0.2", world4, nil, segment(from, to, flags, text))))
				beside.send(
					frameTo(s.bridgeMAC(), other.filter.MAC, unix.ETH_P_IP,
						packet4(unix.IPPROTO_UDP, "172.30.0.3", world4, nil, datagram("0.0.0.0:1", "0.0.0.0:9", end)[20:])))
			}); len(got) > 0 {
				t.Errorf("tcp_loose %s: %s is let through", loose, name)
			}
		}
	}
	// In fragments: whole ones, and such as cover what was there with another port.
	whole := func(port uint16, text string) []byte {
		b := datagram("0.0.0.0:5000", "0.0.0.0:0", text)[20:]
		binary.BigEndian.PutUint16(b[2:], port)
		return b
	}
	send := func(parts ...[]byte) {
		for _, p := range parts {
			out.send(frameTo(s.bridgeMAC(), g.filter.MAC, unix.ETH_P_IP, p))
		}
	}
	part := func(at int, more bool, b []byte) []byte { return fragment4("172.30.0.2", world4, at, more, b) }
	a, b := whole(80, "0123456789abcdef"), whole(81, "0123456789abcdef")
	for name, parts := range map[string][][]byte{
		"whole":       {part(0, true, b[:16]), part(16, false, b[16:])},
		"tiny":        {part(0, true, b[:8]), part(8, false, b[8:])},
		"late":        {part(8, false, b[8:]), part(0, true, b[:8])},
		"overlapping": {part(0, true, a[:8]), part(0, true, b[:8]), part(8, false, b[8:])},
		"covered":     {part(0, true, a[:16]), part(0, true, b[:16]), part(16, false, b[16:])},
		"from behind": {part(8, false, b[8:]), part(0, true, a[:8]), part(0, true, b[:8])},
	} {
		if ear81.heard("0123456789abcdef", "end "+name, func() {
			send(parts...)
			other.Must(func() error { return sendTo(world4+":81", "end "+name) })
		}) {
			t.Errorf("fragments, %s: come", name)
		}
	}
	if !ear80.heard("0123456789abcdef", "end", func() {
		send(part(0, true, a[:8]), part(8, false, a[8:]))
		other.Must(func() error { return sendTo(world4+":80", "end") })
	}) {
		t.Error("fragments of what is allowed do not come")
	}
}

// What is denied stays so in a flood, of which the host answers only a part.
func TestAttack_Flood(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	g := s.guest(0, func(g *filter.Guest) { g.Policy = deny(world4) })
	other := s.guest(1, nil)
	world, host := s.outsideEar(world4+":9"), listen(t, "172.30.0.1:9")
	out := g.wire(t)
	for at, e := range map[string]*ear{world4: world, "172.30.0.1": host} {
		if e.heard("flood", "end", func() {
			for n := range 3000 {
				from := fmt.Sprint("172.30.0.2:", 1000+n)
				out.send(frameTo(s.bridgeMAC(), g.filter.MAC, unix.ETH_P_IP, datagram(from, at+":9", "flood")))
			}
			if e == host {
				if err := sendTo("172.30.0.1:9", "end"); err != nil {
					t.Fatal(err)
				}
				return
			}
			other.Must(func() error { return sendTo(world4+":9", "end") })
		}) {
			t.Errorf("%s is reached by a flood", at)
		}
	}
}

// outsideEar hears at an address of the world's.
func (s *site) outsideEar(address string) (e *ear) {
	s.t.Helper()
	s.outside.Must(func() error { e = listen(s.t, address); return nil })
	return e
}

func sendTo(address, text string) error {
	c, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	_, err = c.Write([]byte(text))
	return errors.Join(err, c.Close())
}
