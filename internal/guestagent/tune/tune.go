// Package tune sets what the kernel and Go's runtime do with the agent's own process.
package tune

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Go's runtime has a thread that looks every 20 µs, asleep in between, whether a system call takes
// longer than that, and has others go on elsewhere then. On its way up a guest does one thing after
// another, most of it in the kernel, and each of those timers is its host's to set: they and the
// changes of threads took a third of the time. A thread's timer slack is how late its sleeps may
// end.
const (
	BootSlack  = 20 * time.Millisecond
	UsualSlack = time.Millisecond
)

// Slacken sets the timer slack of all threads that there are; others get that of the thread that
// starts them, but for programs: see process.Usual. It needs /proc.
func Slacken(slack time.Duration) error {
	tasks, err := os.ReadDir("/proc/self/task")
	text := []byte(strconv.FormatInt(slack.Nanoseconds(), 10))
	for _, task := range tasks {
		err = errors.Join(err, os.WriteFile(filepath.Join("/proc", task.Name(), "timerslack_ns"), text, 0))
	}
	if err != nil {
		return fmt.Errorf("set timer slack: %w", err)
	}
	return nil
}

// Frugal keeps the heap small, of which Go would have two thirds as garbage before it looks for
// any.
func Frugal() { debug.SetGCPercent(gcPercent) }

const gcPercent = 50

// The end of process 1 would be the end of the kernel, which therefore drops what would end it by
// default. Go's runtime handles all signals, and ends the process by some.
//
// Immortal gives those back to the kernel, except for those by which Go knows its own faults, which
// main catches. Package os/signal takes two changes of threads for each.
func Immortal() {
	var byDefault struct {
		handler, flags, restorer uintptr
		mask                     uint64
	}
	for _, s := range []syscall.Signal{
		unix.SIGHUP, unix.SIGQUIT, unix.SIGTRAP, unix.SIGABRT, unix.SIGSTKFLT, unix.SIGXCPU, unix.SIGXFSZ,
		unix.SIGSYS, unix.SIGILL,
	} {
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&byDefault)), 0,
			unsafe.Sizeof(byDefault.mask), 0, 0)
	}
}
