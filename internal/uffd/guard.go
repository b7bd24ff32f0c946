package uffd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// peer is the VMM at the other end of a connection.
type peer struct {
	pid   int
	pidfd int
}

// peerOf finds out who is at the other end. The caller closes the pidfd.
func peerOf(conn *net.UnixConn) (p peer, uid int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return p, 0, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err != nil {
			return
		}
		p.pid, uid = int(cred.Pid), int(cred.Uid)
		// Before Linux 6.5 the process may be another by now, if it is gone and its number is given
		// again; the caller finds it gone by the connection's end.
		if p.pidfd, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err != nil {
			p.pidfd, err = unix.PidfdOpen(p.pid, 0)
		}
		if err == nil {
			err = unix.SetNonblock(p.pidfd, true) // the runtime's poller shall wait for it
		}
	})
	return p, uid, errors.Join(err, cerr)
}

// errNoGuard says that the VMM does not hold its end of the connection, as Firecracker before 1.12
// does not.
var errNoGuard = errors.New("the VMM has closed its connection")

// guard makes the kernel kill the VMM when our end of the connection closes, so also when this
// process is killed. A socket can have a signal sent to a process when something happens to it
// (fcntl's O_ASYNC, F_SETOWN, F_SETSIG); here it is the VMM's own end that signals the VMM. What
// was sent has been read, so nothing but the end is left to happen. For us to set this up the
// descriptor is borrowed (pidfd_getfd: we are root, or the VMM's parent).
//
// PR_SET_PDEATHSIG would not do: the jailer's change of user clears it.
func (p peer) guard(conn *net.UnixConn) error {
	ours := conn.LocalAddr().String()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.pid))
	if err != nil {
		return fmt.Errorf("guard VMM: %w", err)
	}
	var errs []error
	for _, e := range entries {
		number, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(p.pidfd, number, 0)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		name, err := unix.Getpeername(fd)
		if address, ok := name.(*unix.SockaddrUnix); err == nil && ok && address.Name == ours {
			return errors.Join(p.signalOnEnd(fd), unix.Close(fd))
		}
		_ = unix.Close(fd)
	}
	return fmt.Errorf("guard VMM: %w", errors.Join(append(errs, errNoGuard)...))
}

func (p peer) signalOnEnd(fd int) error {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETOWN, p.pid)
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETSIG, int(unix.SIGKILL))
	}
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_ASYNC)
	}
	if err != nil {
		return fmt.Errorf("guard VMM: %w", err)
	}
	return nil
}

// kill ends the VMM. If it is gone, that is all right.
func (p peer) kill() error {
	if err := unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill VMM: %w", err)
	}
	return nil
}
