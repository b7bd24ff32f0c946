package network_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/netns"
	"push.rocks/smartvm/network/policy"
)

// dice makes a policy of bytes, which is valid more often than not.
type dice []byte

func (d *dice) roll(n int) int {
	if len(*d) == 0 {
		return 0
	}
	k := int((*d)[0]) % n
	*d = (*d)[1:]
	return k
}

func (d *dice) ports() (all policy.Ports) {
	for range d.roll(4) * d.roll(20) {
		first := uint16(d.roll(256)<<8|d.roll(256)) | 1
		all = append(all, policy.PortRange{First: first, Last: max(first, uint16(d.roll(256)<<8))})
	}
	return all
}

func (d *dice) policy() *policy.Policy {
	p := &policy.Policy{DefaultAction: []policy.Action{"", policy.Allow, policy.Deny}[d.roll(3)]}
	for range d.roll(12) * d.roll(24) {
		r := policy.Rule{
			Action:   []policy.Action{policy.Allow, policy.Deny}[d.roll(2)],
			Protocol: []string{"", "tcp", "udp", "icmp"}[d.roll(4)],
		}
		switch d.roll(5) {
		case 0:
			a := netip.AddrFrom4([4]byte{byte(d.roll(256)), byte(d.roll(256)), byte(d.roll(256)), byte(d.roll(256))})
			r.Destination = netip.PrefixFrom(a, d.roll(33)).Masked().String()
		case 1:
			a := netip.AddrFrom16([16]byte{byte(d.roll(256)), byte(d.roll(256)), 5: byte(d.roll(256)), 15: byte(d.roll(256))})
			r.Destination = netip.PrefixFrom(a, d.roll(129)).Masked().String()
		case 2:
			r.Action, r.Domain = policy.Allow, []string{"", "*."}[d.roll(2)]+strings.Repeat("x", 1+d.roll(63))+".example"
		}
		if r.Protocol != "icmp" {
			r.Ports = d.ports()
		}
		p.Rules = append(p.Rules, r)
	}
	return p
}

// largest is as large as a policy may be.
func largest() *policy.Policy {
	p := &policy.Policy{DefaultAction: policy.Deny}
	for i := range 256 {
		r := policy.Rule{Action: policy.Allow}
		for n := range 64 {
			r.Ports = append(r.Ports, policy.PortRange{First: uint16(1 + n*1000), Last: uint16(500 + n*1000 + i)})
		}
		if i < 64 {
			r.Domain = fmt.Sprintf("*.%s%d.example", strings.Repeat(strings.Repeat("x", 55)+".", 4), i)
		} else {
			r.Destination = fmt.Sprintf("2001:db8:%x::/48", i)
		}
		p.Rules = append(p.Rules, r)
	}
	return p
}

// load loads a policy as a network's, and as a guest's of that, and takes it away again.
func load(t *testing.T, p *policy.Policy) error {
	ours := tables()
	ours.Egress = p
	g := &filter.Guest{
		Table: ours.Name, Tap: "svtap", MAC: "02:00:00:00:00:01", IP4: netip.MustParseAddr("172.30.0.2"),
		IP6:    netip.MustParseAddr("fd00::2"),
		Policy: p,
	}
	if err := errors.Join(ours.Apply(t.Context()), g.Apply(t.Context())); err != nil {
		return errors.Join(err, ours.Revert(t.Context()))
	}
	for _, tap := range []string{"", g.Tap} {
		if counts, err := inspect.Counts(ours.Name, tap); err != nil || len(counts) == 0 ||
			counts[len(counts)-1].Packets > 0 {
			return fmt.Errorf("counters of %q: %+v, %w", tap, counts, err)
		}
	}
	return errors.Join(g.Revert(t.Context()), ours.Revert(t.Context()))
}

// Whatever policy is valid, the kernel takes it, and its JSON says the same.
func FuzzPolicies(f *testing.F) {
	testenv.Require(f, testenv.Root)
	own, err := netns.New()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { own.Close() })
	f.Add([]byte(
		`{"defaultAction":"deny","rules":[{"action":"allow","domain":"*.example.com","ports":"80,443"},{"action":"deny","destination":"::/0"},{"action":"allow","protocol":"icmp"},{"action":"allow","destination":"0.0.0.0/0","ports":[1,"2-65535"]}]}`))
	f.Add([]byte{
		2, 11, 23, 0, 1, 0, 10, 0, 0, 0, 8, 3, 19, 1, 2, 3, 4, 5, 6, 7, 1, 2, 2, 1, 60, 0, 0, 1, 3, 1, 32,
		1, 13, 184, 48,
	})
	f.Add(bytes.Repeat([]byte{7, 200, 31, 2, 90, 17, 255}, 800))
	f.Fuzz(func(t *testing.T, data []byte) {
		d := dice(data)
		p := d.policy()
		if read, err := policy.Load(bytes.NewReader(data)); err == nil {
			p = read
		}
		if len(p.Validate()) > 0 {
			return
		}
		for _, r := range p.Rules {
			action, text, _ := strings.Cut(r.String(), " ")
			if again, err := policy.ParseRule(policy.Action(action), text); err != nil || again.String() != r.String() {
				t.Errorf("%q is parsed to %q, %v", r, again, err)
			}
		}
		if err := own.Do(func() error { return load(t, p) }); err != nil {
			t.Fatal(err)
		}
	})
}

// The largest policy that is valid is none too many for the kernel.
func TestNetwork_LargestPolicy(t *testing.T) {
	testenv.Require(t, testenv.Root)
	own, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if wrong := largest().Validate(); len(wrong) > 0 {
		t.Fatal(wrong)
	}
	if err := own.Do(func() error { return load(t, largest()) }); err != nil {
		t.Fatal(err)
	}
	// Nor for a journal: a guest's part has the network's and its own.
	path := filepath.Join(t.TempDir(), "journal")
	kinds := journal.Kinds{"tables": func() journal.Effect {
		return new(filter.Tables)
	}, "part": func() journal.Effect { return new(filter.Guest) }}
	j, err := journal.Create(path, kinds, nil)
	if err != nil {
		t.Fatal(err)
	}
	ours := tables()
	ours.Egress = largest()
	err = own.Do(func() error {
		return errors.Join(j.Do(t.Context(), ours), j.Do(t.Context(), &filter.Guest{
			Table: ours.Name, Tap: "svtap", MAC: "02:00:00:00:00:01", IP4: netip.MustParseAddr("172.30.0.2"), Policy: largest(),
		}), j.Close())
	})
	if err != nil {
		t.Fatal(err)
	}
	if j, err = journal.Open(path, kinds, nil); err != nil {
		t.Fatal(err)
	}
	if err := own.Do(func() error { return j.Revert(t.Context()) }); err != nil {
		t.Error(err)
	}
}
