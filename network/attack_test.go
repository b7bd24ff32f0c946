package network_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/conntrack"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/policy"
)

// What a guest with root sends and no tool does. Beside each thing that must not work stands the
// same from somewhere where it does.

var allowHost = &policy.Policy{AllowHost: true}

// rough is a host that looks at no sources, as Debian's does not.
func rough(t *testing.T) {
	t.Helper()
	for _, v := range []string{"all", "default"} {
		setVariable(t, "ipv4/conf/"+v+"/rp_filter", "0")
	}
}

// ear hears what is sent to a UDP port of an address in the test's network.
type ear struct {
	t *testing.T
	net.PacketConn
}

func listen(t *testing.T, address string) *ear {
	t.Helper()
	c, err := net.ListenPacket("udp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &ear{t, c}
}

// heard says whether what comes before end has a datagram with this text. It sends end: while a
// link comes up, the kernel loses some.
func (e *ear) heard(text, end string, send func()) (yes bool) {
	e.t.Helper()
	buf := make([]byte, 1500)
	for range 100 {
		send()
		if err := e.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			e.t.Fatal(err)
		}
		for {
			n, _, err := e.ReadFrom(buf)
			if err != nil {
				break
			}
			if string(buf[:n]) == end {
				return yes
			}
			yes = yes || string(buf[:n]) == text
		}
	}
	e.t.Fatalf("%q does not arrive", end)
	return false
}

// datagram is an IPv4 packet.
func datagram(from, to, text string) []byte {
	source, dest := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
	b := udp4(source.Addr().String(), source.Port())
	copy(b[16:], dest.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[22:], dest.Port())
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(text)))
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(text)))
	b[10], b[11] = 0, 0
	checksum4(b)
	return append(b, text...)
}

// learned are the MACs that a bridge has behind a port.
func learned(t *testing.T, port string) (macs []string) {
	t.Helper()
	link, err := netlink.LinkByName(port)
	if err != nil {
		t.Fatal(err)
	}
	all, err := netlink.NeighList(link.Attrs().Index, unix.AF_BRIDGE)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range all {
		// What is there for good, of the host, is no entry of the guest's.
		if n.State&netlink.NUD_PERMANENT == 0 && n.HardwareAddr[0]&1 == 0 {
			macs = append(macs, n.HardwareAddr.String())
		}
	}
	return macs
}

// stranger is a port of the network's bridge that is no guest's: of our rules it knows none but
// those of the host.
func (s *site) stranger(t *testing.T) *guest {
	t.Helper()
	g := &guest{Namespace: nettest.New(t)}
	g.Connect(nettest.Link{Name: "stranger"}, nettest.Link{Name: "eth0", Addresses: prefixes("172.30.0.200/24")})
	port, err := netlink.LinkByName("stranger")
	if err != nil {
		t.Fatal(err)
	}
	bridge, err := netlink.LinkByName(s.config.Bridge)
	if err == nil {
		err = netlink.LinkSetMaster(port, bridge)
	}
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// reserved is a frame's destination that a bridge does not forward (IEEE 802.1Q, 8.6.3).
func reserved(n int) string { return fmt.Sprintf("01:80:c2:00:00:%02x", n) }

// A bridge hands frames for reserved addresses to the host beside its rules, and learns from them.
func TestAttack_Reserved(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	rough(t)
	s := newSite(t, nil)
	victim, attacker, friend := s.guest(0, nil), s.guest(1, nil), s.guest(2, func(g *filter.Guest) {
		g.Policy = allowHost
	})
	other := s.stranger(t)
	bridge, err := netlink.LinkByName(s.config.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	gateway := bridge.Attrs().HardwareAddr.String()
	host := listen(t, ":9000")
	mac, from := attacker.filter.MAC, "172.30.0.3:1"
	out, plain, friendly := attacker.wire(t), other.wire(t), friend.wire(t)
	for _, on := range []bool{false, true} {
		nettest.BridgeNetfilter(t, on)
		for n := range 16 {
			text, end := fmt.Sprint("attack ", n, on), fmt.Sprint("end ", n, on)
			for _, source := range []string{mac, victim.filter.MAC, "02:00:00:00:01:01"} {
				for _, of := range []string{from, "172.30.0.2:1", "198.51.100.77:1"} {
					for _, to := range []string{"172.30.0.1", uplink4} {
						out.send(frameTo(reserved(n), source, unix.ETH_P_IP, datagram(of, to+":9000", text)))
					}
				}
				out.send(frameTo(reserved(n), source, unix.ETH_P_ARP, arp(source, "172.30.0.3", uplink4)))
			}
			if host.heard(text, end, func() {
				friendly.send(frameTo(gateway, friend.filter.MAC, unix.ETH_P_IP, datagram("172.30.0.4:1", "172.30.0.1:9000", end)))
			}) {
				t.Errorf("bridge netfilter %v: the host gets what is for %s", on, reserved(n))
			}
		}
		// By a port without our rules it does.
		host.heard("", "plain", func() {
			plain.send(frameTo(reserved(14), "02:00:00:00:01:02", unix.ETH_P_IP,
				datagram("172.30.0.200:1", uplink4+":9000", "plain")))
		})
	}
	if got := learned(t, attacker.filter.Tap); len(got) != 1 || got[0] != mac {
		t.Errorf("behind the attacker's port are %q, want %s", got, mac)
	}
	if got := learned(t, "stranger"); !slices.Contains(got, "02:00:00:00:01:02") {
		t.Errorf("behind a plain port are %q, want what it sent from", got)
	}
	// What the host sends the victim, by its MAC, the victim gets, and nobody else.
	heard, spied := victim.wire(t), attacker.wire(t)
	openWire(t, s.config.Bridge).send(
		frameTo(victim.filter.MAC, gateway, unix.ETH_P_IP, udp4("172.30.0.1", 1), mark("secret")),
		frameTo("02:00:00:00:00:77", gateway, unix.ETH_P_IP, udp4("172.30.0.1", 1), mark("unknown")),
		frameTo(victim.filter.MAC, gateway, unix.ETH_P_IP, udp4("172.30.0.1", 1), mark("end")),
		frameTo(mac, gateway, unix.ETH_P_IP, udp4("172.30.0.1", 1), mark("end")))
	for name, w := range map[string]*wire{"victim": heard, "attacker": spied} {
		got := w.until(mark("end"))
		if slices.Contains(got, string(mark("secret"))) != (name == "victim") ||
			slices.Contains(got, string(mark("unknown"))) {
			t.Errorf("the %s gets %q", name, got)
		}
	}
	// Nor did anybody answer what was asked of the host's other addresses, by that way or the ordinary
	// one.
	out.send(frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.3", uplink4)),
		frame(mac, unix.ETH_P_ARP, arp(mac, "172.30.0.3", "172.30.0.1")))
	for f := out.answer(); !bytes.Equal(f[28:32], []byte{172, 30, 0, 1}); f = out.answer() {
		t.Errorf("the host tells the guest: %x", f)
	}
}

// answer returns the next ARP reply.
func (w *wire) answer() []byte {
	w.t.Helper()
	buf := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(w.fd, buf, 0)
		if err != nil {
			w.t.Fatalf("wait for an answer: %v", err)
		}
		if n >= 42 && bytes.Equal(buf[12:14], []byte{8, 6}) && buf[21] == 2 {
			return buf[:n]
		}
	}
}

// What listens on the host's loopback alone is no guest's to reach, nor what another's rules lead
// to from there.
func TestAttack_Loopback(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	rough(t)
	setVariable(t, "ipv4/ip_forward", "1")
	s := newSite(t, nil)
	// What is published is reached by the loopback, so that the bridge is a way from there, and to
	// there.
	g := s.guest(0, func(g *filter.Guest) {
		g.Policy, g.Ports = allowHost, []filter.Port{{Host: 8000, Guest: 80, Protocol: "tcp"}}
	})
	if got := variable(t, "ipv4/conf/"+s.config.Bridge+"/route_localnet"); got != "1" {
		t.Fatalf("route_localnet is %q: the kernel itself drops what this test sends", got)
	}
	// As Docker before 28 publishes 127.0.0.1:5432 of a container.
	container := nettest.New(t)
	container.Connect(nettest.Link{Name: "docker0", Addresses: prefixes("172.17.0.1/16")},
		nettest.Link{Name: "eth0", Addresses: prefixes("172.17.0.2/16")})
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Name: "nat", Family: nftables.TableFamilyIPv4})
	chain := conn.AddChain(
		&nftables.Chain{
			Table: table, Name: "PREROUTING", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting,
			Priority: nftables.ChainPriorityNATDest,
		})
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{127, 0, 0, 1}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x15, 0x38}},
		&expr.Immediate{Register: 1, Data: []byte{172, 17, 0, 2}},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	// Another bridge beside ours, with what the kernel is told for ours and none of its rules.
	addBridge(t, "plain0")
	plain := nettest.New(t)
	plain.Connect(nettest.Link{Name: "plain1"}, nettest.Link{Name: "eth0"})
	port, err := netlink.LinkByName("plain1")
	if err != nil {
		t.Fatal(err)
	}
	bridge, err := netlink.LinkByName("plain0")
	if err == nil {
		err = netlink.LinkSetMaster(port, bridge)
	}
	if err == nil {
		err = nettest.Link{Name: "plain0", Addresses: prefixes("172.29.0.1/24")}.Configure()
	}
	if err == nil {
		setVariable(t, "ipv4/conf/plain0/route_localnet", "1")
		bridge, err = netlink.LinkByName("plain0") // it has the port's MAC now
	}
	if err != nil {
		t.Fatal(err)
	}
	local, all := listen(t, "127.0.0.1:6379"), listen(t, ":9000")
	var database *ear
	container.Must(func() error { database = listen(t, ":5432"); return nil })
	ours, err := netlink.LinkByName(s.config.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	g1, p1 := g.wire(t), (*wire)(nil)
	plain.Must(func() error { p1 = openWire(t, "eth0"); return nil })
	send := func(w *wire, to netlink.Link, mac, from, text string) {
		for _, at := range []string{"127.0.0.1:6379", "127.0.0.1:5432", "127.1.2.3:6379"} {
			w.send(frameTo(to.Attrs().HardwareAddr.String(), mac, unix.ETH_P_IP, datagram(from+":1", at, text)))
		}
	}
	for n, tt := range []struct{ bridgeNetfilter, untracked bool }{{false, false}, {true, false}, {false, true}} {
		end, seen := fmt.Sprint("end ", n), fmt.Sprint("seen ", n)
		nettest.BridgeNetfilter(t, tt.bridgeNetfilter)
		if tt.untracked { // what the kernel is told not to track goes through no chain for NAT
			raw := conn.AddTable(&nftables.Table{Name: "raw", Family: nftables.TableFamilyIPv4})
			conn.AddRule(&nftables.Rule{Table: raw, Exprs: []expr.Any{&expr.Notrack{}}, Chain: conn.AddChain(&nftables.Chain{
				Table: raw, Name: "PREROUTING", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting,
				Priority: nftables.ChainPriorityRaw,
			})})
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		send(g1, ours, g.filter.MAC, "172.30.0.2", "attack")
		all.heard("", seen, func() {
			g1.send(frameTo(ours.Attrs().HardwareAddr.String(), g.filter.MAC, unix.ETH_P_IP,
				datagram("172.30.0.2:1", "172.30.0.1:9000", seen)))
		})
		for name, e := range map[string]*ear{"the loopback": local, "what is published on it": database} {
			if tt.untracked && e == database {
				continue
			}
			if e.heard("attack", end, func() { send(p1, bridge, "02:00:00:00:00:55", "172.29.0.2", end) }) {
				t.Errorf("%+v: a guest reaches %s", tt, name)
			}
		}
	}
}

// One guest that opens connections without end, to the world or to the host, takes them from nobody
// else, and keeps those that it has.
func TestAttack_Connections(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	const most = 50
	s := newSite(t, func(c *network.Config) { c.MaxConnections = most })
	s.outside.Serve(":80", "world")
	greedy, other := s.guest(0, func(g *filter.Guest) { g.Policy = allowHost }), s.guest(1, nil)
	if err := nettest.Serve(t, ":9000", "host"); err != nil {
		t.Fatal(err)
	}
	// open opens n connections and returns those that the kernel does not refuse to begin.
	open := func(address string, n int) (all []net.Conn) {
		for range n {
			var c net.Conn
			greedy.Must(func() (err error) { c, err = net.Dial("udp", address); return err })
			t.Cleanup(func() { c.Close() })
			if _, err := c.Write([]byte("?")); err != nil {
				t.Fatal(err)
			}
			all = append(all, c)
		}
		return all
	}
	// answered says how many have an answer. What is asked last, by another, shows that what was asked
	// before has come or will not.
	answered := func(all []net.Conn) (n int) {
		other.reaches(t, "udp", world4+":80", "world from "+uplink4+"\n")
		for _, c := range all {
			if err := c.SetReadDeadline(time.Now().Add(testenv.Patience(200 * time.Millisecond))); err != nil {
				t.Fatal(err)
			}
			if k, _ := c.Read(make([]byte, 64)); k > 0 {
				n++
			}
		}
		return n
	}
	// Of IPv6 it may have as many besides.
	if n := answered(open("["+world6+"]:80", most+15)); n < most-5 || n > most+5 {
		t.Errorf("%d connections by IPv6, want about %d", n, most)
	}
	first := open(world4+":80", most-10)
	if n := answered(first); n != len(first) {
		t.Errorf("%d of %d are answered", n, len(first))
	}
	// The kernel counts before it knows the newest, and for a while what has ended.
	if n := answered(open("172.30.0.1:9000", 22)); n < 5 || n > 12 {
		t.Errorf("%d more connections, want about 10", n)
	}
	for _, c := range first[:3] {
		if !answers(t, c, 5*time.Second) {
			t.Error("a connection that was there is not any more")
		}
	}
	other.reaches(t, "udp", world4+":80", "world from "+uplink4+"\n")
	other.reaches(t, "tcp", "["+world6+"]:80", "world from "+uplink6+"\n")
	counts, err := inspect.Counts(s.config.Table(), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(counts) != 1 || counts[0].Rule != "over 50 connections" || counts[0].Packets < 20 {
		t.Errorf("counted %+v, want what was over 50 connections alone", counts)
	}
	// When its connections end it has others.
	if err := conntrack.ForgetAll(); err != nil {
		t.Fatal(err)
	}
	greedy.reaches(t, "udp", world4+":80", "world from "+uplink4+"\n")
}

// answers says whether a datagram on a connection has one for an answer.
func answers(t *testing.T, c net.Conn, wait time.Duration) bool {
	t.Helper()
	_, err := c.Write([]byte("?"))
	if err == nil {
		err = c.SetReadDeadline(time.Now().Add(wait))
	}
	if err != nil {
		t.Fatal(err)
	}
	n, _ := c.Read(make([]byte, 64))
	return n > 0
}

// Who begins connections faster than is allowed is refused those, and takes nothing from others.
func TestAttack_NewConnections(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	const most = 100
	s := newSite(t, func(c *network.Config) { c.NewConnections = most })
	s.outside.Serve(":80", "world")
	greedy, other := s.guest(0, nil), s.guest(1, nil)
	for _, world := range []string{world4, "[" + world6 + "]"} {
		var through int
		begun := time.Now()
		greedy.Must(func() error {
			for range 10 * most {
				c, err := net.DialTimeout("tcp", world+":80", time.Second)
				if err != nil {
					continue // it is refused at once
				}
				through++
				if err := c.Close(); err != nil {
					return err
				}
			}
			return nil
		})
		if allowed := most + int(most*time.Since(begun).Seconds()) + 1; through < most || through > allowed {
			t.Errorf("%s: %d of %d connections that were begun at once are let through, want from %d to %d", world, through,
				10*most, most, allowed)
		}
	}
	other.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	counts, err := inspect.Counts(s.config.Table(), "")
	if err != nil {
		t.Fatal(err)
	}
	if want := "over 100 new connections a second"; len(counts) != 1 || counts[0].Rule != want ||
		counts[0].Packets < most {
		t.Errorf("counted %+v, want what was %s", counts, want)
	}
}
