package network

import (
	"context"

	"push.rocks/smartvm/network/filter"
)

// Guest is an interface's part in its network's tables, as an effect on the host.
type Guest struct{ filter.Guest }

// Revert takes it out, with others whose turn it is too.
func (g *Guest) Revert(ctx context.Context) error {
	if r := sharedOf(ctx).Reaper; r != nil {
		return r.guests.do(&g.Guest, filter.Remove)
	}
	return g.Guest.Revert(ctx)
}
