package attach_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/spec"
)

// A guest is told of further names; the host is at the gateway of its network, whether the guest is
// in a namespace or not. One without an agent cannot be told.
func TestTell_ExtraHosts(t *testing.T) {
	// From a network that nothing leaves no question goes to the host's servers, so nothing here
	// depends on them.
	of := network.Config{
		Name: "lan", Bridge: "sv-lan", Subnet: netip.MustParsePrefix("10.7.0.0/24"),
		Subnet6: netip.MustParsePrefix("fd07::/64"), Inside: true,
	}
	s := &spec.Spec{
		Image:      "debian",
		ExtraHosts: []spec.ExtraHost{{Name: "db", IP: netip.MustParseAddr("192.0.2.7")}, {Name: "host", HostGateway: true}},
	}
	gateway4, gateway6 := of.Gateway()
	want := []guest.Host{
		{Name: "db", Address: netip.MustParseAddr("192.0.2.7")},
		{Name: "host", Address: gateway4},
		{Name: "host", Address: gateway6},
	}
	ip4, ip6 := of.Guest(0)
	for name, file := range map[string]string{"Bridge": "", "Namespace": "/run/ns"} {
		t.Run(name, func(t *testing.T) {
			all := []attach.Interface{{ID: "eth0", Network: of, MAC: "06:00:ac:10:00:02", IP4: ip4, IP6: ip6, File: file}}
			guest := &guest.Boot{RootDevice: "/dev/vda", RootType: guest.Ext4}
			if err := attach.Tell(s, guest, all); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, guest.Hosts, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Error(diff)
			}
			if err := attach.Tell(s, nil, all); !errors.Is(err, spec.ErrNotSupported) {
				t.Errorf("without an agent: %v", err)
			}
		})
	}
}
