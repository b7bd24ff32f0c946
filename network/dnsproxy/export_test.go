package dnsproxy

import (
	"net/netip"

	"golang.org/x/net/dns/dnsmessage"
)

// ParseQuery parses a guest's message.
func ParseQuery(message []byte) {
	if q, code, err := parseQuery(message); err == nil {
		q.reply(reply{code: code})
	}
}

// ParseAnswer parses a server's message, with the number that it has itself, and returns the
// addresses that are let through.
func ParseAnswer(message []byte, q dnsmessage.Question) []netip.Addr {
	var id uint16
	if len(message) > 1 {
		id = uint16(message[0])<<8 | uint16(message[1])
	}
	r, _, err := parseAnswer(message, id, q)
	if err != nil {
		return nil
	}
	asked := query{question: q, size: maxUDP}
	asked.reply(r.capped())
	records, addresses, _ := choose(q, r.answers, []reason{{}})
	asked.reply(reply{answers: records})
	return addresses
}
