package network_test

import (
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
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
		if _, err := conn.Write(packed); err != nil {
			return err
		}
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, 1500)
		n, err := conn.Read(buf)
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

// A guest reaches the addresses of a name that its policy allows once it has asked for it, and those of no other.
func TestNetwork_Names(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.nameServer(map[string]string{"good.example.": "203.0.113.9", "bad.example.": world4, "inner.example.": "172.30.0.1"})
	s.outside.Serve(":80", "world")
	var proxies attach.Upkeep
	t.Cleanup(proxies.Close)
	g := s.guestWith(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{DefaultAction: policy.Deny, Rules: []policy.Rule{
			{Action: policy.Allow, Domain: "good.example", Ports: policy.Ports{{First: 80, Last: 80}}},
			{Action: policy.Allow, Domain: "inner.example"},
		}}
	}, func(g *guest) error {
		return proxies.Add(filepath.Dir(s.dir), &g.filter, []attach.Interface{{Tap: g.filter.Tap, Network: s.config}}, slog.New(slog.DiscardHandler))
	})
	g.misses(t, "tcp", "203.0.113.9:80")
	for _, server := range []string{"172.30.0.1:53", "192.0.2.53:53"} { // whomever it asks
		for name, want := range map[string]string{
			"good.example.": "203.0.113.9", "bad.example.": "RCodeNameError", "x.good.example.": "RCodeNameError", "inner.example.": "RCodeSuccess",
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

// namedGuest is a guest of a network whose policy has names, with its own proxy.
func (s *site) namedGuest(n int, own *policy.Policy) (*guest, *attach.Upkeep) {
	s.t.Helper()
	proxies := new(attach.Upkeep)
	s.t.Cleanup(proxies.Close)
	g := s.guestWith(n, func(g *filter.Guest) { g.Network, g.Policy = s.config.GuestPolicy(), own }, func(g *guest) error {
		return proxies.Add(filepath.Dir(s.dir), &g.filter, []attach.Interface{{Tap: g.filter.Tap, Network: s.config}}, slog.New(slog.DiscardHandler))
	})
	return g, proxies
}

// Names in the network's own policy hold for each guest on it, and only after it has asked; a guest's own policy can only narrow
// them.
func TestNetwork_NamesForAll(t *testing.T) {
	if !nettest.Alone(t) {
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
	s.nameServer(map[string]string{"good.example.": "203.0.113.9 " + good6, "world.example.": world4, "bad.example.": world4, "inner.example.": "10.0.0.1 192.168.0.1"})
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
		{Action: policy.Allow, Domain: "world.example"}, {Action: policy.Allow, Domain: "bad.example"}, {Action: policy.Allow, Destination: "10.0.0.0/8"},
	}})
	mute, _ := s.namedGuest(4, &policy.Policy{DefaultAction: policy.Deny})
	bare := s.guest(5, nil) // without its part in the network's policy
	bare.misses(t, "tcp", world4+":80")
	free.misses(t, "tcp", "203.0.113.9:80")
	for g, answers := range map[*guest]map[string]string{
		free:   {"good.example.": "203.0.113.9", "world.example.": world4, "bad.example.": "RCodeNameError", "inner.example.": "RCodeSuccess"},
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
	counts, err := filter.Counts(s.config.Table(), "")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range counts {
		got = append(got, fmt.Sprint(c.Rule, " ", c.Packets > 0))
	}
	if want := []string{"deny tcp:203.0.113.9:81 true", "allow good.example true", "allow tcp:world.example true", "allow inner.example false", "default deny true"}; !slices.Equal(got, want) {
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
