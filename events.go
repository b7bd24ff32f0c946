package smartvm

import (
	"context"
	"iter"
	"path/filepath"

	"push.rocks/smartvm/internal/events"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/status"
)

// Event is something that has happened on a host; EventType says what. The types are in package
// status. LostError says which events were dropped before they were read.
type (
	Event     = status.Event
	EventType = status.EventType
	LostError = status.LostError
)

// EventsNow stands for the id of the newest event.
const EventsNow = events.Now

// eventBytes is how much of the events is kept, at most twice.
const eventBytes = 1 << 20

// Events yields what happens to the VMs of the runtime directory, whichever process does it, and
// what processes with that runtime directory do to snapshots, images and networks: first what is
// kept of the events after the one with an id (0: all that are kept; EventsNow: none), then those
// that come. It ends when ctx ends, whose error is the last. A reader that comes too late for some
// events is given a *LostError, which says between which ids they were, and goes on.
func (h *Host) Events(ctx context.Context, since int64) iter.Seq2[Event, error] {
	return h.ring.Follow(ctx, since)
}

// openRing prepares the ring of events.
func (h *Host) openRing() {
	h.ring.Dir, h.ring.Limit = filepath.Join(h.RuntimeDir(), store.EventDir), eventBytes
	// as on a full file system, which stops nothing
	h.ring.Failed = func(err error) { h.env.Log.Warn("append events", "err", err) }
}

// changes returns a function that appends events of a type, of something with a name.
func (h *Host) changes(kind EventType) func(action, name string) {
	return func(action, name string) {
		h.ring.Append(Event{Type: kind, Name: name, Attributes: map[string]string{"action": action}})
	}
}
