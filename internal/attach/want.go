package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
)

// want has an interface get an address, which may be zero, and the IPv6 one of the same number. It
// says why it cannot.
func (i *Interface) want(a netip.Addr) (reason string) {
	if !a.IsValid() {
		return ""
	}
	if i.Network.LAN != nil {
		if reason = i.wantLAN(a); reason == "" {
			i.IP4 = a
		}
		return reason
	}
	c := i.Network
	gateway, _ := c.Gateway()
	first, _ := c.Guest(0)
	n := int(number(a)) - int(number(first))
	switch {
	case !c.Subnet.Contains(a):
		return fmt.Sprintf("must be of network %s: of %s", c.Name, c.Subnet)
	case a == gateway:
		return fmt.Sprintf("must not be the gateway of network %s", c.Name)
	case n < 0:
		return fmt.Sprintf("must not be the address of network %s itself", c.Name)
	case n >= c.Guests():
		return fmt.Sprintf("must not be the broadcast address of network %s", c.Name)
	}
	i.IP4, i.IP6 = c.Guest(n)
	return ""
}

func number(a netip.Addr) uint32 { return binary.BigEndian.Uint32(a.AsSlice()[:4]) }

// leaseWanted leases the address that an interface wants.
func (i *Interface) leaseWanted(ctx context.Context, vm VM, do Do) error {
	err := do(ctx, vm.Store.Lease(leaseKind, i.Network.Name+"/"+i.IP4.String(), vm.ID))
	taken, ok := errors.AsType[*store.TakenError](err)
	switch {
	case ok && taken.Owner == poolOwner:
		err = hint.Add(fmt.Errorf("%s is that of a warm slot: %w", i.IP4, err),
			"smartvm network warm %s 0 removes those that no VM has", i.Network.Name)
	case ok:
		err = hint.Add(err, "without --ip the VM gets an address that is free")
	}
	if err != nil {
		return fmt.Errorf("attach %s to network %s: %w", i.ID, i.Network.Name, err)
	}
	return nil
}

// Anew has what is behind interfaces of s chosen anew that an earlier VM had on networks of ours.
// An address that somebody wanted was for that VM alone. It returns the taps that they had, by the
// ids of the interfaces.
func Anew(s *spec.Spec, was []Interface) (taps map[string]string) {
	s.NetworkInterfaces = slices.Clone(s.NetworkInterfaces)
	taps = map[string]string{}
	for i := range s.NetworkInterfaces {
		n := &s.NetworkInterfaces[i]
		if slices.ContainsFunc(was, func(w Interface) bool { return w.ID == n.IfaceID }) {
			taps[n.IfaceID] = n.HostDevName
			n.HostDevName, n.GuestMAC, n.IP = "", "", netip.Addr{}
		}
	}
	return taps
}

// Wish has interfaces get what they had in an earlier VM, where it is free.
func Wish(all, was []Interface) {
	for i := range all {
		if n := slices.IndexFunc(was, func(w Interface) bool { return w.ID == all[i].ID }); n >= 0 {
			all[i].Wish = &was[n]
		}
	}
}
