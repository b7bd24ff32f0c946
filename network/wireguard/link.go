package wireguard

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/network/rtnl"
)

// DefaultMTU leaves room for WireGuard's own in packets of 1500 bytes, by IPv6 too.
const DefaultMTU = 1420

// ErrNoKernel means that the kernel has no WireGuard.
var ErrNoKernel = errors.New("kernel has no WireGuard")

// Link is a WireGuard interface, as an effect on the host. Its keys stay in the file.
type Link struct {
	Name string `json:"name"` // drawn for it, so that nobody else has it
	File string `json:"file"` // its configuration
}

// Apply makes the interface. Returns an error that is fs.ErrExist where one of its name is there,
// ErrConfig, ErrNoKernel.
func (l *Link) Apply(ctx context.Context) error {
	c, err := Load(l.File)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = l.Name, c.MTU
	if attrs.MTU == 0 {
		attrs.MTU = DefaultMTU
	}
	link := &netlink.Wireguard{LinkAttrs: attrs}
	switch err := netlink.LinkAdd(link); {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("make WireGuard interface %s: %w", l.Name, fs.ErrExist)
	case errors.Is(err, unix.EOPNOTSUPP):
		return hint.Add(fmt.Errorf("make WireGuard interface %s: %w: %w", l.Name, ErrNoKernel, err),
			"load the kernel module wireguard")
	case err != nil:
		return fmt.Errorf("make WireGuard interface %s: %w", l.Name, err)
	}
	if err := c.configure(ctx, l.Name); err != nil {
		return fmt.Errorf("configure WireGuard interface %s: %w", l.Name, err)
	}
	if err := rtnl.AddAddresses(link, c.Addresses); err != nil {
		return fmt.Errorf("give WireGuard interface %s its %w", l.Name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set WireGuard interface %s up: %w", l.Name, err)
	}
	return nil
}

func (c *Config) configure(ctx context.Context, name string) error {
	device := wgtypes.Config{PrivateKey: &c.privateKey, ReplacePeers: true}
	if c.ListenPort != 0 {
		device.ListenPort = &c.ListenPort
	}
	for _, p := range c.Peers {
		peer := wgtypes.PeerConfig{PublicKey: p.publicKey, PresharedKey: p.preshared, ReplaceAllowedIPs: true}
		for _, a := range p.Allowed {
			peer.AllowedIPs = append(peer.AllowedIPs,
				net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())})
		}
		if p.Endpoint != "" {
			host, port, err := net.SplitHostPort(p.Endpoint)
			if err != nil {
				return err
			}
			at, found := endpoints(ctx)[host]
			if !found {
				at.addresses, at.err = lookup(ctx, host)
			}
			if at.err != nil {
				return fmt.Errorf("find endpoint: %w", at.err)
			}
			number, err := parseNumber(port, 1, 65535)
			if err != nil {
				return err
			}
			peer.Endpoint = net.UDPAddrFromAddrPort(netip.AddrPortFrom(at.addresses[0].Unmap(), uint16(number)))
		}
		if p.Keepalive != 0 {
			peer.PersistentKeepaliveInterval = &p.Keepalive
		}
		device.Peers = append(device.Peers, peer)
	}
	client, err := wgctrl.New()
	if err != nil {
		return err
	}
	return errors.Join(client.ConfigureDevice(name, device), client.Close())
}

// lookupTime bounds how long an endpoint's name is looked for.
const lookupTime = 3 * time.Second

// endpoint is what was found of one's name.
type endpoint struct {
	addresses []netip.Addr
	err       error
}

type endpointsKey struct{}

func endpoints(ctx context.Context) map[string]endpoint {
	found, _ := ctx.Value(endpointsKey{}).(map[string]endpoint)
	return found
}

// Find looks for the endpoints of the configuration in a file, so that Apply with the returned
// context need not: servers may take long to answer, and whoever makes interfaces keeps others
// waiting. What cannot be found is an error of Apply's.
func Find(ctx context.Context, file string) context.Context {
	c, err := Load(file)
	if err != nil {
		return ctx
	}
	found := map[string]endpoint{}
	for _, p := range c.Peers {
		if host, _, err := net.SplitHostPort(p.Endpoint); err == nil {
			addresses, err := lookup(ctx, host)
			found[host] = endpoint{addresses, err}
		}
	}
	return context.WithValue(ctx, endpointsKey{}, found)
}

func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
}

// Revert removes the interface.
func (l *Link) Revert(context.Context) error {
	link, err := netlink.LinkByName(l.Name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) || err == nil && link.Type() != "wireguard" {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove WireGuard interface %s: %w", l.Name, err)
	}
	return nil
}

// There says whether the interface is.
func (l *Link) There(context.Context) (bool, error) {
	_, err := netlink.LinkByName(l.Name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return false, nil
	}
	return err == nil, err
}

// State is how an interface does.
type State struct {
	Peers []PeerState `json:"peers"`
}

// PeerState is how a peer does.
type PeerState struct {
	PublicKey     string    `json:"publicKey"`
	Endpoint      string    `json:"endpoint,omitempty"`
	LastHandshake time.Time `json:"lastHandshake,omitzero"`
	ReceivedBytes int64     `json:"receivedBytes"`
	SentBytes     int64     `json:"sentBytes"`
}

// Status looks at an interface.
func Status(name string) (*State, error) {
	client, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("look at WireGuard interface %s: %w", name, err)
	}
	device, err := client.Device(name)
	if err := errors.Join(err, client.Close()); err != nil {
		return nil, fmt.Errorf("look at WireGuard interface %s: %w", name, err)
	}
	s := &State{Peers: []PeerState{}}
	for _, p := range device.Peers {
		state := PeerState{
			PublicKey: p.PublicKey.String(), LastHandshake: p.LastHandshakeTime, ReceivedBytes: p.ReceiveBytes,
			SentBytes: p.TransmitBytes,
		}
		if p.Endpoint != nil {
			state.Endpoint = p.Endpoint.String()
		}
		s.Peers = append(s.Peers, state)
	}
	return s, nil
}
