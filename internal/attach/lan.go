package attach

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"push.rocks/smartvm/internal/resolvconf"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/spec"
)

// onLAN returns all that a VM wishes for and cannot have on a bridge that is not ours, joined.
func onLAN(s *spec.Spec, all []Interface) error {
	var errs []error
	wrong := func(path string, value any, reason string) {
		errs = append(errs, &spec.FieldError{Path: path, Value: value, Reason: reason})
	}
	for n, i := range all {
		if i.Network.LAN == nil {
			continue
		}
		of := fmt.Sprintf("network %s, whose bridge is not ours", i.Network.Name)
		for at, in := range s.NetworkInterfaces {
			if in.IfaceID == i.ID && in.Namespace {
				wrong(fmt.Sprintf("networkInterfaces[%d].namespace", at), true,
					"must not be there on "+of+": want bridge:"+i.Network.Bridge)
			}
		}
		if n == 0 && (len(s.Ports) > 0 || s.PublishAll) {
			wrong("ports", nil, "must not be there on "+of+": the LAN reaches the VM by its own address")
		}
		if n == 0 && slices.ContainsFunc(s.ExtraHosts, func(h spec.ExtraHost) bool { return h.HostGateway }) {
			wrong("extraHosts", nil, "must not have the host's gateway on "+of+": the host is none there")
		}
		if p := s.Policy; p != nil &&
			(len(p.Rules) > 0 || p.DefaultAction == policy.Deny || p.Egress != "" || p.AllowMetadata) {
			wrong("policy", nil, "must say no more than allowHost on "+of+
				": what goes to the LAN does not come by the host's rules")
		}
	}
	return errors.Join(errs...)
}

// fromLAN says whether the guest gets its address from the LAN, or has it in its own files.
func (i *Interface) fromLAN() bool { return i.Network.LAN != nil && !i.Network.Subnet.IsValid() }

// wantLAN says why an interface cannot have an address of its LAN.
func (i *Interface) wantLAN(a netip.Addr) (reason string) {
	c := i.Network
	switch {
	case !c.Subnet.IsValid():
		return fmt.Sprintf("must not be there on network %s: it knows no subnet (network create --on %s --subnet)",
			c.Name, c.Bridge)
	case !bridged.IsHost(c.Subnet, a):
		return fmt.Sprintf("must be that of a host on network %s: of %s", c.Name, c.Subnet)
	case a == c.LAN.Gateway:
		return fmt.Sprintf("must not be the gateway of network %s", c.Name)
	}
	return ""
}

// insideLAN are the guest's addresses and gateways, as far as they are known.
func (i *Interface) insideLAN() (at []netip.Prefix, gateways []netip.Addr) {
	if i.IP4.IsValid() {
		at = []netip.Prefix{netip.PrefixFrom(i.IP4, i.Network.Subnet.Bits())}
	}
	if i.Network.LAN.Gateway.IsValid() {
		gateways = []netip.Addr{i.Network.LAN.Gateway}
	}
	return at, gateways
}

// lanResolvers are the DNS servers of a guest: those that it was given, else the host's, which is
// on that LAN, or the gateway. One that asks the LAN for its address asks it for those too.
func (i *Interface) lanResolvers() []netip.Addr {
	if i.DNS != nil || i.fromLAN() {
		return i.DNS
	}
	for _, path := range []string{resolvconf.Path, resolvconf.Stub} {
		if all := slices.DeleteFunc(resolvconf.Servers(path), OnHost); len(all) > 0 {
			return all
		}
	}
	_, gateways := i.insideLAN()
	return gateways
}

// onBridge are the effects of an interface on a bridge that is not ours.
func (i *Interface) onBridge(vm VM, s *spec.Spec) []journal.Effect {
	return []journal.Effect{
		i.use(vm),
		&network.Tap{Name: i.Tap, Bridge: i.Network.Bridge, UID: vm.UID, Mutual: i.Network.Mutual, LAN: true},
		&bridged.Guest{Tap: i.Tap, Bridge: i.Network.Bridge, MAC: i.MAC, IP4: i.IP4, Host: s.Policy != nil &&
			s.Policy.AllowHost},
	}
}
