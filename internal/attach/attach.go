// Package attach gives a VM its interfaces: which network, which addresses, which ports of the
// host, and what that does to the host, as effects for its journals.
package attach

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/resolvconf"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/spec"
)

// VM is what attaching needs to know of one.
type VM struct {
	ID, Nonce string
	Store     *store.Store
	UID       int // who may open the taps
}

// Interface is one of a VM's that a network of ours is behind.
type Interface struct {
	ID      string         `json:"id"`
	Network network.Config `json:"network"`
	Tap     string         `json:"tap"`
	MAC     string         `json:"mac"`
	MTU     int            `json:"mtu,omitempty"`
	IP4     netip.Addr     `json:"ip4,omitzero"` // zero: not chosen yet
	IP6     netip.Addr     `json:"ip6,omitzero"`
	// File is that of the VM's own namespace. Then Tap, MAC, IP4 and IP6 are those of the namespace,
	// as the network sees it; the guest's are network.InnerMAC and InnerGuest.
	File string `json:"namespace,omitempty"`
	Warm bool   `json:"warm,omitempty"` // the namespace is a pool's
	// DNS are the servers that the guest's questions go to. Empty: those of the network, or of the
	// host.
	DNS []netip.Addr `json:"dns,omitempty"`

	// Wish is what it had in a VM that this one is restored from: it gets that again where it is free.
	// It may be nil.
	Wish *Interface `json:"-"`
}

// Resolve decides what is behind the interfaces of s that name no tap, and says so there. They have
// no addresses yet. Returns catalog.ErrNotFound.
func Resolve(vm VM, s *spec.Spec, networks *catalog.Store) (all []Interface, err error) {
	s.NetworkInterfaces = slices.Clone(s.NetworkInterfaces) // the caller's own stay as they are
	var errs []error
	for at := range s.NetworkInterfaces {
		n := &s.NetworkInterfaces[at]
		if n.HostDevName != "" {
			continue
		}
		n.Network = cmp.Or(n.Network, network.DefaultName)
		config, err := networks.Get(n.Network)
		if err != nil {
			errs = append(errs,
				&spec.FieldError{
					Path: fmt.Sprintf("networkInterfaces[%d].network", at), Value: n.Network,
					Reason: err.Error(), Err: err,
				})
			continue
		}
		n.HostDevName = network.TapName(config.Bridge, vm.ID, vm.Nonce, n.IfaceID)
		n.GuestMAC = strings.ToLower(cmp.Or(n.GuestMAC, network.MAC(vm.ID, n.IfaceID).String()))
		i := Interface{ID: n.IfaceID, Network: config, Tap: n.HostDevName, MAC: n.GuestMAC, MTU: config.MTU, DNS: s.DNS}
		if reason := i.want(n.IP); reason != "" {
			errs = append(errs, &spec.FieldError{Path: fmt.Sprintf("networkInterfaces[%d].ip", at), Value: n.IP, Reason: reason})
		}
		if n.Namespace && config.LAN == nil {
			i.File = filepath.Join(vm.Store.Dir(vm.ID), store.NetNSFile)
			n.HostDevName, n.GuestMAC = network.InnerTap, network.InnerMAC
		}
		all = append(all, i)
	}
	return all, errors.Join(append(errs, onLAN(s, all))...)
}

// leaseKind is that of addresses.
const leaseKind = "address"

// Do carries out an effect, in the journal that lasts as long as the VM.
type Do func(context.Context, journal.Effect) error

// Address leases addresses for interfaces: those that they want, or free ones. Returns
// network.ErrExhausted, *store.TakenError.
func Address(ctx context.Context, vm VM, all []Interface, do Do) error {
	for i := range all {
		if all[i].IP4.IsValid() {
			if err := all[i].leaseWanted(ctx, vm, do); err != nil {
				return err
			}
		} else if all[i].File != "" {
			slot, err := (&Pool{Store: vm.Store, Network: all[i].Network}).take(ctx, vm.ID, all[i].Wish, do)
			if err != nil {
				return err
			}
			if slot != nil {
				all[i].Tap, all[i].MAC, all[i].IP4, all[i].IP6 = slot.Name, slot.MAC, slot.IP4.Addr(), slot.IP6.Addr()
				all[i].File, all[i].Warm = slot.File, true
				continue
			}
		}
		regained, err := all[i].regain(ctx, vm, do)
		if err != nil {
			return err
		}
		if !regained { // two of a MAC on one bridge would get each other's frames
			if err := do(ctx, vm.Store.Lease("mac", all[i].Network.Name+"/"+all[i].MAC, vm.ID)); err != nil {
				return err
			}
		}
		if !all[i].IP4.IsValid() && !all[i].fromLAN() {
			if err := all[i].address(ctx, vm, do); err != nil {
				return err
			}
		}
	}
	return nil
}

// regain leases what an interface wishes to have again, as far as that is free and of its network:
// a MAC, and then addresses.
func (i *Interface) regain(ctx context.Context, vm VM, do Do) (mac bool, err error) {
	w := i.Wish
	if w == nil || i.IP4.IsValid() {
		return false, nil
	}
	parsed, err := net.ParseMAC(w.MAC)
	if err != nil || parsed.String() != w.MAC || parsed[0]&1 != 0 || !i.isGuest(w.IP4, w.IP6) {
		return false, nil
	}
	lease := func(kind, name string) (bool, error) {
		if vm.Store.Holder(kind, name) != "" {
			return false, nil
		}
		err := do(ctx, vm.Store.Lease(kind, name, vm.ID))
		if errors.Is(err, fs.ErrExist) {
			return false, nil
		}
		return err == nil, err
	}
	mac, err = lease("mac", i.Network.Name+"/"+w.MAC)
	if !mac {
		return false, err
	}
	i.MAC = w.MAC
	if i.fromLAN() {
		return true, nil
	}
	address, err := lease(leaseKind, i.Network.Name+"/"+w.IP4.String())
	if address {
		i.IP4, i.IP6 = w.IP4, w.IP6
	}
	return true, err
}

// isGuest says whether the network has a guest with these addresses.
func (i *Interface) isGuest(ip4, ip6 netip.Addr) bool {
	if i.Network.LAN != nil {
		return i.fromLAN() != ip4.Is4() && (i.fromLAN() || i.wantLAN(ip4) == "") && !ip6.IsValid()
	}
	first, _ := i.Network.Guest(0)
	if !ip4.Is4() {
		return false
	}
	a, b := ip4.As4(), first.As4()
	n := int(binary.BigEndian.Uint32(a[:])) - int(binary.BigEndian.Uint32(b[:]))
	if n < 0 || n >= i.Network.Guests() {
		return false
	}
	want4, want6 := i.Network.Guest(n)
	return ip4 == want4 && ip6 == want6
}

// Rekey says which interfaces of a guest have become others.
func Rekey(was, now []Interface) (changed []agentproto.Rekey) {
	before, after := guestInterfaces(was), guestInterfaces(now)
	for n := range min(len(before), len(after)) {
		if before[n].MAC != after[n].MAC || !slices.Equal(before[n].Addresses, after[n].Addresses) {
			changed = append(changed, agentproto.Rekey{Was: before[n], Now: after[n]})
		}
	}
	return changed
}

// address leases the first addresses that no VM of the store has.
func (i *Interface) address(ctx context.Context, vm VM, do Do) error {
	for n := range i.Network.Guests() {
		ip4, ip6 := i.Network.Guest(n)
		lease := vm.Store.Lease(leaseKind, i.Network.Name+"/"+ip4.String(), vm.ID)
		if vm.Store.Holder(leaseKind, lease.Name) != "" {
			continue
		}
		err := do(ctx, lease)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err == nil {
			i.IP4, i.IP6 = ip4, ip6
		}
		return err
	}
	if i.Network.LAN != nil && i.Network.Guests() == 0 {
		return hint.Add(
			fmt.Errorf("attach %s to network %s: %w: none of the LAN's are for guests who wish for none", i.ID, i.Network.Name,
				network.ErrExhausted),
			"name one with --ip, or make the network with a --range of them")
	}
	return hint.Add(
		fmt.Errorf("attach %s to network %s: %w: its %s has room for %d", i.ID, i.Network.Name, network.ErrExhausted,
			i.Network.Subnet, i.Network.Guests()),
		"remove VMs, or make a network with a larger --subnet")
}

// Tell tells the guest of its interfaces: its first program, nil if it has none of ours, or else
// its kernel.
func Tell(s *spec.Spec, guest *guest.Boot, all []Interface) error {
	if guest != nil {
		guest.Interfaces, guest.DNS, guest.Search = guestInterfaces(all), resolvers(all[0], s.Policy), s.DNSSearch
		guest.Hosts = hosts(s, &all[0].Network)
		_, err := guest.Encode()
		return err
	}
	if len(s.ExtraHosts) > 0 {
		return fmt.Errorf("image %s boots by itself: %w: extra hosts are for our own agent", s.Image, spec.ErrNotSupported)
	}
	if all[0].fromLAN() {
		return nil
	}
	if args := &s.BootSource.BootArgs; !strings.Contains(" "+*args, " ip=") {
		*args = cmp.Or(*args, spec.DefaultBootArgs) + " " + bootArgs(all[0], cmp.Or(s.Hostname, s.Name, s.ID))
	}
	return nil
}

// hosts are the names that a guest is told. The host is at its network's gateway, also for a guest
// in a namespace, whose own gateway is in that.
func hosts(s *spec.Spec, of *network.Config) (all []guest.Host) {
	gateway4, gateway6 := of.Gateway()
	for _, h := range s.ExtraHosts {
		addresses := []netip.Addr{h.IP}
		if h.HostGateway {
			addresses = []netip.Addr{gateway4, gateway6}
		}
		for _, a := range addresses {
			if a.IsValid() {
				all = append(all, guest.Host{Name: h.Name, Address: a})
			}
		}
	}
	return all
}

// Ports are those of a spec, as the tables have them.
func Ports(s *spec.Spec) (all []filter.Port) {
	for _, p := range s.Ports {
		all = append(all,
			filter.Port{Address: p.HostIP, Host: p.HostPort, Guest: p.GuestPort, Protocol: cmp.Or(p.Protocol, "tcp")})
	}
	return all
}

// Effects are what running the VM with its interfaces does to the host. The ports are those of the
// first.
func Effects(vm VM, all []Interface, s *spec.Spec) (effects []journal.Effect) {
	for n, i := range all {
		if i.Network.LAN != nil {
			effects = append(effects, i.onBridge(vm, s)...)
			continue
		}
		g := &network.Guest{Guest: filter.Guest{
			Table: i.Network.Table(), Tap: i.Tap, MAC: i.MAC, IP4: i.IP4, IP6: i.IP6,
			Routed: i.Network.Routed, Policy: s.Policy,
		}}
		if n == 0 {
			g.Ports = Ports(s)
			for _, p := range g.Ports {
				if p.Host != 0 {
					effects = append(effects, PortLeases(vm, p)...)
				}
			}
		}
		var link journal.Effect = &network.Tap{
			Name: i.Tap, Bridge: i.Network.Bridge, UID: vm.UID, MTU: i.MTU,
			Mutual: i.Network.Bridged(),
		}
		if i.File != "" {
			link = i.slot()
		}
		use := i.use(vm)
		use.Name, use.Addresses = cmp.Or(s.Name, vm.ID), i.addresses()
		effects = append(effects, use, link, g)
	}
	return effects
}

func (i *Interface) use(vm VM) *network.Use {
	return &network.Use{
		Dir: filepath.Join(vm.Store.Path(), store.NetworkDir), Network: i.Network, VM: vm.ID + "-" + vm.Nonce + "-" + i.ID,
		VMDir: vm.Store.Dir(vm.ID),
	}
}

// addresses are those by which others on its network reach it.
func (i *Interface) addresses() []netip.Addr {
	if !i.IP6.IsValid() {
		return []netip.Addr{i.IP4}
	}
	return []netip.Addr{i.IP4, i.IP6}
}

// bootArgs configure an interface for a kernel that does so itself (CONFIG_IP_PNP).
func bootArgs(i Interface, hostname string) string {
	at, gateways := i.inside()
	mask := net.IP(net.CIDRMask(at[0].Bits(), 32))
	gateway := ""
	if len(gateways) > 0 {
		gateway = gateways[0].String()
	}
	return fmt.Sprintf("ip=%s::%s:%s:%s:eth0:off", at[0].Addr(), gateway, mask, hostname)
}

// inside returns the addresses that the guest itself has, and its gateways.
func (i *Interface) inside() (at []netip.Prefix, gateways []netip.Addr) {
	if i.Network.LAN != nil {
		return i.insideLAN()
	}
	gateway4, gateway6 := i.Network.Gateway()
	at, gateways = []netip.Prefix{netip.PrefixFrom(i.IP4, i.Network.Subnet.Bits())}, []netip.Addr{gateway4}
	if i.File != "" {
		at, gateways = network.InnerGuest[:1], network.InnerGateways[:1]
	}
	if i.IP6.IsValid() {
		inner := netip.PrefixFrom(i.IP6, 64)
		if i.File != "" {
			inner, gateway6 = network.InnerGuest[1], network.InnerGateways[1]
		}
		at, gateways = append(slices.Clip(at), inner), append(slices.Clip(gateways), gateway6)
	}
	return at, gateways
}

func guestInterfaces(all []Interface) (interfaces []guest.Interface) {
	for n, i := range all {
		at, gateways := i.inside()
		g := guest.Interface{
			MAC: i.MAC, Name: "eth" + strconv.Itoa(n), MTU: i.MTU, Addresses: at,
			Routers: i.Network.LAN != nil,
		}
		if i.File != "" {
			g.MAC = network.InnerMAC
		}
		if n == 0 && !i.Network.Inside {
			g.Gateways = gateways
		}
		interfaces = append(interfaces, g)
	}
	return interfaces
}

// resolvers are the DNS servers that a guest is told of: its network's own. Where another firewall
// drops what comes to the host, that may be out of reach: then, if no name depends on it, the
// host's, but for those that only the host itself reaches.
func resolvers(i Interface, p *policy.Policy) (all []netip.Addr) {
	gateway4, gateway6 := i.Network.Gateway()
	if i.Network.Inside { // one of the network's own guests may be such a server
		return i.DNS
	}
	if i.Network.LAN != nil {
		return i.lanResolvers()
	}
	gateway := []netip.Addr{gateway4}
	if i.Network.Policy.Names() || p.Names() || i.Network.WireGuard != "" || i.Network.WireGuardConfig != "" {
		return gateway
	}
	if blockers, err := inspect.Blockers(nftables.ChainHookInput); err != nil || len(blockers) == 0 {
		return gateway
	}
	if i.DNS != nil {
		return i.DNS
	}
	for _, path := range []string{resolvconf.Path, resolvconf.Stub} {
		all = slices.DeleteFunc(resolvconf.Servers(path), func(a netip.Addr) bool {
			return OnHost(a) || a.Is6() && !gateway6.IsValid()
		})
		if len(all) > 0 {
			return all
		}
	}
	return gateway
}

// OnHost says whether only the host itself reaches a server.
func OnHost(a netip.Addr) bool { return a.IsLoopback() || a.IsLinkLocalUnicast() }
