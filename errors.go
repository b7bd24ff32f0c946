package smartvm

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"push.rocks/smartvm/spec"
)

// Sentinels for control flow; test with errors.Is.
var (
	ErrNotFound     = errors.New("not found")
	ErrExists       = errors.New("already exists")
	ErrState        = errors.New("wrong state")
	ErrNotSupported = spec.ErrNotSupported
)

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
	Outcome Outcome   `json:"outcome"`
	Code    int       `json:"code"`             // the VMM's exit status, -1 if a signal ended it or it is unknown
	Signal  string    `json:"signal,omitempty"` // "SIGKILL"
	Started time.Time `json:"started,omitzero"`
	Ended   time.Time `json:"ended"`
	Error   string    `json:"error,omitempty"`   // why, when the outcome is Failed
	Command *CmdExit  `json:"command,omitempty"` // how the image's command ended, if its guest could say so
}

// Outcome sorts ends.
type Outcome string

// The outcomes.
const (
	OutcomeExited  Outcome = "exited"  // the guest shut down or rebooted
	OutcomeKilled  Outcome = "killed"  // by a signal: a forced stop, or somebody else
	OutcomeCrashed Outcome = "crashed" // the VMM gave up: triple fault, error
	OutcomeFailed  Outcome = "failed"  // it never ran
	OutcomeLost    Outcome = "lost"    // nobody was watching
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

// Hint returns advice on what to do about err, "" if there is none.
func Hint(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

// Code returns err's name in the original package, "" if it has none.
func Code(err error) string {
	var c interface{ Code() string }
	if errors.As(err, &c) {
		return c.Code()
	}
	return ""
}
