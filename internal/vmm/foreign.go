package vmm

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// foreign tells how a process ended whose parent another process is. While the parent has not
// waited for it, /proc says so; afterwards the kernel does (Linux >= 6.15) by a pidfd that was
// opened while the process ran.
type foreign struct {
	pid   int
	pidfd *os.File
}

// openForeign returns that of an adopted VMM, nil where that has more processes than one, or has
// ended.
func (p *Process) openForeign() *foreign {
	pids, err := p.PIDs()
	if err != nil || len(pids) != 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(pids[0], 0)
	if err != nil {
		return nil
	}
	f := &foreign{pids[0], os.NewFile(uintptr(fd), "pidfd")}
	// The descriptor is of whatever had the PID then: only if that is the VMM's now, it was before.
	if again, err := p.PIDs(); err != nil || !slices.Equal(pids, again) {
		_ = f.pidfd.Close()
		return nil
	}
	return f
}

// endPatience is how long the kernel may take from the end of a process's group or working
// directory to that of the process.
const endPatience = time.Second

// exit tells how the process did, which ends just now or has ended. It closes f.
func (f *foreign) exit() Exit {
	if f == nil {
		return Exit{}
	}
	defer f.pidfd.Close()
	fd := int(f.pidfd.Fd())
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	for end := time.Now().Add(endPatience); ; {
		_, err := unix.Poll(fds, max(0, int(time.Until(end).Milliseconds())))
		if err != unix.EINTR { //nolint:errorlint // a system call's
			break
		}
	}
	status, err := zombieStatus(f.pid)
	if err == nil && unix.PidfdSendSignal(fd, 0, nil, 0) == nil { // so no other process has had its PID
		return exitOfStatus(status)
	}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	if err := unix.IoctlPidfdInfo(fd, &info); err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return Exit{}
	}
	return exitOfStatus(syscall.WaitStatus(info.Exit_code)) //nolint:gosec // as the kernel has it
}

// zombieStatus reads the exit status of a process for which its parent has not waited from the last
// field of /proc/PID/stat (proc(5)).
func zombieStatus(pid int) (syscall.WaitStatus, error) {
	dir := "/proc/" + strconv.Itoa(pid)
	// The same right that shows the status: without it, that is 0.
	if _, err := os.Readlink(dir + "/cwd"); err != nil && !os.IsNotExist(err) {
		return 0, err
	}
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:]) // a program's name may have blanks
	if len(fields) < 50 || string(fields[0]) != "Z" {
		return 0, fmt.Errorf("process %d is no zombie", pid)
	}
	status, err := strconv.ParseUint(string(fields[49]), 10, 32)
	return syscall.WaitStatus(status), err
}
