package filter

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network/internal/nft"
	"push.rocks/smartvm/network/policy"
)

// A kernel that has no nft_log refuses the whole transaction: then there are the same rules
// without. Guests and changes come after that.
func TestWithLog_Unsupported(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	rules := func(destinations ...string) *policy.Policy {
		p := &policy.Policy{DefaultAction: policy.Deny}
		for _, d := range destinations {
			p.Rules = append(p.Rules, policy.Rule{Action: policy.Allow, Destination: d})
		}
		return p
	}
	tables := &Tables{
		Name: "smartvm-svbr0", Owner: "me", Bridge: "svbr0", Taps: "svbr0-",
		Subnet: netip.MustParsePrefix("10.0.0.0/24"), Egress: rules("192.0.2.1"),
	}
	conn, err := nft.Open()
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	err = withLog(tables.Name, func(l *layout) error {
		if tried++; l.logs {
			return unix.ENOENT // as the kernel says of an expression that it does not know
		}
		return tables.make(conn, l)
	})
	if err != nil || tried != 2 {
		t.Fatal(tried, err)
	}
	has := func(want bool) {
		t.Helper()
		if logs, err := Logs(tables.Name); err != nil || logs != want {
			t.Errorf("logs: %v, %v, want %v", logs, err, want)
		}
	}
	chains := func() (names []string) {
		t.Helper()
		all, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if strings.Contains(c.Name, ".") || strings.HasPrefix(c.Name, "guest-") {
				names = append(names, c.Name)
			}
		}
		slices.Sort(names)
		return names
	}
	has(false)
	g := &Guest{
		Table: tables.Name, Tap: "svbr0-a", MAC: "02:00:00:00:00:01", IP4: netip.MustParseAddr("10.0.0.2"),
		Policy: rules("192.0.2.1"),
	}
	if err := g.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := chains(); !slices.Equal(got, []string{"guest-svbr0-a"}) {
		t.Errorf("without a log there are %q", got)
	}
	if err := g.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	if whole, err := tables.There(t.Context()); err != nil || !whole {
		t.Error(whole, err)
	}
	// The kernel of this test logs: the chains of decisions come and go with their rules.
	if err := tables.Replace(t.Context()); err != nil {
		t.Fatal(err)
	}
	has(true)
	for _, step := range []struct {
		network, own []string
		want         string
	}{
		{[]string{"192.0.2.1"}, nil, "egress.0 egress.1 guest-svbr0-a guest-svbr0-a.0"},
		{
			[]string{"192.0.2.1", "192.0.2.2"},
			[]string{"192.0.2.1"},
			"egress.0 egress.1 egress.2 guest-svbr0-a guest-svbr0-a.0 guest-svbr0-a.1",
		},
		{nil, []string{"192.0.2.1", "192.0.2.2"}, "egress.0 guest-svbr0-a guest-svbr0-a.0 guest-svbr0-a.1 guest-svbr0-a.2"},
	} {
		tables.Egress, g.Policy = rules(step.network...), rules(step.own...)
		if done, err := tables.Renew(t.Context()); err != nil || !done {
			t.Fatal(done, err)
		}
		if err := g.Replace(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(chains(), " "); got != step.want {
			t.Errorf("there are %q, want %q", got, step.want)
		}
	}
	if err := g.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := chains(); !slices.Equal(got, []string{"egress.0"}) {
		t.Errorf("the guest left %q", got)
	}
	if err := tables.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
}
