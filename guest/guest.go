// Package guest has what a VM's guest is asked for and what it answers: programs, copies, how it
// is.
package guest

import (
	"io"
	"syscall"
	"time"
)

// Size is that of a terminal, in characters.
type Size struct{ Rows, Cols uint16 }

// Cmd is a program to be run in a guest.
type Cmd struct {
	Args []string // the program and its arguments; found in the guest's PATH
	Env  []string // NAME=VALUE, over the image's own
	Dir  string   // absolute; if empty, the image's own
	User string   // "name", "uid", "name:group" or "uid:gid" of the guest's; if empty, the image's own

	// Stdin is read until its end, or nil; what is read last may be lost when the program ends.
	// Stdout and Stderr receive its output; if nil, it is discarded. With a TTY all output goes to
	// Stdout.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// TTY gives the program a terminal, of Size and of the kind Term (like $TERM).
	TTY  bool
	Size Size
	Term string

	Signals <-chan syscall.Signal // are passed on to the program and its process group
	Resize  <-chan Size           // of the terminal
	// Detach, when it is closed, ends the call with ErrDetached; the program goes on, and its later
	// output is lost.
	Detach <-chan struct{}
}

// Exit is how a program in a guest ended.
type Exit struct {
	// 128 and the signal's number if a signal ended it, 127 and 126 if it could not be run
	Code   int            `json:"code"`
	Signal syscall.Signal `json:"signal,omitempty"` // that ended it
	Reason string         `json:"reason,omitempty"` // why it could not be run
}

// CopyOptions say how files are copied. The zero value serves.
type CopyOptions struct {
	// Owners keeps the numbers of users and groups, and set-user-id bits. Otherwise copies belong to
	// root in the guest and to the caller on the host.
	Owners bool
	// FollowLink copies what a source that is a symbolic link leads to. Links below a source are
	// always copied as links.
	FollowLink bool
	// Progress receives how many bytes were copied. It may be nil.
	Progress func(int64)
}

// Stats is how a guest is.
type Stats struct {
	Uptime     time.Duration `json:"uptime"`     // nanoseconds
	CPU        time.Duration `json:"cpu"`        // used since the start, all CPUs; nanoseconds
	CPUs       int           `json:"cpus"`       // online
	Memory     uint64        `json:"memory"`     // bytes
	MemoryUsed uint64        `json:"memoryUsed"` // that cannot be reclaimed at once; bytes
	Disk       uint64        `json:"disk"`       // of /, bytes
	DiskUsed   uint64        `json:"diskUsed"`   // bytes
	Processes  int           `json:"processes"`

	DiskRead    uint64 `json:"diskRead"`    // of all drives, since the start; bytes
	DiskWritten uint64 `json:"diskWritten"` // bytes
}

// Process is one of a guest's.
type Process struct {
	PID     int           `json:"pid"`
	Parent  int           `json:"ppid"`
	User    string        `json:"user"`   // a name, or a number that has none
	State   string        `json:"state"`  // a letter, as in /proc
	CPU     time.Duration `json:"cpu"`    // used since its start; nanoseconds
	Memory  uint64        `json:"memory"` // resident; bytes
	Command string        `json:"command"`
}

// State is how far a guest has come, as its agent says. Times are since the VM's start.
type State struct {
	VMM     time.Duration `json:"vmm"`               // until the VMM ran the guest; nanoseconds, as all
	Agent   time.Duration `json:"agent,omitempty"`   // until the kernel had booted and the agent ran; 0: not yet
	Command time.Duration `json:"command,omitempty"` // until the image's command or init ran; 0: not yet
	Skew    time.Duration `json:"skew,omitempty"`    // by which the guest's clock was wrong, and was set right
	// Degraded says why an agent that answered no longer does. If empty, it does, or never has.
	Degraded string `json:"degraded,omitempty"`
	Exit     *Exit  `json:"exit,omitempty"` // of the image's command
}

// Ready says whether the guest has come so far that its command runs.
func (g *State) Ready() bool { return g != nil && g.Command > 0 && g.Degraded == "" }
