// Package rtnl asks a guest's kernel to set up interfaces, addresses and routes. See rtnetlink(7).
package rtnl

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// With opens a socket for f.
func With(f func(Conn) error) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer unix.Close(fd)
	// The kernel answers at once.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return err
	}
	return f(Conn(fd))
}

// SetLink sets those of an interface's flags that change says, and attributes.
func (c Conn) SetLink(index int, flags, change uint32, attributes ...[]byte) error {
	return c.request(unix.RTM_NEWLINK, 0, linkMessage(index, flags, change), attributes...)
}

// AddAddress gives an interface an address, which is of use at once.
func (c Conn) AddAddress(index int, p netip.Prefix) error {
	body, attributes := addressMessage(index, p)
	if p.Addr().Is6() {
		// Nobody else has it: the host has leased it. So it is of use at once.
		body[2] = unix.IFA_F_NODAD
	} else if p.Bits() < 31 {
		broadcast := p.Masked().Addr().As4()
		for bit := p.Bits(); bit < 32; bit++ {
			broadcast[bit/8] |= 0x80 >> (bit % 8)
		}
		attributes = append(attributes, Attribute(unix.IFA_BROADCAST, broadcast[:]))
	}
	return c.request(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, body, attributes...)
}

// RemoveAddress takes an address from an interface.
func (c Conn) RemoveAddress(index int, p netip.Prefix) error {
	body, attributes := addressMessage(index, p)
	return c.request(unix.RTM_DELADDR, 0, body, attributes...)
}

// addressMessage is a struct ifaddrmsg and what follows it.
func addressMessage(index int, p netip.Prefix) (body []byte, attributes [][]byte) {
	body = []byte{family(p.Addr()), byte(p.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	body = binary.NativeEndian.AppendUint32(body, uint32(index))
	return body, [][]byte{Attribute(unix.IFA_LOCAL, p.Addr().AsSlice()), Attribute(unix.IFA_ADDRESS, p.Addr().AsSlice())}
}

// AddDefault adds a default route by a gateway.
func (c Conn) AddDefault(index int, gateway netip.Addr) error {
	// struct rtmsg
	body := []byte{
		family(gateway), 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE,
		unix.RTN_UNICAST, 0, 0, 0, 0,
	}
	return c.request(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, body,
		Attribute(unix.RTA_GATEWAY, gateway.AsSlice()),
		Attribute(unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(index))))
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// linkMessage is a struct ifinfomsg that sets those of the flags that change says.
func linkMessage(index int, flags, change uint32) []byte {
	body := make([]byte, 4, unix.SizeofIfInfomsg)
	body = binary.NativeEndian.AppendUint32(body, uint32(index))
	body = binary.NativeEndian.AppendUint32(body, flags)
	return binary.NativeEndian.AppendUint32(body, change)
}

// Attribute is a struct rtattr and what it holds.
func Attribute(kind uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofRtAttr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, data...)
	return append(b, make([]byte, -len(b)&3)...)
}

// Conn is a socket.
type Conn int

// request sends one message and waits for its acknowledgement.
func (c Conn) request(kind, flags uint16, body []byte, attributes ...[]byte) error {
	payload := append(slices.Clip(body), bytes.Join(attributes, nil)...)
	message := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(payload)))
	message = binary.NativeEndian.AppendUint16(message, kind)
	message = binary.NativeEndian.AppendUint16(message, unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	// sequence and port: there is one request at a time, on a socket of its own
	message = append(message, make([]byte, 8)...)
	if err := unix.Sendto(int(c), append(message, payload...), 0,
		&unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, os.Getpagesize())
	n, _, err := unix.Recvfrom(int(c), answer, 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel's answer does not read")
	}
	if code := int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}
