package nettest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

const wireGuardPort = 51820

// WireGuard gives n a tunnel, wg0, whose other end is 10.7.0.2 and fd07::2, and behind which n is
// 10.7.0.1, fd07::1 and 203.0.113.77. It returns a file with the other end's configuration, as
// wg-quick has it, for whom n is at an IPv4 address.
func (n *Namespace) WireGuard(address string) (file string) {
	n.t.Helper()
	var theirs, ours wgtypes.Key
	for _, key := range []*wgtypes.Key{&theirs, &ours} {
		var err error
		if *key, err = wgtypes.GeneratePrivateKey(); err != nil {
			n.t.Fatal(err)
		}
	}
	n.Must(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "wg0"
		if err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs}); err != nil {
			return err
		}
		client, err := wgctrl.New()
		if err != nil {
			return err
		}
		port := wireGuardPort
		all := []net.IPNet{{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, {IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}}
		err = client.ConfigureDevice("wg0",
			wgtypes.Config{
				PrivateKey: &ours, ListenPort: &port,
				Peers: []wgtypes.PeerConfig{{PublicKey: theirs.PublicKey(), AllowedIPs: all}},
			})
		return errors.Join(err, client.Close(), Link{Name: "wg0", Addresses: []netip.Prefix{
			netip.MustParsePrefix("10.7.0.1/24"), netip.MustParsePrefix("fd07::1/64"), netip.MustParsePrefix("203.0.113.77/32"),
		}}.Configure())
	})
	file = filepath.Join(n.t.TempDir(), "wg.conf")
	text := fmt.Sprintf(
		"[Interface]\nPrivateKey = %s\nAddress = 10.7.0.2/24, fd07::2/64\n[Peer]\nPublicKey = %s\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = %s:%d\n",
		theirs, ours.PublicKey(), address, wireGuardPort)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	return file
}
