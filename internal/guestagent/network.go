package guestagent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agentproto"
)

// setNetwork gives the guest's interfaces their addresses and routes, and says what it could not: a guest without a part of
// its network is better than none.
func setNetwork(b *agentproto.Boot) {
	for _, i := range b.Interfaces {
		link, err := awaitLink(i.MAC)
		if err == nil {
			err = withNetlink(func(r rtnetlink) error { return r.setInterface(link, i) })
		}
		if err != nil {
			say("set up interface %s: %v", i.MAC, err)
		}
	}
	putNetwork(b)
}

// putNetwork writes what programs read of the network.
func putNetwork(b *agentproto.Boot) {
	if len(b.DNS) > 0 {
		put("/etc/resolv.conf", resolvConf(b), b.ScratchDevice != "")
	}
	putHosts(b)
}

// putHosts writes under which address a command finds the guest's own name, and what else the guest is told of names.
func putHosts(b *agentproto.Boot) {
	if len(b.Interfaces) > 0 && len(b.Command) > 0 || len(b.Hosts) > 0 {
		put("/etc/hosts", hosts(b), b.ScratchDevice != "")
	}
}

func resolvConf(b *agentproto.Boot) string {
	var text strings.Builder
	if len(b.Search) > 0 {
		fmt.Fprintf(&text, "search %s\n", strings.Join(b.Search, " "))
	}
	for _, a := range b.DNS {
		fmt.Fprintf(&text, "nameserver %s\n", a)
	}
	return text.String()
}

func hosts(b *agentproto.Boot) string {
	text := "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
	own := "127.0.1.1"
	for _, i := range b.Interfaces {
		if n := slices.IndexFunc(i.Addresses, func(p netip.Prefix) bool { return p.Addr().Is4() }); n >= 0 {
			own = i.Addresses[n].Addr().String()
			break
		}
	}
	if b.Hostname != "" {
		text += own + " " + b.Hostname + "\n"
	}
	for _, h := range b.Hosts {
		text += h.Address.String() + " " + h.Name + "\n"
	}
	return text
}

// put makes a file of the image this text: in place of what is there, or, where nothing can be written, over it.
func put(name, text string, writable bool) {
	target := name
	if !writable {
		if info, err := os.Stat(name); err != nil || !info.Mode().IsRegular() {
			say("%s stays as it is: there is nothing to lay it over", name)
			return
		}
		target = "/run/smartvm-" + strings.ReplaceAll(name[1:], "/", "-")
	}
	err := os.Remove(target) // it may be a link, which leads elsewhere, or a FIFO, which would hold us up
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644); err == nil {
			_, err = f.WriteString(text)
			err = errors.Join(err, f.Close())
		}
	}
	if err == nil && target != name {
		err = unix.Mount(target, name, "", unix.MS_BIND, "")
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // an image without /etc has no use for it
		say("write %s: %v", name, err)
	}
}

// awaitLink waits for the interface that has one of some MACs.
func awaitLink(macs ...string) (link net.Interface, err error) {
	err = await(func() error {
		all, err := net.Interfaces()
		if err != nil {
			return err
		}
		n := slices.IndexFunc(all, func(i net.Interface) bool { return slices.Contains(macs, i.HardwareAddr.String()) })
		if n < 0 {
			return errNotYet
		}
		link = all[n]
		return nil
	})
	return link, err
}

// withNetlink opens a socket for f.
func withNetlink(f func(rtnetlink) error) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer unix.Close(fd)
	// The kernel answers at once.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
		return err
	}
	return f(rtnetlink(fd))
}

func (r rtnetlink) setInterface(link net.Interface, i agentproto.Interface) error {
	name := link.Name
	if i.Name != "" && i.Name != name {
		if err := r.request(unix.RTM_NEWLINK, 0, linkMessage(link.Index, 0, 0), attribute(unix.IFLA_IFNAME, append([]byte(i.Name), 0))); err != nil {
			say("call %s %s: %v", name, i.Name, err) // by its other name it does as well
		} else {
			name = i.Name
		}
	}
	// A router that is none of ours is not for the guest. Where there is no such file there is no IPv6.
	ipv6 := setIPv6(name, "accept_ra", map[bool]string{true: "2", false: "0"}[i.Routers])
	if i.Routers && ipv6 { // the host lets through such addresses alone as are made of the MAC
		setIPv6(name, "addr_gen_mode", "0")
		setIPv6(name, "use_tempaddr", "0")
	}
	var set [][]byte
	if i.MTU != 0 {
		set = append(set, attribute(unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, uint32(i.MTU))))
	}
	if err := r.request(unix.RTM_NEWLINK, 0, linkMessage(link.Index, unix.IFF_UP, unix.IFF_UP), set...); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	var errs []error
	for _, p := range i.Addresses {
		if p.Addr().Is4() || ipv6 {
			if err := r.addAddress(link.Index, p); err != nil && !errors.Is(err, unix.EEXIST) {
				errs = append(errs, fmt.Errorf("address %s: %w", p, err))
			}
		}
	}
	for _, g := range i.Gateways {
		if g.Is4() || ipv6 {
			if err := r.addDefault(link.Index, g); err != nil && !errors.Is(err, unix.EEXIST) {
				errs = append(errs, fmt.Errorf("route by %s: %w", g, err))
			}
		}
	}
	return errors.Join(errs...)
}

// setIPv6 sets a variable of an interface, and says whether the kernel has it.
func setIPv6(name, variable, value string) bool {
	return os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/"+variable, []byte(value), 0) == nil
}

func (r rtnetlink) addAddress(index int, p netip.Prefix) error {
	body, attributes := addressMessage(index, p)
	if p.Addr().Is6() {
		// Nobody else has it: the host has leased it. So it is of use at once.
		body[2] = unix.IFA_F_NODAD
	} else if p.Bits() < 31 {
		broadcast := p.Masked().Addr().As4()
		for bit := p.Bits(); bit < 32; bit++ {
			broadcast[bit/8] |= 0x80 >> (bit % 8)
		}
		attributes = append(attributes, attribute(unix.IFA_BROADCAST, broadcast[:]))
	}
	return r.request(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, body, attributes...)
}

func (r rtnetlink) removeAddress(index int, p netip.Prefix) error {
	body, attributes := addressMessage(index, p)
	return r.request(unix.RTM_DELADDR, 0, body, attributes...)
}

// addressMessage is a struct ifaddrmsg and what follows it.
func addressMessage(index int, p netip.Prefix) (body []byte, attributes [][]byte) {
	body = []byte{family(p.Addr()), byte(p.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	body = binary.NativeEndian.AppendUint32(body, uint32(index))
	return body, [][]byte{attribute(unix.IFA_LOCAL, p.Addr().AsSlice()), attribute(unix.IFA_ADDRESS, p.Addr().AsSlice())}
}

func (r rtnetlink) addDefault(index int, gateway netip.Addr) error {
	// struct rtmsg
	body := []byte{family(gateway), 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0}
	return r.request(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, body,
		attribute(unix.RTA_GATEWAY, gateway.AsSlice()), attribute(unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(index))))
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

// attribute is a struct rtattr and what it holds.
func attribute(kind uint16, data []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(unix.SizeofRtAttr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, data...)
	return append(b, make([]byte, -len(b)&3)...)
}

// rtnetlink is a socket.
type rtnetlink int

// request sends one message and waits for its acknowledgement.
func (r rtnetlink) request(kind, flags uint16, body []byte, attributes ...[]byte) error {
	payload := append(slices.Clip(body), bytes.Join(attributes, nil)...)
	message := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(payload)))
	message = binary.NativeEndian.AppendUint16(message, kind)
	message = binary.NativeEndian.AppendUint16(message, unix.NLM_F_REQUEST|unix.NLM_F_ACK|flags)
	message = append(message, make([]byte, 8)...) // sequence and port: there is one request at a time, on a socket of its own
	if err := unix.Sendto(int(r), append(message, payload...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, os.Getpagesize())
	n, _, err := unix.Recvfrom(int(r), answer, 0)
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
