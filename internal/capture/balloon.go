package capture

import (
	"context"
	"fmt"
	"time"
)

// A guest's memory that it does not use is in a snapshot too, unless its balloon has it: then its
// host has taken it back, and there are zeros.

const (
	balloonReserve = 32              // MiB that a guest keeps
	balloonTime    = 5 * time.Second // in which a balloon may grow
	balloonLook    = 100 * time.Millisecond
	balloonStall   = 5 // looks without more
)

// inflate has the guest's balloon take what the guest does not use, and returns how many MiB the
// balloon had before; nil if it was left as it is.
func (v *VM) inflate(ctx context.Context) (was *uint32, err error) {
	ctx, cancel := context.WithTimeout(ctx, balloonTime)
	defer cancel()
	b, err := v.Client.GetBalloon(ctx)
	if err != nil {
		return nil, fmt.Errorf("balloon: %w", err)
	}
	unused, err := v.unused(ctx)
	if err != nil {
		return nil, fmt.Errorf("balloon: %w", err)
	}
	if unused <= balloonReserve {
		return nil, nil
	}
	take := unused - balloonReserve
	if err := v.Hold.MustDeflate(b.AmountMiB); err != nil {
		return nil, err
	}
	v.Trace("inflate")
	if err := v.Client.PatchBalloon(ctx, b.AmountMiB+uint32(take)); err != nil {
		return &b.AmountMiB, fmt.Errorf("balloon: %w", err)
	}
	v.settle(ctx, unused, balloonReserve+take/16)
	return &b.AmountMiB, nil
}

// settle waits until the guest has no more than enough, or gives no more. What the balloon has got
// when the time is over counts too.
func (v *VM) settle(ctx context.Context, left, enough int64) {
	tick := time.NewTicker(balloonLook)
	defer tick.Stop()
	for stalled := 0; left > enough && stalled < balloonStall; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, err := v.unused(ctx)
		if stalled++; err == nil && now < left {
			left, stalled = now, 0
		}
	}
}

// unused is how many MiB the guest could do without.
func (v *VM) unused(ctx context.Context) (int64, error) {
	s, err := v.Agent.Stats(ctx)
	if err != nil || s.MemoryUsed > s.Memory { // it is the guest's word
		return 0, err
	}
	return int64(min(s.Memory-s.MemoryUsed, maxUnused) >> 20), nil
}

// maxUnused bounds what a guest says, in bytes.
const maxUnused = 1 << 44

// deflate gives a guest back what its balloon took.
func (v *VM) deflate(ctx context.Context, was uint32) []string {
	v.Trace("deflate")
	if err := v.Client.PatchBalloon(ctx, was); err != nil {
		return []string{fmt.Sprintf("VM %s: its balloon may still have the guest's memory: %v", v.Name, err)}
	}
	return nil
}
