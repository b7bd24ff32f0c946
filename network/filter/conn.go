package filter

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
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

// Allowed says whether this process may look at rules, as who may not may not change them either. Returns an error that is fs.ErrPermission, or
// ErrTooOld.
func Allowed() error {
	conn, err := open()
	if err != nil {
		return err
	}
	_, err = conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) {
		err = fmt.Errorf("%w: %w", ErrTooOld, err)
	}
	if err != nil {
		return fmt.Errorf("look at nftables: %w", err)
	}
	return nil
}
