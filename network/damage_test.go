package network_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/network/rtnl"
	"push.rocks/smartvm/network/watch"
)

// byAnother does what another program does: the kernel tells of a change of rules with the name of
// the thread's program.
func byAnother(t *testing.T, f func() error) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	const name = "/proc/thread-self/comm"
	own, err := os.ReadFile(name)
	if err == nil {
		err = os.WriteFile(name, []byte("nft"), 0)
	}
	if err == nil {
		err = errors.Join(f(), os.WriteFile(name, bytes.TrimSpace(own), 0))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// partOf is all that a guest has on its host, as text: elements of sets, chains, its port, and
// where the bridge and the host have it.
func partOf(t *testing.T, g *guest) (all []string) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyBridge} {
		table := &nftables.Table{Name: g.filter.Table, Family: family}
		sets, err := conn.GetSets(table)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sets {
			elements, err := conn.GetSetElements(s)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range elements {
				if !s.Dynamic && !s.Anonymous {
					verdict := ""
					if e.VerdictData != nil {
						verdict = fmt.Sprint(e.VerdictData.Kind, e.VerdictData.Chain)
					}
					all = append(all, fmt.Sprintf("%s %x: %x %s", s.Name, e.Key, e.Val, verdict))
				}
			}
		}
	}
	chain := &nftables.Chain{
		Table: &nftables.Table{Name: g.filter.Table, Family: nftables.TableFamilyINet},
		Name:  "guest-" + g.filter.Tap,
	}
	if rules, err := conn.GetRules(chain.Table, chain); err == nil {
		all = append(all, fmt.Sprint(len(rules), " rules"))
	}
	port, err := netlink.LinkByName(g.filter.Tap)
	if err != nil {
		t.Fatal(err)
	}
	flags, err := rtnl.Port(port.Attrs().Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, flag := range slices.Sorted(maps.Keys(flags)) {
		if flag != nl.IFLA_BRPORT_STATE {
			all = append(all, fmt.Sprint("port ", flag, " ", flags[flag]))
		}
	}
	all = append(all,
		fmt.Sprint("port flags ", port.Attrs().RawFlags&(unix.IFF_UP|unix.IFF_NOARP), " ",
			variable(t, "ipv6/conf/"+g.filter.Tap+"/disable_ipv6")))
	bridge, err := netlink.LinkByName(g.filter.Bridge())
	if err != nil {
		t.Fatal(err)
	}
	for _, of := range []struct{ link, family int }{
		{port.Attrs().Index, unix.AF_BRIDGE},
		{bridge.Attrs().Index, unix.AF_INET},
		{bridge.Attrs().Index, unix.AF_INET6},
	} {
		entries, err := netlink.NeighList(of.link, of.family)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range entries {
			if n.State&(netlink.NUD_PERMANENT|netlink.NUD_NOARP) != 0 && (n.IP == nil || !n.IP.IsMulticast()) {
				all = append(all, fmt.Sprintf("entry %d %s %s %x", of.family, n.IP, n.HardwareAddr, n.State))
			}
		}
	}
	slices.Sort(all)
	return all
}

// damage is what somebody does to a guest's part.
type damage struct {
	name string
	do   func() error
}

// damages are such to a guest, one by one.
func damages(t *testing.T, g *guest) (all []damage) {
	t.Helper()
	element := func(family nftables.TableFamily, name string, of func(nftables.SetElement) bool,
		change func(*nftables.SetElement),
	) func() error {
		return func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			set, err := conn.GetSetByName(&nftables.Table{Name: g.filter.Table, Family: family}, name)
			if err != nil {
				return err
			}
			elements, err := conn.GetSetElements(set)
			if err != nil {
				return err
			}
			elements = slices.DeleteFunc(elements, func(e nftables.SetElement) bool { return !of(e) })
			if len(elements) == 0 {
				return fmt.Errorf("set %s has nothing of the guest", name)
			}
			if err := conn.SetDeleteElements(set, elements); err != nil {
				return err
			}
			if change != nil {
				for i := range elements {
					change(&elements[i])
				}
				if err := conn.SetAddElements(set, elements); err != nil {
					return err
				}
			}
			return conn.Flush()
		}
	}
	mac, err := net.ParseMAC(g.filter.MAC)
	if err != nil {
		t.Fatal(err)
	}
	key := func(part []byte) func(nftables.SetElement) bool {
		return func(e nftables.SetElement) bool { return bytes.Contains(e.Key, part) }
	}
	leads := func(a netip.Addr) func(nftables.SetElement) bool {
		return func(e nftables.SetElement) bool { return bytes.HasPrefix(e.Val, a.AsSlice()) }
	}
	bridge, inet := nftables.TableFamilyBridge, nftables.TableFamilyINet
	otherPort := func(e *nftables.SetElement) { e.Val = []byte{0, 99} }
	all = []damage{
		{"its MAC", element(bridge, "macs", key(mac), nil)},
		{"its IPv4 address", element(bridge, "senders4", key(mac), nil)},
		{"its IPv6 addresses", element(bridge, "senders6", key(mac), nil)},
		{"its policy", element(inet, "policies", key(mac), nil)},
		{"another policy", element(inet, "policies", key(mac), func(e *nftables.SetElement) {
			e.VerdictData = &expr.Verdict{Kind: expr.VerdictDrop}
		})},
		{"its way to the host", element(inet, "host4", key(g.filter.IP4.AsSlice()), nil)},
		{"its resolver", element(inet, "resolver4", key(g.filter.IP4.AsSlice()), nil)},
		{"another resolver", element(inet, "resolver6", key(g.filter.IP6.AsSlice()), otherPort)},
		{"its port", element(inet, "ports4", leads(g.filter.IP4), nil)},
		{"its port by IPv6", element(inet, "ports6", leads(g.filter.IP6), func(e *nftables.SetElement) { e.Val[17]++ })},
		{"its port at an address", element(inet, "ports-at4", leads(g.filter.IP4), nil)},
		{"a right that it has not", func() error {
			conn, err := nftables.New()
			if err == nil {
				err = conn.SetAddElements(
					&nftables.Set{
						Table: &nftables.Table{Name: g.filter.Table, Family: inet}, Name: "metadata4",
						KeyType: nftables.TypeIPAddr,
					},
					[]nftables.SetElement{{Key: g.filter.IP4.AsSlice()}})
			}
			return errors.Join(err, conn.Flush())
		}},
		{"its chain", func() error {
			conn, err := nftables.New()
			if err != nil {
				return err
			}
			conn.FlushChain(
				&nftables.Chain{Table: &nftables.Table{Name: g.filter.Table, Family: inet}, Name: "guest-" + g.filter.Tap})
			return conn.Flush()
		}},
	}
	for name, flag := range map[string]struct {
		flag int
		on   bool
	}{
		"isolated": {nl.IFLA_BRPORT_ISOLATED, false}, "learning": {nl.IFLA_BRPORT_LEARNING, true},
		"flood":           {nl.IFLA_BRPORT_UNICAST_FLOOD, true},
		"multicast flood": {nl.IFLA_BRPORT_MCAST_FLOOD, true}, "broadcast flood": {nl.IFLA_BRPORT_BCAST_FLOOD, true},
		"neighbour suppression": {nl.IFLA_BRPORT_NEIGH_SUPPRESS, true}, "hairpin": {nl.IFLA_BRPORT_MODE, true},
	} {
		all = append(all, damage{"flag " + name, func() error {
			link, err := netlink.LinkByName(g.filter.Tap)
			if err != nil {
				return err
			}
			return rtnl.SetPort(link.Attrs().Index, map[int]bool{flag.flag: flag.on})
		}})
	}
	link := func(f func(netlink.Link) error) func() error {
		return func() error {
			l, err := netlink.LinkByName(g.filter.Tap)
			if err != nil {
				return err
			}
			return f(l)
		}
	}
	neighbour := func(a netip.Addr, mac net.HardwareAddr) func() error {
		return func() error {
			l, err := netlink.LinkByName(g.filter.Bridge())
			if err != nil {
				return err
			}
			n := &netlink.Neigh{LinkIndex: l.Attrs().Index, IP: a.AsSlice(), State: netlink.NUD_PERMANENT, HardwareAddr: mac}
			if mac == nil {
				return netlink.NeighDel(n)
			}
			return netlink.NeighSet(n)
		}
	}
	return append(all,
		damage{"it is down", link(netlink.LinkSetDown)},
		damage{"it has ARP", link(netlink.LinkSetARPOn)},
		damage{"it is no port", link(netlink.LinkSetNoMaster)},
		damage{"the bridge's entry", link(func(l netlink.Link) error {
			return netlink.NeighDel(
				&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: mac})
		})},
		damage{"the host's entry", neighbour(g.filter.IP4, nil)},
		damage{"the host's IPv6 entry", neighbour(g.filter.IP6, nil)},
		damage{"another's MAC", neighbour(g.filter.IP4, net.HardwareAddr{2, 0, 0, 0, 1, 1})})
}

// damaged is a guest that has all that guests may have, and what repairs it.
func (s *site) damaged(t *testing.T) (*guest, []journal.Effect, attach.Interface) {
	t.Helper()
	g := s.guest(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{AllowHost: true, Rules: []policy.Rule{{Action: policy.Deny, Destination: "203.0.113.0/24"}}}
		g.DNS = 5353
		g.Ports = []filter.Port{
			{Host: 8000, Guest: 80, Protocol: "tcp"},
			{Address: netip.MustParseAddr(uplink4), Host: 8001, Guest: 80, Protocol: "udp"},
		}
	})
	effects := []journal.Effect{g.use, &network.Tap{Name: g.filter.Tap, Bridge: s.config.Bridge}, &g.filter}
	return g, effects, attach.Interface{Tap: g.filter.Tap, Network: s.config, IP4: g.filter.IP4, IP6: g.filter.IP6}
}

// What somebody removes or changes of one guest's part is noticed at once, and made again; while it
// lasts the guest reaches nothing that its policy denies.
func TestNetwork_Damaged(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	g, effects, _ := s.damaged(t)
	other := s.guest(1, nil)
	g.Serve(":80", "web")
	whole, others := partOf(t, g), partOf(t, other)
	works := func(t *testing.T) {
		t.Helper()
		g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
		g.reaches(t, "tcp", "["+world6+"]:80", "world from "+uplink6+"\n")
		if got := s.outside.Ask("tcp", uplink4+":8000"); got != "web from "+world4+"\n" {
			t.Errorf("the published port says %q", got)
		}
		g.misses(t, "tcp", "203.0.113.9:80")
	}
	works(t)
	other.reaches(t, "tcp", "203.0.113.9:80", "world from "+uplink4+"\n")
	for _, d := range damages(t, g) {
		t.Run(d.name, func(t *testing.T) {
			byAnother(t, d.do)
			if slices.Equal(partOf(t, g), whole) {
				t.Fatal("it does no damage")
			}
			g.misses(t, "tcp", "203.0.113.9:80")
			u := new(upkeep.Upkeep)
			defer u.Close()
			if err := u.HealPart(t.Context(), effects); err != nil {
				t.Fatal(err)
			}
			if got := partOf(t, g); !slices.Equal(got, whole) {
				t.Fatalf("after it was repaired:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(whole, "\n"))
			}
		})
	}
	works(t)
	if got := partOf(t, other); !slices.Equal(got, partOf(t, g)) && len(got) != len(others) {
		t.Errorf("another guest's part: %q, want %q", got, others)
	}
	s.remove(g)
	s.remove(other)
}

// hear returns channels for the events that Watch has for who looks after a guest: of the networks,
// and of the guest's part. It ends with the test, or by end.
func hear(t *testing.T, of watch.Of) (events, parts chan struct{}, end func()) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	listens, done := make(chan struct{}, 2), make(chan error, 1)
	events, parts = make(chan struct{}, 2), make(chan struct{}, 1000)
	go func() {
		done <- watch.Watch(ctx, of, func() {
			listens <- struct{}{}
		}, func() { events <- struct{}{} }, func() { parts <- struct{}{} })
	}()
	<-listens
	<-listens
	return events, parts, func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// Of each damage the kernel tells whoever looks after the guest, who is told of nothing that he
// does himself, nor of what others of his program do.
func TestNetwork_DamageSeen(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	const decoy = filter.TablePrefix + "decoy"
	s := newSite(t, nil)
	g, effects, i := s.damaged(t)
	of := watch.Of{
		Tables: []string{s.config.Table(), decoy},
		Ports:  []watch.Port{{Name: i.Tap, Bridge: s.config.Bridge, Addresses: []netip.Addr{i.IP4, i.IP6}}},
	}
	whole := partOf(t, g)
	u := new(upkeep.Upkeep)
	defer u.Close()
	for _, d := range damages(t, g) {
		events, parts, end := hear(t, of)
		byAnother(t, d.do)
		select {
		case <-parts:
		case <-events:
			t.Errorf("%s: somebody is to look at the network, of which nothing is amiss", d.name)
		case <-time.After(testenv.Patience(10 * time.Second)):
			t.Errorf("%s is not seen", d.name)
		}
		end()
		if err := u.HealPart(t.Context(), effects); err != nil {
			t.Fatal(d.name, err)
		}
		if got := partOf(t, g); !slices.Equal(got, whole) {
			t.Errorf("%s: the guest has\n%s\nwant\n%s", d.name, strings.Join(got, "\n"), strings.Join(whole, "\n"))
		}
	}
	// A look at what is as it shall be changes nothing, and is no event to anybody.
	events, parts, end := hear(t, of)
	other := s.guest(1, nil)
	for range 10 {
		if err := u.HealPart(t.Context(), effects); err != nil {
			t.Fatal(err)
		}
	}
	s.remove(other)
	// What comes last ends both of its ears.
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Table = netlink.FAMILY_V4, 5000, 77
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Name: decoy, Family: nftables.TableFamilyINet})
	err = conn.Flush()
	conn.DelTable(table)
	if err := errors.Join(err, conn.Flush(), netlink.RuleAdd(rule), netlink.RuleDel(rule)); err != nil {
		t.Fatal(err)
	}
	<-events
	<-events
	if n := len(parts); n != 0 {
		t.Errorf("%d events of the guest's part, though nothing of it was changed", n)
	}
	end()
	s.remove(g)
}

// A damage is repaired by who is told to look, and again when it comes back, but not as often as
// somebody likes.
func TestUpkeep_Part(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	g, effects, i := s.damaged(t)
	whole := partOf(t, g)
	u := new(upkeep.Upkeep)
	defer u.Close()
	ctx, stop := context.WithTimeout(t.Context(), testenv.Patience(30*time.Second))
	defer stop()
	_, part := u.Look(ctx, "", []attach.Interface{i}, time.Hour, slog.New(slog.DiscardHandler))
	damage := damages(t, g)[3]
	for range 2 {
		looks := 0
		for again := true; again; again = !slices.Equal(partOf(t, g), whole) {
			for range 20 { // somebody insists
				byAnother(t, damage.do)
				if err := u.HealPart(ctx, effects); err != nil {
					t.Fatal(err)
				}
			}
			byAnother(t, damage.do)
			select {
			case <-part:
				looks++
				if err := u.HealPart(ctx, effects); err != nil {
					t.Fatal(err)
				}
			case <-ctx.Done():
				t.Fatal("it is not seen")
			}
		}
		if looks > 1 {
			t.Errorf("%d looks for what one repairs", looks)
		}
	}
	stop()
	s.remove(g)
}

// Guests whose ports are not isolated any more do not reach each other, and one whose port learns
// takes no frames from another.
func TestAttack_PortFlags(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	a, b := s.guest(0, nil), s.guest(1, nil)
	b.Serve(":80", "neighbour")
	for from, to := range map[*guest]*guest{a: b, b: a} {
		mac, err := net.ParseMAC(to.filter.MAC)
		if err != nil {
			t.Fatal(err)
		}
		from.Must(func() error {
			l, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.NeighSet(
				&netlink.Neigh{
					LinkIndex: l.Attrs().Index, IP: to.filter.IP4.AsSlice(), State: netlink.NUD_PERMANENT,
					HardwareAddr: mac,
				})
		})
	}
	index := func(g *guest) int {
		l, err := netlink.LinkByName(g.filter.Tap)
		if err != nil {
			t.Fatal(err)
		}
		return l.Attrs().Index
	}
	for _, g := range []*guest{a, b} {
		if err := rtnl.SetPort(index(g),
			map[int]bool{nl.IFLA_BRPORT_ISOLATED: false, nl.IFLA_BRPORT_LEARNING: true}); err != nil {
			t.Fatal(err)
		}
	}
	at := net.JoinHostPort(b.filter.IP4.String(), "80")
	a.misses(t, "tcp", at)
	steal := func() {
		b.wire(t).send(frameTo(reserved(14), a.filter.MAC, unix.ETH_P_IP, datagram("172.30.0.3:1", uplink4+":9000", "mine")))
	}
	steal()
	if got := learned(t, a.filter.Tap); !slices.Equal(got, []string{a.filter.MAC}) {
		t.Errorf("behind the port of whom it was taken from are %q", got)
	}
	// Without the rule, and the entry as others make them, it would work. Where the rules for IP see
	// bridged packets, these say no too.
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.FlushChain(
		&nftables.Chain{Table: &nftables.Table{Name: s.config.Table(), Family: nftables.TableFamilyBridge}, Name: "forward"})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	want := "neighbour from 172.30.0.2\n"
	if data, _ := os.ReadFile("/proc/sys/net/bridge/bridge-nf-call-iptables"); string(data) == "1\n" {
		want = ""
	}
	a.reaches(t, "tcp", at, want)
	mac, err := net.ParseMAC(a.filter.MAC)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.NeighSet(
		&netlink.Neigh{
			LinkIndex: index(a), Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER,
			HardwareAddr: mac,
		}); err != nil {
		t.Fatal(err)
	}
	steal()
	if got := learned(t, a.filter.Tap); len(got) != 0 {
		t.Errorf("an entry that may move stays: %q", got)
	}
	s.remove(a)
	s.remove(b)
}
