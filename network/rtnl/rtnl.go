// Package rtnl is what all need that speak to the kernel of interfaces, addresses and routes
// (rtnetlink(7)).
package rtnl

import (
	"encoding/binary"
	"errors"
	"net"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Sticky has a bridge's entry stay at its port (NTF_STICKY), though a port that learns sees the MAC
// elsewhere.
const Sticky = 1 << 6

// maxLists is how often something is listed that changes meanwhile.
const maxLists = 20

// Whole lists until nothing changes meanwhile: the kernel says so when a list may lack something.
// One that never comes to rest serves as it is.
func Whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range maxLists {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return all, nil
}

// Index returns that of an interface, 0 where there is none of the name: quicker than all that the
// kernel knows of it.
func Index(name string) (int, error) {
	answer, err := ask(name, unix.SIOCGIFINDEX)
	return int(binary.NativeEndian.Uint32(answer[:])), err
}

// MAC returns that of an Ethernet interface, zeros where there is none of the name: as quick as
// Index.
func MAC(name string) (net.HardwareAddr, error) {
	answer, err := ask(name, unix.SIOCGIFHWADDR)
	return answer[2:8], err // behind struct sockaddr's family
}

// ask returns what the kernel has to say of an interface by a request of netdevice(7): the union of
// struct ifreq, zeros where there is no such interface.
func ask(name string, request uintptr) (answer [24]byte, err error) {
	var ifreq struct {
		name  [unix.IFNAMSIZ]byte
		union [24]byte
	}
	if len(name) >= len(ifreq.name) {
		return answer, unix.EINVAL
	}
	copy(ifreq.name[:], name)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return answer, err
	}
	defer unix.Close(fd)
	switch _, _, err := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&ifreq))); {
	case err == unix.ENODEV:
		return answer, nil
	case err != 0:
		return answer, err
	}
	return ifreq.union, nil
}

// NoIPv6 says whether an error means that the kernel, or an interface, has IPv6 switched off.
func NoIPv6(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EAFNOSUPPORT)
}
