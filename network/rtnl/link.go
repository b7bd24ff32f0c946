package rtnl

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// SetVariable sets a variable of an interface, unless it is so, where the kernel has its protocol.
func SetVariable(name, protocol, variable, value string) error {
	group := "conf"
	if variable == "proxy_delay" {
		group = "neigh"
	}
	path := "/proc/sys/net/" + protocol + "/" + group + "/" + name + "/" + variable
	now, err := os.ReadFile(path)
	if err == nil && strings.TrimSpace(string(now)) != value {
		err = os.WriteFile(path, []byte(value), 0)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// AddAddresses gives an interface addresses, IPv6 ones only where the kernel has it.
func AddAddresses(link netlink.Link, all []netip.Prefix) error {
	for _, p := range all {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, a); err != nil && !(p.Addr().Is6() && NoIPv6(err)) {
			return fmt.Errorf("address %s: %w", p, err)
		}
	}
	return nil
}

// Remove removes an interface of a name, if it is there and is ours.
func Remove(name string, ours func(netlink.Link) bool) error {
	l, err := netlink.LinkByName(name)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if !ours(l) {
		return nil
	}
	if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

// SetPort switches attributes of a bridge's port (IFLA_BRPORT_*) on and off, by the port's index.
func SetPort(index int, attributes map[int]bool) error {
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(index)
	port := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	for attribute, on := range attributes {
		port.AddRtAttr(attribute, map[bool][]byte{true: {1}, false: {0}}[on])
	}
	return request(unix.RTM_SETLINK, msg, port)
}

// Port returns the attributes of a bridge's port (IFLA_BRPORT_*) that are a byte, by the port's
// index: none where it is no port.
func Port(index int) (map[int]byte, error) {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	req.AddData(msg)
	answer, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, err
	}
	port := map[int]byte{}
	for _, m := range answer {
		data := m[min(unix.SizeofIfInfomsg, len(m)):]
		for _, kind := range []uint16{unix.IFLA_LINKINFO, nl.IFLA_INFO_SLAVE_DATA} {
			all, err := nl.ParseRouteAttr(data)
			if err != nil {
				return nil, err
			}
			data = nil
			for _, a := range all {
				if a.Attr.Type&^unix.NLA_F_NESTED == kind {
					data = a.Value
				}
			}
		}
		all, err := nl.ParseRouteAttr(data)
		if err != nil {
			return nil, err
		}
		for _, a := range all {
			if len(a.Value) == 1 {
				port[int(a.Attr.Type)] = a.Value[0]
			}
		}
	}
	return port, nil
}

// SetUpNoARP sets an interface up that is to have no ARP of its own.
func SetUpNoARP(index int) error {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), unix.IFF_UP|unix.IFF_NOARP, unix.IFF_UP|unix.IFF_NOARP
	return request(unix.RTM_NEWLINK, msg)
}

func request(kind int, parts ...nl.NetlinkRequestData) error {
	req := nl.NewNetlinkRequest(kind, unix.NLM_F_ACK)
	for _, p := range parts {
		req.AddData(p)
	}
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}
