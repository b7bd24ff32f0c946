package firecracker

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
)

// NetworkInterface is a network device on a TAP.
type NetworkInterface struct {
	IfaceID     string `json:"iface_id"`            // letters, digits and _; does not name the guest's interface
	HostDevName string `json:"host_dev_name"`       // the TAP, up to 15 bytes
	GuestMAC    string `json:"guest_mac,omitempty"` // "06:00:c0:00:02:01"; absent: the guest picks one
	// MTU is advertised to the guest, 68 to 65535; that of the TAP is the caller's affair. Firecracker
	// >= 1.16.
	MTU           int          `json:"mtu,omitempty" since:"1.16.0"`
	RxRateLimiter *RateLimiter `json:"rx_rate_limiter,omitempty"` // towards the guest
	TxRateLimiter *RateLimiter `json:"tx_rate_limiter,omitempty"` // from the guest
}

// PutNetworkInterface creates or replaces an interface before boot; a failed replacement loses the
// old one. The VMM opens the TAP at once. In a started VM it plugs a new one in: Firecracker >=
// 1.16 with --enable-pci.
func (c *Client) PutNetworkInterface(ctx context.Context, n NetworkInterface) error {
	return c.sendTo(ctx, http.MethodPut, "/network-interfaces", n.IfaceID, n)
}

// PartialNetworkInterface is what of an interface can change in a started VM.
type PartialNetworkInterface struct {
	IfaceID       string       `json:"iface_id"`
	RxRateLimiter *RateLimiter `json:"rx_rate_limiter,omitempty"`
	TxRateLimiter *RateLimiter `json:"tx_rate_limiter,omitempty"`
}

// PatchNetworkInterface changes the limits of a started VM's interface.
func (c *Client) PatchNetworkInterface(ctx context.Context, n PartialNetworkInterface) error {
	return c.sendTo(ctx, http.MethodPatch, "/network-interfaces", n.IfaceID, n)
}

// DeleteNetworkInterface unplugs an interface from a started VM with --enable-pci. Firecracker >=
// 1.16, unpublished.
func (c *Client) DeleteNetworkInterface(ctx context.Context, id string) error {
	return c.sendTo(ctx, http.MethodDelete, "/network-interfaces", id, nil)
}

// Vsock is the VM's one vsock device.
type Vsock struct {
	GuestCID uint32 `json:"guest_cid"` // at least 3, which the VMM does not check
	// UDSPath is the socket that the VMM listens on for connections to the guest. Those from the guest
	// to port N go to UDSPath_N, where the caller listens. The VMM never unlinks it.
	UDSPath string `json:"uds_path"`
	VsockID string `json:"vsock_id,omitempty"` // deprecated and without effect
}

// PutVsock creates or replaces the vsock device before boot. The VMM binds the socket at once; a
// file in its place is an error.
func (c *Client) PutVsock(ctx context.Context, v Vsock) error {
	return c.send(ctx, http.MethodPut, "/vsock", v)
}

// MMDSVersion is the protocol of the metadata service.
type MMDSVersion string

// The protocols.
const (
	MMDSV1 MMDSVersion = "V1" // without tokens; the default, deprecated
	MMDSV2 MMDSVersion = "V2" // with tokens
)

// MMDSConfig opens the metadata service to the guest.
type MMDSConfig struct {
	NetworkInterfaces []string    `json:"network_interfaces"` // ids of interfaces that exist already; len >= 1
	Version           MMDSVersion `json:"version,omitempty"`
	// IPv4Address is where the guest finds it, in 169.254.1.0 to 169.254.254.255; 169.254.169.254 if
	// absent.
	IPv4Address netip.Addr `json:"ipv4_address,omitzero"`
	// text whatever the guest accepts; Firecracker >= 1.13
	IMDSCompat bool `json:"imds_compat,omitempty" since:"1.13.0"`
}

// PutMMDSConfig configures the metadata service before boot.
func (c *Client) PutMMDSConfig(ctx context.Context, m MMDSConfig) error {
	return c.send(ctx, http.MethodPut, "/mmds/config", m)
}

// PutMMDS replaces the metadata, which encodes to any JSON, in any state. Status 413 says that it
// exceeds the VMM's limit. After the boot of a VM whose interfaces have no metadata service it is
// refused, Firecracker >= 1.15.
func (c *Client) PutMMDS(ctx context.Context, metadata any) error {
	return c.send(ctx, http.MethodPut, "/mmds", metadata)
}

// PatchMMDS merges into the metadata as RFC 7396 says: null removes. The metadata must have been
// put before.
func (c *Client) PatchMMDS(ctx context.Context, patch any) error {
	return c.send(ctx, http.MethodPatch, "/mmds", patch)
}

// GetMMDS returns the metadata, {} if there is none.
func (c *Client) GetMMDS(ctx context.Context) (json.RawMessage, error) {
	var metadata json.RawMessage
	err := c.get(ctx, "/mmds", &metadata)
	return metadata, err
}
