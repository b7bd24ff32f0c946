package smartvm_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
)

// A real guest on a network that leaves through a tunnel reaches its peer and what lies behind;
// when it is cut, nothing.
func TestLinuxNetwork_WireGuard(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	h := imageHost(t, smartvm.LaunchJailed)
	world := nettest.New(t)
	world.Connect(nettest.Link{Name: "uplink", Addresses: prefixes("198.51.100.1/24")},
		nettest.Link{Name: "eth0", Addresses: prefixes("198.51.100.2/24")})
	world.Serve(":80", "world")
	file := world.WireGuard("198.51.100.2")
	networks, err := h.Networks()
	if err == nil {
		_, err = networks.Create(network.Config{Name: "vpn", WireGuardConfig: file})
	}
	if err != nil {
		t.Fatal(err)
	}
	m := linuxGuest(t, h, "v", "vpn", idle, nil)
	answers := func(when string) string {
		lines := strings.Split(ask(t, m, asks(when, "198.51.100.2", "203.0.113.77", "fd07::1")), "\n")
		for i := range lines {
			lines[i] = strings.TrimSpace(lines[i])
		}
		slices.Sort(lines)
		return strings.Join(lines, "\n")
	}
	want := "up 198.51.100.2: world from 10.7.0.2\nup 203.0.113.77: world from 10.7.0.2\nup fd07::1: world from fd07::2"
	got := answers("up")
	for end := time.Now().Add(linuxPatience); got != want && time.Now().Before(end); {
		got = answers("up")
	}
	if got != want {
		t.Errorf("through the tunnel: %q, want %q", got, want)
	}
	world.Must(func() error {
		wg, err := netlink.LinkByName("wg0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(wg)
	})
	if got := answers("cut"); got != "cut 198.51.100.2:\ncut 203.0.113.77:\ncut fd07::1:" {
		t.Errorf("when the tunnel is cut: %q", got)
	}
	endGuest(t, m)
	if err := networks.Remove("vpn"); err != nil {
		t.Error(err)
	}
}
