// Package lab runs a command on an emulated host: QEMU, which emulates a CPU
// that can virtualize (AMD SVM), boots an ordinary Linux kernel in which
// /dev/kvm is complete. Real microVMs with real Linux guests run in it on
// machines whose own KVM is missing or boots no Linux ([Decide] says so), some
// ten times slower.
//
// The lab sees this machine's root file system, which it cannot alter: what it
// writes goes to memory and vanishes, except below the directories that
// [Config.Share] names. /proc, /sys, /dev, /dev/shm and /run are its own. It has
// cgroup v2 with every controller, TUN, bridges, loop devices and vsock; the
// kernel loads further modules by itself. The only network is the loopback.
// SMARTVM_IN_LAB=1 is in the command's environment.
//
// Nothing of a lab outlives the process that runs it, even if that is killed.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// InLabVariable is "1" in the environment of what runs in a lab.
const InLabVariable = "SMARTVM_IN_LAB"

// Defaults of Config. One processor is as fast as two, and cannot wait for another for ever: see
// docs/lab.md.
const (
	DefaultMemoryMiB = 4096
	DefaultCPUs      = 1
)

// BootTimeout is how long a lab may take until the command runs. It takes some
// four seconds on a quiet machine, and 13 were seen on a busy one.
const BootTimeout = 90 * time.Second

// A lab whose command runs gives a sign of life every three seconds. It has
// stalled when none has come for four times as long as it took to boot, which
// says how fast the machine is, but within these bounds.
const (
	minSilence = 20 * time.Second
	maxSilence = 45 * time.Second
)

// Config describes a lab and what runs in it. The first four fields, Command
// and Dir must be set.
type Config struct {
	// Kernel is a generic distribution kernel: a vmlinux with a PVH entry,
	// which saves seconds, or a bzImage.
	Kernel string
	// Modules is Kernel's lib/modules/<release>, with modules.dep.
	Modules string
	// Busybox is statically linked.
	Busybox string
	// QEMU is qemu-system-x86_64.
	QEMU string

	// MemoryMiB is what the lab has at most: DefaultMemoryMiB if 0. Half of
	// it can be used for files.
	MemoryMiB int
	// CPUs is DefaultCPUs if 0.
	CPUs int
	// Share lists directories of this machine, absolute, that the lab can
	// write to. They are at the same paths in the lab.
	Share []string

	// Command is a program and its arguments. The program is sought as a
	// shell would, on this machine, whose files the lab has.
	Command []string
	// Env is the command's whole environment, "name=value".
	Env []string
	// Dir is the command's working directory, absolute.
	Dir string
	// Stdout and Stderr get the command's output as it comes; nil discards it.
	// Its standard input is empty. Writes to these and to Console never overlap.
	Stdout, Stderr io.Writer
	// Console gets the kernel's messages as they come, if set.
	Console io.Writer
	// Booted is called once, when the command is about to be started, if set.
	Booted func()
}

// Errors of Run.
var (
	// ErrConfig means that the Config makes no sense.
	ErrConfig = errors.New("invalid lab configuration")
	// ErrBoot means that the command has not been started.
	ErrBoot = errors.New("lab did not boot")
	// ErrDied means that the lab ended before the command did.
	ErrDied = errors.New("lab died")
	// ErrStalled means that the lab gave no sign of life while the command ran.
	ErrStalled = errors.New("lab stalled")
)

// ConsoleError carries the last messages of a lab that went wrong. It wraps
// ErrBoot, ErrDied, ErrStalled or the reason for which the lab was ended.
type ConsoleError struct {
	Err     error
	Console string // of QEMU and of the lab's kernel, and where its processors were; bounded
}

func (e *ConsoleError) Error() string {
	console := strings.TrimSpace(e.Console)
	if console == "" {
		return e.Err.Error()
	}
	return fmt.Sprintf("%v; its last messages:\n%s", e.Err, console)
}

// Unwrap returns Err.
func (e *ConsoleError) Unwrap() error { return e.Err }

// LargePages is what guests in the lab should have for memory, in the words of the VMM's machine
// configuration. Where an interrupt meets a page that the guest's guest has not touched yet, the
// emulator forgets the interrupt, or writes its frame to a wrong place, and the guest stops or
// dies. With pages of 2 MiB that is rare. The lab has 1280 MiB of them.
const LargePages = "2M"

// Niceness is QEMU's nice value, where we may set it. A processor that is emulated and preempted
// between two looks at its interrupts may take one of them twice, which the guest does not survive:
// see docs/lab.md.
const Niceness = -5

// Run boots a lab, runs the command in it and returns the command's exit
// status, 128+n when signal n killed it. All of the command's output has been
// written when Run returns; processes that the command leaves behind are
// killed with the lab. When ctx ends, so does the lab at once. Besides the
// errors above there are those of ctx, of the writers and of starting QEMU.
func Run(ctx context.Context, c Config) (exitCode int, err error) {
	c, err = c.withDefaults()
	if err != nil {
		return 0, err
	}
	h, err := launch(ctx, c)
	if err != nil {
		return 0, fmt.Errorf("start lab: %w", err)
	}
	return h.wait(ctx)
}
