package network_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/policy"
)

// Behind link-local addresses clouds keep credentials, and VMMs metadata: what is not answered by
// the VMM itself goes nowhere, whatever rules allow, unless the policy says allowMetadata.
func TestNetwork_Metadata(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	// AWS's, and those of its containers; Azure's, Alibaba's, Oracle's; of IPv6 AWS's and Google's;
	// and the ways to those of IPv4 by IPv6.
	cloud := []string{
		"169.254.169.254", "169.254.170.2", "168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254",
		"fd00:ec2::23", "fd20:ce::254",
	}
	for _, text := range cloud[:5] {
		b := netip.MustParseAddr(text).As4()
		cloud = append(cloud, fmt.Sprintf("64:ff9b::%x:%x", b[:2], b[2:]), fmt.Sprintf("2002:%x:%x::1", b[:2], b[2:]))
	}
	any := &policy.Policy{}
	for _, text := range cloud {
		a := netip.MustParseAddr(text)
		p := netip.PrefixFrom(a, a.BitLen())
		s.outside.Must(nettest.Link{Name: "eth0", Addresses: []netip.Prefix{p}}.Configure)
		route(t, p.String(), map[bool]string{true: world4, false: world6}[a.Is4()])
		any.Rules = append(any.Rules, policy.Rule{Action: policy.Allow, Destination: text})
	}
	s.outside.Serve(":80", "cloud")
	some := &policy.Policy{AllowMetadata: true, Rules: []policy.Rule{{Action: policy.Deny, Destination: cloud[1]}}}
	plain := s.guest(0, nil)
	bold := s.guest(1, func(g *filter.Guest) { g.Policy = any })
	trusted := s.guest(2, func(g *filter.Guest) { g.Policy = some })
	for n, a := range cloud {
		for _, g := range []*guest{plain, bold} {
			g.misses(t, "tcp", net.JoinHostPort(a, "80"))
		}
		want := "cloud from " + uplink4 + "\n"
		switch {
		case n == 1, n == 8+2, n == 8+3: // with the ways to it
			want = ""
		case strings.Contains(a, ":"):
			want = "cloud from " + uplink6 + "\n"
		}
		trusted.reaches(t, "tcp", net.JoinHostPort(a, "80"), want)
	}
}

// A guest of the internet alone reaches no private network, not even the host's LAN, but what its
// own rules say; other guests do.
func TestNetwork_EgressPublic(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	private := []string{
		"10.1.2.3", "172.20.0.1", "192.168.1.1", "100.64.0.9", "198.18.0.1", "fd12::1", "64:ff9b::a01:203",
		"2002:c0a8:101::1",
	}
	for _, text := range append(private, "192.168.1.2", "1.1.1.1", "2606:4700::1111") {
		a := netip.MustParseAddr(text)
		p := netip.PrefixFrom(a, a.BitLen())
		s.outside.Must(nettest.Link{Name: "eth0", Addresses: []netip.Prefix{p}}.Configure)
		route(t, p.String(), map[bool]string{true: world4, false: world6}[a.Is4()])
	}
	s.outside.Serve(":80", "world")
	public := s.guest(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{
			Egress: policy.EgressPublic,
			Rules:  []policy.Rule{{Action: policy.Allow, Destination: "192.168.1.2"}},
		}
	})
	other := s.guest(1, nil)
	ask := func(g *guest, address string) string { return g.Ask("tcp", net.JoinHostPort(address, "80")) }
	for _, a := range private {
		public.misses(t, "tcp", net.JoinHostPort(a, "80"))
		if got := ask(other, a); !strings.HasPrefix(got, "world from ") {
			t.Errorf("%s without a policy: %q", a, got)
		}
	}
	for _, a := range []string{"1.1.1.1", "2606:4700::1111", world4, world6, "192.168.1.2"} {
		if got := ask(public, a); !strings.HasPrefix(got, "world from ") {
			t.Errorf("%s: got %q", a, got)
		}
	}
	counts, err := inspect.Counts(s.config.Table(), public.filter.Tap)
	if err != nil || len(counts) != 3 || counts[1].Rule != "egress public" || counts[1].Packets == 0 {
		t.Errorf("counters %+v, %v", counts, err)
	}
}

// What is denied is not reached by an IPv6 address that stands for it either.
func TestNetwork_Embedded(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	for _, text := range []string{"64:ff9b::cb00:7109", "2002:cb00:7109::1"} { // 203.0.113.9
		s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes(text + "/128")}.Configure)
		route(t, text+"/128", world6)
	}
	s.outside.Serve(":80", "world")
	denied := s.guest(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{Rules: []policy.Rule{{Action: policy.Deny, Destination: "203.0.113.0/24"}}}
	})
	other := s.guest(1, nil)
	for _, a := range []string{"203.0.113.9:80", "[64:ff9b::cb00:7109]:80", "[2002:cb00:7109::1]:80"} {
		denied.misses(t, "tcp", a)
		if got := other.Ask("tcp", a); !strings.HasPrefix(got, "world from ") {
			t.Errorf("%s without a policy: %q", a, got)
		}
	}
	denied.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
}

// A subnet that the host needs for something else is refused with advice, and nothing is left; one
// of which a route leads to more than it, by a gateway or a tunnel, is not.
func TestUse_Overlap(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	byWorld := func(t *testing.T, to ...string) {
		for _, to := range to {
			route(t, to, world4)
		}
	}
	for name, tt := range map[string]struct {
		prepare func(*testing.T)
		want    string // what of the host's; "": the network comes up
	}{
		"part":      {func(t *testing.T) { byWorld(t, "172.30.0.128/25") }, "route to 172.30.0.128/25 by uplink"},
		"same":      {func(t *testing.T) { byWorld(t, "172.30.0.0/24") }, "route to 172.30.0.0/24 by uplink"},
		"neighbour": {func(t *testing.T) { addresses4(t, "uplink", "172.30.7.1/16") }, "route to 172.30.0.0/16 by uplink"},
		"own":       {func(t *testing.T) { addresses4(t, "lo", "172.30.0.7/32") }, "route to 172.30.0.7/32 by lo"},
		"gateway": {func(t *testing.T) {
			addOnLink(t, "uplink", "172.30.0.9")
		}, "gateway 172.30.0.9"},
		"server": {func(t *testing.T) { nettest.Resolver(t, "172.30.0.2") }, "DNS server 172.30.0.2"},
		"another table": {func(t *testing.T) {
			_, dst, _ := net.ParseCIDR("172.30.0.64/26")
			if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(world4), Table: 52}); err != nil {
				t.Fatal(err)
			}
		}, "route to 172.30.0.64/26 by uplink"},

		"company":  {func(t *testing.T) { byWorld(t, "172.16.0.0/12") }, ""},
		"def1":     {func(t *testing.T) { byWorld(t, "0.0.0.0/1", "128.0.0.0/1") }, ""},
		"tunnel":   {func(t *testing.T) { tunnel(t, "172.16.0.0/12") }, ""},
		"unwanted": {func(t *testing.T) { blackhole(t, "172.16.0.0/12") }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, nil)
			t.Cleanup(func() { clearNetwork(t); cutCables(t) })
			tt.prepare(t)
			before := hosts(t)
			u := s.use("a")
			err := u.Apply(t.Context())
			var overlap *network.OverlapError
			var advised interface{ Hint() string }
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" &&
				(!errors.As(err, &overlap) || overlap.Code() != "INVALID_SUBNET" || !strings.HasSuffix(overlap.Error(), tt.want) ||
					!errors.As(err, &advised) || !strings.Contains(advised.Hint(), "--subnet")):
				t.Errorf("got %v, hint %v", err, advised)
			}
			if err := u.Revert(t.Context()); err != nil {
				t.Error(err)
			}
			if after := hosts(t); !slices.Equal(before, after) {
				t.Errorf("before %q, after %q", before, after)
			}
		})
	}
}

// A network that names no subnet gets one that the host does not need, and a route is hidden only
// where there is no other way.
func TestStore_Subnets(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	newSite(t, nil)
	store := &catalog.Store{Dir: t.TempDir()}
	var err error
	if store.Default, err = network.NewDefault("", ""); err != nil {
		t.Fatal(err)
	}
	next := func(name, want string) {
		t.Helper()
		c, err := store.Create(network.Config{Name: name})
		if err != nil || c.Subnet.String() != want {
			t.Errorf("%s: got %v, %v, want %s", name, c.Subnet, err, want)
		}
	}
	next("first", "172.30.1.0/24")
	route(t, "172.30.2.128/25", world4)
	nettest.Resolver(t, "172.30.3.2")
	next("second", "172.30.4.0/24")
	route(t, "172.30.0.0/16", world4)
	next("third", "172.30.5.0/24")
}

func addresses4(t *testing.T, link string, all ...string) {
	t.Helper()
	if err := (nettest.Link{Name: link, Addresses: prefixes(all...)}).Configure(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return // gone with its addresses
		}
		for _, text := range all {
			a, err := netlink.ParseAddr(text)
			if err == nil {
				err = netlink.AddrDel(l, a)
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
}

// addOnLink makes a gateway, in no subnet of the link's, the way to a network far away.
func addOnLink(t *testing.T, name, gateway string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	_, dst, _ := net.ParseCIDR("192.0.2.0/24")
	if err := netlink.RouteAdd(
		&netlink.Route{
			Dst: dst, Gw: net.ParseIP(gateway), LinkIndex: link.Attrs().Index,
			Flags: int(netlink.FLAG_ONLINK),
		}); err != nil {
		t.Fatal(err)
	}
}

// tunnel makes an interface without neighbours the way somewhere, as a VPN does.
func tunnel(t *testing.T, to string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "tun7"
	if err := netlink.LinkAdd(
		&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TUN, NonPersist: false}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := netlink.LinkByName("tun7"); err == nil {
			removeLink(t, "tun7")
		}
	})
	link, err := netlink.LinkByName("tun7")
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err == nil {
		_, dst, _ := net.ParseCIDR(to)
		err = netlink.RouteAdd(&netlink.Route{Dst: dst, LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK})
	}
	if err != nil {
		t.Fatal(err)
	}
}

func blackhole(t *testing.T, to string) {
	t.Helper()
	_, dst, _ := net.ParseCIDR(to)
	r := &netlink.Route{Dst: dst, Type: unix.RTN_BLACKHOLE}
	if err := netlink.RouteAdd(r); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netlink.RouteDel(r); err != nil {
			t.Error(err)
		}
	})
}

// withoutNetfilter runs f on a thread whose kernel has no netfilter: it refuses the socket as one
// that is built without it.
func withoutNetfilter(t *testing.T, f func() error) error {
	t.Helper()
	// On the systems that we know, socket(2) has the family and protocol as its first and third
	// argument.
	load := func(k uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: k}
	}
	unless := func(k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jf: skip}
	}
	answer := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	program := []unix.SockFilter{
		load(0), unless(unix.SYS_SOCKET, 5), load(16), unless(unix.AF_NETLINK, 3), load(32),
		unless(unix.NETLINK_NETFILTER, 1),
		answer(unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)), answer(unix.SECCOMP_RET_ALLOW),
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends, and its filter with it
		filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
		if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0,
			uintptr(unsafe.Pointer(&filter))); errno != 0 {
			done <- errno
			return
		}
		done <- f()
	}()
	return <-done
}

// A kernel whose nftables cannot do is named, with advice, and nothing is left.
func TestUse_TooOld(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	before := hosts(t)
	u := s.use("a")
	err := withoutNetfilter(t, func() error { return u.Apply(t.Context()) })
	var advised interface{ Hint() string }
	if !errors.Is(err, filter.ErrTooOld) || !errors.As(err, &advised) || !strings.Contains(advised.Hint(), "--net none") {
		t.Errorf("got %v, hint %v", err, advised)
	}
	if err := u.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}
