package flowlog

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Attributes of nfnetlink_log's messages (linux/netfilter/nfnetlink_log.h).
const (
	attrTime    = 3
	attrSender  = 8
	attrPayload = 9
	attrPrefix  = 10
)

// dns is Event.Protocol of questions for names.
const dns = "dns"

var protocols = map[byte]string{
	unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp",
	unix.IPPROTO_ICMPV6: "icmpv6",
}

// parseMessage reads what the kernel says of a packet, behind the header of its messages: who sent
// it, by its MAC, and what it was.
func parseMessage(data []byte) (sender string, e Event, ok bool) {
	if len(data) < 4 {
		return "", e, false
	}
	attributes, err := netlink.UnmarshalAttributes(data[4:])
	if err != nil {
		return "", e, false
	}
	e.Time = time.Now()
	var payload []byte
	for _, a := range attributes {
		switch {
		case a.Type == attrTime && len(a.Data) >= 16:
			seconds, micros := binary.BigEndian.Uint64(a.Data), binary.BigEndian.Uint64(a.Data[8:])
			e.Time = time.Unix(int64(seconds), int64(micros)*1000)
		case a.Type == attrSender && len(a.Data) >= 10 && binary.BigEndian.Uint16(a.Data) == 6:
			sender = net.HardwareAddr(a.Data[4:10]).String()
		case a.Type == attrPayload:
			payload = a.Data
		case a.Type == attrPrefix:
			e.Reason, ok = parsePrefix(strings.TrimRight(string(a.Data), "\x00"))
		}
	}
	if sender == "" || !ok {
		return "", e, false
	}
	e.Time = e.Time.UTC()
	e.parsePacket(payload)
	// Whoever has IPv6 asks all for routers and says to whom it listens: that is nothing that it
	// tries.
	return sender, e, !(e.Protocol == "icmpv6" && e.Destination.IsMulticast())
}

// parsePacket reads as much of a packet as there is.
func (e *Event) parsePacket(p []byte) {
	var number byte
	var rest []byte
	whole := true // this part of the packet has what is behind IP's header
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		e.Destination = netip.AddrFrom4([4]byte(p[16:20]))
		number, whole = p[9], binary.BigEndian.Uint16(p[6:])&0x1fff == 0
		rest = p[min(int(p[0]&15)*4, len(p)):]
	case len(p) >= 40 && p[0]>>4 == 6:
		e.Destination = netip.AddrFrom16([16]byte(p[24:40]))
		number, rest, whole = behindExtensions(p[6], p[40:])
	default:
		return
	}
	name, known := protocols[number]
	if !known {
		name = strconv.Itoa(int(number))
	}
	e.Protocol = name
	if whole && len(rest) >= 4 && (number == unix.IPPROTO_TCP || number == unix.IPPROTO_UDP) {
		e.Port = binary.BigEndian.Uint16(rest[2:])
	}
}

// behindExtensions goes through the extension headers of IPv6.
func behindExtensions(next byte, rest []byte) (number byte, behind []byte, whole bool) {
	whole = true
	for len(rest) >= 8 {
		size := (int(rest[1]) + 1) * 8
		switch next {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
		case unix.IPPROTO_AH:
			size = (int(rest[1]) + 2) * 4
		case unix.IPPROTO_FRAGMENT:
			size, whole = 8, whole && binary.BigEndian.Uint16(rest[2:])&0xfff8 == 0
		default:
			return next, rest, whole
		}
		next, rest = rest[0], rest[min(size, len(rest)):]
	}
	return next, rest, whole
}
