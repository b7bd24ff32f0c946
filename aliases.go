package smartvm

import (
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/spec"
	"push.rocks/smartvm/status"
)

// What a VM shall be: see package spec, which parses and validates it.
type (
	Spec             = spec.Spec
	BootSource       = spec.BootSource
	MachineConfig    = spec.MachineConfig
	Drive            = spec.Drive
	Port             = spec.Port
	ExtraHost        = spec.ExtraHost
	NetworkInterface = spec.NetworkInterface
	RateLimiter      = spec.RateLimiter
	TokenBucket      = spec.TokenBucket
	Vsock            = spec.Vsock
	Balloon          = spec.Balloon
	MMDS             = spec.MMDS
	Logger           = spec.Logger
	Metrics          = spec.Metrics
	Entropy          = spec.Entropy
	Serial           = spec.Serial
	Pmem             = spec.Pmem
	MemoryHotplug    = spec.MemoryHotplug
	Scratch          = spec.Scratch
	Secret           = spec.Secret
	Volume           = spec.Volume
	NamedVolume      = spec.NamedVolume
	FieldError       = spec.FieldError
)

// Where a VM is in its life, how its last run ended, and what operations on it fail with: see
// package status.
type (
	State        = status.State
	StateError   = status.StateError
	MachineError = status.MachineError
	Exit         = status.Exit
	Outcome      = status.Outcome
	StagedDrive  = status.StagedDrive
)

// The states: see package status.
const (
	Creating = status.Creating
	Stopped  = status.Stopped
	Starting = status.Starting
	Running  = status.Running
	Paused   = status.Paused
	Stopping = status.Stopping
	Removing = status.Removing
	Failed   = status.Failed
	Lost     = status.Lost
)

// The outcomes: see package status.
const (
	OutcomeExited  = status.OutcomeExited
	OutcomeKilled  = status.OutcomeKilled
	OutcomeCrashed = status.OutcomeCrashed
	OutcomeFailed  = status.OutcomeFailed
	OutcomeLost    = status.OutcomeLost
)

// Sentinels for control flow; test with errors.Is.
var (
	ErrNotFound     = status.ErrNotFound
	ErrExists       = status.ErrExists
	ErrState        = status.ErrState
	ErrAmbiguous    = status.ErrAmbiguous
	ErrClosed       = status.ErrClosed
	ErrUnread       = status.ErrUnread
	ErrNotSupported = spec.ErrNotSupported
)

// What goes on in a guest, of which its agent is asked: see package guest. VMs of images have an
// agent, and others that run it as a service.
type (
	Cmd          = guest.Cmd
	CmdExit      = guest.Exit
	TermSize     = guest.Size
	CopyOptions  = guest.CopyOptions
	GuestStats   = guest.Stats
	GuestProcess = guest.Process
	GuestState   = guest.State
	Secrets      = guest.Secrets // files and variables that only a guest may see
)

// ErrNoAgent means that no agent answers in the guest: it is still booting, has no agent, or is
// about to end.
var ErrNoAgent = agent.ErrNoAgent

// ErrDetached means that the caller has left a program of a guest to itself: see Cmd.
var ErrDetached = agent.ErrDetached
