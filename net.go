package smartvm

import (
	"context"
	"path/filepath"
	"time"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network"
)

// Networks are those that VMs of this host can join.
func (h *Host) Networks() (*network.Store, error) {
	d, err := network.NewDefault(h.opts.BridgeName, h.opts.Subnet)
	if err != nil {
		return nil, err
	}
	d.Policy = h.opts.Firewall
	return &network.Store{Dir: filepath.Join(h.opts.DataDir, store.NetworksDir), Default: d}, nil
}

// networks is the context of effects: what they share in this process.
func (h *Host) networks(ctx context.Context) context.Context {
	return network.NewContext(ctx, &network.Shared{Reaper: &h.reaper, Trace: h.opts.trace, Log: h.log})
}

// defaultHealInterval is how long a guest may be without rules after somebody's flush.
const defaultHealInterval = 5 * time.Second
