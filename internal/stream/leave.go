package stream

import (
	"context"
	"time"
)

// OrLeave calls f, and when the context has ended does not wait long for it: who reads a pipe may
// have stopped, or who writes it, and then f ends with the process.
func OrLeave(ctx context.Context, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return err
	case <-time.After(leaveTime):
		return context.Cause(ctx)
	}
}

// leaveTime is how long what was interrupted may take to clear up.
const leaveTime = time.Second
