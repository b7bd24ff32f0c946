package agent

import (
	"context"
	"crypto/rand"
	"time"

	"push.rocks/smartvm/internal/agentproto"
)

// Freeze stops the guest's programs and file systems, so that a snapshot finds them at rest. The guest thaws by itself when
// nobody does it for agentproto.FreezeTimeout.
func (c *Client) Freeze(ctx context.Context, dropCaches bool) error {
	_, err := c.ask(ctx, agentproto.Request{Op: agentproto.OpFreeze, DropCaches: dropCaches})
	return err
}

// Thaw lets a guest go on that was frozen.
func (c *Client) Thaw(ctx context.Context) error {
	_, err := c.ask(ctx, agentproto.Request{Op: agentproto.OpThaw})
	return err
}

// Identify tells a restored guest who it is, what time it is, and gives it random numbers; then it goes on. Returns by how much its
// clock was wrong, and what the guest could not do.
func (c *Client) Identify(ctx context.Context, id *agentproto.Identity) (skew time.Duration, warnings []string, err error) {
	seed := make([]byte, 64)
	_, _ = rand.Read(seed) // never fails
	r, err := c.ask(ctx, agentproto.Request{Op: agentproto.OpIdentify, Identity: id, Now: time.Now(), Entropy: seed})
	for _, w := range r.Warnings[:min(len(r.Warnings), maxWarnings)] {
		warnings = append(warnings, clean(w))
	}
	return r.Skew, warnings, err
}

// maxWarnings bounds those that a guest has for one request.
const maxWarnings = 16
