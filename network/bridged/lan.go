package bridged

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"push.rocks/smartvm/network/subnet"
)

// LAN is what is known of the network behind a bridge that is not ours.
type LAN struct {
	Gateway netip.Addr `json:"gateway,omitzero"` // zero: guests have no default route for IPv4
	// First and Last are the addresses that guests get who wish for none. Zero: there are none.
	First netip.Addr `json:"first,omitzero"`
	Last  netip.Addr `json:"last,omitzero"`
}

// Validate returns all that is wrong, joined. A subnet of the LAN's that is zero says that guests
// get their addresses from the LAN.
func (l *LAN) Validate(of netip.Prefix) error {
	if !of.IsValid() {
		if l.Gateway.IsValid() || l.First.IsValid() || l.Last.IsValid() {
			return errors.New("gateway and range: want the LAN's subnet too")
		}
		return nil
	}
	if err := subnet.Validate(of); err != nil {
		return err
	}
	var errs []error
	if l.Gateway.IsValid() && !IsHost(of, l.Gateway) {
		errs = append(errs, fmt.Errorf("gateway %s: must be of %s", l.Gateway, of))
	}
	if (l.First.IsValid() || l.Last.IsValid()) &&
		!(IsHost(of, l.First) && IsHost(of, l.Last) && l.First.Compare(l.Last) <= 0) {
		errs = append(errs, fmt.Errorf("range %s-%s: must be two addresses of %s, the lower one first", l.First, l.Last, of))
	}
	return errors.Join(errs...)
}

// IsHost says whether an address is one that a host of a subnet can have.
func IsHost(of netip.Prefix, a netip.Addr) bool {
	last := number(of.Masked().Addr()) | (1<<(32-of.Bits()) - 1)
	return of.Contains(a) && a != of.Masked().Addr() && number(a) != last
}

// Room is how many addresses there are for guests who wish for none.
func (l *LAN) Room() int {
	if !l.First.IsValid() {
		return 0
	}
	return int(number(l.Last)-number(l.First)) + 1
}

// At is the n-th of those, counted from 0.
func (l *LAN) At(n int) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, number(l.First)+uint32(n))))
}

func number(a netip.Addr) uint32 { return binary.BigEndian.Uint32(a.AsSlice()) }
