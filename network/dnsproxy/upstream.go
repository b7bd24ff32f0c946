package dnsproxy

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// errUnusable is an answer that is none to the question.
var errUnusable = errors.New("unusable answer")

// errTooMany is an answer with more records than anything real has.
var errTooMany = fmt.Errorf("more than %d records", maxRecords)

// ask asks the upstreams in turn, and once more: a datagram may be lost, and a guest's resolver
// takes a failure for an answer.
func (p *proxy) ask(ctx context.Context, q query) (r reply, err error) {
	ctx, cancel := context.WithTimeout(ctx, allTimeout)
	defer cancel()
	err = errors.New("no upstream DNS server")
	servers := p.Upstreams()
	for _, server := range slices.Concat(servers, servers) {
		if ctx.Err() != nil {
			break
		}
		r, err = p.askOne(ctx, server, q)
		if err == nil && q.edns && (r.code == dnsmessage.RCodeFormatError || r.code == dnsmessage.RCodeNotImplemented) {
			plain := q
			plain.edns, plain.signed = false, false // it knows nothing of EDNS (RFC 6891, 7)
			r, err = p.askOne(ctx, server, plain)
		}
		// A server that cannot or will not is no better than one that is not there.
		if err == nil && (r.code == dnsmessage.RCodeSuccess || r.code == dnsmessage.RCodeNameError) {
			return r, nil
		}
		if err == nil {
			err = fmt.Errorf("%s answers %v", server, r.code)
		}
	}
	return reply{}, err
}

// askOne asks by UDP, and by TCP for what is too long for that.
func (p *proxy) askOne(ctx context.Context, server netip.AddrPort, q query) (r reply, err error) {
	r, truncated, err := p.exchange(ctx, "udp", server, q)
	if err == nil && truncated {
		r, _, err = p.exchange(ctx, "tcp", server, q)
	}
	return r, err
}

// exchange asks one server, from a port and with a number that are hard to guess.
func (p *proxy) exchange(ctx context.Context, network string, server netip.AddrPort, q query) (r reply,
	truncated bool, err error,
) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := (&net.Dialer{Control: p.Control}).DialContext(ctx, network, server.String())
	if err != nil {
		return r, false, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	var random [2]byte
	_, _ = rand.Read(random[:]) // never fails
	id := binary.BigEndian.Uint16(random[:])
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id, RecursionDesired: true, CheckingDisabled: q.unchecked},
		Questions: []dnsmessage.Question{q.question},
	}
	if q.edns {
		m.Additionals = []dnsmessage.Resource{edns(q.signed)}
	}
	packed, err := m.Pack()
	if err != nil {
		return r, false, err
	}
	if network == "tcp" {
		if err := writeMessage(conn, packed); err != nil {
			return r, false, err
		}
		answer, err := readMessage(conn)
		if err != nil {
			return r, false, err
		}
		return parseAnswer(answer, id, q.question)
	}
	if _, err := conn.Write(packed); err != nil {
		return r, false, err
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return r, false, err
		}
		// What is not the answer may be somebody's guess.
		r, truncated, err = parseAnswer(buf[:n], id, q.question)
		if !errors.Is(err, errUnusable) {
			return r, truncated, err
		}
	}
}

// parseAnswer returns the records of an answer. Returns errUnusable for what is no answer to the
// question, errTooMany for one that is too long: a part of a name's records is none (RFC 2181, 9).
func parseAnswer(message []byte, id uint16, q dnsmessage.Question) (r reply, truncated bool, err error) {
	var parser dnsmessage.Parser
	h, err := parser.Start(message)
	if err != nil || !h.Response || h.ID != id {
		return r, false, errUnusable
	}
	questions, err := parser.AllQuestions()
	if err == nil && len(questions) == 0 && h.RCode == dnsmessage.RCodeFormatError {
		return reply{code: h.RCode}, false, nil // whoever could not read the question need not repeat it
	}
	if err != nil || len(questions) != 1 || questions[0].Type != q.Type || questions[0].Class != q.Class ||
		!strings.EqualFold(questions[0].Name.String(), q.Name.String()) {
		return r, false, errUnusable
	}
	r.code = h.RCode
	if h.Truncated {
		return r, true, nil
	}
	if r.answers, err = section(parser.AnswerHeader, parser.Answer, parser.SkipAnswer); err != nil {
		return reply{}, false, err
	}
	if err := parser.SkipAllAnswers(); err != nil {
		return reply{}, false, errUnusable
	}
	r.authorities, err = section(parser.AuthorityHeader, parser.Authority, parser.SkipAuthority)
	if errors.Is(err, errUnusable) {
		// A name such as a.b\.example, which the parser does not read, may stand in a SOA; the answer is
		// one without it.
		return r, false, nil
	}
	return r, false, err
}

// section reads the records of a section of a message, but for those that are of no use to anybody
// here.
func section(header func() (dnsmessage.ResourceHeader, error), read func() (dnsmessage.Resource, error),
	skip func() error,
) (records []dnsmessage.Resource, err error) {
	for {
		h, err := header()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			return records, nil
		}
		if err != nil {
			return nil, errUnusable
		}
		if h.Class != dnsmessage.ClassINET {
			if skip() != nil {
				return nil, errUnusable
			}
			continue
		}
		if len(records) == maxRecords {
			return nil, errTooMany
		}
		r, err := read()
		if err != nil {
			return nil, errUnusable
		}
		records = append(records, r)
	}
}
