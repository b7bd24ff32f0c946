package attach_test

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/spec"
)

// On a bridge of somebody else's a VM has the address that it wishes for, one of those that are set
// aside, or none that anybody here knows.
func TestLAN(t *testing.T) {
	a := netip.MustParseAddr
	lan := network.Config{
		Name: "lan", Bridge: "br0", Subnet: netip.MustParsePrefix("192.168.1.0/24"),
		LAN: &bridged.LAN{Gateway: a("192.168.1.254")},
	}
	ranged, asks := lan, network.Config{Name: "bridge:br0", Bridge: "br0", LAN: new(bridged.LAN)}
	ranged.LAN = &bridged.LAN{First: a("192.168.1.200"), Last: a("192.168.1.201")}
	const own, was = "06:00:ac:10:00:02", "06:00:ac:10:00:07"
	gateway := []netip.Addr{a("192.168.1.254")}
	for name, tt := range map[string]struct {
		of       network.Config
		ip       string
		wish     *attach.Interface
		taken    string // an address
		ip4, mac string
		gateways []netip.Addr
		err      error
	}{
		"Wished":       {of: lan, ip: "192.168.1.1", ip4: "192.168.1.1", mac: own, gateways: gateway},
		"NoneSetAside": {of: lan, err: network.ErrExhausted},
		"Restored": {
			of: lan, wish: &attach.Interface{MAC: was, IP4: a("192.168.1.50")}, ip4: "192.168.1.50", mac: was,
			gateways: gateway,
		},
		"RestoredTaken": {
			of: ranged, wish: &attach.Interface{MAC: was, IP4: a("192.168.1.50")}, taken: "192.168.1.50",
			ip4: "192.168.1.200", mac: was,
		},
		"RestoredGateway": {of: lan, wish: &attach.Interface{MAC: was, IP4: a("192.168.1.254")}, err: network.ErrExhausted},
		"Range":           {of: ranged, taken: "192.168.1.200", ip4: "192.168.1.201", mac: own},
		"Asks":            {of: asks, mac: own},
		"AsksRestored":    {of: asks, wish: &attach.Interface{MAC: was}, mac: was},
	} {
		t.Run(name, func(t *testing.T) {
			if err := tt.of.Validate(); err != nil {
				t.Fatal(err)
			}
			st, err := store.Open(filepath.Join(t.TempDir(), "runtime"))
			if err != nil {
				t.Fatal(err)
			}
			do := func(ctx context.Context, e journal.Effect) error { return e.Apply(ctx) }
			if tt.taken != "" {
				if err := do(t.Context(), st.Lease("address", tt.of.Name+"/"+tt.taken, "other")); err != nil {
					t.Fatal(err)
				}
			}
			i := attach.Interface{ID: "eth0", Network: tt.of, MAC: own, Wish: tt.wish, DNS: []netip.Addr{a("192.168.1.53")}}
			if tt.ip != "" {
				i.IP4 = a(tt.ip)
			}
			all := []attach.Interface{i}
			err = attach.Address(t.Context(), attach.VM{ID: "vm", Store: st}, all, do)
			if !errors.Is(err, tt.err) || err == nil != (tt.err == nil) {
				t.Fatalf("got %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			if got := all[0]; got.MAC != tt.mac || tt.ip4 == "" && got.IP4.IsValid() || tt.ip4 != "" && got.IP4 != a(tt.ip4) ||
				got.IP6.IsValid() {
				t.Errorf("got %s %s %s, want %s %s", got.MAC, got.IP4, got.IP6, tt.mac, tt.ip4)
			}
			told := &guest.Boot{RootDevice: "/dev/vda", RootType: guest.Ext4}
			if err := attach.Tell(&spec.Spec{Image: "debian"}, told, all); err != nil {
				t.Fatal(err)
			}
			want := guest.Interface{MAC: tt.mac, Name: "eth0", Routers: true, Gateways: tt.gateways}
			if tt.ip4 != "" {
				want.Addresses = []netip.Prefix{netip.PrefixFrom(a(tt.ip4), 24)}
			}
			if diff := cmp.Diff([]guest.Interface{want}, told.Interfaces,
				cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(all[0].DNS, told.DNS, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}
