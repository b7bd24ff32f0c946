package agentproto

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"push.rocks/smartvm/guest"
)

// Op is what a connection is for.
type Op string

// The operations. Each has a connection of its own. What runs or copies ends with an Exit.
const (
	OpExec  Op = "exec"  // run a program; streams of its own
	OpMain  Op = "main"  // run the image's command, which waits for that: see Boot.Attach
	OpWatch Op = "watch" // events of the guest's life, and the exit of its command; the host's time and randomness
	OpRead  Op = "read"  // a tar archive of Path, on stdout
	OpWrite Op = "write" // unpack a tar archive from stdin at Path
	OpDial  Op = "dial"  // after the reply the connection is one to a TCP port on the guest's localhost
	OpStats Op = "stats" // a Reply with Stats

	OpProcesses Op = "processes" // a Reply with Processes

	OpStop Op = "stop" // end the guest as Ctrl-Alt-Del does, when the host has closed the connection

	OpClock Op = "clock" // set the clock to Now: a Reply with Skew

	OpSecrets Op = "secrets" // Env and Files for the command, which waits for them: see Boot.Secrets

	// go on with an OpExec or OpMain whose connection was lost: a Reply with Received, then its frames
	OpResume Op = "resume"

	// Around a snapshot. Its making ends all connections, in the guest that goes on as in those that
	// are restored from it: see OpResume.
	// stop programs and file systems, until one of the following, or until the host closes the
	// connection
	OpFreeze   Op = "freeze"
	OpThaw     Op = "thaw"     // let them go on
	OpIdentify Op = "identify" // be who Identity says, in a guest that was restored; then let them go on
)

// SecretDir is where a guest has its secrets, each in a file.
const SecretDir = "/run/secrets"

// Request is what the host wants.
type Request struct {
	Version int `json:"version"`
	Op      Op  `json:"op"`

	// Of OpExec:
	Args    []string `json:"args,omitempty"`
	Env     []string `json:"env,omitempty"` // over the image's own
	Dir     string   `json:"dir,omitempty"` // "": the image's own
	User    string   `json:"user,omitempty"`
	TTY     bool     `json:"tty,omitempty"` // of OpMain too
	Rows    uint16   `json:"rows,omitempty"`
	Cols    uint16   `json:"cols,omitempty"`
	Term    string   `json:"term,omitempty"`    // the terminal's kind
	NoStdin bool     `json:"noStdin,omitempty"` // its standard input is empty

	// Of OpExec and OpMain, which OpResume can only go on with if they have one: TokenSize random
	// bytes.
	Token []byte `json:"token,omitempty"`
	// Of OpResume: how many bytes of frames, but for the reply, the host has.
	Received uint64 `json:"received,omitempty"`

	// Of OpRead and OpWrite:
	Path     string `json:"path,omitempty"`     // absolute
	Archive  bool   `json:"archive,omitempty"`  // owners too
	Contents bool   `json:"contents,omitempty"` // of a directory: what is in it, not itself
	Follow   bool   `json:"follow,omitempty"`   // of OpRead: what a link at Path leads to, not the link

	// Of OpDial:
	Port uint16 `json:"port,omitempty"`

	// Of OpSecrets, which has Env too: what is in the files of SecretDir, by their names.
	Files map[string][]byte `json:"files,omitempty"`

	// Of OpFreeze:
	DropCaches bool `json:"dropCaches,omitempty"` // forget what can be read again

	// Of OpStop: how long the image's command may take to end until all is killed. 0: as after
	// Ctrl-Alt-Del.
	Patience time.Duration `json:"patience,omitempty"` // nanoseconds

	// Of OpIdentify:
	Identity *Identity `json:"identity,omitempty"`

	// Of OpWatch, OpIdentify and OpClock: the host's clock; of the first two, 64 random bytes.
	Now     time.Time `json:"now,omitzero"`
	Entropy []byte    `json:"entropy,omitempty"`
}

// Identity is what tells a restored guest from others of the same snapshot. What is empty stays as
// it is.
type Identity struct {
	Hostname   string       `json:"hostname,omitempty"`
	MachineID  string       `json:"machineId,omitempty"`
	Interfaces []Rekey      `json:"interfaces,omitempty"`
	DNS        []netip.Addr `json:"dns,omitempty"`
	Hosts      []guest.Host `json:"hosts,omitempty"`
}

// Rekey is an interface that gets another identity.
type Rekey struct {
	Was guest.Interface `json:"was"`
	Now guest.Interface `json:"now"`
}

// Reply is the answer to a request.
type Reply struct {
	Version int          `json:"version"`
	Error   string       `json:"error,omitempty"` // "": it is done, or under way
	Stats   *guest.Stats `json:"stats,omitempty"`

	Processes []guest.Process `json:"processes,omitempty"`

	IsDir bool `json:"isDir,omitempty"` // of OpWrite: Path is a directory
	// Of OpResume: how many bytes of frames, but for the requests, the guest has.
	Received uint64 `json:"received,omitempty"`
	// Of OpIdentify and OpClock: by how much the clock was wrong, nanoseconds; and what could not be
	// done.
	Skew     time.Duration `json:"skew,omitempty"`
	Warnings []string      `json:"warnings,omitempty"`
}

// Phase is how far a guest has come.
type Phase string

// The phases, in their order.
const (
	PhaseAgent   Phase = "agent"   // the agent runs
	PhaseCommand Phase = "command" // the image's command, or its init, runs
)

// Event tells of the guest's life.
type Event struct {
	// Phases are those that were reached, and when: since the kernel's start.
	Phases map[Phase]time.Duration `json:"phases,omitempty"` // nanoseconds
	// by which the guest's clock was wrong, and was set right; nanoseconds
	Skew  time.Duration `json:"skew,omitempty"`
	Exit  *Exit         `json:"exit,omitempty"`  // of the image's command
	Spent *Spent        `json:"spent,omitempty"` // between PhaseAgent and PhaseCommand
}

// Spent is what of a guest's way up was the kernel's work, and none of the agent's; nanoseconds.
type Spent struct {
	Modules time.Duration `json:"modules"` // inserted
	Mounts  time.Duration `json:"mounts"`  // of the root's layers
}

// Exit is how a program ended.
type Exit struct {
	Code   int    `json:"code"`             // 128 and the signal's number if a signal ended it
	Signal int    `json:"signal,omitempty"` // that ended it
	Error  string `json:"error,omitempty"`  // why it was not run, or did not go well
}

// Bounds of what is told of processes.
const (
	MaxProcesses = 2048
	MaxCommand   = 256 // bytes
)

// ParseJSON reads a frame's payload. What is not known there is left out: a newer side may say
// more.
func ParseJSON[T any](payload []byte) (v T, err error) {
	if err := json.Unmarshal(payload, &v); err != nil {
		return v, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	return v, nil
}

// Detach, in place of a signal, says that the host is about to go, and that the program is to go on
// without it.
const Detach = 0
