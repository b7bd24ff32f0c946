package agent_test

import (
	"errors"
	"testing"
	"time"
)

func TestStop(t *testing.T) {
	down := make(chan time.Duration, 1)
	s, c := newServer(t, nil)
	s.ShutDown = func() error { down <- s.Patience(); return errors.New("it stays") }
	for _, tt := range []struct{ patience, want time.Duration }{
		{0, 10 * time.Second}, // the agent's own
		{time.Minute, time.Minute},
	} {
		if err := c.Stop(t.Context(), tt.patience); err != nil {
			t.Fatal(err)
		}
		if got := <-down; got != tt.want {
			t.Errorf("asked with %s, the command has %s", tt.patience, got)
		}
	}
	if _, err := c.Stats(t.Context()); err != nil {
		t.Errorf("after a shutdown that did not go: %v", err)
	}
}
