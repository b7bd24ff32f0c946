package network_test

import (
	"context"
	"encoding/binary"
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
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/policy"
)

// site is a network with an outside world.
type site struct {
	t       *testing.T
	dir     string
	config  network.Config
	outside *nettest.Namespace
}

// The host's and the world's addresses between them.
const (
	uplink4, world4 = "198.51.100.1", "198.51.100.2"
	uplink6, world6 = "2001:db8::1", "2001:db8::2"
)

func prefixes(all ...string) (p []netip.Prefix) {
	for _, s := range all {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

func newSite(t *testing.T, change func(*network.Config)) *site {
	t.Helper()
	s := &site{t: t, dir: filepath.Join(t.TempDir(), store.NetworkDir), outside: nettest.New(t)}
	var err error
	if s.config, err = network.NewDefault("", ""); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&s.config)
	}
	s.outside.Connect(
		nettest.Link{Name: "uplink", Addresses: prefixes(uplink4+"/24", uplink6+"/64")},
		nettest.Link{Name: "eth0", Addresses: prefixes(world4+"/24", world6+"/64", "203.0.113.9/32")})
	route(t, "203.0.113.9/32", world4)
	return s
}

func route(t *testing.T, to, via string) {
	t.Helper()
	_, dst, err := net.ParseCIDR(to)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(via)}); err != nil {
		t.Fatal(err)
	}
}

// guest is a namespace that stands for a VM, and a cable for its tap.
type guest struct {
	*nettest.Namespace
	use    *network.Use
	filter network.Guest
}

func (s *site) use(vm string) *network.Use {
	s.t.Helper()
	dir := filepath.Join(filepath.Dir(s.dir), vm)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	return &network.Use{Dir: s.dir, Network: s.config, VM: vm, VMDir: dir}
}

// guest connects the n-th.
func (s *site) guest(n int, change func(*filter.Guest)) *guest {
	s.t.Helper()
	return s.guestWith(n, change, func(*guest) error { return nil })
}

// guestWith does something more when its network is up.
func (s *site) guestWith(n int, change func(*filter.Guest), more func(*guest) error) *guest {
	s.t.Helper()
	name := string(rune('a' + n))
	ip4, ip6 := s.config.Guest(n)
	g := &guest{Namespace: nettest.New(s.t), use: s.use(name)}
	g.filter.Guest = filter.Guest{
		Table: s.config.Table(), Tap: network.TapName(s.config.Bridge, name, "", "eth0"),
		MAC: network.MAC(name, "eth0").String(), IP4: ip4, IP6: ip6,
		Routed: s.config.Routed,
	}
	if change != nil {
		change(&g.filter.Guest)
	}
	if err := g.use.Apply(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	if err := more(g); err != nil {
		s.t.Fatal(err)
	}
	gateway4, gateway6 := s.config.Gateway()
	mac, err := net.ParseMAC(g.filter.MAC) // it may be another now
	if err != nil {
		s.t.Fatal(err)
	}
	far := nettest.Link{
		Name: "eth0", MAC: mac, Gateways: []netip.Addr{gateway4, gateway6},
		Addresses: []netip.Prefix{netip.PrefixFrom(ip4, s.config.Subnet.Bits()), netip.PrefixFrom(ip6, 64)},
	}
	g.Connect(nettest.Link{Name: g.filter.Tap}, nettest.Link{Name: far.Name, MAC: far.MAC})
	tap := network.Tap{Name: g.filter.Tap, Bridge: s.config.Bridge, Mutual: s.config.Bridged()}
	if err := errors.Join(tap.Join(), g.filter.Apply(s.t.Context())); err != nil {
		s.t.Fatal(err)
	}
	g.Must(far.Configure)
	return g
}

func (s *site) remove(g *guest) {
	s.t.Helper()
	if err := errors.Join(g.filter.Revert(s.t.Context()), g.use.Revert(s.t.Context())); err != nil {
		s.t.Error(err)
	}
}

// hostVariables are those that a network may change, or that change with one of them.
var hostVariables = func() (all []string) {
	for _, of := range []string{"all", "default", "uplink"} {
		for _, name := range []string{
			"ipv4/forwarding", "ipv4/accept_redirects", "ipv4/send_redirects", "ipv4/rp_filter",
			"ipv6/forwarding", "ipv6/force_forwarding", "ipv6/accept_ra", "ipv6/accept_redirects",
		} {
			protocol, name, _ := strings.Cut(name, "/")
			all = append(all, protocol+"/conf/"+of+"/"+name)
		}
	}
	return all
}()

// variable is what one of the kernel's network has, "" where this kernel has none.
func variable(t *testing.T, name string) string {
	t.Helper()
	value, err := os.ReadFile("/proc/sys/net/" + name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(value))
}

func setVariable(t *testing.T, name, value string) {
	t.Helper()
	if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// hosts is what a network may change.
func hosts(t *testing.T) (all []string) {
	t.Helper()
	links := allLinks(t)
	for _, l := range links {
		if l.Type() != "veth" {
			all = append(all, "link "+l.Attrs().Name)
		}
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		all = append(all, "table "+table.Name)
	}
	for _, name := range hostVariables {
		all = append(all, name+" "+variable(t, name))
	}
	return all
}

func (g *guest) reaches(t *testing.T, network, address, want string) {
	t.Helper()
	if got := g.Ask(network, address); got != want {
		t.Errorf("%s %s: got %q, want %q", network, address, got, want)
	}
}

func (g *guest) misses(t *testing.T, network, address string) {
	t.Helper()
	if !g.Silent(network, address) {
		t.Errorf("%s %s: got an answer", network, address)
	}
}

// Guests reach the outside under the host's address, and neither each other nor the host. Nothing
// is left in the end.
func TestNetwork(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	before := hosts(t)
	s.outside.Serve(":80", "world")
	s.outside.Serve(":443", "secure")
	if err := nettest.Serve(t, ":22", "host"); err != nil {
		t.Fatal(err)
	}
	a, b := s.guest(0, nil), s.guest(1, nil)
	a.Serve(":8080", "a")
	for _, proto := range []string{"tcp", "udp"} {
		b.reaches(t, proto, world4+":80", "world from "+uplink4+"\n")
		b.reaches(t, proto, "["+world6+"]:80", "world from "+uplink6+"\n")
		for _, address := range []string{
			"172.30.0.2:8080", "[" + a.filter.IP6.String() + "]:8080", "172.30.0.1:22",
			uplink4 + ":22", "[" + uplink6 + "]:22",
		} {
			b.misses(t, proto, address)
		}
	}
	// One that may reach the host does.
	trusted := s.guest(2, func(g *filter.Guest) { g.Policy = allowHost })
	_, gateway6 := s.config.Gateway()
	for _, proto := range []string{"tcp", "udp"} {
		trusted.reaches(t, proto, "172.30.0.1:22", "host from 172.30.0.4\n")
		trusted.reaches(t, proto, "["+gateway6.String()+"]:22", "host from "+trusted.filter.IP6.String()+"\n")
		b.misses(t, proto, "["+gateway6.String()+"]:22")
	}
	trusted.reaches(t, "tcp", uplink4+":22", "host from 172.30.0.4\n")
	trusted.reaches(t, "tcp", "["+uplink6+"]:22", "host from "+trusted.filter.IP6.String()+"\n")
	s.remove(trusted)
	// The host reaches its guests.
	if got := nettest.Ask("tcp", "172.30.0.2:8080", 5e9); got != "a from 172.30.0.1\n" {
		t.Errorf("got %q", got)
	}
	// The world does not, though it knows the way.
	s.outside.Must(func() error {
		_, dst, _ := net.ParseCIDR("172.30.0.0/24")
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(uplink4)})
	})
	if !s.outside.Silent("tcp", "172.30.0.2:8080") {
		t.Error("the world reaches a guest")
	}
	s.remove(a)
	b.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	s.remove(b)
	s.remove(b)
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) > 0 {
		t.Errorf("left in the networks' directory: %v, %v", left, err)
	}
}

// Guests of a mutual network reach each other.
func TestNetwork_Mutual(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, func(c *network.Config) { c.Mutual = true })
	a, b := s.guest(0, nil), s.guest(1, nil)
	a.Serve(":8080", "a")
	b.reaches(t, "tcp", "172.30.0.2:8080", "a from 172.30.0.3\n")
	b.reaches(t, "udp", "["+a.filter.IP6.String()+"]:8080", "a from "+b.filter.IP6.String()+"\n")
}

// A published port leads to the guest, from the outside and from the host, by its loopback too.
func TestNetwork_Ports(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	a := s.guest(0, func(g *filter.Guest) {
		g.Ports = []filter.Port{
			{Host: 8000, Guest: 80, Protocol: "tcp"},
			{Host: 5353, Guest: 53, Protocol: "udp"},
			{Address: netip.MustParseAddr(uplink4), Host: 9000, Guest: 80, Protocol: "tcp"},
			{Address: netip.MustParseAddr(uplink6), Host: 9004, Guest: 80, Protocol: "tcp"},
			{Address: netip.MustParseAddr("127.0.0.1"), Host: 9001, Guest: 80, Protocol: "tcp"},
			{Address: netip.MustParseAddr("127.0.0.1"), Host: 5354, Guest: 53, Protocol: "udp"},
			{Address: netip.IPv4Unspecified(), Host: 9002, Guest: 80, Protocol: "tcp"},
			{Address: netip.IPv6Unspecified(), Host: 9003, Guest: 80, Protocol: "tcp"},
		}
	})
	a.Serve(":80", "web")
	a.Serve(":53", "names")
	for address, want := range map[string]string{
		uplink4 + ":8000": "web from " + world4 + "\n", "[" + uplink6 + "]:8000": "web from " + world6 + "\n",
		uplink4 + ":9000": "web from " + world4 + "\n", uplink4 + ":9001": "", uplink4 + ":5353": "",
		"[" + uplink6 + "]:9000": "",
		"[" + uplink6 + "]:9004": "web from " + world6 + "\n", uplink4 + ":9004": "",
		uplink4 + ":9002": "web from " + world4 + "\n", "[" + uplink6 + "]:9002": "", uplink4 + ":9003": "",
		"[" + uplink6 + "]:9003": "web from " + world6 + "\n",
	} {
		if got := s.outside.Ask("tcp", address); got != want {
			t.Errorf("%s from outside: got %q, want %q", address, got, want)
		}
	}
	if got := s.outside.Ask("udp", uplink4+":5353"); got != "names from "+world4+"\n" {
		t.Errorf("by UDP from outside: %q", got)
	}
	for address, want := range map[string]string{
		uplink4 + ":8000": "web from " + uplink4 + "\n", "127.0.0.1:8000": "web from 172.30.0.1\n",
		"127.0.0.1:9001": "web from 172.30.0.1\n", "127.0.0.1:9000": "",
		"[" + uplink6 + "]:8000": "web from " + uplink6 + "\n", "[" + uplink6 + "]:9004": "web from " + uplink6 + "\n",
	} {
		if got := nettest.Ask("tcp", address, 5e9); got != want {
			t.Errorf("%s from the host: got %q, want %q", address, got, want)
		}
	}
	// A neighbour may send the host what is for its loopback. The second shows that the first has been
	// seen.
	s.datagram(t, "127.0.0.1", 5354)
	s.datagram(t, uplink4, 5353)
	var flows []string
	for end := time.Now().Add(10 * time.Second); !slices.Contains(flows, uplink4); {
		if time.Now().After(end) {
			t.Fatalf("datagrams do not arrive: %q", flows)
		}
		all, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		flows = nil
		for _, f := range all {
			if f.Forward.SrcPort == datagramPort {
				flows = append(flows, f.Forward.DstIP.String())
			}
		}
	}
	if slices.Contains(flows, "127.0.0.1") {
		t.Error("the host's loopback is open to others")
	}
	s.remove(a)
	if !s.outside.Silent("tcp", uplink4+":8000") {
		t.Error("a port is published still")
	}
}

// What is published is reached by ::1 too, as by 127.0.0.1, whether IP rules see bridged packets or
// not, and by nobody but the host.
func TestNetwork_PortsLoopback6(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	for _, on := range []bool{false, true} {
		t.Run(fmt.Sprintf("bridge netfilter %v", on), func(t *testing.T) {
			s := newSite(t, nil)
			t.Cleanup(func() { clearNetwork(t); cutCables(t) })
			nettest.BridgeNetfilter(t, on)
			st, err := store.Open(filepath.Join(t.TempDir(), "runtime"))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(st.Dir("vm"), 0o700); err != nil {
				t.Fatal(err)
			}
			var ports upkeep.Upkeep
			defer ports.Close()
			a := s.guestWith(0, func(g *filter.Guest) {
				g.Ports = []filter.Port{
					{Host: 8000, Guest: 80, Protocol: "tcp"},
					{Host: 8000, Guest: 80, Protocol: "udp"},
					{Address: netip.IPv6Loopback(), Host: 9001, Guest: 80, Protocol: "tcp"},
				}
			}, func(g *guest) error {
				return ports.Publish(t.Context(), attach.VM{ID: "vm", Store: st}, &g.filter,
					func(ctx context.Context, e journal.Effect) error {
						return e.Apply(ctx)
					})
			})
			a.Serve(":80", "web")
			for _, address := range []string{"[::1]:8000", "127.0.0.1:8000", "[::1]:9001"} {
				if got := nettest.Ask("tcp", address, 5*time.Second); got != "web from 172.30.0.1\n" {
					t.Errorf("%s: got %q", address, got)
				}
			}
			if got := nettest.Ask("udp", "[::1]:8000", 5*time.Second); got != "web from 172.30.0.1\n" {
				t.Errorf("by UDP: got %q", got)
			}
			if got := s.outside.Ask("tcp", "["+uplink6+"]:8000"); got != "web from "+world6+"\n" {
				t.Errorf("from outside: got %q", got)
			}
			if !s.outside.Silent("tcp", "["+uplink6+"]:9001") {
				t.Error("what is published on ::1 is open to others")
			}
		})
	}
}

// A published port leads to the guest that has it now, at once: the host does not go on with the
// MAC of the one before.
func TestNetwork_PortsReplaced(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	publish := func(g *filter.Guest) { g.Ports = []filter.Port{{Host: 8000, Guest: 80, Protocol: "tcp"}} }
	a, _ := s.guest(0, publish), s.guest(1, nil) // the other keeps the network up
	for _, name := range []string{"first", "second", "third"} {
		a.Serve(":80", name)
		for _, address := range []string{uplink4 + ":8000", "[" + uplink6 + "]:8000"} {
			if got := s.outside.Ask("tcp", address); !strings.HasPrefix(got, name+" from ") {
				t.Errorf("%s: got %q, want %q", address, got, name)
			}
		}
		s.remove(a)
		removeLink(t, a.filter.Tap)
		a = s.guest(0, func(g *filter.Guest) {
			publish(g)
			g.MAC = network.MAC(name, "another").String()
		})
	}
}

// From guest to guest by what is published: on a network whose guests reach each other, and on one
// whose guests do not, as what is published is for all; but not past a policy.
func TestNetwork_Hairpin(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	for _, mutual := range []bool{false, true} {
		for _, on := range []bool{false, true} {
			t.Run(fmt.Sprintf("mutual %v, bridge netfilter %v", mutual, on), func(t *testing.T) {
				s := newSite(t, func(c *network.Config) { c.Mutual = mutual })
				t.Cleanup(func() { clearNetwork(t); cutCables(t) })
				nettest.BridgeNetfilter(t, on)
				a := s.guest(0, func(g *filter.Guest) { g.Ports = []filter.Port{{Host: 8000, Guest: 80, Protocol: "tcp"}} })
				b := s.guest(1, nil)
				c := s.guest(2, func(g *filter.Guest) { g.Policy = &policy.Policy{DefaultAction: policy.Deny} })
				a.Serve(":80", "web")
				for _, g := range []*guest{a, b} {
					// Where IP rules see bridged packets, the bridge takes those that lead back to it for its own:
					// not from a port to itself, nor between ports that are isolated.
					if on && (!mutual || g == a) {
						g.misses(t, "tcp", uplink4+":8000")
						continue
					}
					for _, address := range []string{uplink4 + ":8000", "172.30.0.1:8000"} {
						g.reaches(t, "tcp", address, "web from 172.30.0.1\n")
					}
					if got := g.Ask("tcp", "["+uplink6+"]:8000"); !strings.HasPrefix(got, "web from ") {
						t.Errorf("by IPv6: %q", got)
					}
				}
				c.misses(t, "tcp", uplink4+":8000")
				if mutual {
					b.reaches(t, "tcp", "172.30.0.2:80", "web from 172.30.0.3\n")
				} else {
					b.misses(t, "tcp", "172.30.0.2:80")
				}
				if got := s.outside.Ask("tcp", uplink4+":8000"); got != "web from "+world4+"\n" {
					t.Errorf("from outside: %q", got)
				}
			})
		}
	}
}

// What begins while somebody has flushed the rules ends when they are back.
func TestNetwork_FlushedMeanwhile(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	if err := nettest.Serve(t, ":22", "host"); err != nil {
		t.Fatal(err)
	}
	g := s.guest(0, nil)
	echo, err := net.ListenPacket("udp", ":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		buf := make([]byte, 64)
		for {
			n, peer, err := echo.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteTo(buf[:n], peer)
		}
	}()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	// Another's rules go on to have the kernel know connections.
	keep := func() {
		table := conn.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyINet})
		chain := conn.AddChain(
			&nftables.Chain{
				Table: table, Name: "in", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput,
				Priority: nftables.ChainPriorityFilter,
			})
		conn.AddRule(
			&nftables.Rule{
				Table: table, Chain: chain,
				Exprs: []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}, &expr.Counter{}},
			})
	}
	g.misses(t, "tcp", "172.30.0.1:22")
	conn.FlushRuleset()
	keep()
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	var c net.Conn
	g.Must(func() (err error) { c, err = net.Dial("udp", "172.30.0.1:9000"); return err })
	defer c.Close()
	if !answers(t, c, 5*time.Second) {
		t.Fatal("without rules the host does not answer either")
	}
	g.reaches(t, "tcp", "172.30.0.1:22", "host from 172.30.0.2\n")
	if n, _, err := g.use.Check(t.Context()); err != nil || n != 1 {
		t.Fatalf("restored %d times, %v", n, err)
	}
	if err := g.filter.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if answers(t, c, 300*time.Millisecond) {
		t.Error("a connection that the rules do not allow goes on")
	}
	g.misses(t, "tcp", "172.30.0.1:22")
	s.remove(g)
}

// Rules of an earlier version are replaced while guests use them, and what is under way goes on.
func TestNetwork_Upgrade(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	setVariable(t, "netfilter/nf_conntrack_acct", "1")
	s.outside.Serve(":80", "world")
	g := s.guest(0, nil)
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := &nftables.Table{Name: s.config.Table(), Family: nftables.TableFamilyINet}
	chain := &nftables.Chain{Table: table, Name: "forward"}
	rules, err := conn.GetRules(table, chain)
	if err != nil || len(rules) == 0 {
		t.Fatal(rules, err)
	}
	// As before there were versions: the last rule says nothing of one, and a set is missing.
	if err := conn.DelRule(rules[len(rules)-1]); err != nil {
		t.Fatal(err)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	var c net.Conn
	g.Must(func() (err error) { c, err = net.Dial("udp", world4+":80"); return err })
	defer c.Close()
	ask := func() string {
		buf := make([]byte, 64)
		_, err := c.Write([]byte("?"))
		if err == nil {
			err = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		}
		if err != nil {
			t.Fatal(err)
		}
		n, _ := c.Read(buf)
		return string(buf[:n])
	}
	packets := func() uint64 {
		all, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range all {
			if f.Forward.DstIP.String() == world4 && f.Forward.Protocol == unix.IPPROTO_UDP {
				return f.Forward.Packets
			}
		}
		return 0
	}
	ask()
	if n, _, err := g.use.Check(t.Context()); err != nil || n != 1 {
		t.Fatalf("restored %d times, %v", n, err)
	}
	if err := g.filter.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n, _, err := g.use.Check(t.Context()); err != nil || n != 1 {
		t.Errorf("restored %d times, %v", n, err)
	}
	if got := ask(); got != "world from "+uplink4+"\n" || packets() != 2 {
		t.Errorf("the connection says %q, and has had %d packets, want 2", got, packets())
	}
	s.remove(g)
}

// Who has an address after another guest has none of its connections: by what is known he would
// pass his own policy.
func TestNetwork_Reused(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	a := s.guest(0, nil)
	for _, world := range []string{world4, "[" + world6 + "]"} {
		var c net.Conn
		a.Must(func() (err error) { c, err = net.Dial("udp", world+":80"); return err })
		defer c.Close()
		ask := func(wait time.Duration) bool {
			answer := make([]byte, 64)
			_, err := c.Write([]byte("?"))
			if err == nil {
				err = c.SetReadDeadline(time.Now().Add(wait))
			}
			if err != nil {
				t.Fatal(err)
			}
			n, _ := c.Read(answer)
			return n > 0
		}
		if !ask(10 * time.Second) {
			t.Fatalf("%s does not answer", world)
		}
		if err := a.filter.Revert(t.Context()); err != nil {
			t.Fatal(err)
		}
		a.filter.Policy = &policy.Policy{DefaultAction: policy.Deny}
		if err := a.filter.Apply(t.Context()); err != nil {
			t.Fatal(err)
		}
		if ask(time.Second) {
			t.Errorf("%s answers what no rule allows", world)
		}
		if err := a.filter.Revert(t.Context()); err != nil {
			t.Fatal(err)
		}
		a.filter.Policy = nil
		if err := a.filter.Apply(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.remove(a)
}

// datagramPort is where a datagram comes from.
const datagramPort = 7777

// datagram sends one from outside to the host's MAC, whatever its address.
func (s *site) datagram(t *testing.T, to string, port uint16) {
	t.Helper()
	uplink, err := net.InterfaceByName("uplink")
	if err != nil {
		t.Fatal(err)
	}
	udp := binary.BigEndian.AppendUint16(nil, datagramPort)
	udp = binary.BigEndian.AppendUint16(udp, port)
	udp = append(udp, 0, 9, 0, 0, '?')
	ip := append([]byte{0x45, 0, 0, byte(20 + len(udp)), 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0},
		net.ParseIP(world4).To4()...)
	ip = append(ip, net.ParseIP(to).To4()...)
	sum := uint32(0)
	for i := 0; i < len(ip); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	s.outside.Must(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		host := unix.SockaddrLinklayer{Ifindex: eth0.Index, Halen: 6, Protocol: 0x0008} // IPv4, in the network's order
		copy(host.Addr[:], uplink.HardwareAddr)
		return unix.Sendto(fd, append(ip, udp...), 0, &host)
	})
}

// The first rule that matches decides.
func TestNetwork_Policy(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, func(c *network.Config) {
		c.Policy = &policy.Policy{Rules: []policy.Rule{{Action: policy.Deny, Destination: "203.0.113.0/24"}}}
	})
	for _, port := range []string{":80", ":81", ":443"} {
		s.outside.Serve(port, "world")
	}
	a := s.guest(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{DefaultAction: policy.Deny, Rules: []policy.Rule{
			{Action: policy.Deny, Protocol: "tcp", Destination: world4, Ports: policy.Ports{{First: 81, Last: 81}}},
			{
				Action: policy.Allow, Protocol: "tcp", Destination: "198.51.100.0/24",
				Ports: policy.Ports{{First: 80, Last: 82}, {First: 85, Last: 85}},
			},
			{Action: policy.Allow, Destination: "203.0.113.9"},
		}}
	})
	b := s.guest(1, nil)
	a.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	a.misses(t, "tcp", world4+":81")
	a.misses(t, "tcp", world4+":443")
	a.misses(t, "udp", world4+":80")
	a.misses(t, "tcp", "["+world6+"]:80")
	a.misses(t, "tcp", "203.0.113.9:80") // the network's policy wins
	for tap, want := range map[string][]string{
		a.filter.Tap: {
			"deny tcp:198.51.100.2:81 true", "allow tcp:198.51.100.0/24:80-82,85 true", "allow 203.0.113.9 false",
			"default deny true",
		},
		"": {"deny 203.0.113.0/24 true", "default allow true"},
	} {
		counts, err := inspect.Counts(s.config.Table(), tap)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range counts {
			got = append(got, fmt.Sprint(c.Rule, " ", c.Packets > 0 && c.Bytes > 0))
		}
		if !slices.Equal(got, want) {
			t.Errorf("counters of %q: got %q, want %q", tap, got, want)
		}
	}
	b.reaches(t, "tcp", world4+":443", "world from "+uplink4+"\n")
	b.misses(t, "tcp", "203.0.113.9:80")
	s.remove(a)
	s.remove(a)
}

// What a guest may not reach says so at once, and is not waited for; what comes from outside is
// told nothing.
func TestNetwork_Refused(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes("169.254.169.254/32")}.Configure)
	route(t, "169.254.169.254/32", world4)
	g := s.guest(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{
			Rules: []policy.Rule{{Action: policy.Deny, Destination: world4}, {Action: policy.Deny, Destination: world6}},
		}
	})
	other := s.guest(1, nil)
	for _, tt := range []struct {
		network, address string
		want             error
	}{
		{"tcp", world4 + ":80", unix.ECONNREFUSED},
		{"tcp", "[" + world6 + "]:80", unix.ECONNREFUSED},
		{"udp", world4 + ":80", unix.EHOSTUNREACH},
		{"tcp", "172.30.0.1:22", unix.ECONNREFUSED},
		{"tcp", uplink4 + ":22", unix.ECONNREFUSED},
		{"tcp", "169.254.169.254:80", unix.ECONNREFUSED},
	} {
		g.Must(func() error {
			c, err := net.DialTimeout(tt.network, tt.address, 10*time.Second)
			if err == nil {
				_, err = c.Write([]byte("?"))
				if err == nil {
					_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
					_, err = c.Read(make([]byte, 64))
				}
				_ = c.Close()
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("%s %s: got %v, want %v", tt.network, tt.address, err, tt.want)
			}
			return nil
		})
	}
	other.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	s.outside.Must(func() error {
		_, dst, _ := net.ParseCIDR("172.30.0.0/24")
		return netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(uplink4)})
	})
	s.outside.Must(func() error {
		c, err := net.DialTimeout("tcp", "172.30.0.2:80", 300*time.Millisecond)
		var late net.Error
		if !errors.As(err, &late) || !late.Timeout() {
			t.Errorf("from outside: %v, %v, want silence", c, err)
		}
		return nil
	})
	s.remove(g)
}

// A bridge or tables that somebody else has made are neither taken over nor removed.
func TestUse_Foreign(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = s.config.Bridge
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
	before := hosts(t)
	u := s.use("a")
	if err := u.Apply(t.Context()); !errors.Is(err, network.ErrTaken) {
		t.Errorf("got %v, want %v", err, network.ErrTaken)
	}
	if err := u.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
	link, err := netlink.LinkByName(s.config.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkDel(link); err != nil {
		t.Fatal(err)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.AddTable(&nftables.Table{Name: s.config.Table(), Family: nftables.TableFamilyBridge})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	before = hosts(t)
	if err := u.Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got %v, want %v", err, fs.ErrExist)
	}
	if err := u.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}
