package filter

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// maxMessage bounds in bytes what is said to the kernel at once, and what it answers. A largest policy takes some 8 MiB; nothing is
// set aside.
const maxMessage = 64 << 20

// open returns a connection to nftables of the calling thread's network.
func open(opts ...nftables.ConnOption) (*nftables.Conn, error) {
	conn, err := nftables.New(append(opts, nftables.WithSockOptions(func(c *netlink.Conn) error {
		if err := c.SetReadBuffer(maxMessage); err != nil {
			return err
		}
		return c.SetWriteBuffer(maxMessage)
	}))...)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return conn, nil
}
