package smartvm_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/policy"
)

// Real guests: they reach the world by NAT and what their policy allows, each other only on a network that is for it, and are
// reached by published ports.
func TestLinuxNetwork(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	h := imageHost(t, smartvm.LaunchJailed)
	world := nettest.New(t)
	prefixes := func(all ...string) (p []netip.Prefix) {
		for _, s := range all {
			p = append(p, netip.MustParsePrefix(s))
		}
		return p
	}
	world.Connect(nettest.Link{Name: "uplink", Addresses: prefixes("198.51.100.1/24", "2001:db8::1/64")},
		nettest.Link{Name: "eth0", Addresses: prefixes("198.51.100.2/24", "198.51.100.3/24", "2001:db8::2/64")})
	world.Serve(":80", "world")
	networks, err := h.Networks()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := networks.Create(network.Config{Name: "lan", Mutual: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := networks.Remove("lan"); err != nil {
			t.Error(err)
		}
	})
	guest := func(name, net, script string, change func(*smartvm.Spec)) *smartvm.Machine {
		t.Helper()
		spec := smartvm.Spec{
			Name: name, Image: "minimal", Command: []string{"/bin/sh", "-c", script}, MachineConfig: linuxMachine(128),
			NetworkInterfaces: []smartvm.NetworkInterface{{IfaceID: "eth0", Network: net}},
		}
		if change != nil {
			change(&spec)
		}
		m, err := h.Create(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		return m
	}
	server := "echo serving; while :; do echo $(hostname) | nc -l -p 80; done"
	a := guest("a", "default", server, func(s *smartvm.Spec) { s.Ports = []smartvm.Port{{HostPort: 8080, GuestPort: 80}} })
	b := guest("b", "lan", server, nil)
	awaitLog(t, a, "serving")
	awaitLog(t, b, "serving")
	address := func(m *smartvm.Machine) netip.Addr {
		in, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return in.Interfaces[0].IP4
	}
	ask := "ask() { echo \"$1 $2: $(nc -w 5 $1 $2 </dev/null 2>/dev/null | head -1)\"; }; "
	c := guest("c", "default", ask+fmt.Sprintf("cat /etc/hosts; ask 198.51.100.2 80; ask 198.51.100.3 80; ask 2001:db8::2 80; ask %s 80; ask %s 80; echo over", address(a), address(b)),
		func(s *smartvm.Spec) {
			s.Policy = &policy.Policy{Rules: []policy.Rule{{Action: policy.Deny, Destination: "198.51.100.3"}}}
		})
	d := guest("d", "lan", ask+fmt.Sprintf("ask %s 80; ask %s 80; echo over", address(b), address(a)), nil)
	// In a namespace of its own.
	e := guest("e", "default", ask+"ip addr; ask 198.51.100.2 80; ask 198.51.100.3 80; ask 2001:db8::2 80; "+server, func(s *smartvm.Spec) {
		s.NetworkInterfaces[0].Namespace = true
		s.Ports = []smartvm.Port{{HostPort: 8081, GuestPort: 80}}
		s.Policy = &policy.Policy{Rules: []policy.Rule{{Action: policy.Deny, Destination: "198.51.100.3"}}}
	})
	awaitLog(t, e, "serving")
	for m, want := range map[*smartvm.Machine][]string{
		e: {"10.255.255.2/30", "198.51.100.2 80: world from 198.51.100.1", "198.51.100.3 80: \n", "2001:db8::2 80: world from 2001:db8::1"},
		c: {
			"198.51.100.2 80: world from 198.51.100.1", "198.51.100.3 80: \n", "2001:db8::2 80: world from 2001:db8::1",
			address(a).String() + " 80: \n", address(b).String() + " 80: \n", address(c).String() + " c\n",
		},
		d: {address(b).String() + " 80: b\n", address(a).String() + " 80: \n"},
	} {
		if m != e {
			awaitLog(t, m, "over")
		}
		log, err := os.ReadFile(m.ConsoleLog())
		if err != nil {
			t.Fatal(err)
		}
		wantText(t, strings.ReplaceAll(string(log), "\r", ""), want...)
	}
	for what, published := range map[string]struct {
		want string
		ask  func() string
	}{
		"outside":               {"a\n", func() string { return world.Ask("tcp", "198.51.100.1:8080") }},
		"the host":              {"a\n", func() string { return nettest.Ask("tcp", "127.0.0.1:8080", 10*time.Second) }},
		"outside, in namespace": {"e\n", func() string { return world.Ask("tcp", "198.51.100.1:8081") }},
	} {
		var got string
		// Between two askers the guest's server is not there for a moment.
		for end := time.Now().Add(linuxPatience); got == "" && time.Now().Before(end); {
			got = published.ask()
		}
		if got != published.want {
			t.Errorf("a published port from %s: got %q, want %q", what, got, published.want)
		}
	}
	if err := h.StopAll(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(a.Remove(t.Context()), b.Remove(t.Context()), c.Remove(t.Context()), d.Remove(t.Context()), e.Remove(t.Context())); err != nil {
		t.Error(err)
	}
}
