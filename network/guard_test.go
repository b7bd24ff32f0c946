package network_test

import (
	"slices"
	"testing"

	"github.com/google/nftables"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/guard"
)

func flushRuleset(t *testing.T) {
	t.Helper()
	conn, err := nftables.New()
	if err == nil {
		conn.FlushRuleset()
		err = conn.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// While somebody has flushed all rules guests reach nothing, be it denied or not, as long as a
// process holds the network's guard; the host's own is as before. Another process holds it when
// that one lets go.
func TestNetwork_Guard(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	if err := nettest.Serve(t, ":22", "host"); err != nil {
		t.Fatal(err)
	}
	before := hosts(t)
	one, another := new(guard.Keeper), new(guard.Keeper)
	ctx := network.NewContext(t.Context(), &network.Shared{Guards: one})
	g := s.guest(0, func(g *filter.Guest) { g.Ports = []filter.Port{{Host: 8000, Guest: 80, Protocol: "tcp"}} })
	g.Serve(":80", "web")
	held := func(k *guard.Keeper) bool {
		t.Helper()
		free, err := g.use.Hold(network.NewContext(t.Context(), &network.Shared{Guards: k}))
		if err != nil {
			t.Fatal(err)
		}
		defer free()
		return k.Holds(s.config.Bridge)
	}
	if !held(one) {
		t.Skip("guards are missing: this kernel has no tables with an owner that persist (Linux 6.9)")
	}
	release, err := g.use.Hold(ctx)
	if err != nil {
		t.Fatal(err)
	}
	works := func() {
		t.Helper()
		g.misses(t, "tcp", "172.30.0.1:22")
		for _, network := range []string{"tcp", "udp"} {
			g.reaches(t, network, world4+":80", "world from "+uplink4+"\n")
			g.reaches(t, network, "["+world6+"]:80", "world from "+uplink6+"\n")
		}
		if got := s.outside.Ask("tcp", uplink4+":8000"); got != "web from "+world4+"\n" {
			t.Errorf("the published port says %q", got)
		}
	}
	repair := func() {
		t.Helper()
		if _, _, err := g.use.Check(ctx); err != nil {
			t.Fatal(err)
		}
		if err := g.filter.Apply(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	works()
	if held(another) {
		t.Error("two processes hold the guard")
	}
	flushRuleset(t)
	for _, network := range []string{"tcp", "udp"} {
		g.misses(t, network, "172.30.0.1:22")
		g.misses(t, network, uplink4+":22")
		g.misses(t, network, "["+uplink6+"]:22")
		g.misses(t, network, world4+":80")
	}
	if got := s.outside.Ask("tcp", uplink4+":22"); got != "host from "+world4+"\n" {
		t.Errorf("the host itself says %q", got)
	}
	repair()
	works()
	// One that dies leaves it to others: nobody holds it, and it is flushed as all else.
	release()
	if !held(another) {
		t.Error("another process does not hold what the first has let go")
	}
	flushRuleset(t)
	g.reaches(t, "tcp", "172.30.0.1:22", "host from 172.30.0.2\n") // so the path works without
	repair()
	works()
	if !held(one) { // it is made again
		t.Error("the guard is not held again")
	}
	s.remove(g)
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	if all, err := conn.ListTables(); err != nil || len(all) > 0 {
		t.Errorf("tables are left: %v, %v", all, err)
	}
}
