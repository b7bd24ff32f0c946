package smartvm

import "push.rocks/smartvm/spec"

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
