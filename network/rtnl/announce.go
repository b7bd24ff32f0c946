package rtnl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Announce tells all who get broadcasts of a bridge at which MAC addresses are now. Whoever knows
// them at another would send to that for up to a minute. It takes as long as the kernel takes to
// close such a socket, some 15 ms.
func Announce(bridge string, mac net.HardwareAddr, addresses ...netip.Addr) error {
	index, err := Index(bridge)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // 0: it gets nothing
	if err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	defer unix.Close(fd)
	var errs []error
	for _, a := range addresses {
		if !a.IsValid() {
			continue
		}
		frame := announcement6(mac, a.AsSlice())
		if a.Is4() {
			frame = announcement4(mac, a.AsSlice())
		}
		if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index}); err != nil {
			errs = append(errs, fmt.Errorf("announce %s on %s: %w", a, bridge, err))
		}
	}
	return errors.Join(errs...)
}

// announcement4 is an ARP request of a guest for its own address (RFC 5227, 3).
func announcement4(mac net.HardwareAddr, ip []byte) []byte {
	f := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac...)
	f = append(f, unix.ETH_P_ARP>>8, unix.ETH_P_ARP&0xff, 0, unix.ARPHRD_ETHER, unix.ETH_P_IP>>8,
		unix.ETH_P_IP&0xff, 6, 4, 0, 1)
	f = append(append(f, mac...), ip...)
	return append(append(f, make([]byte, 6)...), ip...)
}

// announcement6 is a neighbour advertisement to all nodes that overrides what they know (RFC 4861,
// 7.2.6).
func announcement6(mac net.HardwareAddr, ip []byte) []byte {
	const all = "\xff\x02\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"
	message := append([]byte{136, 0, 0, 0, 0x20, 0, 0, 0}, ip...) // 0x20: override
	message = append(append(message, 2, 1), mac...)               // the target's address in the link
	binary.BigEndian.PutUint16(message[2:],
		checksum(ip, []byte(all), []byte{0, 0, 0, byte(len(message)), 0, 0, 0, unix.IPPROTO_ICMPV6}, message))
	f := append([]byte{0x33, 0x33, 0, 0, 0, 1}, mac...)
	f = append(f, unix.ETH_P_IPV6>>8, unix.ETH_P_IPV6&0xff, 0x60, 0, 0, 0, 0, byte(len(message)), unix.IPPROTO_ICMPV6, 255)
	return append(append(append(f, ip...), all...), message...)
}

// checksum is the internet's (RFC 1071) of parts of even length.
func checksum(parts ...[]byte) uint16 {
	sum := uint32(0)
	for _, p := range parts {
		for ; len(p) > 1; p = p[2:] {
			sum += uint32(binary.BigEndian.Uint16(p))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
