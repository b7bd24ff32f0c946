package network_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
)

// A host that did not forward forwards for guests alone, and is as before in the end; where
// somebody else switches forwarding on meanwhile, or has before, it stays on for all.
func TestNetwork_Forwarding(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	const lan4, lan6 = "192.0.2.2", "2001:db8:1::2"
	for name, tt := range map[string]struct {
		before, meanwhile bool // the host forwards
		allOrNone         bool // IPv6, in a kernel before 6.17
	}{
		"off": {}, "on": {before: true}, "switched on": {meanwhile: true},
		"off, old kernel": {allOrNone: true}, "switched on, old kernel": {allOrNone: true, meanwhile: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, nil)
			t.Cleanup(func() { clearNetwork(t); cutCables(t) })
			lan := nettest.New(t)
			lan.Connect(
				nettest.Link{Name: "lan", Addresses: prefixes("192.0.2.1/24", "2001:db8:1::1/64")},
				nettest.Link{
					Name: "eth0", Addresses: prefixes(lan4+"/24", lan6+"/64"),
					Gateways: addresses("192.0.2.1", "2001:db8:1::1"),
				})
			s.outside.Must(nettest.Link{Name: "eth0", Gateways: addresses(uplink4, uplink6)}.Configure)
			lan.Serve(":80", "lan")
			s.outside.Serve(":80", "world")
			set := func(on bool) {
				t.Helper()
				for _, v := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
					setVariable(t, v, map[bool]string{true: "1", false: "0"}[on])
				}
			}
			// A hardened host, one of whose interfaces has been told something of its own.
			set(false)
			setVariable(t, "ipv4/conf/all/accept_redirects", "0")
			setVariable(t, "ipv6/conf/lan/forwarding", "1")
			if tt.before {
				set(true)
			}
			if tt.allOrNone {
				nothing := filepath.Join(t.TempDir(), "nothing")
				if err := os.WriteFile(nothing, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				const variable = "/proc/sys/net/ipv6/conf/all/force_forwarding"
				if _, err := os.Stat(variable); err != nil {
					t.Skip("the kernel is such a one: the other cases say it all")
				}
				if err := unix.Mount(nothing, variable, "", unix.MS_BIND, ""); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := unix.Unmount(variable, 0); err != nil {
						t.Error(err)
					}
				})
			}
			before := append(hosts(t), variable(t, "ipv4/conf/lan/forwarding"), variable(t, "ipv6/conf/lan/forwarding"))
			g := s.guest(0, nil)
			for _, proto := range []string{"tcp", "udp"} {
				g.reaches(t, proto, world4+":80", "world from "+uplink4+"\n")
				g.reaches(t, proto, "["+world6+"]:80", "world from "+uplink6+"\n")
				g.reaches(t, proto, lan4+":80", "lan from 192.0.2.1\n")
				g.reaches(t, proto, "["+lan6+"]:80", "lan from 2001:db8:1::1\n")
			}
			// What the host is for others: from outside to behind it, and back.
			across := func(open bool) {
				t.Helper()
				for address, want := range map[string]string{
					lan4 + ":80": "lan from " + world4 + "\n", "[" + lan6 + "]:80": "lan from " + world6 + "\n",
				} {
					if !open && !s.outside.Silent("tcp", address) {
						t.Errorf("the host forwards for others: %s", address)
					} else if got := ""; open {
						if got = s.outside.Ask("tcp", address); got != want {
							t.Errorf("the host does not forward for others any more: %s says %q, want %q", address, got, want)
						}
					}
				}
				for _, address := range []string{world4 + ":80", "[" + world6 + "]:80"} {
					if !open && !lan.Silent("udp", address) {
						t.Errorf("the host forwards for others: %s", address)
					}
				}
			}
			across(tt.before)
			if tt.meanwhile {
				set(true)
				if _, _, err := g.use.Check(t.Context()); err != nil {
					t.Fatal(err)
				}
				across(true)
			}
			g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
			s.remove(g)
			across(tt.before || tt.meanwhile)
			after := append(hosts(t), variable(t, "ipv4/conf/lan/forwarding"), variable(t, "ipv6/conf/lan/forwarding"))
			if tt.meanwhile {
				set(false) // what they had switched on, they switch off
				setVariable(t, "ipv4/conf/all/accept_redirects", "0")
				setVariable(t, "ipv6/conf/lan/forwarding", "1")
				after = append(hosts(t), variable(t, "ipv4/conf/lan/forwarding"), variable(t, "ipv6/conf/lan/forwarding"))
			}
			if !slices.Equal(before, after) {
				t.Errorf("before %q, after %q", before, after)
			}
		})
	}
}

// Somebody who switches forwarding off for all does not cut guests off for good, and interfaces
// that come later are guests' way too.
func TestNetwork_ForwardingComesBack(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	setVariable(t, "ipv4/ip_forward", "1")
	setVariable(t, "ipv6/conf/all/forwarding", "1")
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	g := s.guest(0, nil)
	g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	setVariable(t, "ipv4/ip_forward", "0")
	setVariable(t, "ipv6/conf/all/forwarding", "0")
	g.misses(t, "tcp", world4+":80")
	if _, _, err := g.use.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	g.reaches(t, "tcp", "["+world6+"]:80", "world from "+uplink6+"\n")
	late := nettest.New(t)
	late.Connect(nettest.Link{Name: "late", Addresses: prefixes("192.0.2.1/24")},
		nettest.Link{Name: "eth0", Addresses: prefixes("192.0.2.2/24")})
	late.Serve(":80", "late")
	g.misses(t, "tcp", "192.0.2.2:80")
	if err := os.Chtimes(filepath.Join(s.dir, "forwarding.journal"), time.Time{}, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := g.use.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", "192.0.2.2:80", "late from 192.0.2.1\n")
	s.remove(g)
}

// cutCables removes all of the test's own network.
func cutCables(t *testing.T) {
	t.Helper()
	links := allLinks(t)
	for _, l := range links {
		if l.Type() != "veth" {
			continue
		}
		var gone netlink.LinkNotFoundError
		if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) && !errors.As(err, &gone) {
			t.Error(err) // one whose other end's network is gone goes with that
		}
	}
}

func removeLink(t *testing.T, name string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		t.Error(err)
	}
}

// What somebody changes of a bridge comes back, and its ports stay.
func TestNetwork_BridgeChanged(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, func(c *network.Config) { c.MTU = 1400 })
	s.outside.Serve(":80", "world")
	g := s.guest(0, func(g *filter.Guest) { g.Ports = []filter.Port{{Host: 8000, Guest: 80, Protocol: "tcp"}} })
	g.Serve(":80", "web")
	bridge, err := netlink.LinkByName(s.config.Bridge)
	if err != nil {
		t.Fatal(err)
	}
	restored := 0
	for name, change := range map[string]func() error{
		"address": func() error {
			a, err := netlink.ParseAddr("172.30.0.1/24")
			if err != nil {
				return err
			}
			return netlink.AddrDel(bridge, a)
		},
		"all addresses": func() error {
			list, err := netlink.AddrList(bridge, netlink.FAMILY_ALL)
			for _, a := range list {
				err = errors.Join(err, netlink.AddrDel(bridge, &a))
			}
			return err
		},
		"down": func() error { return netlink.LinkSetDown(bridge) },
		"mtu":  func() error { return netlink.LinkSetMTU(bridge, 1300) },
		"route_localnet": func() error {
			return os.WriteFile("/proc/sys/net/ipv4/conf/svbr0/route_localnet", []byte("0"), 0)
		},
	} {
		if err := change(); err != nil {
			t.Fatal(name, err)
		}
		forgotten := name == "down" || strings.Contains(name, "address") // neighbours: by the kernel
		if forgotten {
			restored++
		}
		if n, _, err := g.use.Check(t.Context()); err != nil || n != restored {
			t.Fatalf("%s: restored %d times, %v, want %d", name, n, err, restored)
		}
		again := g.filter.Loopback // as the process that supervises the VM does
		if forgotten {
			again = func() error { return g.filter.Apply(t.Context()) }
		}
		if err := again(); err != nil {
			t.Fatal(name, err)
		}
		if got := g.Ask("tcp", world4+":80"); got != "world from "+uplink4+"\n" {
			t.Errorf("%s: the guest hears %q", name, got)
		}
		if got := nettest.Ask("tcp", "127.0.0.1:8000", 5e9); got != "web from 172.30.0.1\n" {
			t.Errorf("%s: by the loopback: %q", name, got)
		}
		now, err := netlink.LinkByName(s.config.Bridge)
		if err != nil || now.Attrs().MTU != 1400 || now.Attrs().Index != bridge.Attrs().Index {
			t.Errorf("%s: the bridge is %+v, %v", name, now.Attrs(), err)
		}
	}
	s.remove(g)
}

func addresses(all ...string) (a []netip.Addr) {
	for _, text := range all {
		a = append(a, netip.MustParseAddr(text))
	}
	return a
}
