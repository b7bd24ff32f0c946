package network_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// routing is what rules and routes there are.
func routing(t *testing.T) (all []string) {
	t.Helper()
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		all = append(all, r.String())
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: 0x53},
		netlink.RT_FILTER_PROTOCOL)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range routes {
		all = append(all, r.String())
	}
	return all
}

// Guests leave by the one interface, and when it is down or gone by none. A cable stands for the
// tunnel.
func TestNetwork_Via(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, func(c *network.Config) { c.WireGuard = "tunnel" })
	beyond := nettest.New(t)
	beyond.Connect(nettest.Link{Name: "tunnel", Addresses: prefixes("10.7.0.1/24")},
		nettest.Link{Name: "eth0", Addresses: prefixes("10.7.0.2/24", world4+"/32")})
	beyond.Serve(":80", "beyond")
	s.outside.Serve(":80", "world")
	before := routing(t)
	g := s.guest(0, nil)
	// The tunnel knows no addresses of the link's own kind: its other end is asked for all.
	tunnel, err := netlink.LinkByName("tunnel")
	if err != nil {
		t.Fatal(err)
	}
	beyond.Must(func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/proxy_arp", []byte("1"), 0) })
	g.reaches(t, "tcp", world4+":80", "beyond from 10.7.0.1\n")
	g.misses(t, "tcp", "["+world6+"]:80")
	// A guest of another network has both kinds by the host's own way.
	other := *s
	other.config = network.New("plain", "svbr1", netip.MustParsePrefix("172.30.1.0/24"))
	plain := other.guest(3, nil)
	plain.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	plain.reaches(t, "tcp", "["+world6+"]:80", "world from "+uplink6+"\n")
	other.remove(plain)
	// Another's rule of routes leads guests by the host's own way.
	rule := netlink.NewRule()
	rule.Priority, rule.Table, rule.Family = 1, unix.RT_TABLE_MAIN, unix.AF_INET
	if err := netlink.RuleAdd(rule); err != nil {
		t.Fatal(err)
	}
	g.misses(t, "tcp", world4+":80")
	if err := netlink.RuleDel(rule); err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", world4+":80", "beyond from 10.7.0.1\n")
	if got := nettest.Ask("tcp", world4+":80", 5e9); got != "world from "+uplink4+"\n" {
		t.Errorf("the host's own way: got %q", got)
	}
	if err := netlink.LinkSetDown(tunnel); err != nil {
		t.Fatal(err)
	}
	g.misses(t, "tcp", world4+":80")
	if err := netlink.LinkSetUp(tunnel); err != nil {
		t.Fatal(err)
	}
	if _, _, err := g.use.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := g.filter.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", world4+":80", "beyond from 10.7.0.1\n")
	if err := netlink.LinkDel(tunnel); err != nil {
		t.Fatal(err)
	}
	g.misses(t, "tcp", world4+":80")
	s.remove(g)
	s.remove(g)
	if after := routing(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

// What is published on a network that leaves by a tunnel is reached from outside and from beyond,
// by neighbours and the host, and answered where each is.
func TestNetwork_ViaPorts(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	nettest.BridgeNetfilter(t, false) // or neighbours do not: see TestNetwork_Hairpin
	s := newSite(t, func(c *network.Config) { c.WireGuard = "tunnel" })
	beyond := nettest.New(t)
	beyond.Connect(nettest.Link{Name: "tunnel", Addresses: prefixes("10.7.0.1/24", "fd07::1/64")},
		nettest.Link{Name: "eth0", Addresses: prefixes("10.7.0.2/24", world4+"/32", "fd07::2/64")})
	beyond.Must(func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/proxy_arp", []byte("1"), 0) })
	beyond.Serve(":80", "beyond")
	s.outside.Serve(":80", "world")
	before := routing(t)
	a := s.guest(0, func(g *filter.Guest) { g.Ports = []filter.Port{{Host: 8000, Guest: 80, Protocol: "tcp"}} })
	b := s.guest(1, nil)
	a.Serve(":80", "web")
	for _, of := range []struct {
		who     *nettest.Namespace
		address string
		want    string
	}{
		{s.outside, uplink4 + ":8000", "web from " + world4},
		{s.outside, "[" + uplink6 + "]:8000", "web from " + world6},
		{beyond, "10.7.0.1:8000", "web from 10.7.0.2"},
		{b.Namespace, uplink4 + ":8000", "web from 172.30.0.1"},
		{b.Namespace, world4 + ":80", "beyond from 10.7.0.1"},
		{a.Namespace, world4 + ":80", "beyond from 10.7.0.1"},
	} {
		if got := of.who.Ask("tcp", of.address); got != of.want+"\n" {
			t.Errorf("%s: got %q, want %q", of.address, got, of.want)
		}
	}
	if got := nettest.Ask("tcp", "127.0.0.1:8000", 5e9); got != "web from 172.30.0.1\n" {
		t.Errorf("from the host: %q", got)
	}
	s.remove(a)
	s.remove(b)
	if after := routing(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

// What guests ask of names leaves by the tunnel too, and by nothing else.
func TestNetwork_ViaNames(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, func(c *network.Config) {
		c.WireGuard = "tunnel"
		c.Policy = &policy.Policy{
			DefaultAction: policy.Deny,
			Rules: []policy.Rule{
				{Action: policy.Allow, Domain: "good.example"},
				{Action: policy.Allow, Domain: "late.example"},
			},
		}
	})
	beyond := nettest.New(t)
	beyond.Connect(nettest.Link{Name: "tunnel", Addresses: prefixes("10.7.0.1/24")},
		nettest.Link{Name: "eth0", Addresses: prefixes("10.7.0.2/24", world4+"/32")})
	beyond.ServeNames(world4, map[string]string{"good.example.": "203.0.113.8", "late.example.": "203.0.113.8"})
	s.nameServer(map[string]string{"good.example.": "203.0.113.9", "late.example.": "203.0.113.9"})
	g, _ := s.namedGuest(0, nil)
	if got := g.resolve(t, "172.30.0.1:53", "good.example."); got != "203.0.113.8" {
		t.Errorf("by the tunnel: %q", got)
	}
	tunnel, err := netlink.LinkByName("tunnel")
	if err == nil {
		err = netlink.LinkSetDown(tunnel)
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := g.resolve(t, "172.30.0.1:53", "late.example."); got != "RCodeServerFailure" {
		t.Errorf("without the tunnel: %q", got)
	}
	s.remove(g)
}

// A real tunnel to a real peer.
func TestLinuxWireGuard(t *testing.T) {
	testenv.Require(t, testenv.LinuxGuest) // in the lab: this machine's own kernel may have none
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	s.config.WireGuardConfig = s.outside.WireGuard(world4)
	before := routing(t)
	g := s.guest(0, nil)
	g.reaches(t, "tcp", "203.0.113.77:80", "world from 10.7.0.2\n")
	g.reaches(t, "udp", "[fd07::1]:80", "world from fd07::2\n")
	// Who is at the other end reaches nothing of the host by it, which he does by the host's own
	// address.
	if err := nettest.Serve(t, ":22", "host"); err != nil {
		t.Fatal(err)
	}
	if !s.outside.Silent("tcp", "10.7.0.2:22") || !s.outside.Silent("udp", "[fd07::2]:22") {
		t.Error("the host is open to the tunnel's other end")
	}
	if got := s.outside.Ask("tcp", uplink4+":22"); got != "host from "+world4+"\n" {
		t.Errorf("by the uplink: got %q", got)
	}
	_, via, err := network.Current(s.dir, s.config.Name)
	if err != nil {
		t.Fatal(err)
	}
	tunnel, err := netlink.LinkByName(via)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(tunnel); err != nil {
		t.Fatal(err)
	}
	g.misses(t, "tcp", "203.0.113.9:80")
	g.misses(t, "tcp", world4+":80")
	if _, _, err := g.use.Check(t.Context()); err != nil { // made anew
		t.Fatal(err)
	}
	if err := g.filter.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", "203.0.113.77:80", "world from 10.7.0.2\n")
	s.remove(g)
	if after := routing(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

// While the name of a tunnel's endpoint is looked for, no other network waits: neither to come up
// nor to be looked at.
func TestUse_EndpointLookup(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	// A server that is asked, and says nothing.
	var server net.PacketConn
	s.outside.Must(func() (err error) { server, err = net.ListenPacket("udp", world4+":53"); return err })
	defer server.Close()
	if err := server.SetReadDeadline(time.Now().Add(testenv.Patience(10 * time.Second))); err != nil {
		t.Fatal(err)
	}
	nettest.Resolver(t, world4)
	file := filepath.Join(t.TempDir(), "away.conf")
	text := "[Interface]\nPrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=\nAddress = 10.7.0.2/32\n" +
		"[Peer]\nPublicKey = xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=\nAllowedIPs = 0.0.0.0/0\nEndpoint = far.example:51820\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	away := &network.Use{
		Dir: s.dir, Network: network.New("away", "svaway", prefixes("10.78.0.0/24")[0]),
		VM: "z", VMDir: "/",
	}
	away.Network.WireGuardConfig = file
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- away.Apply(ctx) }()
	if _, _, err := server.ReadFrom(make([]byte, 1500)); err != nil {
		t.Fatal(err)
	}
	g := s.guest(0, nil)
	if _, _, err := g.use.Check(t.Context()); err != nil {
		t.Error(err)
	}
	select {
	case err := <-done:
		t.Errorf("the other network came up first: %v", err)
	default:
	}
	cancel()
	if err := <-done; err == nil || !strings.Contains(err.Error(), "bring up network away") {
		t.Errorf("a network without its endpoint: %v", err)
	}
	s.remove(g)
}
