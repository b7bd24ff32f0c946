package smartvm_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
)

// A real guest on a network that leaves through a tunnel reaches its peer and what lies behind; when it is cut, nothing.
func TestLinuxNetwork_WireGuard(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	h := imageHost(t, smartvm.LaunchJailed)
	world := nettest.New(t)
	world.Connect(nettest.Link{Name: "uplink", Addresses: prefixes("198.51.100.1/24")}, nettest.Link{Name: "eth0", Addresses: prefixes("198.51.100.2/24")})
	world.Serve(":80", "world")
	file := world.WireGuard("198.51.100.2")
	networks, err := h.Networks()
	if err == nil {
		_, err = networks.Create(network.Config{Name: "vpn", WireGuardConfig: file})
	}
	if err != nil {
		t.Fatal(err)
	}
	m := linuxGuest(t, h, "v", "vpn", `ask() { echo "$1: $(nc -w 3 $1 80 </dev/null 2>/dev/null | head -1)"; }
while :; do echo begin; ask 203.0.113.77; ask fd07::1; ask 198.51.100.2; echo end; done`, nil)
	awaitLog(t, m, "203.0.113.77: world from 10.7.0.2")
	awaitLog(t, m, "fd07::1: world from fd07::2")
	awaitLog(t, m, "198.51.100.2: world from 10.7.0.2")
	world.Must(func() error {
		wg, err := netlink.LinkByName("wg0")
		if err != nil {
			return err
		}
		return netlink.LinkSetDown(wg)
	})
	// The round that is under way may have been answered.
	rounds := func() []string {
		log, err := os.ReadFile(m.ConsoleLog())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.ReplaceAll(string(log), "\r", ""), "begin\n")
	}
	before := len(rounds())
	for end := time.Now().Add(linuxPatience); len(rounds()) < before+2 && time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond)
	}
	if got := rounds(); len(got) < before+2 || got[before] != "203.0.113.77: \nfd07::1: \n198.51.100.2: \nend\n" {
		t.Errorf("when the tunnel is cut: %q", got[before-1:])
	}
	endGuest(t, m)
	if err := networks.Remove("vpn"); err != nil {
		t.Error(err)
	}
}
