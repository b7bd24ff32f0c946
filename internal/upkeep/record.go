package upkeep

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/flowlog"
)

// sure logs that nothing of a guest is logged, where that is so. Its tables are of this version, as
// somebody has looked.
func (u *Upkeep) sure(g *network.Guest) error {
	of, unsure := u.unsure[g.Tap]
	if !unsure {
		return nil
	}
	logs, err := filter.Logs(g.Table)
	if err != nil {
		return err
	}
	delete(u.unsure, g.Tap)
	if !logs {
		u.tried.Add(flowlog.Unlogged(of))
	}
	return nil
}

// record logs what a guest tries. A guest runs without, where that cannot be.
func (u *Upkeep) record(vmDir string, own *names, of *network.Config, log *slog.Logger) {
	log = log.With("tap", own.guest.Tap)
	if u.tried == nil {
		var err error
		if u.tried, err = flowlog.Create(filepath.Join(vmDir, store.NetworkLog)); err != nil {
			log.Warn("what the guest tries is not logged", "err", err)
			return
		}
	}
	tried := u.tried
	if u.unsure == nil {
		u.unsure = map[string]string{}
	}
	u.unsure[own.guest.Tap] = of.Name
	c := flowlog.Config{
		Dir: network.LogDir(filepath.Join(filepath.Dir(vmDir), store.NetworkDir), of.Name), Table: of.Table(),
		MAC: strings.ToLower(own.guest.MAC), Log: log,
		Event: func(e flowlog.Event) {
			// The guest's own policy has the last word.
			if e.Verdict == flowlog.Allowed && e.Policy == flowlog.OfNetwork && own.own() {
				return
			}
			e.Network = of.Name
			tried.Add(e)
		},
	}
	ctx, cancel := context.WithCancel(context.Background())
	u.cancel = append(u.cancel, cancel)
	u.work.Go(func() {
		if err := flowlog.Follow(ctx, c); err != nil {
			log.Warn("what the guest begins is not logged", "err", err)
			tried.Add(flowlog.Unlogged(of.Name))
		}
	})
}
