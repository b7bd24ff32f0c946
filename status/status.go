// Package status has the states that VMs can be in, how their runs end, and what operations on them
// fail with.
package status

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"push.rocks/smartvm/guest"
)

// Sentinels for control flow; test with errors.Is.
var (
	// ErrNotFound is returned for everything that does not exist: VMs, images, networks, snapshots.
	ErrNotFound = errors.New("not found")
	// ErrExists is returned where an id or a name is taken.
	ErrExists = errors.New("already exists")
	// ErrState is returned for operations that the state of a VM does not allow.
	ErrState = errors.New("wrong state")
	// ErrAmbiguous is returned for the beginning of an id that several things have.
	ErrAmbiguous = errors.New("ambiguous")
	// ErrClosed is returned by what was under way in a Host that is closed, and by its methods
	// afterwards.
	ErrClosed = errors.New("closed")
	// ErrUnread means that a guest does not read what is written to its console.
	ErrUnread = errors.New("the guest does not read its console")
)

// State is where a VM is in its life.
type State string

// The states. What is not in the middle of an operation is derived from the host each time it is
// asked.
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

// AtRest says whether nothing runs in this state, so that the VM can be started.
func (s State) AtRest() bool { return s == Stopped || s == Failed || s == Lost }

// StateError refuses an operation. It is ErrState.
type StateError struct {
	ID    string
	Op    string // as called: "pause", "update drive"
	State State
	Want  []State // states in which Op is allowed
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
	if slices.Contains(e.Want, Running) && e.State.AtRest() {
		return "NO_CLIENT"
	}
	return "INVALID_STATE"
}

// MachineError says what went wrong with one VM, and what is known about it.
type MachineError struct {
	ID    string
	Stage string // what was being done: "start VMM", "PUT /drives/rootfs"
	Err   error
	// The following may be empty.
	Exit    *Exit  // how the VMM ended
	Log     string // the VMM's last lines
	Console string // the guest's last lines
}

func (e *MachineError) Unwrap() error { return e.Err }

func (e *MachineError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "VM %s: %s: %v", e.ID, e.Stage, e.Err)
	if e.Exit != nil {
		fmt.Fprintf(&b, "; the VMM ended: %s", e.Exit)
	}
	for _, part := range []struct{ name, text string }{{"VMM log", e.Log}, {"console", e.Console}} {
		if text := strings.TrimSpace(part.text); text != "" {
			fmt.Fprintf(&b, "\n%s:\n  %s", part.name, strings.ReplaceAll(safeText(text), "\n", "\n  "))
		}
	}
	return b.String()
}

// safeText keeps text of a guest from steering the terminal it is shown on.
func safeText(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || r >= ' ' && r != 0x7f && !(r >= 0x80 && r < 0xa0) {
			return r
		}
		return -1
	}, s)
}

// Exit is how a VM's last run ended. Its JSON form is what is kept on disk.
type Exit struct {
	Outcome Outcome     `json:"outcome"`
	Code    int         `json:"code"`             // the VMM's exit status, -1 if a signal ended it or it is unknown
	Signal  string      `json:"signal,omitempty"` // "SIGKILL"
	Started time.Time   `json:"started,omitzero"`
	Ended   time.Time   `json:"ended"`
	Error   string      `json:"error,omitempty"`   // why, when the outcome is OutcomeFailed
	Command *guest.Exit `json:"command,omitempty"` // how the image's command ended, if its guest could say so
}

// Outcome sorts ends.
type Outcome string

// The outcomes.
const (
	OutcomeExited  Outcome = "exited"  // the guest shut down or rebooted
	OutcomeKilled  Outcome = "killed"  // by a signal: a forced stop, or a signal of another process
	OutcomeCrashed Outcome = "crashed" // the VMM gave up: triple fault, error
	OutcomeFailed  Outcome = "failed"  // it never ran
	OutcomeLost    Outcome = "lost"    // it exited while unsupervised, or was adopted and the kernel did not tell
)

func (e *Exit) String() string {
	switch {
	case e.Signal != "":
		return "killed by " + e.Signal
	case e.Outcome == OutcomeLost:
		return "exit status unknown"
	case e.Command != nil:
		return fmt.Sprintf("exit code %d", e.Command.Code)
	default:
		return fmt.Sprintf("exit status %d", e.Code)
	}
}

// StagedDrive is a VM's own copy of a drive, or what its layer lies over.
type StagedDrive struct {
	Path   string `json:"path"`
	Method string `json:"method"` // "overlay", "reflink" or "sparse-copy"
}
