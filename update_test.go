package smartvm_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/policy"
)

// A VM that runs gets another policy, other ports and limits at once, from whichever process, and
// has them after a stop and a start too.
func TestMachine_Update(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := netSpec(s.spec("idle"), 1)
	spec.Ports = []smartvm.Port{{GuestPort: 80}, {HostPort: 8080, GuestPort: 81}, {HostPort: 8090, GuestPort: 82}}
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	ports := func(m *smartvm.Machine) (all []string) {
		t.Helper()
		in, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range in.Interfaces[0].Ports {
			all = append(all, p.String())
		}
		return all
	}
	rules := func() (all []string) {
		t.Helper()
		in, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range in.Interfaces[0].Rules {
			all = append(all, r.Rule)
		}
		return all
	}
	chosen := ports(m)[0]
	// As another process has it.
	other, err := s.open().Machine(t.Context(), m.ID())
	if err != nil {
		t.Fatal(err)
	}
	third, err := s.open().Machine(t.Context(), m.ID())
	if err != nil {
		t.Fatal(err)
	}
	// shown is what the third says of the VM, though it was another that changed it.
	shown := func(most int) {
		t.Helper()
		in, err := third.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n := in.Interfaces[0].Network.MaxConnections; n != most || in.Spec.Policy == nil || len(in.Spec.Ports) != 3 {
			t.Errorf("shown are at most %d connections, want %d, and %+v", n, most, in.Spec)
		}
	}
	update := func(change func(*smartvm.Spec)) error {
		return other.Update(t.Context(), func(s *smartvm.Spec) error { change(s); return nil })
	}
	err = update(func(s *smartvm.Spec) {
		s.Policy = &policy.Policy{
			DefaultAction: policy.Deny,
			Rules:         []policy.Rule{{Action: policy.Allow, Destination: "192.0.2.0/24"}},
		}
		s.Ports = []smartvm.Port{s.Ports[0], s.Ports[2], {HostPort: 8081, GuestPort: 81}}
		s.NetworkInterfaces[0].RxRateLimiter = &smartvm.RateLimiter{
			Bandwidth: &smartvm.TokenBucket{Size: 1 << 20, RefillTime: 1000},
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{chosen, "8090->82/tcp", "8081->81/tcp"}
	for which, m := range map[string]*smartvm.Machine{"it": m, "another": other} {
		if got := ports(m); !slices.Equal(got, want) {
			t.Errorf("%s has ports %v, want %v", which, got, want)
		}
		if m.Spec().Policy == nil || len(m.Spec().Ports) != 3 {
			t.Errorf("%s has %+v", which, m.Spec())
		}
	}
	wantRules := []string{"allow 192.0.2.0/24", "default deny"}
	if got := rules(); !slices.Equal(got, wantRules) {
		t.Errorf("got rules %q, want %q", got, wantRules)
	}
	shown(0)
	networks, err := h.Networks()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(networks.Dir) })
	changed, err := networks.Update(network.DefaultName, func(c *network.Settings) { c.MaxConnections = 77 })
	if err != nil {
		t.Fatal(err)
	}
	shown(0) // that is not what holds yet
	if err := network.Update(t.Context(), filepath.Join(h.RuntimeDir(), store.NetworkDir), changed); err != nil {
		t.Fatal(err)
	}
	shown(77)
	config, err := m.VMConfig(t.Context())
	if err != nil || config.NetworkInterfaces[0].RxRateLimiter == nil ||
		config.NetworkInterfaces[0].RxRateLimiter.Bandwidth.Size != 1<<20 {
		t.Errorf("the VMM has limits %+v, %v", config.NetworkInterfaces, err)
	}
	for port, free := range map[int]bool{8080: true, 8081: false, 8090: false} {
		l, err := net.Listen("tcp4", fmt.Sprint("0.0.0.0:", port))
		if err == nil {
			err = l.Close()
			if !free {
				t.Errorf("port %d is free", port)
			}
		}
		if free && err != nil {
			t.Errorf("port %d: %v", port, err)
		}
	}
	// All or nothing: one that is taken leaves all as it was.
	taken, err := net.Listen("tcp4", "0.0.0.0:8070")
	if err != nil {
		t.Fatal(err)
	}
	err = update(func(s *smartvm.Spec) {
		s.Policy = nil
		s.Ports = append(s.Ports, smartvm.Port{HostPort: 8071, GuestPort: 71}, smartvm.Port{HostPort: 8070, GuestPort: 70})
	})
	if err == nil || !strings.Contains(err.Error(), "8070:70") || !strings.Contains(err.Error(), unix.EADDRINUSE.Error()) {
		t.Errorf("a port that is taken: %v", err)
	}
	if err := taken.Close(); err != nil {
		t.Fatal(err)
	}
	if got := ports(m); !slices.Equal(got, want) || !slices.Equal(rules(), wantRules) || len(m.Spec().Ports) != 3 ||
		m.Spec().Policy == nil {
		t.Errorf("after that it has %v, %q", got, rules())
	}
	if l, err := net.Listen("tcp4", "0.0.0.0:8071"); err != nil {
		t.Error(err)
	} else if err := l.Close(); err != nil {
		t.Error(err)
	}
	// What cannot be.
	for text, change := range map[string]func(*smartvm.Spec) error{
		"ports[3].guestPort": func(s *smartvm.Spec) error {
			s.Ports = append(s.Ports, smartvm.Port{HostPort: 1})
			return nil
		},
		"only the policy": func(s *smartvm.Spec) error { s.MachineConfig.VCPUCount++; return nil },
		"policy.rules[0].destination": func(s *smartvm.Spec) error {
			s.Policy.Rules[0].Destination = "300.0.0.0"
			return nil
		},
		"only the policy, the ports an": func(s *smartvm.Spec) error { s.NetworkInterfaces = nil; return nil },
		"changed my mind":               func(s *smartvm.Spec) error { s.Ports = nil; return errors.New("changed my mind") },
	} {
		if err := other.Update(t.Context(), change); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want %s in it", err, text)
		}
	}
	if got := ports(m); !slices.Equal(got, want) {
		t.Errorf("it has %v, want %v", got, want)
	}
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	// One that does not run has it from its next start on.
	if err := update(func(s *smartvm.Spec) { s.Policy, s.Ports = nil, s.Ports[1:2] }); err != nil {
		t.Fatal(err)
	}
	if m, err = h.Machine(t.Context(), m.ID()); err == nil {
		err = m.Start(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	if got := ports(m); !slices.Equal(got, []string{"8090->82/tcp"}) || rules() != nil {
		t.Errorf("started again it has %v, %q", got, rules())
	}
	s.stopAndRemove(m)
	wantNoNetwork(t)
}

// What has been changed is followed by a process that takes up the VM when that which was asked has
// died, and all of it goes with the VM.
func TestMachine_UpdateUnsupervised(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := netSpec(s.spec("idle"), 1)
	spec.Ports = []smartvm.Port{{HostPort: 8080, GuestPort: 80}}
	m, err := h.Create(t.Context(), spec)
	if err == nil {
		err = m.Start(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil { // it goes on unsupervised
		t.Fatal(err)
	}
	h = s.open()
	if m, err = h.Machine(t.Context(), m.ID()); err != nil {
		t.Fatal(err)
	}
	err = m.Update(t.Context(), func(s *smartvm.Spec) error {
		s.Policy, s.Ports = &policy.Policy{DefaultAction: policy.Deny},
			[]smartvm.Port{{HostPort: 8081, GuestPort: 80, HostIP: netip.MustParseAddr("127.0.0.1")}}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m, err = h.Machine(t.Context(), m.ID()); err != nil {
		t.Fatal(err)
	}
	// Asked for nothing new, it says when it has looked, be it that it has only just taken up the VM.
	if err := m.Update(t.Context(), func(*smartvm.Spec) error { return nil }); err != nil {
		t.Fatal(err)
	}
	in, err := m.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := in.Interfaces[0]
	if len(i.Ports) != 1 || i.Ports[0].Host != 8081 || !slices.ContainsFunc(i.Rules, func(c inspect.Count) bool {
		return c.Rule == "default deny"
	}) {
		t.Errorf("taken up it has %v, %v", i.Ports, i.Rules)
	}
	s.stopAndRemove(m)
	wantNoNetwork(t)
}
