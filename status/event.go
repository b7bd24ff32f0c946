package status

import (
	"fmt"
	"time"
)

// Event is something that has happened on a host. Its JSON form is stable.
type Event struct {
	// ID only grows, over all processes of a host and its reboots.
	ID         int64             `json:"id"`
	Time       time.Time         `json:"time"`
	Type       EventType         `json:"type"`
	VM         string            `json:"vm,omitempty"`   // its id
	Name       string            `json:"name,omitempty"` // of the VM, snapshot, image or network
	Attributes map[string]string `json:"attributes,omitempty"`
}

// EventType says what has happened.
type EventType string

// The types, and their attributes. Other types may come.
const (
	EventCreated  EventType = "created"  // a VM: image
	EventRestored EventType = "restored" // a VM was made of a snapshot: snapshot
	EventForked   EventType = "forked"   // a VM was made of a snapshot, one of several: snapshot
	EventStarted  EventType = "started"
	EventFailed   EventType = "failed"   // a start: error
	EventAdopted  EventType = "adopted"  // another process supervises the VM now
	EventReady    EventType = "ready"    // the guest's command or init runs
	EventDegraded EventType = "degraded" // the guest's agent does not answer any more: error
	EventPaused   EventType = "paused"
	EventResumed  EventType = "resumed"
	EventUpdated  EventType = "updated" // changed: "policy", "ports", "interfaces", joined by commas
	EventExited   EventType = "exited"  // outcome, code (the image's command's if it is known, else the VMM's), signal
	EventRemoved  EventType = "removed"
	EventSnapshot EventType = "snapshot" // a snapshot: action (create, remove), snapshot
	EventImage    EventType = "image"    // an image: action (tag, remove)
	EventNetwork  EventType = "network"  // a network: action (create, update, remove)
)

// LostError says that events were dropped before they were read: those after Since, up to Through.
type LostError struct{ Since, Through int64 }

func (e *LostError) Error() string {
	return fmt.Sprintf("events after %d were dropped, up to %d", e.Since, e.Through)
}
