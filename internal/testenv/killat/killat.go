// Package killat kills a program at a chosen one of the system calls by which it changes the file
// system: the crash at every step, without any help of the program's.
package killat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// changing are the system calls that count, by the numbers of this architecture; openat only where
// it may make a file, be it one without a name. A write counts too: what is half written at a crash
// is half there.
var changing = map[uint64]bool{
	unix.SYS_MKDIRAT: true, unix.SYS_UNLINKAT: true, unix.SYS_RENAMEAT: true, unix.SYS_RENAMEAT2: true,
	unix.SYS_LINKAT:    true,
	unix.SYS_SYMLINKAT: true, unix.SYS_FTRUNCATE: true, unix.SYS_FCHMOD: true, unix.SYS_FCHMODAT: true,
	unix.SYS_FCHOWN: true,
	unix.SYS_FSYNC:  true, unix.SYS_PWRITE64: true, unix.SYS_COPY_FILE_RANGE: true,
}

// Run runs a command, which must not have been started, until it is about to make its n-th change,
// counted from 1, and kills it there. Ended says that it has ended before; then err is how, nil or
// an *exec.ExitError.
//
// Every child of this process is waited for meanwhile, so there must be no other.
func Run(cmd *exec.Cmd, n int) (ended bool, err error) {
	// All calls about a traced process come from the thread that traces it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Ptrace = true
	if err := cmd.Start(); err != nil {
		return false, err
	}
	pid := cmd.Process.Pid
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return false, fmt.Errorf("await traced program: %w", err)
	}
	err = unix.PtraceSetOptions(pid, unix.PTRACE_O_EXITKILL|unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_TRACESYSGOOD)
	if err == nil {
		err = unix.PtraceSyscall(pid, 0)
	}
	if err != nil {
		return false, fmt.Errorf("trace program: %w", err)
	}
	killed := false
	for {
		tid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return false, fmt.Errorf("await traced program: %w", err)
		case tid == pid && (status.Exited() || status.Signaled()):
			_ = cmd.Wait() // only for what it holds: the process has been waited for
			if status.Exited() && status.ExitStatus() != 0 {
				return !killed, fmt.Errorf("exit status %d", status.ExitStatus())
			}
			return !killed, nil
		case !status.Stopped():
			continue // a thread has ended
		}
		deliver := 0
		switch signal := status.StopSignal(); {
		case signal == unix.SIGTRAP|0x80:
			if n > 0 && changes(tid) {
				if n--; n == 0 {
					killed = true
					_ = unix.Kill(pid, unix.SIGKILL)
					continue
				}
			}
		case signal != unix.SIGTRAP && signal != unix.SIGSTOP: // of ptrace's own and of new threads
			deliver = int(signal)
		}
		if err := unix.PtraceSyscall(tid, deliver); err != nil && !errors.Is(err, unix.ESRCH) {
			return false, fmt.Errorf("trace program: %w", err)
		}
	}
}

// changes says whether a stopped thread is about to change the file system.
func changes(tid int) bool {
	var info [88]byte // struct ptrace_syscall_info
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), uintptr(len(info)),
		uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 || n == 0 || info[0] != unix.PTRACE_SYSCALL_INFO_ENTRY {
		return false
	}
	nr := binary.NativeEndian.Uint64(info[24:])
	if nr == unix.SYS_OPENAT {
		return binary.NativeEndian.Uint64(info[24+8+2*8:])&(unix.O_CREAT|unix.O_TMPFILE&^unix.O_DIRECTORY) != 0
	}
	return changing[nr]
}
