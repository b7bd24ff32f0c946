package smartvm

import (
	"fmt"
	"slices"
	"strings"
)

// State is where a VM is in its life.
type State string

// The states. What is not in the middle of an operation is derived from the host each time it is asked.
const (
	Creating State = "creating"
	Stopped  State = "stopped" // made and never started, or ended
	Starting State = "starting"
	Running  State = "running"
	Paused   State = "paused"
	Stopping State = "stopping"
	Removing State = "removing"
	Failed   State = "failed" // its start failed and was undone; it may be started again
	Lost     State = "lost"   // it was said to run and nothing runs; how it ended is not known
)

// transitions is the one table of what may be done in which state.
var transitions = map[string][]State{
	"start":  {Stopped, Failed, Lost},
	"pause":  {Running},
	"resume": {Paused},
	"stop":   {Stopped, Starting, Running, Paused, Stopping, Failed, Lost}, // of what has ended: nothing to do
	"remove": {Stopped, Failed, Lost},
	"call":   {Running, Paused}, // everything that talks to the VMM of a started VM
}

// StateError refuses an operation. It is ErrState.
type StateError struct {
	ID    string
	Op    string // as called: "pause", "update drive"
	State State
	Want  []State
}

func (e *StateError) Error() string {
	want := make([]string, len(e.Want))
	for i, s := range e.Want {
		want[i] = string(s)
	}
	return fmt.Sprintf("%s VM %s: it is %s, not %s", e.Op, e.ID, e.State, strings.Join(want, " or "))
}

func (e *StateError) Unwrap() error { return ErrState }

// Code is the original's name of the error: NO_CLIENT where there is no VMM to talk to.
func (e *StateError) Code() string {
	if slices.Contains(e.Want, Running) && slices.Contains(transitions["start"], e.State) {
		return "NO_CLIENT"
	}
	return "INVALID_STATE"
}

// allow checks that op, an entry of transitions, may be done in state s. Call names it to the user.
func allow(id, op, call string, s State) error {
	if want := transitions[op]; !slices.Contains(want, s) {
		return &StateError{ID: id, Op: call, State: s, Want: want}
	}
	return nil
}
