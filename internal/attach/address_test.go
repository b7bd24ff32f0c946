package attach_test

import (
	"context"
	"net/netip"
	"path/filepath"
	"testing"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
)

// A VM that is restored has its MAC and addresses again where they are free and of the network; and
// whatever it has, nobody else has.
func TestAddress_Restored(t *testing.T) {
	of := network.Config{Name: "lan", Bridge: "sv-lan", Subnet: netip.MustParsePrefix("10.7.0.0/24")}
	second, _ := of.Guest(1)
	const own, was = "06:00:ac:10:00:02", "06:00:ac:10:00:07"
	for name, tt := range map[string]struct {
		wish   *attach.Interface
		taken  string // a MAC
		mac    string
		number int // of the address
	}{
		"Anew":            {nil, "", own, 0},
		"Again":           {&attach.Interface{MAC: was, IP4: second}, "", was, 1},
		"MACTaken":        {&attach.Interface{MAC: was, IP4: second}, was, own, 0},
		"OtherSubnet":     {&attach.Interface{MAC: was, IP4: netip.MustParseAddr("10.8.0.3")}, "", own, 0},
		"SameIDElsewhere": {&attach.Interface{MAC: own, IP4: netip.MustParseAddr("10.8.0.3")}, "", own, 0},
	} {
		t.Run(name, func(t *testing.T) {
			st, err := store.Open(filepath.Join(t.TempDir(), "runtime"))
			if err != nil {
				t.Fatal(err)
			}
			do := func(ctx context.Context, e journal.Effect) error { return e.Apply(ctx) }
			if tt.taken != "" {
				if err := do(t.Context(), st.Lease("mac", "lan/"+tt.taken, "other")); err != nil {
					t.Fatal(err)
				}
			}
			all := []attach.Interface{{ID: "eth0", Network: of, MAC: own, Wish: tt.wish}}
			if err := attach.Address(t.Context(), attach.VM{ID: "vm", Store: st}, all, do); err != nil {
				t.Fatal(err)
			}
			want, _ := of.Guest(tt.number)
			if got := all[0]; got.MAC != tt.mac || got.IP4 != want {
				t.Errorf("got %s %s, want %s %s", got.MAC, got.IP4, tt.mac, want)
			}
			for kind, lease := range map[string]string{"mac": all[0].MAC, "address": all[0].IP4.String()} {
				if got := st.Holder(kind, "lan/"+lease); got != "vm" {
					t.Errorf("%s %s is held by %q", kind, lease, got)
				}
			}
		})
	}
}
