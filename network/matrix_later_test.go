package network_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
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

// repaired is what the process that supervises a VM does when the kernel tells it that something has changed.
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

// A neighbour that starts while a network is up has all that it has without one, is told of guests as before, may have all rules made anew, and
// is in the end as where there never was one.
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
	l.closed(t, l.guest)
	l.unchanged(t, when)
}

func TestComesLater_Docker20(t *testing.T)   { testComesLater(t, docker20) }
func TestComesLater_Docker28(t *testing.T)   { testComesLater(t, docker28) }
func TestComesLater_Libvirt12(t *testing.T)  { testComesLater(t, libvirt12) }
func TestComesLater_Firewalld2(t *testing.T) { testComesLater(t, firewalld2) }
func TestComesLater_UFW(t *testing.T)        { testComesLater(t, ufw) }
