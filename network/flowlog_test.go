package network_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/flowlog"
	"push.rocks/smartvm/network/policy"
)

// tried reads the log of what a guest tried.
type tried struct {
	t    *testing.T
	r    *flowlog.Reader
	seen []string
}

func (g *guest) tried(t *testing.T) *tried {
	t.Helper()
	r, err := flowlog.Open(filepath.Join(g.use.VMDir, store.NetworkLog), time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return &tried{t: t, r: r}
}

// read adds what has come.
func (l *tried) read() {
	l.t.Helper()
	for {
		e, err := l.r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			l.t.Fatal(err)
		}
		text := fmt.Sprintf("%s %s %s %s", e.Verdict, e.Policy, e.Rule, e.Protocol)
		if e.Destination.IsValid() {
			text += fmt.Sprintf(" %s:%d", e.Destination, e.Port)
		}
		l.seen = append(l.seen, strings.TrimSpace(text+" "+e.Host+" "+e.Type))
	}
}

// wait waits for an event.
func (l *tried) wait(want string) {
	l.t.Helper()
	for deadline := time.Now().Add(testenv.Patience(10 * time.Second)); ; time.Sleep(10 * time.Millisecond) {
		if l.read(); slices.Contains(l.seen, want) {
			return
		}
		if time.Now().After(deadline) {
			l.t.Fatalf("the log has no %q, but %q", want, l.seen)
		}
	}
}

func (l *tried) lacks(what string) {
	l.t.Helper()
	if l.read(); slices.ContainsFunc(l.seen, func(s string) bool { return strings.Contains(s, what) }) {
		l.t.Errorf("the log has %q: %q", what, l.seen)
	}
}

// What guests try is logged, each guest's by itself: by which rule, to which name.
func TestNetwork_Log(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, func(c *network.Config) {
		c.Policy = &policy.Policy{DefaultAction: policy.Deny, Rules: []policy.Rule{
			{Action: policy.Deny, Destination: "203.0.113.9", Protocol: "tcp", Ports: policy.Ports{{First: 81, Last: 81}}},
			{Action: policy.Allow, Domain: "good.example"},
			{Action: policy.Allow, Destination: world4 + "/32"},
			{Action: policy.Allow, Destination: world6 + "/128"},
		}}
	})
	s.nameServer(map[string]string{"good.example.": "203.0.113.9"})
	for _, port := range []string{":80", ":81"} {
		s.outside.Serve(port, "world")
	}
	if err := nettest.Serve(t, ":22", "host"); err != nil {
		t.Fatal(err)
	}
	a, upkeepA := s.namedGuest(0, nil)
	b, _ := s.namedGuest(1, deny("203.0.113.9/32"))
	logA, logB := a.tried(t), b.tried(t)
	if got := a.resolve(t, "172.30.0.1:53", "good.example."); got != "203.0.113.9" {
		t.Fatal(got)
	}
	if got := a.resolve(t, "172.30.0.1:53", "Bad.example."); got != "RCodeNameError" {
		t.Fatal(got)
	}
	a.reaches(t, "tcp", "203.0.113.9:80", "world from "+uplink4+"\n")
	a.misses(t, "tcp", "203.0.113.9:81")
	a.misses(t, "udp", "198.51.100.99:99")
	a.misses(t, "tcp", "172.30.0.1:22")
	route(t, "169.254.169.254/32", world4)
	a.misses(t, "tcp", "169.254.169.254:80")
	a.reaches(t, "tcp", "["+world6+"]:80", "world from "+uplink6+"\n")
	if got := b.resolve(t, "172.30.0.1:53", "good.example."); got != "203.0.113.9" {
		t.Fatal(got)
	}
	b.misses(t, "tcp", "203.0.113.9:80")
	b.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	for _, want := range []string{
		"denied network default deny dns bad.example A",
		"allowed network allow good.example tcp 203.0.113.9:80 good.example",
		"denied network deny tcp:203.0.113.9:81 tcp 203.0.113.9:81 good.example",
		"denied network default deny udp 198.51.100.99:99",
		"denied  to the host tcp 172.30.0.1:22",
		"denied  to link-local and metadata addresses tcp 169.254.169.254:80",
		"allowed network allow [" + world6 + "/128] tcp " + world6 + ":80",
	} {
		logA.wait(want)
	}
	// The guest's own policy has the last word.
	logB.wait("denied vm deny 203.0.113.9/32 tcp 203.0.113.9:80 good.example")
	logB.wait("allowed vm default allow tcp " + world4 + ":80")
	logB.lacks("network")
	logB.lacks("198.51.100.99")
	logA.lacks("ff02:") // what each kernel sends by itself
	// Who listened has ended: soon another does.
	upkeepA.Close()
	for deadline := time.Now().Add(testenv.Patience(10 * time.Second)); ; {
		b.misses(t, "tcp", "172.30.0.1:22")
		if logB.read(); time.Now().After(deadline) || slices.ContainsFunc(logB.seen, func(e string) bool {
			return strings.Contains(e, ":22")
		}) {
			break
		}
	}
	logB.wait("denied  to the host tcp 172.30.0.1:22")
	for _, g := range []*guest{a, b} {
		s.remove(g)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != 0 {
		t.Errorf("the networks left %v, %v", left, err)
	}
}

// Without any policy it is logged all the same, also between guests, and over a guest's bounds.
func TestNetwork_LogBounds(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, func(c *network.Config) { c.NewConnections = 20 })
	s.nameServer(map[string]string{"world.example.": world4})
	s.outside.Serve(":80", "world")
	a, _ := s.namedGuest(0, nil)
	b, _ := s.namedGuest(1, nil)
	logA, logB := a.tried(t), b.tried(t)
	if got := a.resolve(t, "172.30.0.1:53", "world.example."); got != world4 {
		t.Fatal(got)
	}
	a.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	logA.wait("allowed  no policy tcp " + world4 + ":80 world.example")
	// By the host, as a guest would that takes it for its router.
	a.Must(func() error {
		to := &net.IPNet{IP: b.filter.IP4.AsSlice(), Mask: net.CIDRMask(32, 32)}
		return netlink.RouteAdd(&netlink.Route{Dst: to, Gw: net.ParseIP("172.30.0.1")})
	})
	a.misses(t, "tcp", b.filter.IP4.String()+":80")
	logA.wait("denied  to other guests tcp " + b.filter.IP4.String() + ":80")
	a.flood(t, world4, 2000)
	logA.wait("over  20 new connections a second udp " + world4 + ":1023 world.example")
	// A flood takes nothing from another's log, and is bounded in the guest's own.
	b.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	logB.wait("allowed  no policy tcp " + world4 + ":80")
	for deadline := time.Now().Add(testenv.Patience(10 * time.Second)); ; time.Sleep(10 * time.Millisecond) {
		if logA.read(); slices.ContainsFunc(logA.seen, func(e string) bool {
			return strings.HasPrefix(e, "lost")
		}) || len(logA.seen) > 100 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d events", len(logA.seen))
		}
	}
	if n := len(logA.seen); n > 900 {
		t.Errorf("a flood of 2000 is logged as %d events", n)
	}
	s.remove(a)
	s.remove(b)
}

// flood begins so many connections of UDP.
func (g *guest) flood(t *testing.T, to string, n int) {
	t.Helper()
	g.Must(func() error {
		c, err := net.ListenPacket("udp4", ":0")
		if err != nil {
			return err
		}
		defer c.Close()
		for i := range n {
			// A full queue is no matter.
			if _, err := c.WriteTo([]byte("?"), &net.UDPAddr{IP: net.ParseIP(to), Port: 1000 + i}); err != nil &&
				!errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ECONNREFUSED) &&
				!errors.Is(err, unix.EACCES) {
				return err
			}
		}
		return nil
	})
}

// A kernel that does not log has the rules all the same, and the log says so.
func TestNetwork_LogUnsupported(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.nameServer(nil)
	g, upkeep := s.namedGuest(0, nil)
	log := g.tried(t)
	if logs, err := filter.Logs(s.config.Table()); err != nil || !logs {
		t.Fatal(logs, err)
	}
	unlog(t, s.config.Table())
	if err := upkeep.Heal(t.Context(), []journal.Effect{&g.filter}); err != nil {
		t.Fatal(err)
	}
	log.wait("none  the kernel has no nft_log or nfnetlink_log: only names are logged")
	s.remove(g)
}

// unlog takes from tables what logs.
func unlog(t *testing.T, name string) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
	chains, err := conn.ListChainsOfTableFamily(table.Family)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range chains {
		rules, err := conn.GetRules(table, c)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rules {
			if slices.ContainsFunc(r.Exprs, func(e expr.Any) bool { _, logs := e.(*expr.Log); return logs }) {
				if err := conn.DelRule(r); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	conn.DelSet(&nftables.Set{Table: table, Name: "log-denied"})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}

// Tables of the version before, which did not log, do when they have been looked at, with the guest
// that is there.
func TestNetwork_LogUpgrade(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.nameServer(nil)
	s.outside.Serve(":80", "world")
	g, upkeep := s.namedGuest(0, deny("198.51.100.9"))
	log := g.tried(t)
	unlog(t, s.config.Table())
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	chain := &nftables.Chain{
		Table: &nftables.Table{Name: s.config.Table(), Family: nftables.TableFamilyINet},
		Name:  "forward",
	}
	rules, err := conn.GetRules(chain.Table, chain)
	if err != nil {
		t.Fatal(err)
	}
	last := rules[len(rules)-1]
	last.UserData = userdata.AppendString(nil, userdata.TypeComment, "rules 3 00000000")
	last.Table, last.Chain = chain.Table, chain
	conn.ReplaceRule(last)
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	effects := []journal.Effect{g.use, &network.Tap{Name: g.filter.Tap, Bridge: s.config.Bridge}, &g.filter}
	if err := upkeep.Heal(t.Context(), effects); err != nil {
		t.Fatal(err)
	}
	log.lacks("allowed")
	g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	log.wait("allowed vm default allow tcp " + world4 + ":80")
	log.lacks("none")
	s.remove(g)
}

// What comes faster than it is logged is refused all the same.
func TestNetwork_LogFlood(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	const many = 1000
	s := newSite(t, func(c *network.Config) { c.Policy = deny("203.0.113.9/32") })
	s.nameServer(nil)
	g, _ := s.namedGuest(0, nil)
	log := g.tried(t)
	var world net.PacketConn
	s.outside.Must(func() (err error) { world, err = net.ListenPacket("udp4", ":7000"); return err })
	t.Cleanup(func() { world.Close() })
	send := func(to, text string) {
		g.Must(func() error {
			c, err := net.ListenPacket("udp4", ":0")
			if err != nil {
				return err
			}
			defer c.Close()
			_, _ = c.WriteTo([]byte(text), &net.UDPAddr{IP: net.ParseIP(to), Port: 7000}) // that it is refused may come at once
			return nil
		})
	}
	for range many {
		send("203.0.113.9", "denied")
	}
	send(world4, "allowed")
	buf := make([]byte, 16)
	if err := world.SetReadDeadline(time.Now().Add(testenv.Patience(5 * time.Second))); err != nil {
		t.Fatal(err)
	}
	if n, _, err := world.ReadFrom(buf); err != nil || string(buf[:n]) != "allowed" {
		t.Errorf("the world gets %q, %v", buf[:n], err)
	}
	log.wait("allowed network default allow udp " + world4 + ":7000")
	log.wait("denied network deny 203.0.113.9/32 udp 203.0.113.9:7000")
	if n := len(log.seen); n >= many/2 {
		t.Errorf("of %d packets %d are logged", many, n)
	}
	s.remove(g)
}
