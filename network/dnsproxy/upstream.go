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

// ask asks the upstreams in turn, and once more: a datagram may be lost, and a guest's resolver takes a failure for an answer.
func (p *proxy) ask(ctx context.Context, q dnsmessage.Question) (code dnsmessage.RCode, records []dnsmessage.Resource, err error) {
	ctx, cancel := context.WithTimeout(ctx, allTimeout)
	defer cancel()
	err = errors.New("no upstream DNS server")
	servers := p.Upstreams()
	for _, server := range slices.Concat(servers, servers) {
		if ctx.Err() != nil {
			break
		}
		var truncated bool
		code, records, truncated, err = p.exchange(ctx, "udp", server, q)
		if err == nil && truncated {
			code, records, _, err = p.exchange(ctx, "tcp", server, q)
		}
		// A server that cannot or will not is no better than one that is not there.
		if err == nil && (code == dnsmessage.RCodeSuccess || code == dnsmessage.RCodeNameError) {
			return code, records, nil
		}
		if err == nil {
			err = fmt.Errorf("%s answers %v", server, code)
		}
	}
	return 0, nil, err
}

// exchange asks one server, from a port and with a number that are hard to guess.
func (p *proxy) exchange(ctx context.Context, network string, server netip.AddrPort, q dnsmessage.Question) (code dnsmessage.RCode, records []dnsmessage.Resource, truncated bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	conn, err := (&net.Dialer{Control: p.Control}).DialContext(ctx, network, server.String())
	if err != nil {
		return 0, nil, false, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	var random [2]byte
	_, _ = rand.Read(random[:]) // never fails
	id := binary.BigEndian.Uint16(random[:])
	m := dnsmessage.Message{Header: dnsmessage.Header{ID: id, RecursionDesired: true}, Questions: []dnsmessage.Question{q}}
	packed, err := m.Pack()
	if err != nil {
		return 0, nil, false, err
	}
	if network == "tcp" {
		if err := writeMessage(conn, packed); err != nil {
			return 0, nil, false, err
		}
		answer, err := readMessage(conn)
		if err != nil {
			return 0, nil, false, err
		}
		return p.parseAnswer(answer, id, q)
	}
	if _, err := conn.Write(packed); err != nil {
		return 0, nil, false, err
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return 0, nil, false, err
		}
		// What is not the answer may be somebody's guess.
		code, records, truncated, err = p.parseAnswer(buf[:n], id, q)
		if !errors.Is(err, errUnusable) {
			return code, records, truncated, err
		}
	}
}

// parseAnswer takes the records of known types, of all where nothing depends on it. Returns errUnusable for what is no answer to the question.
func (p *proxy) parseAnswer(message []byte, id uint16, q dnsmessage.Question) (code dnsmessage.RCode, records []dnsmessage.Resource, truncated bool, err error) {
	var parser dnsmessage.Parser
	h, err := parser.Start(message)
	if err != nil || !h.Response || h.ID != id {
		return 0, nil, false, errUnusable
	}
	questions, err := parser.AllQuestions()
	if err != nil || len(questions) != 1 || questions[0].Type != q.Type || questions[0].Class != q.Class ||
		!strings.EqualFold(questions[0].Name.String(), q.Name.String()) {
		return 0, nil, false, errUnusable
	}
	if h.Truncated {
		return h.RCode, nil, true, nil
	}
	for range maxAnswers + maxChain {
		h, err := parser.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			break
		}
		if err != nil {
			return 0, nil, false, errUnusable
		}
		if h.Class != dnsmessage.ClassINET || len(p.policies()) > 0 && !known(h.Type) {
			if parser.SkipAnswer() != nil {
				return 0, nil, false, errUnusable
			}
			continue
		}
		r, err := parser.Answer()
		if err != nil {
			return 0, nil, false, errUnusable
		}
		records = append(records, r)
	}
	return h.RCode, records, false, nil
}
