package network_test

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
)

// frame puts an Ethernet frame together.
func frame(source string, kind uint16, payload ...[]byte) []byte {
	mac, err := net.ParseMAC(source)
	if err != nil {
		panic(err)
	}
	f := append(bytes.Repeat([]byte{0xff}, 6), mac...)
	f = binary.BigEndian.AppendUint16(f, kind)
	return append(f, bytes.Join(payload, nil)...)
}

func arp(mac, ip string) []byte {
	hw, _ := net.ParseMAC(mac)
	b := append([]byte{0, 1, 8, 0, 6, 4, 0, 2}, hw...)
	b = append(b, netip.MustParseAddr(ip).AsSlice()...)
	return append(b, make([]byte, 10)...)
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

// checksum4 fills in the header's checksum, without which a bridge drops the packet, and adds nothing.
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

// icmp6 is a message with a target.
func icmp6(kind byte, target string) []byte {
	return append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, netip.MustParseAddr(target).AsSlice()...)
}

// What a guest sends under another's MAC or address, or as a router or DHCP server, ends at its tap.
func TestNetwork_Spoofing(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	g := s.guest(0, nil)
	s.guest(1, nil)
	mac, own6 := g.filter.MAC, g.filter.IP6.String()
	const otherMAC = "02:00:00:00:00:99"
	bridge, err := netlink.LinkByName(s.config.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	seen, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL})))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(seen)
	if err := unix.Bind(seen, &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16([]byte{0, unix.ETH_P_ALL}), Ifindex: bridge.Attrs().Index}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(seen, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		t.Fatal(err)
	}
	var out int
	g.Must(func() (err error) {
		if out, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return unix.Bind(out, &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index})
	})
	defer unix.Close(out)
	mark := func(name string) []byte { return []byte((name + "................")[:16]) }
	// passes says whether the frame arrives at the bridge, before one that does.
	passes := func(name string, f []byte) bool {
		t.Helper()
		for _, f := range [][]byte{append(f[:len(f):len(f)], mark(name)...), frame(mac, unix.ETH_P_IP, udp4("172.30.0.2", 9), mark("end"))} {
			if _, err := unix.Write(out, f); err != nil {
				t.Fatal(err)
			}
		}
		buf := make([]byte, 2048)
		arrived := false
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); {
			n, _, err := unix.Recvfrom(seen, buf, 0)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if bytes.HasSuffix(buf[:n], mark("end")) {
				return arrived
			}
			arrived = arrived || bytes.HasSuffix(buf[:n], mark(name))
		}
		t.Fatalf("%s: what is genuine does not arrive", name)
		return false
	}
	for _, tt := range []struct {
		name  string
		frame []byte
		want  bool
	}{
		{"arp", frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.2")), true},
		{"arp probe", frame(mac, unix.ETH_P_ARP, arp(mac, "0.0.0.0")), true},
		{"ip4", frame(mac, unix.ETH_P_IP, udp4("172.30.0.2", 1000)), true},
		{"ip6", frame(mac, unix.ETH_P_IPV6, packet6(own6, 17, 0, 1, 0, 2, 0, 8, 0, 0)), true},
		{"tcp", frame(mac, unix.ETH_P_IP, tcp4("172.30.0.2")), true},
		{"tcp6", frame(mac, unix.ETH_P_IPV6, packet6(own6, unix.IPPROTO_TCP, tcp(547)...)), true},
		{"tcp under vlan", frame(mac, unix.ETH_P_8021Q, []byte{0, 1, 8, 0}, tcp4("172.30.0.2")), true},
		{"neighbour", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(136, own6)...)), true},
		{"address check", frame(mac, unix.ETH_P_IPV6, packet6("::", 58, icmp6(135, own6)...)), true},

		{"mac", frame(otherMAC, unix.ETH_P_IP, udp4("172.30.0.2", 1000)), false},
		{"tcp with mac", frame(otherMAC, unix.ETH_P_IP, tcp4("172.30.0.2")), false},
		{"tcp of other", frame(mac, unix.ETH_P_IP, tcp4("172.30.0.3")), false},
		{"tcp of gateway", frame(mac, unix.ETH_P_IP, tcp4("172.30.0.1")), false},
		{"tcp6 with mac", frame(otherMAC, unix.ETH_P_IPV6, packet6(own6, unix.IPPROTO_TCP, tcp(1)...)), false},
		{"tcp6 of other", frame(mac, unix.ETH_P_IPV6, packet6("fd00::99", unix.IPPROTO_TCP, tcp(1)...)), false},
		{"tcp of other under vlan", frame(mac, unix.ETH_P_8021Q, []byte{0, 1, 8, 0}, tcp4("172.30.0.3")), false},
		// Where an IPv4 packet has its source, and its protocol, these have the guest's own.
		{"like tcp", frame(mac, unix.ETH_P_ARP, tcp4("172.30.0.2")), false},
		{"like tcp, mpls", frame(mac, 0x8847, tcp4("172.30.0.2")), false},
		{"other's ip4", frame(mac, unix.ETH_P_IP, udp4("172.30.0.3", 1000)), false},
		{"gateway's ip4", frame(mac, unix.ETH_P_IP, udp4("172.30.0.1", 1000)), false},
		{"no ip4", frame(mac, unix.ETH_P_IP, udp4("0.0.0.0", 68)), false},
		{"dhcp server", frame(mac, unix.ETH_P_IP, udp4("172.30.0.2", 67)), false},
		{"arp for other", frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.1")), false},
		{"arp with mac", frame(mac, unix.ETH_P_ARP, arp(otherMAC, "172.30.0.2")), false},
		{"other's ip6", frame(mac, unix.ETH_P_IPV6, packet6("fd00::99", 17, 0, 1, 0, 2, 0, 8, 0, 0)), false},
		{"router", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(134, own6)...)), false},
		{"redirect", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(137, own6)...)), false},
		{"dhcp6 server", frame(mac, unix.ETH_P_IPV6, packet6(own6, 17, 2, 35, 2, 34, 0, 8, 0, 0)), false},
		{"neighbour other", frame(mac, unix.ETH_P_IPV6, packet6(own6, 58, icmp6(136, "fe80::1")...)), false},
		{"vlan", frame(mac, unix.ETH_P_8021Q, []byte{0, 1, 8, 0}, udp4("172.30.0.3", 1)), false},
		{"lldp", frame(mac, 0x88cc), false},
	} {
		if got := passes(tt.name, tt.frame); got != tt.want {
			t.Errorf("%s: passes: %v, want %v", tt.name, got, tt.want)
		}
	}
}
