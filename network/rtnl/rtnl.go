// Package rtnl is what all need that speak to the kernel of interfaces, addresses and routes (rtnetlink(7)).
package rtnl

import (
	"errors"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// maxLists is how often something is listed that changes meanwhile.
const maxLists = 20

// Whole lists until nothing changes meanwhile: the kernel says so when a list may lack something. One that never comes to rest serves as it is.
func Whole[T any](list func() ([]T, error)) (all []T, err error) {
	for range maxLists {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return all, nil
}

// Index returns that of an interface, 0 where there is none of the name: quicker than all that the kernel knows of it.
func Index(name string) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); errors.Is(err, unix.ENODEV) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	return int(ifr.Uint32()), nil
}

// NoIPv6 says whether an error means that the kernel, or an interface, has IPv6 switched off.
func NoIPv6(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.EAFNOSUPPORT)
}
