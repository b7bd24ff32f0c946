package network_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
)

// frame puts an Ethernet frame together that is for all.
func frame(source string, kind uint16, payload ...[]byte) []byte {
	return frameTo("ff:ff:ff:ff:ff:ff", source, kind, payload...)
}

func frameTo(to, source string, kind uint16, payload ...[]byte) (f []byte) {
	for _, text := range []string{to, source} {
		mac, err := net.ParseMAC(text)
		if err != nil {
			panic(err)
		}
		f = append(f, mac...)
	}
	f = binary.BigEndian.AppendUint16(f, kind)
	return append(f, bytes.Join(payload, nil)...)
}

// arp says, or asks, where target is.
func arp(mac, ip, target string) []byte {
	hw, _ := net.ParseMAC(mac)
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, 1}, hw...)
	b = append(b, netip.MustParseAddr(ip).AsSlice()...)
	b = append(b, make([]byte, 6)...)
	return append(b, netip.MustParseAddr(target).AsSlice()...)
}

// udp4 and packet6 have no checksums: nobody on the way looks.
func udp4(source string, port uint16) []byte {
	b := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	b = append(b, netip.MustParseAddr(source).AsSlice()...)
	b = append(b, 172, 30, 0, 255)
	b = binary.BigEndian.AppendUint16(b, port)
	b = append(b, 0, 68, 0, 8+16, 0, 0)
	binary.BigEndian.PutUint16(b[2:], uint16(len(b))+16)
	return append(b, checksum4(b)...)
}

// checksum4 fills in the header's checksum, without which a bridge drops the packet, and adds
// nothing.
func checksum4(header []byte) []byte {
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(header[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(header[10:], ^uint16(sum+sum>>16))
	return nil
}

// tcp is a segment's header.
func tcp(source uint16) []byte {
	return append(binary.BigEndian.AppendUint16(nil, source), 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0)
}

// tcp4 has a segment in it.
func tcp4(source string) []byte {
	b := udp4(source, 0)[:20]
	b[9], b[10], b[11] = unix.IPPROTO_TCP, 0, 0
	binary.BigEndian.PutUint16(b[2:], 20+20+16)
	return append(append(b, checksum4(b)...), tcp(67)...)
}

func packet6(source string, proto byte, payload ...byte) []byte {
	b := []byte{0x60, 0, 0, 0, 0, 0, proto, 255}
	binary.BigEndian.PutUint16(b[4:], uint16(len(payload)+16))
	b = append(b, netip.MustParseAddr(source).AsSlice()...)
	b = append(b, netip.MustParseAddr("ff02::1").AsSlice()...)
	return append(b, payload...)
}

// extended is an IPv6 packet with headers before its payload: of each its kind, and what it has but
// for the next one's kind, which comes first.
func extended(source string, proto byte, payload []byte, headers ...[]byte) []byte {
	var all []byte
	for i, h := range headers {
		next := proto
		if i+1 < len(headers) {
			next = headers[i+1][0]
		}
		all = append(append(all, next), h[1:]...)
	}
	return packet6(source, headers[0][0], append(all, payload...)...)
}

// Extension headers as extended takes them. The first fragment's and the later one's are of one
// packet.
var (
	hopByHop      = []byte{0, 0, 1, 4, 0, 0, 0, 0}
	options       = []byte{60, 0, 1, 4, 0, 0, 0, 0}
	atomic        = []byte{44, 0, 0, 0, 0, 0, 0, 7}
	firstFragment = []byte{44, 0, 0, 1, 0, 0, 0, 7}
	laterFragment = []byte{44, 0, 0, 8, 0, 0, 0, 7}
)

// More of them: none leads to another address any more, and the last says that the packet is not
// changed on its way (RFC 4302).
var (
	routing6  = []byte{43, 0, 4, 0, 0, 0, 0, 0}
	authentic = []byte{51, 1, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1}
)

// arpOf is arp in another format.
func arpOf(format string, mac, ip, target string) []byte {
	return append([]byte(format), arp(mac, ip, target)[len(format):]...)
}

// udpOptions is udp4 with an option before its port: a source route, which has been gone.
func udpOptions(source string, port uint16) []byte {
	b := udp4(source, port)
	b = slices.Concat(b[:20], []byte{131, 7, 8, 198, 51, 100, 2, 0}, b[20:])
	b[0], b[10], b[11] = 0x47, 0, 0
	binary.BigEndian.PutUint16(b[2:], uint16(len(b))+16)
	sum := uint32(0)
	for i := 0; i < 28; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	return b
}

// error4 is an error about a packet that was sent to an address, as far as it goes.
func error4(source string, kind byte, of string, bytes int) []byte {
	b := packet4(unix.IPPROTO_ICMP, source, "172.30.0.255", nil,
		icmp4(kind, 0, [4]byte{}, datagram("198.51.100.2:9", of+":9", "?"))[:bytes])
	binary.BigEndian.PutUint16(b[2:], uint16(len(b))+16)
	b[10], b[11] = 0, 0
	binary.BigEndian.PutUint16(b[10:], sum(b[:20]))
	return b
}

func error6(source string, kind byte, of string) []byte {
	about := packet6("2001:db8::2", 17, 0, 1, 0, 2, 0, 8, 0, 0)
	copy(about[24:], netip.MustParseAddr(of).AsSlice())
	return packet6(source, 58, append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, about...)...)
}

// icmp6 is a message with a target.
func icmp6(kind byte, target string) []byte {
	return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, netip.MustParseAddr(target).AsSlice()...)
}

// wire is a guest's own socket for frames, as it sends and gets them.
type wire struct {
	t  *testing.T
	fd int
}

var everything = binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})

// openWire opens a socket on an interface of the thread's network.
func openWire(t *testing.T, name string) *wire {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(everything))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: link.Attrs().Index}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	return &wire{t, fd}
}

func (g *guest) wire(t *testing.T) (w *wire) {
	t.Helper()
	g.Must(func() error { w = openWire(t, "eth0"); return nil })
	return w
}

func (w *wire) send(frames ...[]byte) {
	w.t.Helper()
	for _, f := range frames {
		if _, err := unix.Write(w.fd, f); err != nil {
			w.t.Fatal(err)
		}
	}
}

// until returns the ends of what comes, up to one that ends so.
func (w *wire) until(end []byte) (ends []string) {
	w.t.Helper()
	buf := make([]byte, 2048)
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
		n, _, err := unix.Recvfrom(w.fd, buf, 0)
		if err != nil {
			w.t.Fatalf("wait for a frame: %v", err)
		}
		if bytes.HasSuffix(buf[:n], end) {
			return ends
		}
		ends = append(ends, string(buf[max(0, n-len(end)):n]))
	}
	w.t.Fatal("what is genuine does not arrive")
	return nil
}

func mark(name string) []byte { return []byte((name + "................")[:16]) }

// What a guest sends under another's MAC or address, or as a router or DHCP server, ends at its
// tap: neither its network's other guests nor the host see it.
func TestNetwork_Spoofing(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	rough(t)
	s := newSite(t, func(c *network.Config) { c.Mutual = true })
	g, other := s.guest(0, nil), s.guest(1, nil)
	mac, own6, other6 := g.filter.MAC, g.filter.IP6.String(), other.filter.IP6.String()
	const otherMAC = "02:00:00:00:00:99"
	port, err := netlink.LinkByName(s.config.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	bridge := port.Attrs().HardwareAddr.String()
	out, host, neighbour := g.wire(t), openWire(t, s.config.Bridge), other.wire(t)
	// passes says whether the frame arrives, before one that does.
	passes := func(name string, f []byte) (atHost, atOther bool) {
		t.Helper()
		out.send(append(f[:len(f):len(f)], mark(name)...), frame(mac, unix.ETH_P_IP, udp4("172.30.0.2", 9), mark("end")))
		return slices.Contains(host.until(mark("end")), string(mark(name))),
			slices.Contains(neighbour.until(mark("end")), string(mark(name)))
	}
	for _, tt := range []struct {
		name  string
		frame []byte
		want  bool
	}{
		{"arp", frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.2", "172.30.0.3")), true},
		{"arp announcement", frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.2", "172.30.0.2")), true},
		{"arp probe", frame(mac, unix.ETH_P_ARP, arp(mac, "0.0.0.0", "172.30.0.2")), true},
		{"ip4", frame(mac, unix.ETH_P_IP, udp4("172.30.0.2", 1000)), true},
		{"ip6", frame(mac, unix.ETH_P_IPV6, packet6(own6, 17, 0, 1, 0, 2, 0, 8, 0, 0)), true},
		{"tcp", frame(mac, unix.ETH_P_IP, tcp4("172.30.0.2")), true},
		{"tcp6", frame(mac, unix.ETH_P_IPV6, packet6(own6, unix.IPPROTO_TCP, tcp(547)...)), true},
		{"neighbour", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(136, own6)...)), true},
		{"address check", frame(mac, unix.ETH_P_IPV6, packet6("::", 58, icmp6(135, own6)...)), true},
		{"group", frame(mac, unix.ETH_P_IPV6, extended("::", 58, icmp6(143, "::"), hopByHop)), true},
		{"fragment", frame(mac, unix.ETH_P_IPV6, extended(own6, 17, []byte{0, 1, 0, 2, 0, 99, 0, 0}, firstFragment)), true},
		{"fragment, later", frame(mac, unix.ETH_P_IPV6, extended(own6, 17, make([]byte, 32), laterFragment)), true},
		{"fragment of echo", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(128, "::"), firstFragment)), true},

		{
			"arp answer", frame(mac, unix.ETH_P_ARP, arpOf("\x00\x01\x08\x00\x06\x04\x00\x02", mac, "172.30.0.2", "172.30.0.3")),
			true,
		},
		{"ip4, options", frame(mac, unix.ETH_P_IP, udpOptions("172.30.0.2", 1000)), true},
		{
			"ip6, options", frame(mac, unix.ETH_P_IPV6, extended(own6, 17, []byte{0, 1, 2, 35, 0, 24, 0, 0}, hopByHop, options)),
			true,
		},
		{"ip6, routing", frame(mac, unix.ETH_P_IPV6, extended(own6, 17, []byte{0, 1, 2, 35, 0, 24, 0, 0}, routing6)), true},
		{"neighbour, options", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(136, own6), options)), true},
		// What is authenticated only those take who share its key: what it carries is theirs to judge.
		{"router, authentic", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(134, own6), authentic)), true},
		{"unreachable", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 3, "172.30.0.2", 36)), true},
		{"time exceeded", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 11, "172.30.0.2", 36)), true},
		{"echo", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 8, "172.30.0.3", 36)), true}, // about nothing
		{"unreachable, 6", frame(mac, unix.ETH_P_IPV6, error6(own6, 1, own6)), true},
		{"echo, 6", frame(mac, unix.ETH_P_IPV6, error6(own6, 128, other6)), true},
		{"router wanted", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(133, "::")...)), true},

		{"mac", frame(otherMAC, unix.ETH_P_IP, udp4("172.30.0.2", 1000)), false},
		// An error is about what was sent to whom it is from: others' connections are not a guest's to
		// end.
		{"other unreachable", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 3, "172.30.0.3", 36)), false},
		{"other, short", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 3, "172.30.0.3", 8)), false},
		{"other, quench", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 4, "172.30.0.3", 36)), false},
		{"other, redirect", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 5, "172.30.0.3", 36)), false},
		{"other, exceeded", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 11, "172.30.0.3", 36)), false},
		{"other, parameter", frame(mac, unix.ETH_P_IP, error4("172.30.0.2", 12, "198.51.100.1", 36)), false},
		{"other's error", frame(mac, unix.ETH_P_IP, error4("172.30.0.3", 3, "172.30.0.2", 36)), false},
		{"other, 6", frame(mac, unix.ETH_P_IPV6, error6(own6, 1, other6)), false},
		{"other, too big", frame(mac, unix.ETH_P_IPV6, error6(own6, 2, other6)), false},
		{"other's, 6", frame(mac, unix.ETH_P_IPV6, error6(other6, 2, own6)), false},
		{"arp with mac outside", frame(otherMAC, unix.ETH_P_ARP, arp(mac, "172.30.0.2", "172.30.0.3")), false},
		{"probe with mac outside", frame(otherMAC, unix.ETH_P_ARP, arp(mac, "0.0.0.0", "172.30.0.2")), false},
		{"group with mac", frame(otherMAC, unix.ETH_P_IPV6, extended("::", 58, icmp6(143, "::"), hopByHop)), false},
		{"no mac", frame("00:00:00:00:00:00", unix.ETH_P_IP, udp4("172.30.0.2", 1000)), false},
		{"mac for many", frame("01:00:5e:00:00:01", unix.ETH_P_IP, udp4("172.30.0.2", 1000)), false},
		{"mac for all", frame("ff:ff:ff:ff:ff:ff", unix.ETH_P_IP, udp4("172.30.0.2", 1000)), false},
		{"bridge's mac", frame(bridge, unix.ETH_P_IP, udp4("172.30.0.2", 1000)), false},
		{"bridge's mac, arp", frame(bridge, unix.ETH_P_ARP, arp(bridge, "172.30.0.1", "172.30.0.1")), false},
		{"other's mac", frame(other.filter.MAC, unix.ETH_P_IP, udp4("172.30.0.3", 1000)), false},
		{"tcp with mac", frame(otherMAC, unix.ETH_P_IP, tcp4("172.30.0.2")), false},
		{"tcp of other", frame(mac, unix.ETH_P_IP, tcp4("172.30.0.3")), false},
		{"tcp of gateway", frame(mac, unix.ETH_P_IP, tcp4("172.30.0.1")), false},
		{"tcp6 with mac", frame(otherMAC, unix.ETH_P_IPV6, packet6(own6, unix.IPPROTO_TCP, tcp(1)...)), false},
		{"tcp6 of other", frame(mac, unix.ETH_P_IPV6, packet6("fd00::99", unix.IPPROTO_TCP, tcp(1)...)), false},
		// Where an IPv4 packet has its source, and its protocol, these have the guest's own.
		{"like tcp", frame(mac, unix.ETH_P_ARP, tcp4("172.30.0.2")), false},
		{"like tcp, mpls", frame(mac, 0x8847, tcp4("172.30.0.2")), false},
		{"other's ip4", frame(mac, unix.ETH_P_IP, udp4("172.30.0.3", 1000)), false},
		{"gateway's ip4", frame(mac, unix.ETH_P_IP, udp4("172.30.0.1", 1000)), false},
		{"no ip4", frame(mac, unix.ETH_P_IP, udp4("0.0.0.0", 68)), false},
		{"dhcp server", frame(mac, unix.ETH_P_IP, udp4("172.30.0.2", 67)), false},
		{"dhcp server, options", frame(mac, unix.ETH_P_IP, udpOptions("172.30.0.2", 67)), false},
		{"ip4 of other, options", frame(mac, unix.ETH_P_IP, udpOptions("172.30.0.3", 1000)), false},
		{"arp for other", frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.1", "172.30.0.3")), false},
		{"arp with mac", frame(mac, unix.ETH_P_ARP, arp(otherMAC, "172.30.0.2", "172.30.0.3")), false},
		{"gateway announced", frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.1", "172.30.0.1")), false},
		{"other announced", frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.3", "172.30.0.3")), false},
		{
			"answer for other",
			frame(mac, unix.ETH_P_ARP, arpOf("\x00\x01\x08\x00\x06\x04\x00\x02", mac, "172.30.0.3", "172.30.0.1")), false,
		},
		{"arp, ieee 802", frame(mac, unix.ETH_P_ARP, arpOf("\x00\x06", mac, "172.30.0.2", "172.30.0.3")), false},
		{"arp of what", frame(mac, unix.ETH_P_ARP, arpOf("\x00\x01\x86\xdd", mac, "172.30.0.2", "172.30.0.3")), false},
		{
			"arp, short mac", frame(mac, unix.ETH_P_ARP, arpOf("\x00\x01\x08\x00\x04\x04", mac, "172.30.0.2", "172.30.0.3")),
			false,
		},
		{
			"arp, long mac", frame(mac, unix.ETH_P_ARP, arpOf("\x00\x01\x08\x00\x08\x04", mac, "172.30.0.2", "172.30.0.3")),
			false,
		},
		{
			"arp, long ip", frame(mac, unix.ETH_P_ARP, arpOf("\x00\x01\x08\x00\x06\x10", mac, "172.30.0.2", "172.30.0.3")),
			false,
		},
		{"arp, cut", frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.3", "172.30.0.1")[:16]), false},
		{"rarp", frame(mac, 0x8035, arp(mac, "172.30.0.2", "172.30.0.2")), false},
		{"probe of other", frame(mac, unix.ETH_P_ARP, arp(mac, "0.0.0.0", "172.30.0.3")), false},
		{"other's ip6", frame(mac, unix.ETH_P_IPV6, packet6("fd00::99", 17, 0, 1, 0, 2, 0, 8, 0, 0)), false},
		{"router", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(134, own6)...)), false},
		{"redirect", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(137, own6)...)), false},
		{"dhcp6 server", frame(mac, unix.ETH_P_IPV6, packet6(own6, 17, 2, 35, 2, 34, 0, 8, 0, 0)), false},
		{"neighbour other", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(136, "fe80::1")...)), false},
		{"check of other", frame(mac, unix.ETH_P_IPV6, packet6("::", 58, icmp6(135, other6)...)), false},
		{"lldp", frame(mac, 0x88cc), false},

		// What stands before it hides nothing.
		{"router, options", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(134, own6), hopByHop, options)), false},
		{"router, routing", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(134, own6), routing6)), false},
		{"redirect, options", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(137, own6), options)), false},
		{
			"dhcp6, options",
			frame(mac, unix.ETH_P_IPV6, extended(own6, 17, []byte{2, 35, 2, 34, 0, 24, 0, 0}, hopByHop, options)), false,
		},
		{
			"dhcp6, routing", frame(mac, unix.ETH_P_IPV6, extended(own6, 17, []byte{2, 35, 2, 34, 0, 24, 0, 0}, routing6)),
			false,
		},
		{"of other, options", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(136, other6), options)), false},
		{"of other, routing", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(136, other6), routing6)), false},
		{"check, options", frame(mac, unix.ETH_P_IPV6, extended("::", 58, icmp6(135, other6), hopByHop)), false},
		{"wanted, fragment", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(133, "::"), firstFragment)), false},
		{"router, atomic", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(134, own6), atomic)), false},
		{"neighbour, atomic", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(136, own6), atomic)), false},
		{"solicit, atomic", frame(mac, unix.ETH_P_IPV6, extended("::", 58, icmp6(135, own6), atomic)), false},
		{
			"neighbour, short", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(136, own6)[:8], options, firstFragment)),
			false,
		},
		{"router, fragment", frame(mac, unix.ETH_P_IPV6, extended(own6, 58, icmp6(134, own6), firstFragment)), false},
		// The message itself is in the second fragment, which says only that options come first.
		{
			"hidden, second",
			frame(mac, unix.ETH_P_IPV6,
				extended(own6, 60, append([]byte{58, 0, 1, 4, 0, 0, 0, 0}, icmp6(134, own6)...), laterFragment)), false,
		},

		// A tag: no VLAN of a host begins in a guest.
		{"vlan", frame(mac, unix.ETH_P_8021Q, []byte{0, 1, 8, 0}, tcp4("172.30.0.2")), false},
		{"vlan 0", frame(mac, unix.ETH_P_8021Q, []byte{0, 0, 8, 0}, udp4("172.30.0.2", 1)), false},
		{"other under vlan", frame(mac, unix.ETH_P_8021Q, []byte{0, 1, 8, 0}, tcp4("172.30.0.3")), false},
		{"vlan 802.1ad", frame(mac, unix.ETH_P_8021AD, []byte{0, 1, 8, 0}, tcp4("172.30.0.2")), false},
		{"qinq", frame(mac, unix.ETH_P_8021AD, []byte{0, 1, 0x81, 0, 0, 2, 8, 0}, tcp4("172.30.0.2")), false},
		{"arp under vlan", frame(mac, unix.ETH_P_8021Q, []byte{0, 1, 8, 6}, arp(mac, "172.30.0.2", "172.30.0.3")), false},
	} {
		for _, on := range []bool{false, true} {
			nettest.BridgeNetfilter(t, on)
			// Where IP rules see bridged packets, they see whole ones: a fragment waits for the others.
			want := tt.want && !(on && strings.HasPrefix(tt.name, "fragment"))
			if atHost, atOther := passes(tt.name, tt.frame); atHost != want || atOther != want {
				t.Errorf("%s, bridge netfilter %v: passes to the host: %v, to another guest: %v, want %v", tt.name, on, atHost,
					atOther, want)
			}
		}
	}
}
