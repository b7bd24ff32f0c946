package network_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/resolvconf"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/policy"
)

// nameServer serves names on the world's first address, and makes it the host's.
func (s *site) nameServer(names map[string]string) {
	s.t.Helper()
	s.outside.ServeNames(world4, names)
	nettest.Resolver(s.t, world4)
}

// resolve asks a server for a name's IPv4 address, from the guest.
func (g *guest) resolve(t *testing.T, server, name string) string {
	t.Helper()
	return g.resolveType(t, server, name, dnsmessage.TypeA)
}

// resolveType returns the last address of an answer, or else what its code is.
func (g *guest) resolveType(t *testing.T, server, name string, kind dnsmessage.Type) (address string) {
	t.Helper()
	g.Must(func() error {
		conn, err := net.Dial("udp", server)
		if err != nil {
			return err
		}
		defer conn.Close()
		m := dnsmessage.Message{
			Header:    dnsmessage.Header{ID: 1, RecursionDesired: true},
			Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
		}
		packed, err := m.Pack()
		if err != nil {
			return err
		}
		// As resolvers do: a port that has just joined its bridge may lose a datagram.
		buf, n := make([]byte, 1500), 0
		for range 10 {
			if _, err := conn.Write(packed); err != nil {
				return err
			}
			_ = conn.SetReadDeadline(time.Now().Add(time.Second))
			if n, err = conn.Read(buf); err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
		if err != nil {
			address = err.Error()
			return nil
		}
		if err := m.Unpack(buf[:n]); err != nil {
			return err
		}
		address = m.RCode.String()
		for _, r := range m.Answers {
			switch body := r.Body.(type) {
			case *dnsmessage.AResource:
				address = netip.AddrFrom4(body.A).String()
			case *dnsmessage.AAAAResource:
				address = netip.AddrFrom16(body.AAAA).String()
			}
		}
		return nil
	})
	return address
}

// A guest reaches the addresses of a name that its policy allows once it has asked for it, and
// those of no other.
func TestNetwork_Names(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.nameServer(map[string]string{"good.example.": "203.0.113.9", "bad.example.": world4, "inner.example.": "172.30.0.1"})
	s.outside.Serve(":80", "world")
	var proxies upkeep.Upkeep
	t.Cleanup(proxies.Close)
	g := s.guestWith(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{DefaultAction: policy.Deny, Rules: []policy.Rule{
			{Action: policy.Allow, Domain: "good.example", Ports: policy.Ports{{First: 80, Last: 80}}},
			{Action: policy.Allow, Domain: "inner.example"},
		}}
	}, func(g *guest) error {
		return proxies.Add(g.use.VMDir, &g.filter, []attach.Interface{{Tap: g.filter.Tap, Network: s.config}},
			slog.New(slog.DiscardHandler))
	})
	g.misses(t, "tcp", "203.0.113.9:80")
	for _, server := range []string{"172.30.0.1:53", "192.0.2.53:53"} { // whomever it asks
		for name, want := range map[string]string{
			"good.example.": "203.0.113.9", "bad.example.": "RCodeNameError", "x.good.example.": "RCodeNameError",
			"inner.example.": "RCodeSuccess",
		} {
			if got := g.resolve(t, server, name); got != want {
				t.Errorf("%s by %s: got %s, want %s", name, server, got, want)
			}
		}
	}
	g.reaches(t, "tcp", "203.0.113.9:80", "world from "+uplink4+"\n")
	g.misses(t, "udp", world4+":80")
	g.misses(t, "tcp", world4+":80")
	g.misses(t, "tcp", "203.0.113.9:81")
	proxies.Close()
	if got := g.resolve(t, "172.30.0.1:53", "good.example."); got == "203.0.113.9" {
		t.Error("there is an answer without a proxy")
	}
	s.remove(g)
}

// A guest has names whatever server its host asks, where only the host reaches that too, and as it
// is now; what it asks others itself goes there.
func TestNetwork_Resolver(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.ServeNames(world4, map[string]string{"who.example.": "192.0.2.1"})
	s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes("169.254.169.254/32")}.Configure)
	route(t, "169.254.169.254/32", world4)
	s.outside.ServeNames("169.254.169.254", map[string]string{"who.example.": "192.0.2.2"})
	g, _ := s.namedGuest(0, nil)
	here := map[string]string{"127.0.0.1": "192.0.2.3", "127.0.0.53": "192.0.2.4", uplink4: "192.0.2.5"}
	for server, answer := range here {
		if err := nettest.ServeNames(t, server, map[string]string{"who.example.": answer}); err != nil {
			t.Fatal(err)
		}
	}
	here[world4], here["169.254.169.254"] = "192.0.2.1", "192.0.2.2"
	for server, want := range here {
		nettest.Resolver(t, server)
		if got := g.resolve(t, "172.30.0.1:53", "who.example."); got != want {
			t.Errorf("with %s as the host's server: got %s, want %s", server, got, want)
		}
	}
	var proxies upkeep.Upkeep
	t.Cleanup(proxies.Close)
	own := s.guestWith(1, nil, func(g *guest) error {
		i := attach.Interface{Tap: g.filter.Tap, Network: s.config, DNS: addresses(world4)}
		return proxies.Add(g.use.VMDir, &g.filter, []attach.Interface{i}, slog.New(slog.DiscardHandler))
	})
	nettest.Resolver(t, "127.0.0.1")
	if got := own.resolve(t, "172.30.0.1:53", "who.example."); got != "192.0.2.1" {
		t.Errorf("with a server of its own: got %s", got)
	}
	s.remove(own)
	if got := g.resolve(t, world4+":53", "who.example."); got != "192.0.2.1" {
		t.Errorf("of another server: got %s", got)
	}
	s.remove(g)
}

// Guests of a mutual network find each other by name, whatever their policies say of other names;
// those of an isolated one do not.
func TestNetwork_Neighbours(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	for _, mutual := range []bool{true, false} {
		s := newSite(t, func(c *network.Config) { c.Mutual = mutual })
		s.nameServer(map[string]string{"web.": "192.0.2.66", "WEB.": "192.0.2.66"})
		named, err := os.MkdirTemp(t.TempDir(), "vm")
		if err != nil {
			t.Fatal(err)
		}
		ip4, ip6 := s.config.Guest(7)
		web := &network.Use{
			Dir: s.dir, Network: s.config, VM: "web", VMDir: named, Name: "Web",
			Addresses: []netip.Addr{ip4, ip6},
		}
		if err := web.Apply(t.Context()); err != nil {
			t.Fatal(err)
		}
		free, _ := s.namedGuest(0, nil)
		closed, _ := s.namedGuest(1,
			&policy.Policy{DefaultAction: policy.Deny, Rules: []policy.Rule{{Action: policy.Allow, Domain: "good.example"}}})
		want := map[bool][3]string{
			true:  {"172.30.0.9", ip6.String(), "172.30.0.9"},
			false: {"192.0.2.66", "RCodeSuccess", "RCodeNameError"},
		}[mutual]
		got := [3]string{
			free.resolve(t, "172.30.0.1:53", "WEB."), free.resolveType(t, "172.30.0.1:53", "web.", dnsmessage.TypeAAAA),
			closed.resolve(t, "172.30.0.1:53", "web."),
		}
		if got != want {
			t.Errorf("mutual %v: got %q, want %q", mutual, got, want)
		}
		again := *web
		again.VM, again.Addresses = "web-2", []netip.Addr{ip4.Next()}
		if err := errors.Join(again.Apply(t.Context()), web.Revert(t.Context())); err != nil {
			t.Fatal(err)
		}
		if got := free.resolve(t, "172.30.0.1:53", "web."); mutual && got != ip4.Next().String() {
			t.Errorf("of the VM that has the name now: got %s", got)
		}
		if err := again.Revert(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := free.resolve(t, "172.30.0.1:53", "web."); got != "192.0.2.66" {
			t.Errorf("of a VM that is gone: got %s", got)
		}
		s.remove(free)
		s.remove(closed)
		cutCables(t)
	}
}

// When a bridge has been removed and is another, the proxies serve there.
func TestNetwork_ResolverNewBridge(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.nameServer(map[string]string{"who.example.": "192.0.2.1"})
	g, upkeep := s.namedGuest(0, nil)
	if got := g.resolve(t, "172.30.0.1:53", "who.example."); got != "192.0.2.1" {
		t.Fatalf("before: got %s", got)
	}
	removeLink(t, s.config.Bridge)
	// The cable stands for the tap.
	effects := []journal.Effect{g.use, &network.Tap{Name: g.filter.Tap, Bridge: s.config.Bridge}, &g.filter}
	for range 2 { // the second finds nothing to do
		if err := upkeep.Heal(t.Context(), effects); err != nil {
			t.Fatal(err)
		}
	}
	if got := g.resolve(t, "172.30.0.1:53", "who.example."); got != "192.0.2.1" {
		t.Errorf("on the new bridge: got %s", got)
	}
	// A port that somebody has taken from it is one again.
	port, err := netlink.LinkByName(g.filter.Tap)
	if err == nil {
		err = netlink.LinkSetNoMaster(port)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := upkeep.Heal(t.Context(), effects); err != nil {
		t.Fatal(err)
	}
	if got := g.resolve(t, "172.30.0.1:53", "who.example."); got != "192.0.2.1" {
		t.Errorf("after the port was taken: got %s", got)
	}
	s.remove(g)
}

// Rules that are put back cut no guest's cable: what is behind it would look for its gateway again,
// perhaps before its part is there.
func TestNetwork_FlushedCable(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	g, upkeep := s.namedGuest(0, nil)
	effects := []journal.Effect{g.use, &network.Tap{Name: g.filter.Tap, Bridge: s.config.Bridge}, &g.filter}
	heal := func() (cut bool) {
		t.Helper()
		before := carrierChanges(t, g.filter.Tap)
		if err := upkeep.Heal(t.Context(), effects); err != nil {
			t.Fatal(err)
		}
		g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
		return carrierChanges(t, g.filter.Tap) != before
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	if heal() {
		t.Error("the cable was cut, though the bridge is the same")
	}
	// A port of another bridge is none like any other, not for a moment.
	removeLink(t, s.config.Bridge)
	if !heal() {
		t.Error("the cable was not cut when it was led to another bridge")
	}
	s.remove(g)
}

func carrierChanges(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/class/net", name, "carrier_changes"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// By a tunnel guests ask the servers that it has, else those of the host that can be beyond it:
// never the host's own.
func TestNetwork_ResolverVia(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, func(c *network.Config) { c.WireGuard = "tunnel" })
	beyond := nettest.New(t)
	beyond.Connect(nettest.Link{Name: "tunnel", Addresses: prefixes("10.7.0.1/24")},
		nettest.Link{Name: "eth0", Addresses: prefixes("10.7.0.2/24", world4+"/32")})
	beyond.Must(func() error { return os.WriteFile("/proc/sys/net/ipv4/conf/eth0/proxy_arp", []byte("1"), 0) })
	beyond.ServeNames(world4, map[string]string{"who.example.": "203.0.113.8"})
	// As systemd-resolved has it: a stub on the host's loopback, and beside it what that asks.
	if err := nettest.ServeNames(t, "127.0.0.53", map[string]string{"who.example.": "203.0.113.66"}); err != nil {
		t.Fatal(err)
	}
	nettest.Resolver(t, "127.0.0.53")
	if err := unix.Mount("none", "/run", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	g, _ := s.namedGuest(0, nil)
	if got := g.resolve(t, "172.30.0.1:53", "who.example."); got != "RCodeServerFailure" {
		t.Errorf("with nothing but the stub: got %s", got)
	}
	if err := os.MkdirAll(filepath.Dir(resolvconf.Stub), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(resolvconf.Stub, []byte("nameserver "+world4+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := g.resolve(t, "172.30.0.1:53", "who.example."); got != "203.0.113.8" {
		t.Errorf("by the tunnel: got %s", got)
	}
	s.remove(g)
}

// namedGuest is a guest of a network whose policy has names, with its own proxy.
func (s *site) namedGuest(n int, own *policy.Policy) (*guest, *upkeep.Upkeep) {
	s.t.Helper()
	proxies := new(upkeep.Upkeep)
	s.t.Cleanup(proxies.Close)
	g := s.guestWith(n, func(g *filter.Guest) { g.Policy = own }, func(g *guest) error {
		return proxies.Add(g.use.VMDir, &g.filter, []attach.Interface{{Tap: g.filter.Tap, Network: s.config}},
			slog.New(slog.DiscardHandler))
	})
	return g, proxies
}

// Names in the network's own policy hold for each guest on it, and only after it has asked; a
// guest's own policy can only narrow them.
func TestNetwork_NamesForAll(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	const good6 = "2001:db8:9::9"
	s := newSite(t, func(c *network.Config) {
		c.Policy = &policy.Policy{DefaultAction: policy.Deny, Rules: []policy.Rule{
			{Action: policy.Deny, Destination: "203.0.113.9", Protocol: "tcp", Ports: policy.Ports{{First: 81, Last: 81}}},
			{Action: policy.Allow, Domain: "good.example"},
			{Action: policy.Allow, Domain: "world.example", Protocol: "tcp"},
			{Action: policy.Allow, Domain: "inner.example"},
		}}
	})
	if err := s.config.Validate(); err != nil {
		t.Fatal(err)
	}
	s.nameServer(
		map[string]string{
			"good.example.": "203.0.113.9 " + good6, "world.example.": world4, "bad.example.": world4,
			"inner.example.": "10.0.0.1 192.168.0.1",
		})
	s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes(good6 + "/128")}.Configure)
	route(t, good6+"/128", world6)
	for _, port := range []string{":80", ":81"} {
		s.outside.Serve(port, "world")
	}
	before := hosts(t)
	free, _ := s.namedGuest(0, nil)
	silent, _ := s.namedGuest(1, nil)
	narrow, proxies := s.namedGuest(2, &policy.Policy{Rules: []policy.Rule{{Action: policy.Deny, Destination: world4}}})
	named, _ := s.namedGuest(3, &policy.Policy{DefaultAction: policy.Deny, Rules: []policy.Rule{
		{Action: policy.Allow, Domain: "world.example"},
		{Action: policy.Allow, Domain: "bad.example"},
		{Action: policy.Allow, Destination: "10.0.0.0/8"},
	}})
	mute, _ := s.namedGuest(4, &policy.Policy{DefaultAction: policy.Deny})
	bare := s.guest(5, nil) // without anybody to ask
	bare.misses(t, "tcp", world4+":80")
	free.misses(t, "tcp", "203.0.113.9:80")
	for g, answers := range map[*guest]map[string]string{
		free: {
			"good.example.": "203.0.113.9", "world.example.": world4, "bad.example.": "RCodeNameError",
			"inner.example.": "RCodeSuccess",
		},
		narrow: {"good.example.": "203.0.113.9", "world.example.": world4},
		named:  {"good.example.": "RCodeNameError", "world.example.": world4, "bad.example.": "RCodeNameError"},
		mute:   {"good.example.": "RCodeNameError"},
	} {
		for name, want := range answers {
			if got := g.resolve(t, "192.0.2.53:53", name); got != want {
				t.Errorf("%s has %s as %s, want %s", g.filter.IP4, name, got, want)
			}
		}
	}
	if got := free.resolveType(t, "172.30.0.1:53", "good.example.", dnsmessage.TypeAAAA); got != good6 {
		t.Errorf("IPv6: got %s, want %s", got, good6)
	}
	free.reaches(t, "tcp", "203.0.113.9:80", "world from "+uplink4+"\n")
	free.reaches(t, "tcp", "["+good6+"]:80", "world from "+uplink6+"\n")
	free.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	free.misses(t, "tcp", "203.0.113.9:81") // a rule before the name's
	free.misses(t, "udp", world4+":80")     // of that name TCP alone
	free.misses(t, "tcp", "["+world6+"]:80")
	silent.misses(t, "tcp", "203.0.113.9:80") // has not asked
	narrow.reaches(t, "tcp", "203.0.113.9:80", "world from "+uplink4+"\n")
	narrow.misses(t, "tcp", world4+":80")
	named.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	named.misses(t, "tcp", "203.0.113.9:80")
	counts, err := inspect.Counts(s.config.Table(), "")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range counts {
		got = append(got, fmt.Sprint(c.Rule, " ", c.Packets > 0))
	}
	if want := []string{
		"deny tcp:203.0.113.9:81 true", "allow good.example true", "allow tcp:world.example true",
		"allow inner.example false", "default deny true",
	}; !slices.Equal(got, want) {
		t.Errorf("the network's rules have counted %q, want %q", got, want)
	}
	proxies.Close()
	if got := narrow.resolve(t, "172.30.0.1:53", "good.example."); got == "203.0.113.9" {
		t.Error("there is an answer without a proxy")
	}
	// Whoever comes to have the address knows nothing of what it was allowed before.
	if err := free.filter.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	free.misses(t, "tcp", "203.0.113.9:80")
	if err := free.filter.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	free.misses(t, "tcp", "203.0.113.9:80")
	for _, g := range []*guest{free, silent, narrow, named, mute, bare} {
		s.remove(g)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

// Of a guest's questions no more are answered than its network allows; another's are.
func TestNetwork_Questions(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	const most = 5
	s := newSite(t, func(c *network.Config) { c.DNSQuestions = most })
	s.nameServer(map[string]string{"who.example.": "192.0.2.1"})
	greedy, _ := s.namedGuest(0, nil)
	other, _ := s.namedGuest(1, nil)
	m := dnsmessage.Message{
		Header: dnsmessage.Header{ID: 1, RecursionDesired: true},
		Questions: []dnsmessage.Question{
			{Name: dnsmessage.MustNewName("who.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
		},
	}
	packed, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	answered := 0
	begun := time.Now()
	greedy.Must(func() error {
		conn, err := net.Dial("udp", "172.30.0.1:53")
		if err != nil {
			return err
		}
		defer conn.Close()
		for range 20 * most {
			if _, err := conn.Write(packed); err != nil {
				return err
			}
		}
		for {
			_ = conn.SetReadDeadline(time.Now().Add(testenv.Patience(300 * time.Millisecond)))
			if _, err := conn.Read(make([]byte, 1500)); err != nil {
				return nil
			}
			answered++
		}
	})
	if allowed := 2*most + int(most*time.Since(begun).Seconds()) + 1; answered < most || answered > allowed {
		t.Errorf("%d of %d questions at once are answered, want from %d to %d", answered, 20*most, most, allowed)
	}
	if got := other.resolve(t, "172.30.0.1:53", "who.example."); got != "192.0.2.1" {
		t.Errorf("another has %s", got)
	}
	s.remove(greedy)
	s.remove(other)
}
