package smartvm

import (
	"context"
	"errors"
	"fmt"

	"push.rocks/smartvm/internal/orphans"
)

// Watch is a Recover that stays: it blocks until ctx ends, whose cause it returns, and takes up
// what processes leave when they die or release their VMs, also of VMs that are made meanwhile. It
// adopts VMs that run on and undoes runs that have ended; the kernel tells it when (inotify). Did,
// if it is not nil, is called with each Report that is not empty, or what went wrong with one;
// calls may overlap. What cannot be done is tried again, after a minute at most. Of several
// processes that watch, one adopts. The Host supervises what Watch has adopted until it is closed:
// end ctx before that.
func (h *Host) Watch(ctx context.Context, did func(*Report, error)) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	tell := func(report *Report, err error) {
		if did != nil && ctx.Err() == nil && (err != nil || !report.empty()) {
			did(report, err)
		}
		if errors.Is(err, ErrClosed) {
			stop(err)
		}
	}
	tell(h.Recover(ctx))
	return orphans.Watch(ctx, h.env.Store, func(ctx context.Context, id string) orphans.State {
		report := newReport()
		err := h.recoverOne(ctx, id, true, report)
		if err != nil {
			err = fmt.Errorf("recover VM %s: %w", id, err)
		}
		tell(report, err)
		if len(report.Adopted) > 0 {
			return orphans.Settled
		}
		switch held, err := h.env.Store.Locked(id); {
		case err == nil && held:
			return orphans.Locked
		case err != nil || h.needsRecovery(id):
			return orphans.Left
		}
		return orphans.Settled
	})
}
