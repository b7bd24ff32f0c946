package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"time"

	"push.rocks/smartvm/internal/agentproto"
)

// Freeze stops the guest's programs and file systems, so that a snapshot finds them at rest. They
// go on after Thaw, and when this process ends or closes what Freeze returns, unless a snapshot was
// made before: what is restored from that goes on after Identify only.
func (c *Client) Freeze(ctx context.Context, dropCaches bool) (io.Closer, error) {
	conn, err := c.open(ctx, agentproto.Request{Op: agentproto.OpFreeze, DropCaches: dropCaches})
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	if _, err = answer(conn); !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// Thaw lets a guest go on that was frozen.
func (c *Client) Thaw(ctx context.Context) error {
	_, err := c.ask(ctx, agentproto.Request{Op: agentproto.OpThaw})
	return err
}

// Identify tells a restored guest what time it is and who it is, and gives it random numbers; then
// it goes on. Returns by how much its clock was wrong, and what the guest could not do.
func (c *Client) Identify(ctx context.Context, id *agentproto.Identity) (skew time.Duration,
	warnings []string, err error,
) {
	seed := make([]byte, 64)
	_, _ = rand.Read(seed) // never fails
	req := agentproto.Request{Op: agentproto.OpIdentify, Identity: id, Entropy: seed}
	skew, err = c.SetClock(ctx)
	if told := (*GuestError)(nil); errors.As(err, &told) {
		req.Now = time.Now() // an older agent, which hears the time only so
	} else if err != nil {
		return 0, nil, err
	}
	r, err := c.ask(ctx, req)
	for _, w := range r.Warnings[:min(len(r.Warnings), maxWarnings)] {
		warnings = append(warnings, clean(w))
	}
	return skew + r.Skew, warnings, err
}

const (
	// closeEnough is how late a guest may hear what time it is: half of what its clock may be wrong
	// by.
	closeEnough = 250 * time.Millisecond
	// maxClocks is how often it is told. Where none was in time, it keeps what it was told last.
	maxClocks = 5
)

// SetClock tells the guest what time it is until it has heard that in time: on a busy host it may
// get to run only seconds later. Returns by how much its clock was wrong, and a *GuestError of an
// agent that knows of no such request.
func (c *Client) SetClock(ctx context.Context) (skew time.Duration, err error) {
	for range maxClocks {
		conn, err := c.open(ctx, agentproto.Request{Op: agentproto.OpClock, Now: time.Now()})
		if err != nil {
			return skew, err
		}
		asked := time.Now()
		stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
		r, err := answer(conn)
		stop()
		_ = conn.Close() // it has said what it had to
		if skew += r.Skew; err != nil || time.Since(asked) < closeEnough {
			return skew, err
		}
	}
	return skew, nil
}

// maxWarnings bounds those that a guest has for one request.
const maxWarnings = 16
