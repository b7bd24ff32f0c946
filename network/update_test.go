package network_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// stream opens a connection of TCP on which each line is answered by itself.
func (g *guest) stream(t *testing.T, address string) net.Conn {
	t.Helper()
	var c net.Conn
	g.Must(func() (err error) { c, err = net.DialTimeout("tcp", address, 5*time.Second); return err })
	t.Cleanup(func() { c.Close() })
	if !echoes(t, c) {
		t.Fatalf("%s does not answer", address)
	}
	return c
}

// echoes says whether what is sent on a connection comes back.
func echoes(t *testing.T, c net.Conn) bool {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(testenv.Patience(2 * time.Second))); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("?")); err != nil {
		return false
	}
	n, _ := c.Read(make([]byte, 8))
	return n > 0
}

// deny is a policy that keeps guests from addresses alone.
func deny(destinations ...string) *policy.Policy {
	p := new(policy.Policy)
	for _, d := range destinations {
		p.Rules = append(p.Rules, policy.Rule{Action: policy.Deny, Destination: d})
	}
	return p
}

// A network that is up gets another policy at once: what is not allowed any more ends, what is goes
// on, and no guest adds its part again.
func TestNetwork_Update(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	const second4 = "203.0.113.10"
	s := newSite(t, nil)
	s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes(second4 + "/32")}.Configure)
	route(t, second4+"/32", world4)
	s.outside.Serve(":80", "world")
	s.outside.Echo(":7")
	before := hosts(t)
	a, b := s.guest(0, nil), s.guest(1, func(g *filter.Guest) { g.Policy = deny("198.51.100.9") })
	first, second := a.stream(t, world4+":7"), a.stream(t, second4+":7")
	others := b.stream(t, world4+":7")
	update := func(settings network.Settings) {
		t.Helper()
		if err := network.Update(t.Context(), s.dir, network.Config{Name: s.config.Name, Settings: settings}); err != nil {
			t.Fatal(err)
		}
		s.config.Settings = settings // of those who come from now on
	}
	update(network.Settings{Policy: deny(world4)})
	if echoes(t, first) || echoes(t, others) {
		t.Error("a connection goes on that is not allowed any more")
	}
	if !echoes(t, second) {
		t.Error("a connection that is allowed has ended")
	}
	for _, g := range []*guest{a, b} {
		g.misses(t, "tcp", world4+":80")
		g.reaches(t, "tcp", second4+":80", "world from "+uplink4+"\n")
	}
	update(network.Settings{Policy: deny(second4), NewConnections: 7, MaxConnections: 1000})
	if echoes(t, second) {
		t.Error("a connection goes on that the second change has ended")
	}
	c := s.guest(2, nil)
	for _, g := range []*guest{a, b, c} {
		g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
		g.misses(t, "tcp", second4+":80")
	}
	if n, now, err := a.use.Check(t.Context()); err != nil || n != 0 || len(now.Rules) != 1 ||
		now.Rules[0].Destination != second4 {
		t.Errorf("restored %d times, %+v, %v", n, now, err)
	}
	// Who comes with settings of before is not let in with others than he has been promised.
	s.config.Settings = network.Settings{}
	if err := s.use("z").Apply(t.Context()); err == nil {
		t.Error("a VM joins the network with another policy")
	}
	for _, g := range []*guest{a, b, c} {
		s.remove(g)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

// A change that was cut short is completed by the next process that looks.
func TestNetwork_UpdateCut(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	g := s.guest(0, nil)
	up := filepath.Join(s.dir, s.config.Name, "up.json")
	was, err := os.ReadFile(up)
	if err != nil {
		t.Fatal(err)
	}
	if err := network.Update(t.Context(), s.dir,
		network.Config{Name: s.config.Name, Settings: network.Settings{Policy: deny(world4)}}); err != nil {
		t.Fatal(err)
	}
	g.misses(t, "tcp", world4+":80")
	// As if the tables had not been reached: they have the rules of the one, the file says the other.
	if err := os.WriteFile(up, was, 0o600); err != nil {
		t.Fatal(err)
	}
	if n, _, err := g.use.Check(t.Context()); err != nil || n != 0 {
		t.Errorf("restored %d times, %v", n, err)
	}
	g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	s.remove(g)
}

// Names follow a change without anybody's doing, and those that stay stay as they are.
func TestNetwork_UpdateNames(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	const old, kept, fresh = "203.0.113.9", world4, "203.0.113.10"
	names := func(all ...string) network.Settings {
		p := &policy.Policy{DefaultAction: policy.Deny}
		for _, name := range all {
			p.Rules = append(p.Rules, policy.Rule{Action: policy.Allow, Domain: name})
		}
		return network.Settings{Policy: p}
	}
	s := newSite(t, func(c *network.Config) { c.Settings = names("old.example", "kept.example") })
	s.nameServer(map[string]string{"old.example.": old, "kept.example.": kept, "fresh.example.": fresh})
	s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes(fresh + "/32")}.Configure)
	route(t, fresh+"/32", world4)
	s.outside.Serve(":80", "world")
	g, upkeep := s.namedGuest(0, nil)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	effects := []journal.Effect{g.use, &network.Tap{Name: g.filter.Tap, Bridge: s.config.Bridge}, &g.filter}
	looks, _ := upkeep.Look(ctx, "", []attach.Interface{{Tap: g.filter.Tap, Network: s.config}}, time.Hour,
		slog.New(slog.DiscardHandler))
	// followed waits until the supervising process has seen what is new.
	followed := func(name, want string) {
		t.Helper()
		for deadline := time.Now().Add(testenv.Patience(10 * time.Second)); ; {
			got := g.resolve(t, "172.30.0.1:53", name)
			if got == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s is %s, want %s", name, got, want)
			}
			select {
			case <-looks:
				if err := upkeep.Heal(ctx, effects); err != nil {
					t.Fatal(err)
				}
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	followed("old.example.", old)
	followed("kept.example.", kept)
	followed("fresh.example.", "RCodeNameError")
	g.reaches(t, "tcp", old+":80", "world from "+uplink4+"\n")
	g.reaches(t, "tcp", kept+":80", "world from "+uplink4+"\n")
	if err := network.Update(ctx, s.dir,
		network.Config{Name: s.config.Name, Settings: names("kept.example", "fresh.example")}); err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", kept+":80", "world from "+uplink4+"\n") // it has not asked again
	g.misses(t, "tcp", old+":80")
	followed("fresh.example.", fresh)
	followed("old.example.", "RCodeNameError")
	g.reaches(t, "tcp", fresh+":80", "world from "+uplink4+"\n")
	if err := network.Update(ctx, s.dir, network.Config{Name: s.config.Name, Settings: network.Settings{}}); err != nil {
		t.Fatal(err)
	}
	followed("old.example.", old)
	g.reaches(t, "tcp", old+":80", "world from "+uplink4+"\n")
	stop()
	s.remove(g)
}

// What is kept of a network is changed by itself: bounds and policy, of the default one too.
func TestStore_Update(t *testing.T) {
	d, err := network.NewDefault("", "")
	if err != nil {
		t.Fatal(err)
	}
	d.Policy = deny("10.0.0.0/8") // of the whole host
	s := &catalog.Store{Dir: filepath.Join(t.TempDir(), "networks"), Default: d}
	for _, name := range []string{network.DefaultName, "lab"} {
		if name == "lab" {
			if _, err := s.Create(network.New("lab", "svlab", prefixes("10.77.0.0/24")[0])); err != nil {
				t.Fatal(err)
			}
		}
		destination := func() string {
			c, err := s.Get(name)
			if err != nil {
				t.Fatal(err)
			}
			return c.Policy.Rules[0].Destination
		}
		if _, err := s.Update(name, func(c *network.Settings) { c.MaxConnections = 5 }); err != nil {
			t.Fatal(err)
		}
		if got := destination(); got != "10.0.0.0/8" {
			t.Errorf("%s: with other bounds its policy denies %s, want the host's", name, got)
		}
		if _, err := s.Update(name, func(c *network.Settings) { c.Policy = deny("192.0.2.0/24") }); err != nil {
			t.Fatal(err)
		}
		if c, err := s.Get(name); err != nil || destination() != "192.0.2.0/24" || c.MaxConnections != 5 {
			t.Errorf("%s: got %+v, %v", name, c, err)
		}
		if _, err := s.Update(name, func(c *network.Settings) {
			c.Policy = nil
		}); err != nil || destination() != "10.0.0.0/8" {
			t.Errorf("%s: without one of its own it denies %s, %v", name, destination(), err)
		}
		_, err := s.Update(name, func(c *network.Settings) { c.MaxConnections, c.NewConnections = -1, -2 })
		for _, want := range []string{"maxConnections -1", "newConnections -2", name} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("wrong bounds of %s: %v, want %s in it", name, err, want)
			}
		}
	}
	if _, err := s.Update("none", func(*network.Settings) {}); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("a network that is not there: %v", err)
	}
}

// A guest gets another policy and other ports at once: what is not allowed any more ends, to it and
// from it, what is goes on.
func TestGuest_Replace(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	const second4 = "203.0.113.10"
	s := newSite(t, nil)
	s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes(second4 + "/32")}.Configure)
	route(t, second4+"/32", world4)
	s.outside.Echo(":7")
	before := hosts(t)
	port := func(host uint16) filter.Port { return filter.Port{Host: host, Guest: 7, Protocol: "tcp"} }
	g, other := s.guest(0, func(g *filter.Guest) {
		g.Ports, g.Policy = []filter.Port{port(8007), port(8008)}, allowHost
	}), s.guest(1, nil)
	g.Echo(":7")
	l, err := net.Listen("tcp", "172.30.0.1:9000")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	world := &guest{Namespace: s.outside}
	first, second, toHost := g.stream(t, world4+":7"), g.stream(t, second4+":7"), g.stream(t, "172.30.0.1:9000")
	gone, stays, others := world.stream(t, uplink4+":8007"), world.stream(t, uplink4+":8008"), other.stream(t, world4+":7")
	g.filter.Policy, g.filter.Ports = deny(world4), []filter.Port{port(8008), port(8009)}
	if err := g.filter.Replace(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]net.Conn{
		"to what is denied now": first, "to the host": toHost,
		"by a port that is not published any more": gone,
	} {
		if echoes(t, c) {
			t.Errorf("a connection %s goes on", name)
		}
	}
	for name, c := range map[string]net.Conn{
		"to what is allowed": second, "by a port that stays": stays,
		"of another guest": others,
	} {
		if !echoes(t, c) {
			t.Errorf("a connection %s has ended", name)
		}
	}
	world.stream(t, uplink4+":8009")
	if !s.outside.Silent("tcp", uplink4+":8007") {
		t.Error("the port that is not published any more answers")
	}
	g.filter.Policy, g.filter.Ports = nil, nil
	if err := g.filter.Replace(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.stream(t, world4+":7")
	if !s.outside.Silent("tcp", uplink4+":8009") {
		t.Error("a port answers though none is published")
	}
	for _, g := range []*guest{g, other} {
		s.remove(g)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

// A guest that has learnt many addresses of names leaves none behind: whoever has its address next
// would reach them.
func TestNetwork_ManyNames(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, func(c *network.Config) {
		c.Settings.Policy = &policy.Policy{
			DefaultAction: policy.Deny,
			Rules:         []policy.Rule{{Action: policy.Allow, Domain: "*.example"}},
		}
	})
	g, h := s.guest(0, nil), s.guest(1, nil)
	elements := func() (n int) {
		for line := range strings.SplitSeq(run(t, nil, "nft", "list", "table", "inet", s.config.Table()), "\n") {
			n += strings.Count(line, "203.0.")
		}
		return n
	}
	const many = 4000
	for _, of := range []*guest{g, h} {
		names := &filter.Names{Guest: of.filter.Guest}
		defer names.Close()
		n := many
		if of == h {
			n = 1
		}
		for i := range n {
			address := netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)})
			if err := names.Allow(filter.OfNetwork, "*.example", []netip.Addr{address}, time.Hour); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := elements(); got != many+1 {
		t.Fatalf("%d addresses, want %d", got, many+1)
	}
	s.remove(g)
	if got := elements(); got != 1 {
		t.Errorf("%d addresses are left, one is the other guest's", got)
	}
}

// A VM that starts while its network is changed has the settings of before or after, whichever it
// finds, and waits where these are not both written down yet; what nobody changes is refused.
func TestUse_Updated(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	old, fresh := network.Settings{Policy: deny("203.0.113.9")}, network.Settings{Policy: deny(world4)}
	s := newSite(t, func(c *network.Config) { c.Settings = old })
	g := s.guest(0, nil)
	starts := func(refresh func(*network.Config) error) error {
		u := s.use("b")
		err := u.Apply(network.NewContext(t.Context(), &network.Shared{Refresh: refresh}))
		return errors.Join(err, u.Revert(t.Context()))
	}
	update := func(to network.Settings) {
		if err := network.Update(t.Context(), s.dir, network.Config{Name: s.config.Name, Settings: to}); err != nil {
			t.Error(err)
		}
	}
	asked := 0
	if err := starts(func(c *network.Config) error { // as it was, and then it is changed
		if c.Settings = fresh; asked == 0 {
			c.Settings = old
			update(fresh)
		}
		asked++
		return nil
	}); err != nil || asked != 2 {
		t.Errorf("changed behind its back: %v, after %d looks", err, asked)
	}
	asked = 0
	if err := starts(func(c *network.Config) error { // as it will be
		if c.Settings = old; asked == 1 {
			update(old)
		}
		asked++
		return nil
	}); err != nil || asked != 2 {
		t.Errorf("before it is changed: %v, after %d looks", err, asked)
	}
	if err := starts(func(c *network.Config) error {
		c.Settings = fresh
		return nil
	}); err == nil || !strings.Contains(err.Error(), "other settings, and 1 VMs") {
		t.Errorf("other settings for good: %v", err)
	}
	s.remove(g)
}
