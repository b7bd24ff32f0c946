package vmflags_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/spec"
)

func TestParsePorts(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	for text, want := range map[string][]spec.Port{
		"8080:80":               {{HostPort: 8080, GuestPort: 80}},
		"127.0.0.1:53:5353/udp": {{HostIP: local, HostPort: 53, GuestPort: 5353, Protocol: "udp"}},
		"[::1]:1:65535/tcp":     {{HostIP: netip.IPv6Loopback(), HostPort: 1, GuestPort: 65535, Protocol: "tcp"}},
		"8000-8001:80-81/udp": {
			{HostPort: 8000, GuestPort: 80, Protocol: "udp"},
			{HostPort: 8001, GuestPort: 81, Protocol: "udp"},
		},
		"80":                      {{GuestPort: 80}},
		"53/udp":                  {{GuestPort: 53, Protocol: "udp"}},
		"53:53/UDP":               {{HostPort: 53, GuestPort: 53, Protocol: "udp"}},
		"80-81":                   {{GuestPort: 80}, {GuestPort: 81}},
		"127.0.0.1::80":           {{HostIP: local, GuestPort: 80}},
		"[::1]::80/tcp":           {{HostIP: netip.IPv6Loopback(), GuestPort: 80, Protocol: "tcp"}},
		"127.0.0.1:65535-65535:1": {{HostIP: local, HostPort: 65535, GuestPort: 1}},
	} {
		got, err := vmflags.ParsePorts(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("%s: %s", text, diff)
		}
	}
	for _, text := range []string{
		"", ":80", "::80", "[::1]:80", "127.0.0.1:80", "0", "127.0.0.1::", "8000-8010:80", "80:",
		"0:80", "80:0", "65536:80", "8001-8000:80-81", "8000-8009:80", "8000-8009:80-88", "host:80:80", "1-2-3:1-2-3",
		"-1:80", "80-:80-81",
	} {
		if got, err := vmflags.ParsePorts(text); err == nil {
			t.Errorf("%q: got %+v", text, got)
		}
	}
}
