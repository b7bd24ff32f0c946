package process

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Usual gives the thread what programs usually start with, and so do those that it forks or
// becomes: no signal is blocked, and the timer slack is the kernel's. The agent's own threads may
// have another slack, and whatever has started the agent may have blocked signals.
func Usual() {
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, new(unix.Sigset_t), nil)
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, usualSlack, 0, 0, 0)
}

const usualSlack = 50_000 // nanoseconds

// Ignored lists the signals that this process ignores, as what has started it did: nohup ignores
// SIGHUP, a shell's background job SIGINT. A program inherits that, unlike a handler. So a main
// program catches them, into nowhere: then it is as deaf to them as before, and programs that it
// starts have them as they expect. Package os/signal does not know all that are ignored.
func Ignored() (all []os.Signal) {
	var action struct {
		handler, flags, restorer uintptr
		mask                     uint64
	}
	for s := unix.Signal(1); s <= lastSignal; s++ {
		_, _, err := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), 0, uintptr(unsafe.Pointer(&action)),
			unsafe.Sizeof(action.mask), 0, 0)
		if err == 0 && action.handler == ignore {
			all = append(all, s)
		}
	}
	return all
}

const (
	ignore     = 1  // SIG_IGN
	lastSignal = 64 // _NSIG
)
