package network_test

import (
	"log/slog"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
)

// knows returns the MAC that a guest knows for an address, once it is not old.
func (g *guest) knows(a netip.Addr, old string) (mac string) {
	for end := time.Now().Add(5 * time.Second); (mac == "" || mac == old) &&
		time.Now().Before(end); time.Sleep(time.Millisecond) {
		g.Must(func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			all, err := netlink.NeighList(link.Attrs().Index,
				map[bool]int{true: netlink.FAMILY_V4, false: netlink.FAMILY_V6}[a.Is4()])
			for _, n := range all {
				if n.IP.Equal(a.AsSlice()) {
					mac = n.HardwareAddr.String()
				}
			}
			return err
		})
	}
	return mac
}

// When a VM has the addresses of one that is gone, its neighbours find it at once, though they know
// those at another MAC.
func TestNetwork_Replaced(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, func(c *network.Config) { c.Mutual = true })
	a, b := s.guest(0, nil), s.guest(1, nil)
	b.Serve(":8080", "b")
	for _, ip := range []netip.Addr{b.filter.IP4, b.filter.IP6} {
		at := netip.AddrPortFrom(ip, 8080).String()
		if got := a.Ask("tcp", at); got == "" {
			t.Fatalf("%s: no answer", at)
		}
		if got := a.knows(ip, ""); got != b.filter.MAC {
			t.Fatalf("%s is at %q, want %q", ip, got, b.filter.MAC)
		}
	}
	s.remove(b)
	removeLink(t, b.filter.Tap)
	var upkeep upkeep.Upkeep
	t.Cleanup(upkeep.Close)
	next := s.guestWith(1, func(g *filter.Guest) { g.MAC = network.MAC("next", "eth0").String() }, func(g *guest) error {
		return upkeep.Add(filepath.Dir(s.dir), &g.filter, []attach.Interface{{Tap: g.filter.Tap, Network: s.config}},
			slog.New(slog.DiscardHandler))
	})
	next.Serve(":8080", "next")
	for _, ip := range []netip.Addr{b.filter.IP4, b.filter.IP6} {
		if got := a.knows(ip, b.filter.MAC); got != next.filter.MAC {
			t.Errorf("%s is at %q, want %q", ip, got, next.filter.MAC)
		}
		at := netip.AddrPortFrom(ip, 8080).String()
		if got := a.Ask("tcp", at); !strings.HasPrefix(got, "next from ") {
			t.Errorf("%s: got %q", at, got)
		}
	}
}
