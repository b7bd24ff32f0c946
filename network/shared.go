package network

import (
	"context"
	"log/slog"

	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network/guard"
)

// Shared is what the effects of one process share. Put it into their context by NewContext.
type Shared struct {
	Reaper *Reaper       // removes many taps at once; nil: each by itself
	Guards *guard.Keeper // holds those of networks; nil: nobody does
	Trace  journal.Trace // of the networks' journals
	// Refresh gives a network the settings that it has now; nil: those that it has are they.
	Refresh func(*Config) error
	Log     *slog.Logger
}

type sharedKey struct{}

// NewContext returns a context whose effects share s.
func NewContext(ctx context.Context, s *Shared) context.Context {
	return context.WithValue(ctx, sharedKey{}, s)
}

func sharedOf(ctx context.Context) *Shared {
	if s, ok := ctx.Value(sharedKey{}).(*Shared); ok {
		return s
	}
	return &Shared{}
}

func (s *Shared) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}
