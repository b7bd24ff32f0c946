package guestagent

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The end of process 1 would be the end of the kernel, which therefore drops what would end it by default. Go's runtime handles all
// signals, and ends the process by some.
//
// immortal gives those back to the kernel, except for those by which Go knows its own faults, which main catches. Package
// os/signal takes two changes of threads for each.
func immortal() {
	var byDefault struct {
		handler, flags, restorer uintptr
		mask                     uint64
	}
	for _, s := range []syscall.Signal{
		unix.SIGHUP, unix.SIGQUIT, unix.SIGTRAP, unix.SIGABRT, unix.SIGSTKFLT, unix.SIGXCPU, unix.SIGXFSZ, unix.SIGSYS, unix.SIGILL,
	} {
		_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&byDefault)), 0, unsafe.Sizeof(byDefault.mask), 0, 0)
	}
}
