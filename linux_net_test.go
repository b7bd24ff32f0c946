package smartvm_test

import (
	"errors"
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

func prefixes(all ...string) (p []netip.Prefix) {
	for _, s := range all {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

// linuxGuest starts a guest on a network whose command is a script. It is booted: see restoreGuest
// for guests that need not be.
func linuxGuest(t *testing.T, h *smartvm.Host, name, net, script string, change func(*smartvm.Spec)) *smartvm.Machine {
	t.Helper()
	spec := smartvm.Spec{
		Name: name, Image: "minimal", Command: []string{"/bin/sh", "-c", script}, MachineConfig: linuxMachine(128),
		NetworkInterfaces: []smartvm.NetworkInterface{{IfaceID: "eth0", Network: net}},
	}
	if change != nil {
		change(&spec)
	}
	return startGuest(t, h, spec)
}

// asks is a script for a guest that asks the servers at all addresses, on port 80, at once. It puts
// out a line for each, as "WHEN ADDRESS: ANSWER".
func asks(when string, addresses ...string) string {
	script := `ask() { echo "$1 $2: $(nc -w 5 $2 80 </dev/null 2>/dev/null | head -1)"; }; `
	for _, a := range addresses {
		script += "ask " + when + " " + a + " & "
	}
	return script + "wait"
}

// Real guests: they reach the world by NAT and what their policy allows, each other only on a
// network that is for it, and are reached by published ports.
func TestLinuxNetwork(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	h := imageHost(t, smartvm.LaunchJailed)
	world := nettest.New(t)
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
	address := func(m *smartvm.Machine) string {
		in, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return in.Interfaces[0].IP4.String()
	}
	server := "echo serving; while :; do echo $(hostname) | nc -l -p 80; done"
	denied := &policy.Policy{Rules: []policy.Rule{{Action: policy.Deny, Destination: "198.51.100.3"}}}
	a := restoreGuest(t, h, onBridge,
		smartvm.RestoreOptions{Name: "a", Ports: []smartvm.Port{{HostPort: 8080, GuestPort: 80}}})
	begin(t, a, server)
	// In a namespace of its own.
	e := restoreGuest(t, h, inNamespace,
		smartvm.RestoreOptions{Name: "e", Ports: []smartvm.Port{{HostPort: 8081, GuestPort: 80}}, Policy: denied})
	begin(t, e, "ip addr; "+asks("e", "198.51.100.2", "198.51.100.3", "2001:db8::2")+"; echo over; "+server)
	extra := []smartvm.ExtraHost{
		{Name: "db.example", IP: netip.MustParseAddr("2001:db8::2")},
		{Name: "gateway.example", HostGateway: true},
	}
	b := linuxGuest(t, h, "b", "lan", server, func(s *smartvm.Spec) { s.ExtraHosts = extra })
	awaitLog(t, a, "serving")
	awaitLog(t, b, "serving")
	c := linuxGuest(t, h, "c", "default",
		"cat /etc/hosts; "+asks("c", "198.51.100.2", "198.51.100.3", "2001:db8::2", address(a), address(b))+"; echo over",
		func(s *smartvm.Spec) { s.Policy, s.ExtraHosts = denied, extra })
	forks, err := b.Fork(t.Context(), 1, smartvm.ForkOptions{RestoreOptions: smartvm.RestoreOptions{Name: "d"}})
	if err != nil {
		t.Fatal(err)
	}
	d := forks[0]
	begin(t, d, "cat /etc/hosts; "+asks("d", address(a), address(b))+"; echo over")
	for m, want := range map[*smartvm.Machine][]string{
		e: {
			"10.255.255.2/30", "e 198.51.100.2: world from 198.51.100.1\n", "e 198.51.100.3: \n",
			"e 2001:db8::2: world from 2001:db8::1\n",
		},
		c: {
			"c 198.51.100.2: world from 198.51.100.1\n", "c 198.51.100.3: \n", "c 2001:db8::2: world from 2001:db8::1\n",
			"c " + address(a) + ": \n", "c " + address(b) + ": \n", address(c) + " c\n",
			"2001:db8::2 db.example\n172.30.0.1 gateway.example\n",
		},
		d: {"d " + address(a) + ": \n", "d " + address(b) + ": b\n", address(d) + " d\n2001:db8::2 db.example\n"},
	} {
		awaitLog(t, m, "over")
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
	if err := errors.Join(a.Remove(t.Context()), b.Remove(t.Context()), c.Remove(t.Context()), d.Remove(t.Context()),
		e.Remove(t.Context())); err != nil {
		t.Error(err)
	}
	if _, err := h.Sweep(t.Context()); err != nil { // what d was made from
		t.Error(err)
	}
}

// Real guests that may reach names: over IPv4 and IPv6 they reach what an allowed one leads to,
// once they have asked for it, and not its neighbour; a name that leads to a private address leads
// nowhere. So it is for a VM's own policy, its network's, and in a namespace.
func TestLinuxNetwork_Names(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	h := imageHost(t, smartvm.LaunchJailed)
	world := nettest.New(t)
	world.Connect(
		nettest.Link{Name: "uplink", Addresses: prefixes("198.51.100.1/24", "2001:db8::1/64"), Gateways: []netip.Addr{
			netip.MustParseAddr("198.51.100.2"), netip.MustParseAddr("2001:db8::2"),
		}}, nettest.Link{Name: "eth0", Addresses: prefixes("198.51.100.2/24", "2001:db8::2/64",
			"203.0.113.9/32", "203.0.113.10/32", "2001:db8:9::9/128", "2001:db8:9::10/128", "10.9.9.9/32", "fd99::9/128")})
	world.Serve(":80", "world")
	world.ServeNames("198.51.100.2", map[string]string{
		"good.example.": "203.0.113.9 2001:db8:9::9", "bad.example.": "203.0.113.10 2001:db8:9::10",
		"rebind.example.": "10.9.9.9 fd99::9",
	})
	nettest.Resolver(t, "198.51.100.2")
	names := &policy.Policy{
		DefaultAction: policy.Deny,
		Rules: []policy.Rule{
			{Action: policy.Allow, Domain: "good.example"},
			{Action: policy.Allow, Domain: "rebind.example"},
		},
	}
	networks, err := h.Networks()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := networks.Create(network.Config{Name: "named", Settings: network.Settings{Policy: names}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := networks.Remove("named"); err != nil {
			t.Error(err)
		}
	})
	script := asks("early", "203.0.113.9", "2001:db8:9::9") + `
for n in good bad rebind; do nslookup $n.example >/tmp/$n 2>&1; echo "$n is $(grep -c -e 203.0.113 -e 2001:db8:9 -e 10.9.9 -e fd99: /tmp/$n) $(grep -c NXDOMAIN /tmp/$n)"; done
` + asks("then", "203.0.113.9", "2001:db8:9::9", "203.0.113.10", "2001:db8:9::10", "10.9.9.9", "fd99::9") + "\necho over"
	all := []*smartvm.Machine{
		linuxGuest(t, h, "own", "default", script, func(s *smartvm.Spec) { s.Policy = names }),
		linuxGuest(t, h, "networks", "named", script, nil),
		linuxGuest(t, h, "namespace", "named", script, func(s *smartvm.Spec) { s.NetworkInterfaces[0].Namespace = true }),
	}
	for _, m := range all {
		awaitLog(t, m, "over")
		log, err := os.ReadFile(m.ConsoleLog())
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(log), "\r", "")
		wantText(t, text, "early 203.0.113.9: \n", "early 2001:db8:9::9: \n", "good is 2 0\n", "rebind is 0 0\n",
			"then 203.0.113.9: world from 198.51.100.1\n", "then 2001:db8:9::9: world from 2001:db8::1\n",
			"then 203.0.113.10: \n", "then 2001:db8:9::10: \n", "then 10.9.9.9: \n", "then fd99::9: \n")
		if strings.Contains(text, "bad is 0 0\n") || !strings.Contains(text, "bad is 0 ") {
			t.Errorf("a name that no rule allows is not told to be none: %s", text)
		}
	}
	if got := nettest.Ask("tcp", "203.0.113.10:80", time.Second); got == "" {
		t.Error("the neighbour is not there at all")
	}
	if err := h.StopAll(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
		t.Error(err)
	}
	for _, m := range all {
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
}
