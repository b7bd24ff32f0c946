package policy_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm/network/policy"
)

const sample = `{
  "defaultAction": "deny",
  "rules": [
    {"action": "deny", "destination": "10.1.0.0/16"},
    {"action": "allow", "protocol": "tcp", "destination": "10.0.0.0/8", "ports": [443, "8000-8080", "8081,22"]},
    {"action": "allow", "protocol": "udp", "destination": "2001:db8::1", "ports": 53},
    {"action": "allow", "domain": "*.Example.com.", "ports": "80"},
    {"action": "allow", "protocol": "icmp"}
  ],
  "allowHost": true
}`

func TestLoad(t *testing.T) {
	p, err := policy.Load(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Compile()
	if err != nil {
		t.Fatal(err)
	}
	want := []policy.Compiled{
		{Prefix: netip.MustParsePrefix("10.1.0.0/16"), Text: "deny 10.1.0.0/16"},
		{
			Allow: true, Protocols: []uint8{6}, Prefix: netip.MustParsePrefix("10.0.0.0/8"),
			Ports: []policy.PortRange{{22, 22}, {443, 443}, {8000, 8081}}, Text: "allow tcp:10.0.0.0/8:443,8000-8080,8081,22",
		},
		{
			Allow: true, Protocols: []uint8{17}, Prefix: netip.MustParsePrefix("2001:db8::1/128"),
			Ports: []policy.PortRange{{53, 53}}, Text: "allow udp:[2001:db8::1]:53",
		},
		{
			Allow: true, Protocols: []uint8{6, 17}, Domain: "*.example.com", Ports: []policy.PortRange{{80, 80}},
			Text: "allow *.Example.com.:80",
		},
		{Allow: true, Protocols: []uint8{1, 58}, Text: "allow icmp:*"},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Error(diff)
	}
}

func TestLoad_Wrong(t *testing.T) {
	for in, want := range map[string]string{
		`{"defaultAction": "reject"}`:                                                  "defaultAction: must be allow or deny",
		`{"rules": [{"destination": "10.0.0.0/8"}]}`:                                   "rules[0].action: must be allow or deny",
		`{"rules": [{"action": "deny", "protocol": "sctp"}]}`:                          "rules[0].protocol: must be",
		`{"rules": [{"action": "deny", "destination": "10.0.0.1/8"}]}`:                 "host bits: 10.0.0.0/8 is meant?",
		`{"rules": [{"action": "deny", "destination": "::ffff:10.0.0.1"}]}`:            "must be an IP address",
		`{"rules": [{"action": "deny", "domain": "example.com"}]}`:                     "only allow can have a name",
		`{"rules": [{"action": "allow", "domain": "a..b"}]}`:                           "must be like example.com",
		`{"rules": [{"action": "allow", "domain": "bü cher.example"}]}`:                "must be like example.com",
		`{"rules": [{"action": "allow", "domain": "443"}]}`:                            "as in tcp:*:443",
		`{"rules": [{"action": "allow", "domain": "10.0.0"}]}`:                         "as 10.0.0.1",
		`{"rules": [{"action": "allow", "domain": "10.0.0.256"}]}`:                     "no name ends with a number",
		`{"rules": [{"action": "allow", "domain": "*"}]}`:                              "must be like example.com",
		`{"rules": [{"action": "allow", "domain": "10.0.0.1"}]}`:                       "is an address",
		`{"rules": [{"action": "allow", "domain": "a.b", "destination": "10.0.0.1"}]}`: "beside destination",
		`{"rules": [{"action": "allow", "protocol": "icmp", "ports": 1}]}`:             "beside icmp",
		`{"rules": [{"action": "allow", "ports": 0}]}`:                                 "want like 80",
		`{"rules": [{"action": "allow", "ports": "9-8"}]}`:                             "want like 80",
		`{"rules": [{"action": "allow", "ports": 65536}]}`:                             "want like 80",
		`{"rules": [{"action": "allow", "port": 1}]}`:                                  "rules[0].port",
		`{"rules": [` + strings.Repeat(`{"action":"deny"},`, 256) +
			`{"action":"deny"}]}`: "at most 256",
		`{"rules": [` + strings.Repeat(`{"action":"allow","domain":"a.b"},`, 64) +
			`{"action":"allow","domain":"a.b"}]}`: "at most 64 with a domain",
	} {
		if _, err := policy.Load(strings.NewReader(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100s: got %v, want %q", in, err, want)
		}
	}
}

func TestParseRule(t *testing.T) {
	for in, want := range map[string]policy.Rule{
		"tcp:example.com:443":   {Protocol: "tcp", Domain: "example.com", Ports: policy.Ports{{443, 443}}},
		"example.com":           {Domain: "example.com"},
		"*.example.com:80,443":  {Domain: "*.example.com", Ports: policy.Ports{{80, 80}, {443, 443}}},
		"10.0.0.0/8":            {Destination: "10.0.0.0/8"},
		"10.0.0.1:22":           {Destination: "10.0.0.1", Ports: policy.Ports{{22, 22}}},
		"2001:db8::/32":         {Destination: "2001:db8::/32"},
		"udp:[fd00::/8]:53-60":  {Protocol: "udp", Destination: "fd00::/8", Ports: policy.Ports{{53, 60}}},
		"icmp:*":                {Protocol: "icmp"},
		"*:53":                  {Ports: policy.Ports{{53, 53}}},
		"[2001:db8::1]":         {Destination: "2001:db8::1"},
		"tcp:[2001:db8::1]:443": {Protocol: "tcp", Destination: "2001:db8::1", Ports: policy.Ports{{443, 443}}},
	} {
		want.Action = policy.Allow
		got, err := policy.ParseRule(policy.Allow, in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", in, diff)
		}
	}
	for _, in := range []string{
		"", "tcp:", ":80", "10.0.0.0/8:", "[::1", "[::1]80", "a b", "icmp:*:1", "example.com:0",
		"10.0.0.1/8", "tcp:443", "10.0.0", "10.0.0.256",
	} {
		if r, err := policy.ParseRule(policy.Allow, in); err == nil {
			t.Errorf("%q: got %+v", in, r)
		}
	}
	if _, err := policy.ParseRule(policy.Deny, "example.com"); err == nil {
		t.Error("a name can be denied")
	}
}

// Names in other scripts are what DNS has of them.
func TestCompile_IDNA(t *testing.T) {
	for in, want := range map[string]string{
		"bücher.example": "xn--bcher-kva.example", "*.BÜCHER.example.": "*.xn--bcher-kva.example",
		"例え.テスト":                "xn--r8jz45g.xn--zckzah",
		"xn--bcher-kva.example": "xn--bcher-kva.example", "_dmarc.Example.com": "_dmarc.example.com",
	} {
		p := policy.Policy{Rules: []policy.Rule{{Action: policy.Allow, Domain: in}}}
		if got, err := p.Compile(); err != nil || got[0].Domain != want {
			t.Errorf("%s: got %+v, %v, want %s", in, got, err, want)
		}
	}
}

func TestMatchDomain(t *testing.T) {
	for _, c := range []struct {
		domain, name string
		want         bool
	}{
		{"example.com", "Example.COM.", true},
		{"example.com", "a.example.com", false},
		{"example.com", "notexample.com", false},
		{"*.example.com", "a.b.example.com.", true},
		{"*.example.com", "example.com", false},
		{"*.example.com", "notexample.com", false},
		{"*.example.com", ".example.com", false},
	} {
		if got := policy.MatchDomain(c.domain, c.name); got != c.want {
			t.Errorf("%s for %s: got %v", c.name, c.domain, got)
		}
	}
}

func FuzzParseRule(f *testing.F) {
	for _, seed := range []string{
		"tcp:example.com:443", "udp:[fd00::/8]:53-60,7", "10.0.0.0/8", "*:1", "icmp:*",
		"[::1]:1", "tcp:tcp:1",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		r, err := policy.ParseRule(policy.Allow, in)
		if err != nil {
			return
		}
		again, err := policy.ParseRule(policy.Allow, strings.TrimPrefix(r.String(), "allow "))
		if err != nil || !cmp.Equal(r, again) {
			t.Errorf("%q is %+v, and its text %q is %+v, %v", in, r, r, again, err)
		}
	})
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(sample))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := policy.Load(strings.NewReader(string(data)))
		if err != nil {
			return
		}
		all, err := p.Compile()
		if err != nil {
			t.Errorf("what loads does not compile: %v", err)
		}
		for _, c := range all {
			for i := range c.Ports {
				if c.Ports[i].First > c.Ports[i].Last || i > 0 && c.Ports[i].First <= c.Ports[i-1].Last {
					t.Errorf("ports %v", c.Ports)
				}
			}
		}
	})
}
