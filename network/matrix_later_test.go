package network_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
)

// later is a host on which a neighbour starts while a network is up, or without one.
type later struct {
	*neighbourhood
	guest  *guest
	upkeep *upkeep.Upkeep
}

func newLater(t *testing.T, guest bool) *later {
	t.Helper()
	for _, v := range []string{"ipv4/conf/all", "ipv4/conf/default", "ipv6/conf/all", "ipv6/conf/default"} {
		setVariable(t, v+"/accept_redirects", "1")
	}
	l := &later{neighbourhood: newNeighbourhood(t, beside{}, false, "2")}
	l.serveNames(t)
	if guest {
		l.guest, l.upkeep = l.publishedGuest()
		l.guest.Serve(":80", "guest")
		sendLoopback(l.guest.Namespace, "172.30.0.1")
		l.outward(t, l.guest)
	}
	return l
}

// comes is the neighbour's start.
func (l *later) comes(t *testing.T, b beside) {
	t.Helper()
	l.beside, l.blocked = b, b.drops || b.dropsOff
	if b.bridge != "" {
		l.addInner(t)
	}
	l.start(t)
	l.repaired(t)
	l.reached = nil
	l.reached = l.look()
}

// repaired is what the process that supervises a VM does when the kernel tells it that something
// has changed.
func (l *later) repaired(t *testing.T) {
	t.Helper()
	if l.guest == nil {
		return
	}
	if _, _, err := l.guest.use.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := l.guest.filter.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// left is what others reach and what of the host's network is not drawn anew for each bridge.
func (l *later) left(t *testing.T) (all []string) {
	t.Helper()
	all = slices.DeleteFunc(l.everything(t), func(s string) bool {
		return strings.HasPrefix(s, "link ") || strings.HasPrefix(s, "address ") || strings.HasPrefix(s, "route ")
	})
	for name, yes := range l.look() {
		if yes {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return all
}

// A neighbour that starts while a network is up has all that it has without one, is told of guests
// as before, may have all rules made anew, and is in the end as where there never was one.
func testComesLater(t *testing.T, b beside) {
	t.Helper()
	needsRules(t)
	if !nettest.Alone(t) {
		return
	}
	var want []string
	t.Run("alone", func(t *testing.T) {
		l := newLater(t, false)
		t.Cleanup(func() { clearNetwork(t); cutCables(t) })
		l.comes(t, b)
		want = l.left(t)
	})
	t.Run("beside a network", func(t *testing.T) {
		l := newLater(t, true)
		t.Cleanup(func() { clearNetwork(t); cutCables(t) })
		l.comes(t, b)
		if l.blocked {
			l.guest.misses(t, "tcp", world4+":80")
			l.tell(t)
		}
		l.works(t, "when told")
		// As a service has it that loads all rules anew.
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		conn.FlushRuleset()
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		l.start(t)
		if l.blocked {
			l.tell(t)
		}
		l.repaired(t)
		l.works(t, "after all rules were flushed")
		l.upkeep.Close()
		l.remove(l.guest)
		removeLink(t, l.guest.filter.Tap)
		l.start(t)
		if diff := cmp.Diff(want, l.left(t)); diff != "" {
			t.Errorf("the host is another than without a network:\n%s", diff)
		}
	})
}

func (l *later) works(t *testing.T, when string) {
	t.Helper()
	l.outward(t, l.guest)
	l.names(t, l.guest)
	l.published(t)
	l.bounded(t, l.guest, true, when)
}

func TestComesLater_Docker20(t *testing.T)   { testComesLater(t, docker20) }
func TestComesLater_Docker28(t *testing.T)   { testComesLater(t, docker28) }
func TestComesLater_Libvirt12(t *testing.T)  { testComesLater(t, libvirt12) }
func TestComesLater_Firewalld2(t *testing.T) { testComesLater(t, firewalld2) }
func TestComesLater_UFW(t *testing.T)        { testComesLater(t, ufw) }

// systemd-networkd, when it starts, removes what it does not know: rules of routes and routes that
// lead by no interface; on interfaces that its files are about, which with "Name=*" are all,
// addresses, routes and entries of neighbours too (seen of version 262 with its defaults). Nobody
// leaves by another way meanwhile, and what is looked at again is whole.
func TestNetworkd(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	for _, all := range []bool{false, true} {
		t.Run(fmt.Sprintf("of all interfaces %v", all), func(t *testing.T) {
			s := newSite(t, func(c *network.Config) { c.WireGuard = "tunnel" })
			t.Cleanup(func() { clearNetwork(t); cutCables(t) })
			beyond := nettest.New(t)
			beyond.Connect(nettest.Link{Name: "tunnel", Addresses: prefixes("10.7.0.1/24")},
				nettest.Link{Name: "eth0", Addresses: prefixes("10.7.0.2/24", world4+"/32")})
			beyond.Must(func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/proxy_arp", []byte("1"), 0) })
			beyond.Serve(":80", "beyond")
			s.outside.Serve(":80", "world")
			before := routing(t)
			g := s.guest(0, func(g *filter.Guest) { g.Ports = []filter.Port{{Host: 8000, Guest: 80, Protocol: "tcp"}} })
			g.Serve(":80", "web")
			works := func() {
				t.Helper()
				g.reaches(t, "tcp", world4+":80", "beyond from 10.7.0.1\n")
				for address, want := range map[string]string{
					uplink4 + ":8000": "web from " + world4 + "\n", "[" + uplink6 + "]:8000": "web from " + world6 + "\n",
				} {
					if got := s.outside.Ask("tcp", address); got != want {
						t.Errorf("%s: got %q, want %q", address, got, want)
					}
				}
			}
			works()
			with := routing(t)
			removeForeign(t, all)
			if got := nettest.Ask("tcp", world4+":80", 5*time.Second); got != "world from "+uplink4+"\n" {
				t.Errorf("the host's own way: got %q", got)
			}
			g.misses(t, "tcp", world4+":80")
			g.misses(t, "udp", world4+":80")
			if _, _, err := g.use.Check(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := g.filter.Apply(t.Context()); err != nil {
				t.Fatal(err)
			}
			works()
			if now := routing(t); !slices.Equal(with, now) {
				t.Errorf("there were %q, are %q", with, now)
			}
			// One rule alone is missed, too.
			rules, err := netlink.RuleList(netlink.FAMILY_V6)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range rules {
				r.Family = netlink.FAMILY_V6
				if r.IifName == s.config.Bridge {
					if err := netlink.RuleDel(&r); err != nil {
						t.Fatal(err)
					}
				}
			}
			if _, _, err := g.use.Check(t.Context()); err != nil {
				t.Fatal(err)
			}
			if now := routing(t); !slices.Equal(with, now) {
				t.Errorf("there were %q, are %q", with, now)
			}
			s.remove(g)
			if after := routing(t); !slices.Equal(before, after) {
				t.Errorf("before %q, after %q", before, after)
			}
		})
	}
}

// removeForeign does what systemd-networkd does.
func removeForeign(t *testing.T, all bool) {
	t.Helper()
	var errs []error
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		errs = append(errs, err)
		for _, r := range rules {
			r.Family = family
			if r.Priority > 0 && r.Priority < 32766 {
				errs = append(errs, netlink.RuleDel(&r))
			}
		}
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		errs = append(errs, err)
		for _, r := range routes {
			const kernel = 2
			if r.Protocol != kernel && (r.LinkIndex == 0 || all && r.Table != unix.RT_TABLE_MAIN) {
				errs = append(errs, netlink.RouteDel(&r))
			}
		}
	}
	if bridge, err := netlink.LinkByName("svbr0"); all {
		errs = append(errs, err)
		addresses, err := netlink.AddrList(bridge, netlink.FAMILY_ALL)
		errs = append(errs, err)
		for _, a := range addresses {
			errs = append(errs, netlink.AddrDel(bridge, &a))
		}
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// VPNs that lead all of the host's traffic, or addresses around the network's own, lead guests' as
// well, and hide nothing of theirs.
func TestBeside_VPN(t *testing.T) {
	needsRules(t)
	if !nettest.Alone(t) {
		return
	}
	const away = "203.0.113.77" // by the VPN
	rule := func(change func(*netlink.Rule)) error {
		r := netlink.NewRule()
		change(r)
		return netlink.RuleAdd(r)
	}
	by := func(table int, to ...string) (errs error) {
		link, err := netlink.LinkByName("vpn")
		if err != nil {
			return err
		}
		for _, p := range to {
			_, dst, err := net.ParseCIDR(p)
			errs = errors.Join(errs, err,
				netlink.RouteAdd(
					&netlink.Route{Dst: dst, LinkIndex: link.Attrs().Index, Gw: net.ParseIP("10.8.0.2"), Table: table}))
		}
		return errs
	}
	for name, up := range map[string]func() error{
		"OpenVPN's def1":        func() error { return by(0, "0.0.0.0/1", "128.0.0.0/1") },
		"a company's 172.16/12": func() error { return by(0, "172.16.0.0/12", away+"/32") },
		"wg-quick's AllowedIPs": func() error { // 0.0.0.0/0
			return errors.Join(by(51820, "0.0.0.0/0"),
				rule(func(r *netlink.Rule) { r.Priority, r.Table, r.SuppressPrefixlen = 32764, unix.RT_TABLE_MAIN, 0 }),
				rule(func(r *netlink.Rule) { r.Priority, r.Table, r.Mark, r.Invert = 32765, 51820, 0xca6c, true }))
		},
		"Tailscale's 100.64/10": func() error {
			return errors.Join(by(52, "100.64.0.0/10", away+"/32"), rule(func(r *netlink.Rule) {
				r.Priority, r.Table = 5270, 52
			}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			const rpFilter = "1" // the strictest
			h := newNeighbourhood(t, beside{}, false, rpFilter)
			t.Cleanup(func() { clearNetwork(t); cutCables(t); removeForeign(t, false) })
			beyond := nettest.New(t)
			beyond.Connect(nettest.Link{Name: "vpn", Addresses: prefixes("10.8.0.1/24")},
				nettest.Link{
					Name: "eth0", Addresses: prefixes("10.8.0.2/24", away+"/32", "172.16.7.7/32", "100.64.7.7/32"),
					Gateways: addresses("10.8.0.1"),
				})
			setVariable(t, "ipv4/conf/vpn/rp_filter", rpFilter)
			if err := up(); err != nil {
				t.Fatal(err)
			}
			beyond.Serve(":80", "beyond")
			if got := nettest.Ask("tcp", away+":80", 5*time.Second); got != "beyond from 10.8.0.1\n" {
				t.Fatalf("the host: got %q", got)
			}
			h.serveNames(t)
			settled(t)
			before := h.everything(t)
			g, upkeep := h.publishedGuest()
			g.Serve(":80", "guest")
			g.reaches(t, "tcp", away+":80", "beyond from 10.8.0.1\n")
			for address, where := range map[string]string{
				"172.16.7.7:80": "a company's 172.16/12", "100.64.7.7:80": "Tailscale's 100.64/10",
			} {
				if where == name {
					g.reaches(t, "tcp", address, "beyond from 10.8.0.1\n")
				}
			}
			g.reaches(t, "tcp", lanPeer+":80", "lan from "+lanHost+"\n")
			nettest.Resolver(t, dnsPeer)
			if got := g.resolve(t, "172.30.0.1:53", "who.example."); got != resolvers[dnsPeer] {
				t.Errorf("a name: got %s", got)
			}
			for from, got := range map[string]string{
				"beyond": beyond.Ask("tcp", "10.8.0.1:8000"), "lan": h.lan.Ask("tcp", lanHost+":8000"),
				"host": nettest.Ask("tcp", "127.0.0.1:8000", 5*time.Second),
			} {
				if !strings.HasPrefix(got, "guest from ") {
					t.Errorf("%s does not reach what is published: %q", from, got)
				}
			}
			if !beyond.Silent("tcp", "172.30.0.2:80") || !g.Silent("tcp", "10.8.0.1:22") {
				t.Error("the VPN's other end and the host are open")
			}
			upkeep.Close()
			h.remove(g)
			removeLink(t, g.filter.Tap)
			if diff := cmp.Diff(before, h.everything(t)); diff != "" {
				t.Errorf("the host is another than before:\n%s", diff)
			}
		})
	}
}

// A host that has IPv6 switched off, now or always, has guests with IPv4, and is as it was.
func TestBeside_NoIPv6(t *testing.T) {
	needsRules(t)
	if !nettest.Alone(t) {
		return
	}
	h := newNeighbourhood(t, beside{}, false, "2")
	for _, of := range []string{"all", "default"} {
		setVariable(t, "ipv6/conf/"+of+"/disable_ipv6", "1")
	}
	h.serveNames(t)
	h.round(t, false)
}
