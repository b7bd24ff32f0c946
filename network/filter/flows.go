package filter

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// whose says which addresses are meant.
type whose func(netip.Addr) bool

// MatchConntrackFlow says whether a connection is theirs.
func (w whose) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	for _, ip := range []net.IP{f.Forward.SrcIP, f.Forward.DstIP, f.Reverse.SrcIP, f.Reverse.DstIP} {
		if a, ok := netip.AddrFromSlice(ip); ok && w(a.Unmap()) {
			return true
		}
	}
	return false
}

// forgetGuests has the kernel forget the connections of guests that are gone: a known connection is accepted, and whoever has the address
// next is neither to go on with it nor to be reached by it.
func forgetGuests(guests []*Guest) error {
	addresses := map[netip.Addr]bool{}
	for _, g := range guests {
		addresses[g.IP4], addresses[g.IP6] = true, true
	}
	return forget(func(a netip.Addr) bool { return addresses[a] })
}

func forget(of whose) error {
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		// What comes and goes during the dump may be missing from it.
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, of)
		if cannotBeAsked(err) {
			return nil
		}
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("forget connections: %w", err)
		}
	}
	return nil
}

// ForgetAll has the kernel forget all connections of the calling thread's network.
func ForgetAll() error {
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil && !cannotBeAsked(err) {
		return fmt.Errorf("forget connections: %w", err)
	}
	return nil
}

// cannotBeAsked says that a kernel does not tell of connections (no NF_CT_NETLINK): a guest must go all the same.
func cannotBeAsked(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)
}
