package etc_test

import (
	"net/netip"
	"strings"
	"testing"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/guestagent/etc"
)

// boot is a guest with a network.
func boot() *guest.Boot {
	return &guest.Boot{
		Hostname: "web", Search: []string{"a.example", "b.example"},
		DNS: []netip.Addr{netip.MustParseAddr("172.30.0.1"), netip.MustParseAddr("fd00::1")},
		Interfaces: []guest.Interface{{
			Addresses: []netip.Prefix{netip.MustParsePrefix("172.30.0.2/23"), netip.MustParsePrefix("fd00::2/64")},
		}},
	}
}

func TestResolvConf(t *testing.T) {
	if got, want := etc.ResolvConf(boot()),
		"search a.example b.example\nnameserver 172.30.0.1\nnameserver fd00::1\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestHosts(t *testing.T) {
	b := boot()
	if got := etc.Hosts(b); !strings.HasSuffix(got, "\n172.30.0.2 web\n") ||
		!strings.HasPrefix(got, "127.0.0.1 localhost\n::1 localhost ") {
		t.Errorf("got %q", got)
	}
	b.Hosts = []guest.Host{
		{Name: "db.example", Address: netip.MustParseAddr("192.0.2.7")},
		{Name: "db.example", Address: netip.MustParseAddr("2001:db8::7")},
	}
	if got := etc.Hosts(b); !strings.HasSuffix(got, "\n172.30.0.2 web\n192.0.2.7 db.example\n2001:db8::7 db.example\n") {
		t.Errorf("with more names: %q", got)
	}
	b.Interfaces, b.Hosts = nil, nil
	if got := etc.Hosts(b); !strings.HasSuffix(got, "\n127.0.1.1 web\n") {
		t.Errorf("without an interface: %q", got)
	}
}
