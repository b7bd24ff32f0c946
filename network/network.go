package network

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"

	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/conntrack"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/network/subnet"
)

// What the default network is, unless told otherwise.
const (
	DefaultName   = "default"
	DefaultBridge = "svbr0"
	DefaultSubnet = "172.30.0.0/24"
)

// Config is a network of VMs. Its JSON is the file that keeps it.
type Config struct {
	Name    string       `json:"name"`             // [a-z0-9-], at most 32 bytes
	Bridge  string       `json:"bridge"`           // the interface, at most 15 bytes
	Subnet  netip.Prefix `json:"subnet"`           // IPv4, /8 to /30; the host has its first address
	Subnet6 netip.Prefix `json:"subnet6,omitzero"` // a /64; zero: no IPv6
	MTU     int          `json:"mtu,omitempty"`    // 0: 1500
	Mutual  bool         `json:"mutual,omitempty"` // guests reach each other
	// Routed has what guests of a mutual network send each other go by the host, as policies allow; of
	// what one sends to all the others see nothing.
	Routed bool `json:"routed,omitempty"`
	Inside bool `json:"internal,omitempty"`
	Settings
	// WireGuard is the interface by which alone guests leave. "": any. WireGuardConfig is a file as
	// wg-quick has it, absolute, of which such an interface is made.
	WireGuard       string `json:"wireguard,omitempty"`
	WireGuardConfig string `json:"wireguardConfig,omitempty"`
	// LAN says that the bridge is somebody else's, and what is behind it. Then guests have addresses
	// of Subnet, which is the LAN's, or if it is zero such as they get from there; IPv6 ones are those
	// that the LAN's routers lead to. MTU is what guests are told. Nil: the bridge is ours.
	LAN *bridged.LAN `json:"lan,omitempty"`
	// HostPolicy says that Policy is the host's, as the network has none.
	HostPolicy bool `json:"hostPolicy,omitempty"`
}

// Refresh gives the network the settings that it has now. If it has no policy any more, that of the
// host stays: not each process that has to do with the network is told of that.
func (c *Config) Refresh(now Config) {
	if c.HostPolicy && now.Policy == nil {
		now.Policy, now.HostPolicy = c.Policy, true
	}
	c.Settings, c.HostPolicy = now.Settings, now.HostPolicy
}

// OnBridge is how the names of networks begin that are a bridge of somebody else's and no more:
// "bridge:br0". Each is always there.
const OnBridge = "bridge:"

// Settings are what may be changed while a network is up.
type Settings struct {
	Policy *policy.Policy `json:"policy,omitempty"` // what all its guests may reach at most
	// MaxConnections is how many the host may have to know of one guest, of IPv4 and of IPv6. 0: an
	// eighth of what it can know of all.
	MaxConnections int `json:"maxConnections,omitempty"`
	// NewConnections is how many a guest may begin in a second. 0: DefaultNewConnections.
	NewConnections int `json:"newConnections,omitempty"`
	// DNSQuestions is how many a guest that starts from now on may ask in a second. 0:
	// dnsproxy.DefaultPerSecond.
	DNSQuestions int `json:"dnsQuestions,omitempty"`
}

// DefaultNewConnections is far above what ordinary programs begin in a second, and a tenth of what
// keeps a processor busy.
const DefaultNewConnections = 2000

// Errors of this package.
var (
	ErrExhausted = errors.New("no address is free")
	ErrTaken     = errors.New("interface is somebody else's")
)

// OverlapError says that an address of a network leads elsewhere.
type OverlapError = subnet.OverlapError

// New returns a network with the rest of its settings as they are by default. An invalid subnet is
// a matter of Validate.
func New(name, bridge string, ip4 netip.Prefix) Config {
	return Config{Name: name, Bridge: bridge, Subnet: ip4.Masked(), Subnet6: subnet.Local(bridge)}
}

// Validate returns all that is wrong, joined. Subnets give *subnet.Errors.
func (c *Config) Validate() error {
	var errs []error
	if !regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`).MatchString(c.Name) && c.Name != OnBridge+c.Bridge {
		errs = append(errs, fmt.Errorf("network name %q: must be 1 to 32 of a-z, 0-9 and -", c.Name))
	}
	if err := ValidInterface(c.Bridge); err != nil {
		errs = append(errs, err)
	}
	if c.LAN != nil {
		errs = append(errs, c.LAN.Validate(c.Subnet), c.ours())
	} else if err := subnet.Validate(c.Subnet); err != nil {
		errs = append(errs, err)
	}
	if p := c.Subnet6; p.IsValid() &&
		(!p.Addr().Is6() || p.Bits() != 64 || p != p.Masked() || !p.Addr().IsGlobalUnicast()) {
		errs = append(errs,
			&subnet.Error{Subnet: p.String(), Reason: "must be an IPv6 /64 without host bits, such as " +
				subnet.Local(c.Bridge).String()})
	}
	if c.MTU != 0 && (c.MTU < 1280 || c.MTU > 65535) {
		errs = append(errs, fmt.Errorf("mtu %d: must be from 1280 to 65535", c.MTU))
	}
	errs = append(errs, c.Settings.Validate())
	if c.WireGuard != "" {
		errs = append(errs, ValidInterface(c.WireGuard))
		if c.WireGuardConfig != "" {
			errs = append(errs, errors.New("wireguard: an interface that is there, or the configuration of another, not both"))
		}
	}
	if c.Routed && !c.Mutual {
		errs = append(errs, errors.New("routed: is for networks whose guests reach each other"))
	}
	if c.Inside && (c.WireGuard != "" || c.WireGuardConfig != "") {
		errs = append(errs, errors.New("internal: nothing leaves the network, not by WireGuard either"))
	}
	if c.WireGuardConfig != "" && !filepath.IsAbs(c.WireGuardConfig) {
		errs = append(errs, fmt.Errorf("wireguard configuration %q: must be an absolute path", c.WireGuardConfig))
	}
	return errors.Join(errs...)
}

// ours says what of the settings is for bridges of ours alone.
func (c *Config) ours() error {
	var errs []error
	for _, o := range []struct {
		set       bool
		what, why string
	}{
		{c.Subnet6.IsValid(), "subnet6", "the LAN's routers say which it is"},
		{c.Routed, "routed", "guests send each other what they send by the LAN, not by way of the host"},
		{c.Inside, "internal", "the LAN is not ours to close"},
		{c.WireGuard != "" || c.WireGuardConfig != "", "wireguard", "guests leave by the LAN, not by way of the host"},
		{c.Policy != nil, "policy", "what guests send to the LAN does not come by the host's rules"},
		{
			c.MaxConnections != 0 || c.NewConnections != 0 || c.DNSQuestions != 0,
			"maxConnections, newConnections, dnsQuestions",
			"the host knows no connections of these guests, and answers none for names",
		},
	} {
		if o.set {
			errs = append(errs, fmt.Errorf("%s: not on a bridge that is not ours: %s", o.what, o.why))
		}
	}
	return errors.Join(errs...)
}

// Validate returns all that is wrong, joined.
func (s *Settings) Validate() error {
	var errs []error
	for name, n := range map[string]int{
		"maxConnections": s.MaxConnections, "newConnections": s.NewConnections,
		"dnsQuestions": s.DNSQuestions,
	} {
		if n < 0 || n > math.MaxInt32 {
			errs = append(errs, fmt.Errorf("%s %d: must be from 0 to %d", name, n, math.MaxInt32))
		}
	}
	if s.Policy != nil {
		for _, e := range s.Policy.Validate() {
			errs = append(errs, fmt.Errorf("policy.%w", e))
		}
		if s.Policy.AllowHost {
			errs = append(errs, errors.New("policy.allowHost: is for the policies of VMs"))
		}
		if s.Policy.AllowMetadata {
			errs = append(errs, errors.New("policy.allowMetadata: is for the policies of VMs"))
		}
	}
	return errors.Join(errs...)
}

// ValidInterface says whether an interface may be called so.
func ValidInterface(name string) error {
	if !regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$`).MatchString(name) {
		return fmt.Errorf("interface name %q: must be 1 to 15 of A-Z, a-z, 0-9, _, . and -", name)
	}
	return nil
}

// Gateway returns the host's addresses in the network, or the LAN's gateway, invalid where there is
// none.
func (c *Config) Gateway() (ip4, ip6 netip.Addr) {
	if c.LAN != nil {
		return c.LAN.Gateway, ip6
	}
	ip4 = c.Subnet.Addr().Next()
	if c.Subnet6.IsValid() {
		ip6 = c.Subnet6.Addr().Next()
	}
	return ip4, ip6
}

// Guests is how many addresses guests can have who wish for none.
func (c *Config) Guests() int {
	if c.LAN != nil {
		return c.LAN.Room()
	}
	return 1<<(32-c.Subnet.Bits()) - 3
}

// Guest returns the addresses of the n-th guest, counted from 0.
func (c *Config) Guest(n int) (ip4, ip6 netip.Addr) {
	if c.LAN != nil {
		return c.LAN.At(n), ip6
	}
	a := c.Subnet.Addr().As4()
	ip4 = netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(a[:])+uint32(n)+2)))
	if c.Subnet6.IsValid() {
		b := c.Subnet6.Addr().As16()
		binary.BigEndian.PutUint64(b[8:], uint64(n)+2)
		ip6 = netip.AddrFrom16(b)
	}
	return ip4, ip6
}

// MAC is an interface's address: locally administered, and always the same for one VM and
// interface.
func MAC(vm, iface string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(vm + "\x00" + iface))
	return net.HardwareAddr{sum[0]&0xfc | 2, sum[1], sum[2], sum[3], sum[4], sum[5]}
}

// Bridged says whether guests reach each other by the bridge alone.
func (c *Config) Bridged() bool { return c.Mutual && !c.Routed }

// Table is the name of the network's nftables tables.
func (c *Config) Table() string { return filter.TableName(c.Bridge) }

// via is the one interface by which guests leave, "" if they leave by any.
func (c *Config) via(owner string) string {
	if c.WireGuardConfig != "" {
		return "svw" + word(12, c.Bridge, owner)
	}
	return c.WireGuard
}

func (c *Config) tables(owner string) *filter.Tables {
	return &filter.Tables{
		Name: c.Table(), Owner: owner, Bridge: c.Bridge, Taps: tapPrefix(c.Bridge), Subnet: c.Subnet, Subnet6: c.Subnet6,
		Mutual: c.Mutual, Routed: c.Routed, Inside: c.Inside, Via: c.via(owner), Tunnel: c.WireGuardConfig != "",
		Egress:         c.Policy,
		Connections:    cmp.Or(c.MaxConnections, conntrack.Most()/8),
		NewConnections: cmp.Or(c.NewConnections, DefaultNewConnections),
	}
}

// NewDefault returns the default network. Empty values stand for DefaultBridge and DefaultSubnet; a
// subnet that does not read is a *subnet.Error.
func NewDefault(bridge, ip4 string) (Config, error) {
	p, err := netip.ParsePrefix(cmp.Or(ip4, DefaultSubnet))
	if err != nil {
		return Config{}, &subnet.Error{Subnet: ip4, Reason: "must be an IPv4 network such as " + DefaultSubnet}
	}
	if err := subnet.Validate(p); err != nil {
		return Config{}, err
	}
	return New(DefaultName, cmp.Or(bridge, DefaultBridge), p), nil
}
