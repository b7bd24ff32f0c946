package smartvm

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/status"
)

// Networks are those that VMs of this host can join.
func (h *Host) Networks() (*catalog.Store, error) {
	d, err := network.NewDefault(h.opts.BridgeName, h.opts.Subnet)
	d.Policy = h.opts.Firewall
	changed := h.changes(status.EventNetwork)
	return &catalog.Store{Dir: filepath.Join(h.opts.DataDir, store.NetworksDir), Default: d, Changed: changed}, err
}

// Warm makes or removes warm slots of a network, until it has n of them: namespaces that VMs of
// NetworkInterface.Namespace need not wait for. Slots that VMs have stay. Returns
// catalog.ErrNotFound, network.ErrExhausted.
func (h *Host) Warm(ctx context.Context, network string, n int) (Slots, error) {
	p, err := h.pool(network)
	if err != nil {
		return Slots{}, err
	}
	if n < 0 || n > attach.MaxSlots {
		return Slots{}, fmt.Errorf("warm network %s: %d slots: must be from 0 to %d", network, n, attach.MaxSlots)
	}
	count, err := p.Resize(h.env.Context(ctx), n)
	return Slots(count), err
}

// Slots counts the warm slots of a network. Returns catalog.ErrNotFound.
func (h *Host) Slots(network string) (Slots, error) {
	p, err := h.pool(network)
	if err != nil {
		return Slots{}, err
	}
	return Slots(p.Count()), nil
}

// Slots says how many warm slots there are, and how many no VM has.
type Slots struct {
	All  int `json:"all"`
	Free int `json:"free"`
}

func (h *Host) pool(name string) (*attach.Pool, error) {
	all, err := h.Networks()
	if err != nil {
		return nil, err
	}
	config, err := all.Get(name)
	return &attach.Pool{Store: h.env.Store, Network: config, Trace: h.env.Trace}, err
}

// networkContext adds to the context of effects what they share in this process.
func (h *Host) networkContext(ctx context.Context) context.Context {
	return network.NewContext(ctx,
		&network.Shared{
			Reaper: &h.reaper, Guards: &h.guards, Trace: h.env.Trace, Refresh: catalog.Refresher(h.Networks),
			Log: h.env.Log,
		})
}

// defaultRepairInterval is how long a guest may be without rules after they were flushed without an
// event, or frozen after the process that froze it has died.
const defaultRepairInterval = 5 * time.Second
