package smartvm_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/policy"
)

func init() {
	children["crash-lan"] = func(args []string) int { return crashChild(args, crashLAN) }
}

// addLAN makes the bridge br0 with the host on it.
func addLAN(t *testing.T) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	if err == nil { // its first port would give it an IPv6 address, some time later
		err = os.WriteFile("/proc/sys/net/ipv6/conf/br0/disable_ipv6", []byte("1"), 0)
	}
	if err == nil {
		err = nettest.Link{Name: "br0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.168.7.1/24")}}.Configure()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// crashLAN is the life of a VM on a bridge that is not ours.
func crashLAN(ctx context.Context, site *crashSite) error {
	site.spec = netSpec(site.spec, 1)
	site.spec.NetworkInterfaces[0].Network = "bridge:br0"
	return crashLife(ctx, site)
}

func TestCrashMatrix_LAN(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	addLAN(t)
	x := newCrashMatrix(t, testenv.PlainBinary(t), smartvm.LaunchJailed, "crash-lan", tinyguest.Idle)
	x.again()
	t.Logf("%d steps of a life, %d recoveries", x.steps, x.recoveries)
}

// A VM on a bridge of somebody else's has an address of its LAN, and rules of its own that come
// back when others remove them; the bridge is made by nobody here.
func TestNetwork_LAN(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	s.options = smartvm.WithHealInterval(s.options, time.Hour)
	h := s.open()
	networks, err := h.Networks()
	if err != nil {
		t.Fatal(err)
	}
	lan := network.Config{Name: "lan", Bridge: "br0", Subnet: netip.MustParsePrefix("192.168.7.0/24"), LAN: &bridged.LAN{
		Gateway: netip.MustParseAddr("192.168.7.254"), First: netip.MustParseAddr("192.168.7.200"),
		Last: netip.MustParseAddr("192.168.7.201"),
	}}
	if _, err := networks.Create(lan); err != nil {
		t.Fatal(err)
	}
	create := func(change func(*smartvm.Spec)) (*smartvm.Machine, error) {
		spec := netSpec(s.spec("idle"), 1)
		spec.NetworkInterfaces[0].Network = "lan"
		if change != nil {
			change(&spec)
		}
		return h.Create(t.Context(), spec)
	}
	var all []*smartvm.Machine
	for want, change := range map[string]func(*smartvm.Spec){
		" ip=192.168.7.50::192.168.7.254:255.255.255.0:": func(s *smartvm.Spec) {
			s.NetworkInterfaces[0].IP = netip.MustParseAddr("192.168.7.50")
		},
		" ip=192.168.7.200::": nil,
		"": func(s *smartvm.Spec) {
			s.NetworkInterfaces[0].Network = "bridge:br0"
		},
	} {
		m, err := create(change)
		if err != nil {
			t.Fatal(err)
		}
		if args := m.Spec().BootSource.BootArgs; !strings.Contains(args, want) || want == "" &&
			strings.Contains(args, "ip=") {
			t.Errorf("boot arguments %q, want %q", args, want)
		}
		all = append(all, m)
	}
	m := all[0]
	var advised interface{ Hint() string }
	if err := m.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "bridge br0: no such interface") ||
		!errors.As(err, &advised) {
		t.Fatalf("without the bridge: %v", err)
	}
	wantNoNetwork(t)
	addLAN(t)
	for _, m := range all {
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	before := ruleset(t)
	if closed := slices.DeleteFunc(slices.Clone(before), func(s string) bool {
		return !strings.Contains(s, "input")
	}); len(closed) == 0 {
		t.Errorf("the host is open: %q", before)
	}
	wait := func(what string, done func([]string) bool) {
		t.Helper()
		for deadline := time.Now().Add(testenv.Patience(20 * time.Second)); !done(ruleset(t)); {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %q", what, ruleset(t))
			}
		}
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	wait("the rules are not restored", func(now []string) bool { return slices.Equal(now, before) })
	if err := m.Update(t.Context(), func(s *smartvm.Spec) error {
		s.Policy = &policy.Policy{AllowHost: true}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	wait("the VM does not reach the host", func(now []string) bool { return len(now) < len(before) })
	if err := m.Update(t.Context(), func(s *smartvm.Spec) error { s.Policy = nil; return nil }); err != nil {
		t.Fatal(err)
	}
	wait("the VM still reaches the host", func(now []string) bool { return slices.Equal(now, before) })
	for _, change := range []func(*smartvm.Spec) error{
		func(s *smartvm.Spec) error { s.Policy = &policy.Policy{DefaultAction: policy.Deny}; return nil },
		func(s *smartvm.Spec) error { s.Ports = []smartvm.Port{{HostPort: 80, GuestPort: 80}}; return nil },
	} {
		if err := m.Update(t.Context(), change); err == nil || !strings.Contains(err.Error(), "whose bridge is not ours") {
			t.Errorf("changed: %v", err)
		}
	}
	for _, m := range all {
		if _, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
			t.Fatal(err)
		}
	}
	if left := ruleset(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	// The leak oracle looks at what this test made itself, too.
	bridge, err := netlink.LinkByName("br0")
	if err == nil {
		err = netlink.LinkDel(bridge)
	}
	if err != nil {
		t.Errorf("the bridge is not left alone: %v", err)
	}
	for range 2 { // 200 is taken, 201 is the last
		again, err := create(nil)
		if err != nil {
			if !errors.Is(err, network.ErrExhausted) {
				t.Error(err)
			}
			break
		}
		all = append(all, again)
	}
	if len(all) != 4 {
		t.Errorf("%d VMs are made, want 4", len(all))
	}
	for _, m := range all {
		if err := m.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(networks.Remove("lan"), os.Remove(networks.Dir)); err != nil {
		t.Error(err)
	}
}

// All that a bridge of somebody else's cannot give a VM is said at once.
func TestNetwork_LANRefused(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	spec := netSpec(s.spec("idle"), 1)
	spec.NetworkInterfaces[0].Network, spec.NetworkInterfaces[0].Namespace, spec.NetworkInterfaces[0].IP = "bridge:br0",
		true, netip.MustParseAddr("192.168.7.5")
	spec.Policy, spec.Ports = &policy.Policy{Egress: policy.EgressPublic}, []smartvm.Port{{GuestPort: 80}}
	_, err := s.open().Create(t.Context(), spec)
	for _, want := range []string{
		"networkInterfaces[0].ip: must not be there on network bridge:br0: it knows no subnet",
		"networkInterfaces[0].namespace: must not be there", "ports: must not be there",
		"policy: must say no more than allowHost",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
