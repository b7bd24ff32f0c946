package network

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/internal/batch"
	"push.rocks/smartvm/network/rtnl"
)

// Reaper removes taps and guests, those together that are asked for at the same time: the kernel
// waits as long for one as for a hundred. The zero value serves. It is safe for concurrent use.
type Reaper struct {
	taps   batch.Batch[string]
	guests batch.Batch[*Guest]
}

// removeTaps puts taps into a group of interfaces and removes that.
func removeTaps(names []string) error {
	if len(names) == 1 {
		return rtnl.Remove(names[0], isTap)
	}
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails
	group := int(binary.NativeEndian.Uint32(random[:])>>2 | 1<<29)
	grouped := false
	for _, name := range names {
		l, err := netlink.LinkByName(name)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			continue
		}
		if err == nil && isTap(l) {
			err = netlink.LinkSetGroup(l, group)
			grouped = true
		}
		if err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove tap %s: %w", name, err)
		}
	}
	if !grouped {
		return nil
	}
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(uint32(group))))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove %d taps: %w", len(names), err)
	}
	return nil
}

func isTap(l netlink.Link) bool { return l.Type() == "tuntap" || l.Type() == "tun" }
