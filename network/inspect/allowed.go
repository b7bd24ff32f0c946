package inspect

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/internal/nft"
)

// Allowed says whether this process may look at rules, as who may not may not change them either.
// Returns an error that is fs.ErrPermission, or filter.ErrTooOld.
func Allowed() error {
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	_, err = conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EAFNOSUPPORT) {
		err = fmt.Errorf("%w: %w", filter.ErrTooOld, err)
	}
	if err != nil {
		return fmt.Errorf("look at nftables: %w", err)
	}
	return nil
}
