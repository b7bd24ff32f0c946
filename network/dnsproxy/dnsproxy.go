// Package dnsproxy answers one guest's DNS queries by asking the servers that its host has at the
// time. Where a policy has rules about names, the addresses in an answer are let through before the
// guest has it, and a name that no rule is about is not asked for where all else is denied.
//
// Both sides are foreign: what comes in is parsed, and what goes out is made anew from what was
// understood. Records of types that nobody here knows go on as they are, with signatures among
// them, so that a guest can validate (DNSSEC), but for names that a rule is about: their answers
// are chosen from. The proxy itself validates nothing, and never says that it did (AD).
package dnsproxy

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"push.rocks/smartvm/network/policy"
)

// Config is what a proxy needs.
type Config struct {
	UDP net.PacketConn // both are closed by Serve
	TCP net.Listener
	// Upstreams are asked one after the other, as they are at that time.
	Upstreams func() []netip.AddrPort
	// Control is that of net.Dialer, for the sockets by which they are asked. It may be nil.
	Control func(network, address string, socket syscall.RawConn) error
	// Local are the addresses of who has a name on the guest's own network, none if nobody has. It may
	// be nil.
	Local func(name string) []netip.Addr
	// Names are what policies say at the time, each of which must allow a name and what it leads to.
	// Nil or none: all is asked for, of whatever type.
	Names func() []Names
	// Rate bounds the guest's questions: more are dropped by UDP, and wait by TCP.
	Rate Rate
	// Dropped counts the questions that were not answered because there were too many. It may be nil.
	Dropped *atomic.Uint64
	// Answered is called with the addresses of a name before the guest has them, Refused with what one
	// of Names, of that index, does not allow. Both may be nil.
	Answered func(name string, addresses []netip.Addr)
	Refused  func(name, kind string, by int)
	Log      *slog.Logger // nil: nobody
}

// Names is what one policy says of names.
type Names struct {
	// Domains are those of rules, as policy.Compiled has them. Closed: other names are not there
	// (NXDOMAIN: a resolver gives up at once, where it would ask again after a refusal), and nobody is
	// asked for them, so that questions tell nobody anything.
	Domains []string
	Closed  bool
	// Local says that an address may be in the answer for a domain of Domains though it is no public
	// one. Nil: none. Other such addresses are left out: whoever has the name must not choose who of
	// the host's neighbours is let through (DNS rebinding).
	Local func(netip.Addr) bool
	// Allow lets addresses through for a time, because of domains, which are indices into Domains. It
	// is called before the guest has the answer, and if it errs the guest has none.
	Allow func(ctx context.Context, domains []int, addresses []netip.Addr, ttl time.Duration) error
}

// Bounds.
const (
	maxQueries  = 64 // at once; what comes beside them by UDP is dropped, by TCP waits
	maxConns    = 16 // by TCP
	idleTimeout = 10 * time.Second
	askTimeout  = 2 * time.Second // of one upstream
	allTimeout  = 5 * time.Second // of all, which is how long resolvers wait
	maxUDP      = 1232            // bytes of an answer by UDP (DNS flag day 2020)
	leastUDP    = 512
	maxChain    = 16  // CNAMEs
	maxRecords  = 256 // of an answer, and of what a guest sends besides its question
	minTTL      = 5 * time.Second
	maxTTL      = time.Hour
	// guestTTL is how long a guest may keep an answer: after its network was mended, or it was
	// restored, what it keeps leads nowhere.
	guestTTL = time.Minute
	// grace is how much longer than its TTL an address is let through: the guest's own caches count
	// from later.
	grace = time.Minute
)

// Serve answers queries until ctx ends, when all it began has ended too.
func Serve(ctx context.Context, c Config) error {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Rate = Rate{cmp.Or(c.Rate.PerSecond, DefaultPerSecond), cmp.Or(c.Rate.Burst, DefaultBurst)}
	if c.Dropped == nil {
		c.Dropped = new(atomic.Uint64)
	}
	p := &proxy{
		Config: c, slots: make(chan struct{}, maxQueries), conns: make(chan struct{}, maxConns),
		bucket: newBucket(c.Rate),
	}
	ctx, cancel := context.WithCancel(ctx)
	defer p.work.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = errors.Join(c.UDP.Close(), c.TCP.Close()) })
	defer stop()
	errs := make(chan error, 2)
	p.work.Go(func() { errs <- p.serveUDP(ctx) })
	p.work.Go(func() { errs <- p.serveTCP(ctx) })
	err := <-errs
	cancel()
	if err := errors.Join(err, <-errs); !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("serve DNS: %w", err)
	}
	return nil
}

type proxy struct {
	Config
	work         sync.WaitGroup
	slots, conns chan struct{}
	bucket       *bucket
	warned       time.Time // of dropped questions; serveUDP's
}

// policies are what policies say now.
func (p *proxy) policies() []Names {
	if p.Names == nil {
		return nil
	}
	return p.Names()
}

func (p *proxy) serveUDP(ctx context.Context) error {
	buf := make([]byte, 64<<10)
	for {
		n, peer, err := p.UDP.ReadFrom(buf)
		if err != nil {
			return err
		}
		if p.bucket.take(time.Now()) > 0 {
			p.drop()
			continue
		}
		select {
		case p.slots <- struct{}{}:
		default:
			p.drop()
			continue
		}
		query := append([]byte(nil), buf[:n]...)
		p.work.Go(func() {
			defer func() { <-p.slots }()
			if answer := p.answer(ctx, query, false); answer != nil {
				_, _ = p.UDP.WriteTo(answer, peer)
			}
		})
	}
}

// drop counts a question that has no answer. A refusal would be worse: glibc (resolv/res_send.c),
// c-ares (ares_process.c) and systemd-resolved (resolved-dns-transaction.c) ask the next server at
// once, or the same, which makes more questions of too many, and soon tell their program that the
// name cannot be found; musl (res_msend.c) takes no notice. When nothing comes all of them wait,
// and ask again.
func (p *proxy) drop() {
	n := p.Dropped.Add(1)
	if now := time.Now(); now.Sub(p.warned) >= warnEvery {
		p.warned = now
		p.Log.Warn("drop DNS questions: there are too many", "dropped", n, "perSecond", p.Rate.PerSecond)
	}
}

func (p *proxy) serveTCP(ctx context.Context) error {
	for {
		conn, err := p.TCP.Accept()
		if err != nil {
			return err
		}
		select {
		case p.conns <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		p.work.Go(func() {
			defer func() { <-p.conns }()
			p.serveConn(ctx, conn)
		})
	}
}

func (p *proxy) serveConn(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	for {
		_ = conn.SetDeadline(time.Now().Add(idleTimeout))
		query, err := readMessage(conn)
		if err != nil {
			return
		}
		for wait := p.bucket.take(time.Now()); wait > 0; wait = p.bucket.take(time.Now()) {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
		}
		select {
		case p.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		answer := p.answer(ctx, query, true)
		<-p.slots
		_ = conn.SetDeadline(time.Now().Add(idleTimeout))
		if answer == nil || writeMessage(conn, answer) != nil {
			return
		}
	}
}

// readMessage reads a message of a stream (RFC 1035, 4.2.2).
func readMessage(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	message := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(r, message)
	return message, err
}

func writeMessage(w io.Writer, message []byte) error {
	if len(message) > 0xffff {
		return errors.New("message too long")
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(message))), message...))
	return err
}

// query is what a guest asks.
type query struct {
	id        uint16
	desired   bool // recursion
	unchecked bool // a server that validates is not to (CD, RFC 4035)
	question  dnsmessage.Question
	size      int  // of the largest answer
	edns      bool // it is asked by EDNS (RFC 6891), and answered so
	signed    bool // with signatures (DO, RFC 3225)
}

// errForeign is what is no query at all.
var errForeign = errors.New("no query")

// parseQuery returns a query, or why there is none, with as much of it as an answer needs.
func parseQuery(message []byte) (q query, code dnsmessage.RCode, err error) {
	var parser dnsmessage.Parser
	h, err := parser.Start(message)
	if err != nil || h.Response {
		return q, 0, errForeign
	}
	q = query{id: h.ID, desired: h.RecursionDesired, unchecked: h.CheckingDisabled, size: leastUDP}
	if h.OpCode != 0 {
		return q, dnsmessage.RCodeNotImplemented, nil
	}
	all, err := parser.AllQuestions()
	if err != nil || len(all) != 1 || all[0].Class != dnsmessage.ClassINET {
		return q, dnsmessage.RCodeFormatError, nil
	}
	q.question = all[0]
	if parser.SkipAllAnswers() != nil || parser.SkipAllAuthorities() != nil {
		return q, dnsmessage.RCodeFormatError, nil
	}
	for range maxRecords {
		h, err := parser.AdditionalHeader()
		if err != nil {
			break
		}
		if h.Type == dnsmessage.TypeOPT { // its class is a size
			q.size, q.edns, q.signed = min(max(int(h.Class), leastUDP), maxUDP), true, h.DNSSECAllowed()
		}
		if parser.SkipAdditional() != nil {
			break
		}
	}
	return q, dnsmessage.RCodeSuccess, nil
}

// answer returns the answer to a message, nil for none.
func (p *proxy) answer(ctx context.Context, message []byte, stream bool) []byte {
	q, code, err := parseQuery(message)
	if err != nil {
		return nil
	}
	if stream {
		q.size = 0xffff
	}
	if code != dnsmessage.RCodeSuccess {
		return q.reply(reply{code: code})
	}
	name := strings.ToLower(q.question.Name.String())
	var local []netip.Addr
	if p.Local != nil {
		local = p.Local(strings.TrimSuffix(name, "."))
	}
	var because []reason
	for by, n := range p.policies() {
		r := reason{Names: n}
		for i, d := range n.Domains {
			if policy.MatchDomain(d, name) {
				r.domains = append(r.domains, i)
			}
		}
		if r.domains == nil && n.Closed && local == nil {
			if p.Refused != nil {
				p.Refused(strings.TrimSuffix(name, "."), strings.TrimPrefix(q.question.Type.String(), "Type"), by)
			}
			return q.reply(reply{code: dnsmessage.RCodeNameError})
		}
		if r.domains != nil {
			because = append(because, r)
		}
	}
	if local != nil {
		for _, r := range because {
			if err := r.Allow(ctx, r.domains, local, localTTL+grace); err != nil {
				p.Log.Warn("let a neighbour's addresses through", "err", err)
				return q.reply(reply{code: dnsmessage.RCodeServerFailure})
			}
		}
		return q.reply(reply{answers: localRecords(q.question, local)})
	}
	if because != nil && !known(q.question.Type) {
		// Among them HTTPS and SVCB, whose hints are addresses too. A name without them is usual.
		return q.reply(reply{})
	}
	got, err := p.ask(ctx, q)
	if err != nil {
		p.Log.Debug("ask for name", "err", err)
		return q.reply(reply{code: dnsmessage.RCodeServerFailure})
	}
	if because == nil {
		_, addresses, _ := choose(q.question, got.answers, nil)
		p.answered(name, addresses)
		return q.reply(got.capped())
	}
	records, addresses, ttl := choose(q.question, got.answers, because)
	for _, r := range because {
		if len(addresses) == 0 {
			break
		}
		if err := r.Allow(ctx, r.domains, addresses, ttl+grace); err != nil {
			p.Log.Warn("let a name's addresses through", "err", err)
			return q.reply(reply{code: dnsmessage.RCodeServerFailure})
		}
	}
	p.answered(name, addresses)
	return q.reply(reply{code: got.code, answers: records})
}

func (p *proxy) answered(name string, addresses []netip.Addr) {
	if p.Answered != nil {
		p.Answered(strings.TrimSuffix(name, "."), addresses)
	}
}

// localTTL is short: who has the name may be another soon.
const localTTL = 5 * time.Second

// localRecords are the addresses of the kind that is asked for.
func localRecords(q dnsmessage.Question, addresses []netip.Addr) (records []dnsmessage.Resource) {
	for _, a := range addresses {
		r := dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{
				Name: q.Name, Type: q.Type, Class: dnsmessage.ClassINET,
				TTL: uint32(localTTL / time.Second),
			},
		}
		switch {
		case a.Is4() && q.Type == dnsmessage.TypeA:
			r.Body = &dnsmessage.AResource{A: a.As4()}
		case a.Is6() && q.Type == dnsmessage.TypeAAAA:
			r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
		default:
			continue
		}
		records = append(records, r)
	}
	return records
}
