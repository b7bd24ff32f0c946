package network_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network/filter"
)

// icmp4 is an error, or a redirect, about a packet.
func icmp4(kind, code byte, rest [4]byte, about []byte) []byte {
	b := slices.Concat([]byte{kind, code, 0, 0}, rest[:], about[:28])
	binary.BigEndian.PutUint16(b[2:], sum(b))
	return b
}

// What one guest says of another's connections, or of the host's way, is not believed.
func TestAttack_ICMP(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	for _, of := range []string{"all", "default"} { // a host that lets itself be told its ways
		setVariable(t, "ipv4/conf/"+of+"/accept_redirects", "1")
		setVariable(t, "ipv4/conf/"+of+"/secure_redirects", "0")
	}
	s := newSite(t, nil)
	s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes("198.51.100.66/32")}.Configure)
	attacker, victim := s.guest(0, nil), s.guest(1, nil)
	ear := s.outsideEar(world4 + ":9")
	var c net.Conn
	victim.Must(func() (err error) { c, err = net.Dial("udp", world4+":9"); return err })
	defer c.Close()
	if ear.heard("", "hello", func() { _, _ = c.Write([]byte("hello")) }) {
		t.Fatal("an empty datagram")
	}
	port := c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	asked := datagram(fmt.Sprint("172.30.0.3:", port), world4+":9", "hello")
	unreachable := icmp4(3, 3, [4]byte{}, asked)
	out, at := attacker.wire(t), victim.wire(t)
	// Somebody on the way may say so.
	errorOf := func() error {
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, err := c.Read(make([]byte, 64))
		return err
	}
	for range 20 {
		out.send(frameTo(s.bridgeMAC(), attacker.filter.MAC, unix.ETH_P_IP,
			packet4(unix.IPPROTO_ICMP, "172.30.0.2", "172.30.0.3", nil, unreachable)))
	}
	at.seen(nil, "end", func() {
		openWire(t, s.config.Bridge).send(
			frameTo(victim.filter.MAC, s.bridgeMAC(), unix.ETH_P_IP, datagram("172.30.0.1:1", "172.30.0.3:9", "end")))
	})
	if err := errorOf(); errors.Is(err, unix.ECONNREFUSED) {
		t.Error("a guest ends another's connection by an error about it")
	}
	world := openWireIn(t, s.outside)
	mac := macOf(t, "uplink")
	var source string
	s.outside.Must(func() error { source = macOf(t, "eth0"); return nil })
	var seen []string
	for range 100 {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			if f.Forward.SrcPort == port {
				about := datagram(fmt.Sprint(uplink4, ":", f.Reverse.DstPort), world4+":9", "hello")
				world.send(frameTo(mac, source, unix.ETH_P_IP,
					packet4(unix.IPPROTO_ICMP, world4, uplink4, nil, icmp4(3, 3, [4]byte{}, about))))
			}
		}
		err = errorOf()
		seen = append(seen, fmt.Sprint(err))
		if errors.Is(err, unix.ECONNREFUSED) {
			seen = nil
			break
		}
	}
	if seen != nil {
		t.Errorf("an error from outside does not come: %q", seen[len(seen)-1])
	}
	// A redirect: the host's way to what is behind a gateway leads to whom that says. The guest is not
	// it.
	way := func() string {
		routes, err := netlink.RouteGet(net.ParseIP("203.0.113.9"))
		if err != nil || len(routes) == 0 {
			t.Fatal(routes, err)
		}
		return routes[0].Gw.String()
	}
	if err := sendTo("203.0.113.9:9", "?"); err != nil {
		t.Fatal(err)
	}
	about := packet4(unix.IPPROTO_ICMP, uplink4, "203.0.113.9", nil, make([]byte, 8)) // an answer to an echo request
	for _, from := range []string{"172.30.0.2", world4} {
		for _, to := range []string{"172.30.0.1", uplink4} {
			out.send(frameTo(s.bridgeMAC(), attacker.filter.MAC, unix.ETH_P_IP,
				packet4(unix.IPPROTO_ICMP, from, to, nil, icmp4(5, 1, [4]byte{172, 30, 0, 2}, about))))
			out.send(frameTo(s.bridgeMAC(), attacker.filter.MAC, unix.ETH_P_IP,
				packet4(unix.IPPROTO_ICMP, from, to, nil, icmp4(5, 1, [4]byte{198, 51, 100, 66}, about))))
		}
	}
	ear.heard("", "after", func() { attacker.Must(func() error { return sendTo(world4+":9", "after") }) })
	if got := way(); got != world4 {
		t.Errorf("a guest tells the host its way: %s", got)
	}
	for range 100 {
		if way() == "198.51.100.66" {
			return
		}
		world.send(frameTo(mac, source, unix.ETH_P_IP,
			packet4(unix.IPPROTO_ICMP, world4, uplink4, nil, icmp4(5, 1, [4]byte{198, 51, 100, 66}, about))))
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("nor does the gateway tell it: %s", way())
}

func macOf(t *testing.T, name string) string {
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Error(err)
		return ""
	}
	return l.Attrs().HardwareAddr.String()
}

// pings says whether an address answers an echo request of the guest's.
func (g *guest) pings(t *testing.T, a netip.Addr, wait time.Duration) (yes bool) {
	t.Helper()
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if a.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	g.Must(func() error {
		c, err := net.Dial(network, a.String())
		if err != nil {
			return err
		}
		defer c.Close()
		echo := []byte{request, 0, 0, 0, 0x53, 0x56, 0, 1}
		if a.Is4() {
			binary.BigEndian.PutUint16(echo[2:], sum(echo))
		}
		for end := time.Now().Add(wait); !yes && time.Now().Before(end); {
			if _, err := c.Write(echo); err != nil {
				return nil // no way there
			}
			if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
				return err
			}
			buf := make([]byte, 64)
			n, _, err := c.(net.PacketConn).ReadFrom(buf)
			yes = err == nil && n > 0 && buf[0] == reply
		}
		return nil
	})
	return yes
}

// A guest may ask its gateway whether it is there, and none of the host's other addresses; one that
// may reach the host may.
func TestAttack_Echo(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	g, trusted := s.guest(0, nil), s.guest(1, func(g *filter.Guest) { g.Policy = allowHost })
	gateway4, gateway6 := s.config.Gateway()
	for _, a := range []netip.Addr{gateway4, gateway6} {
		if !g.pings(t, a, 5*time.Second) {
			t.Errorf("the gateway %s does not answer", a)
		}
	}
	for _, text := range []string{uplink4, uplink6} {
		a := netip.MustParseAddr(text)
		if g.pings(t, a, 200*time.Millisecond) {
			t.Errorf("the host answers at %s", a)
		}
		if !trusted.pings(t, a, 5*time.Second) {
			t.Errorf("the host does not answer at %s whom it should", a)
		}
	}
}
