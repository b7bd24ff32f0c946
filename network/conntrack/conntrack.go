// Package conntrack has the kernel forget connections that it knows, in the calling thread's
// network: what it knows is let through, whatever rules there are now, and whoever has an address
// next is neither to go on with it nor to be reached by it.
package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/policy"
)

// Flow is a connection: who began it, to whom it leads, and whom that asked for: another, where it
// was led elsewhere.
type Flow struct {
	From  netip.Addr
	To    policy.Target
	Asked netip.AddrPort
}

// Messages and attributes of linux/netfilter/nfnetlink_conntrack.h.
const (
	get       = unix.NFNL_SUBSYS_CTNETLINK<<8 | nl.IPCTNL_MSG_CT_GET
	remove    = unix.NFNL_SUBSYS_CTNETLINK<<8 | nl.IPCTNL_MSG_CT_DELETE
	header    = 4 // struct nfgenmsg
	attribute = 4 // struct nlattr
)

// maxDumps is how often all connections are looked at, while the kernel says that some may have
// been left out.
const maxDumps = 3

// Most is how many connections the kernel can know.
func Most() int {
	const unknown = 1 << 18 // a kernel's default, while it does not track any
	// Without what makes a file of the kernel's one that can be waited for, which takes longer than to
	// read it.
	fd, err := unix.Open("/proc/sys/net/netfilter/nf_conntrack_max", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return unknown
	}
	defer unix.Close(fd)
	var text [20]byte
	n, err := unix.Read(fd, text[:])
	if err != nil {
		return unknown
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(text[:n])))
	if err != nil || most <= 0 {
		return unknown
	}
	return most
}

// Forget has the kernel forget the connections that one of some addresses has a part in, translated
// or not. All that it knows are looked at once, of IPv4 and IPv6: 100,000 take about a tenth of a
// second. A kernel that tells nobody of them (no NF_CT_NETLINK) is no error: a guest must go all
// the same.
func Forget(of func(netip.Addr) bool) error {
	return forget(func(c connection) bool {
		for _, t := range []tuple{c.asked, c.answers} {
			if of(t.source.Addr()) || of(t.destination.Addr()) {
				return true
			}
		}
		return false
	})
}

// ForgetFlows has the kernel forget some connections. Of one that is not, but goes on, the next
// packet is one that begins a connection.
func ForgetFlows(some func(Flow) bool) error {
	return forget(func(c connection) bool {
		to := policy.Target{Address: c.answers.source.Addr(), Protocol: c.asked.protocol, Port: c.answers.source.Port()}
		return some(Flow{c.asked.source.Addr(), to, c.asked.destination})
	})
}

func forget(which func(connection) bool) error {
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("forget connections: %w", err)
	}
	defer s.Close()
	if err := s.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
		return fmt.Errorf("forget connections: %w", err)
	}
	sockets := map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Socket: s}}
	for range maxDumps {
		err = forgetOnce(sockets, which)
		if !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	if err != nil && !untold(err) {
		return fmt.Errorf("forget connections: %w", err)
	}
	return nil
}

func forgetOnce(sockets map[int]*nl.SocketHandle, which func(connection) bool) error {
	var all []connection
	dump := request(sockets, get, unix.NLM_F_DUMP, unix.AF_UNSPEC)
	err := dump.ExecuteIter(unix.NETLINK_NETFILTER, 0, func(message []byte) bool {
		if c, ok := parse(message); ok && which(c) {
			c.keep()
			all = append(all, c)
		}
		return true
	})
	errs := []error{err}
	for _, c := range all {
		r := request(sockets, remove, unix.NLM_F_ACK, c.family)
		r.AddRawData(c.key)
		if _, err := r.Execute(unix.NETLINK_NETFILTER, 0); !errors.Is(err, unix.ENOENT) { // it ended by itself
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func request(sockets map[int]*nl.SocketHandle, kind, flags int, family uint8) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(kind, flags)
	r.Sockets = sockets
	r.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return r
}

// connection is what the kernel tells of one: what was asked for, and by whom answers come.
type connection struct {
	family         uint8
	asked, answers tuple
	parts          [2][]byte // the attributes by which the kernel finds it, as they were told
	key            []byte
}

type tuple struct {
	source, destination netip.AddrPort
	protocol            uint8
}

// parse reads a message, to which the connection's parts belong.
func parse(message []byte) (c connection, ok bool) {
	if len(message) < header {
		return c, false
	}
	c.family = message[0]
	for kind, whole := range attributes(message[header:]) {
		switch kind {
		case nl.CTA_TUPLE_ORIG:
			c.asked, c.parts[0] = parseTuple(whole[attribute:]), whole
		case nl.CTA_TUPLE_REPLY:
			c.answers = parseTuple(whole[attribute:])
		case nl.CTA_ZONE:
			c.parts[1] = whole
		}
	}
	return c, c.asked.source.IsValid() && c.answers.source.IsValid()
}

// keep has the connection need its message no more.
func (c *connection) keep() {
	for _, p := range c.parts {
		c.key = append(c.key, p...)
		c.key = append(c.key, make([]byte, -len(p)&3)...)
	}
	c.parts = [2][]byte{}
}

func parseTuple(b []byte) (t tuple) {
	var source, destination netip.Addr
	var from, to uint16
	for kind, part := range attributes(b) {
		for of, whole := range attributes(part[attribute:]) {
			value := whole[attribute:]
			switch {
			case kind == nl.CTA_TUPLE_IP && (of == nl.CTA_IP_V4_SRC || of == nl.CTA_IP_V6_SRC):
				source, _ = netip.AddrFromSlice(value)
			case kind == nl.CTA_TUPLE_IP && (of == nl.CTA_IP_V4_DST || of == nl.CTA_IP_V6_DST):
				destination, _ = netip.AddrFromSlice(value)
			case kind != nl.CTA_TUPLE_PROTO:
			case of == nl.CTA_PROTO_NUM && len(value) == 1:
				t.protocol = value[0]
			case of == nl.CTA_PROTO_SRC_PORT && len(value) == 2:
				from = binary.BigEndian.Uint16(value)
			case of == nl.CTA_PROTO_DST_PORT && len(value) == 2:
				to = binary.BigEndian.Uint16(value)
			}
		}
	}
	t.source, t.destination = netip.AddrPortFrom(source, from), netip.AddrPortFrom(destination, to)
	return t
}

// attributes are those of a message by their kinds, each with its header.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= attribute {
			n := int(binary.NativeEndian.Uint16(b))
			if n < attribute || n > len(b) ||
				!yield(binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER), b[:n]) {
				return
			}
			b = b[min((n+3)&^3, len(b)):]
		}
	}
}

// ForgetAll has the kernel forget all connections.
func ForgetAll() error {
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil && !untold(err) {
		return fmt.Errorf("forget connections: %w", err)
	}
	return nil
}

// untold is what a kernel answers that tells nobody of connections.
func untold(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)
}
