package filter

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// addresses are those of guests that are gone.
type addresses map[netip.Addr]bool

// MatchConntrackFlow says whether a connection is theirs.
func (a addresses) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	for _, ip := range []net.IP{f.Forward.SrcIP, f.Forward.DstIP, f.Reverse.SrcIP, f.Reverse.DstIP} {
		if addr, ok := netip.AddrFromSlice(ip); ok && a[addr.Unmap()] {
			return true
		}
	}
	return false
}

// forget has the kernel forget the connections of guests that are gone: a known connection is accepted, and whoever has the address next
// is neither to go on with it nor to be reached by it.
func forget(guests []*Guest) error {
	of := map[netlink.InetFamily]addresses{unix.AF_INET: {}, unix.AF_INET6: {}}
	for _, g := range guests {
		of[unix.AF_INET][g.IP4] = true
		if g.IP6.IsValid() {
			of[unix.AF_INET6][g.IP6] = true
		}
	}
	for family, a := range of {
		if len(a) == 0 {
			continue
		}
		// What comes and goes during the dump may be missing from it.
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, a)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil // a kernel that cannot be asked (no NF_CT_NETLINK): the guest must go all the same
		}
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return fmt.Errorf("forget connections: %w", err)
		}
	}
	return nil
}
