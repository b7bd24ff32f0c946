package dnsproxy_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"push.rocks/smartvm/network/dnsproxy"
)

// zone is an upstream server: what it answers to a question.
type zone func(q dnsmessage.Question) dnsmessage.Message

func record(name, data string) dnsmessage.Resource {
	h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET, TTL: 300}
	a, err := netip.ParseAddr(data)
	switch {
	case err != nil:
		return dnsmessage.Resource{Header: h, Body: &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(data)}}
	case a.Is4():
		return dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}}
	}
	return dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}}
}

// names is a zone of fixed records.
func names(records ...dnsmessage.Resource) zone {
	return func(dnsmessage.Question) dnsmessage.Message { return dnsmessage.Message{Answers: records} }
}

// upstream serves a zone by UDP and TCP. Large answers are truncated by UDP.
func upstream(t *testing.T, z zone, large bool) netip.AddrPort {
	t.Helper()
	return server(t, func(m dnsmessage.Message, stream bool) []byte {
		truncate := large && !stream
		a := z(m.Questions[0])
		a.ID, a.Response = m.ID+a.ID, true
		if a.Questions == nil {
			a.Questions = m.Questions
		}
		if a.Truncated = truncate; truncate {
			a.Answers = nil
		}
		out, err := a.Pack()
		if err != nil {
			t.Error(err)
		}
		return out
	})
}

// server answers messages by UDP and TCP.
func server(t *testing.T, z func(m dnsmessage.Message, stream bool) []byte) netip.AddrPort {
	t.Helper()
	tcp, udp := sockets(t)
	t.Cleanup(func() { tcp.Close(); udp.Close() })
	answer := func(packed []byte, stream bool) []byte {
		var m dnsmessage.Message
		if err := m.Unpack(packed); err != nil {
			return nil
		}
		return z(m, stream)
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, peer, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(answer(buf[:n], false), peer)
		}
	}()
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			if q, err := readTCP(c); err == nil {
				writeTCP(c, answer(q, true))
			}
			c.Close()
		}
	}()
	return tcp.Addr().(*net.TCPAddr).AddrPort()
}

func readTCP(c net.Conn) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(c, b)
	return b, err
}

func writeTCP(c net.Conn, b []byte) {
	_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
}

func sockets(t testing.TB) (net.Listener, net.PacketConn) {
	t.Helper()
	for range 20 {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		udp, err := net.ListenPacket("udp", tcp.Addr().String())
		if err == nil {
			return tcp, udp
		}
		tcp.Close()
	}
	t.Fatal("no port is free for both")
	return nil, nil
}

// guest is a proxy and who asks it.
type guest struct {
	t       *testing.T
	address string

	mu      sync.Mutex
	allowed []string // addresses and for how long
	refuse  error
}

func serve(t *testing.T, change func(*dnsproxy.Config), upstreams ...netip.AddrPort) *guest {
	t.Helper()
	tcp, udp := sockets(t)
	g := &guest{t: t, address: tcp.Addr().String()}
	c := dnsproxy.Config{
		UDP: udp, TCP: tcp, Upstreams: func() []netip.AddrPort { return upstreams },
		Names: always(
			dnsproxy.Names{Domains: []string{"example.com", "*.example.org"}, Closed: true, Allow: g.allow("exact", "wild")}),
	}
	if change != nil {
		change(&c)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- dnsproxy.Serve(ctx, c) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return g
}

// ask returns what is answered: the code and the addresses.
func (g *guest) ask(network, name string, kind dnsmessage.Type) (dnsmessage.RCode, []string) {
	g.t.Helper()
	m := g.exchange(network, question(name, kind))
	if m.Truncated {
		return m.RCode, []string{"truncated"}
	}
	var got []string
	for _, r := range m.Answers {
		if r.Header.TTL > 60 {
			g.t.Errorf("the guest may keep the answer for %d seconds", r.Header.TTL)
		}
		switch body := r.Body.(type) {
		case *dnsmessage.AResource:
			got = append(got, netip.AddrFrom4(body.A).String())
		case *dnsmessage.AAAAResource:
			got = append(got, netip.AddrFrom16(body.AAAA).String())
		}
	}
	return m.RCode, got
}

func question(name string, kind dnsmessage.Type) dnsmessage.Message {
	return dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 4711, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
	}
}

// exchange returns what is answered to a question.
func (g *guest) exchange(network string, q dnsmessage.Message) (m dnsmessage.Message) {
	g.t.Helper()
	packed, err := q.Pack()
	if err != nil {
		g.t.Fatal(err)
	}
	c, err := net.Dial(network, g.address)
	if err != nil {
		g.t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	var answer []byte
	if network == "tcp" {
		writeTCP(c, packed)
		answer, err = readTCP(c)
	} else {
		_, _ = c.Write(packed)
		buf := make([]byte, 4096)
		var n int
		n, err = c.Read(buf)
		answer = buf[:n]
	}
	if err != nil {
		g.t.Fatal(err)
	}
	if err := m.Unpack(answer); err != nil || m.ID != q.ID || !m.Response || len(m.Questions) != 1 ||
		m.Questions[0] != q.Questions[0] {
		g.t.Fatalf("answer %+v, %v", m, err)
	}
	return m
}

func (g *guest) want(network, name string, code dnsmessage.RCode, addresses ...string) {
	g.t.Helper()
	gotCode, got := g.ask(network, name, dnsmessage.TypeA)
	if gotCode != code || !slices.Equal(got, addresses) {
		g.t.Errorf("%s by %s: got %v %q, want %v %q", name, network, gotCode, got, code, addresses)
	}
}

func (g *guest) wantAllowed(want ...string) {
	g.t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if !slices.Equal(g.allowed, want) {
		g.t.Errorf("allowed %q, want %q", g.allowed, want)
	}
	g.allowed = nil
}

// allow notes what is let through, by names for domains.
func (g *guest) allow(names ...string) func(context.Context, []int, []netip.Addr, time.Duration) error {
	return func(_ context.Context, domains []int, addresses []netip.Addr, ttl time.Duration) error {
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, d := range domains {
			for _, a := range addresses {
				g.allowed = append(g.allowed, names[d]+" "+a.String()+" "+ttl.String())
			}
		}
		return g.refuse
	}
}

const (
	yes = dnsmessage.RCodeSuccess
	no  = dnsmessage.RCodeNameError
)

// A name is answered and its addresses are let through; its neighbours are not there, and nobody is
// asked for them.
func TestServe(t *testing.T) {
	asked := make(chan string, 100)
	server := upstream(t, func(q dnsmessage.Question) dnsmessage.Message {
		asked <- q.Name.String()
		return dnsmessage.Message{Answers: []dnsmessage.Resource{record(q.Name.String(), "192.0.2.1")}}
	}, false)
	g := serve(t, nil, server)
	for _, network := range []string{"udp", "tcp"} {
		g.want(network, "Example.com.", yes, "192.0.2.1")
		g.wantAllowed("exact 192.0.2.1 6m0s")
		g.want(network, "a.b.example.org.", yes, "192.0.2.1")
		g.wantAllowed("wild 192.0.2.1 6m0s")
		for _, name := range []string{"www.example.com.", "example.org.", "notexample.com.", "secret.evil.test."} {
			g.want(network, name, no)
		}
		g.wantAllowed()
	}
	if code, got := g.ask("udp", "example.com.", 65); code != yes || got != nil { // HTTPS
		t.Errorf("HTTPS: %v %q", code, got)
	}
	for range len(asked) {
		name := <-asked
		if !strings.EqualFold(name, "example.com.") && name != "a.b.example.org." {
			t.Errorf("%s was asked for", name)
		}
	}
}

// always are policies that stay the same.
func always(policies ...dnsproxy.Names) func() []dnsproxy.Names {
	return func() []dnsproxy.Names { return policies }
}

// Where other names are no concern, they are answered too, and nothing is let through for them.
func TestServe_Open(t *testing.T) {
	g := serve(t, func(c *dnsproxy.Config) {
		c.Names()[0].Closed = false
	}, upstream(t, names(record("other.test.", "10.0.0.1")), false))
	g.want("udp", "other.test.", yes, "10.0.0.1")
	g.wantAllowed()
}

// Of two policies both must allow a name, and what it leads to.
func TestServe_Policies(t *testing.T) {
	ten := netip.MustParsePrefix("10.0.0.0/8").Contains
	server := upstream(t, func(q dnsmessage.Question) dnsmessage.Message {
		name := q.Name.String()
		return dnsmessage.Message{Answers: []dnsmessage.Resource{record(name, "192.0.2.1"), record(name, "10.0.0.1")}}
	}, false)
	for _, tt := range []struct {
		name    string
		second  dnsproxy.Names
		ask     string
		code    dnsmessage.RCode
		answer  []string
		allowed []string
	}{
		{
			"Both",
			dnsproxy.Names{Domains: []string{"*.com"}, Closed: true},
			"example.com.", yes,
			[]string{"192.0.2.1"},
			[]string{"exact 192.0.2.1 6m0s", "second 192.0.2.1 6m0s"},
		},
		{
			"BothLocal",
			dnsproxy.Names{Domains: []string{"*.com"}, Closed: true, Local: ten},
			"example.com.", yes,
			[]string{"192.0.2.1", "10.0.0.1"},
			[]string{
				"exact 192.0.2.1 6m0s", "exact 10.0.0.1 6m0s", "second 192.0.2.1 6m0s", "second 10.0.0.1 6m0s",
			},
		},
		{"FirstAlone", dnsproxy.Names{Domains: []string{"other.com"}, Closed: true}, "example.com.", no, nil, nil},
		{"SecondAlone", dnsproxy.Names{Domains: []string{"other.com"}, Closed: true}, "other.com.", no, nil, nil},
		{
			"SecondOpen",
			dnsproxy.Names{Domains: []string{"other.com"}},
			"example.com.", yes,
			[]string{"192.0.2.1", "10.0.0.1"},
			[]string{"exact 192.0.2.1 6m0s", "exact 10.0.0.1 6m0s"},
		},
		{"SecondNothing", dnsproxy.Names{Closed: true}, "example.com.", no, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var second func(context.Context, []int, []netip.Addr, time.Duration) error
			g := serve(t, func(c *dnsproxy.Config) {
				c.Names()[0].Local = ten
				tt.second.Allow = func(ctx context.Context, domains []int, addresses []netip.Addr, ttl time.Duration) error {
					return second(ctx, domains, addresses, ttl)
				}
				c.Names = always(append(c.Names(), tt.second)...)
			}, server)
			second = g.allow("second")
			g.want("udp", tt.ask, tt.code, tt.answer...)
			g.wantAllowed(tt.allowed...)
		})
	}
}

// An alias stands for what it leads to, and for nothing else that the answer holds.
func TestServe_Alias(t *testing.T) {
	g := serve(t, nil, upstream(t, names(
		record("example.com.", "cdn.test."), record("cdn.test.", "edge.test."), record("edge.test.", "192.0.2.7"),
		record("stray.test.", "192.0.2.66"),
	), false))
	g.want("udp", "example.com.", yes, "192.0.2.7")
	g.wantAllowed("exact 192.0.2.7 6m0s")
	loop := serve(t, nil, upstream(t, names(record("example.com.", "b.test."), record("b.test.", "example.com.")), false))
	loop.want("udp", "example.com.", yes)
	loop.wantAllowed()
}

// A name's owner cannot open the way to the host's neighbours.
func TestServe_Rebinding(t *testing.T) {
	var records []dnsmessage.Resource
	for _, a := range []string{
		"127.0.0.1", "10.0.0.1", "172.30.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
		"0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.9",
	} {
		records = append(records, record("example.com.", a))
	}
	server := upstream(t, names(records...), false)
	g := serve(t, nil, server)
	g.want("udp", "example.com.", yes, "192.0.2.9")
	g.wantAllowed("exact 192.0.2.9 6m0s")
	six := serve(t, nil, upstream(t, names(
		record("example.com.", "::1"), record("example.com.", "fd00::1"), record("example.com.", "fe80::1"),
		record("example.com.", "::ffff:10.0.0.1"), record("example.com.", "::ffff:192.0.2.1"),
		record("example.com.", "2001:db8::9"),
	), false))
	if _, got := six.ask("udp", "example.com.", dnsmessage.TypeAAAA); !slices.Equal(got, []string{"2001:db8::9"}) {
		t.Errorf("IPv6: got %q", got)
	}
	local := serve(t, func(c *dnsproxy.Config) {
		c.Names()[0].Local = netip.MustParsePrefix("10.0.0.0/8").Contains
	}, server)
	local.want("udp", "example.com.", yes, "10.0.0.1", "192.0.2.9")
}

// Servers that lie, are dead or refuse are passed over.
func TestServe_Upstreams(t *testing.T) {
	good := upstream(t, names(record("example.com.", "192.0.2.1")), false)
	dead, deadUDP := sockets(t)
	deadPort := dead.Addr().(*net.TCPAddr).AddrPort()
	if err := errors.Join(dead.Close(), deadUDP.Close()); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]netip.AddrPort{
		"Dead": deadPort,
		"Refuses": upstream(t, func(dnsmessage.Question) dnsmessage.Message {
			return dnsmessage.Message{Header: dnsmessage.Header{RCode: dnsmessage.RCodeRefused}}
		}, false),
		"OtherID": upstream(t, func(dnsmessage.Question) dnsmessage.Message {
			return dnsmessage.Message{
				Header:  dnsmessage.Header{ID: 1},
				Answers: []dnsmessage.Resource{record("example.com.", "192.0.2.66")},
			}
		}, false),
		"OtherQuestion": upstream(t, func(q dnsmessage.Question) dnsmessage.Message {
			q.Name = dnsmessage.MustNewName("evil.test.")
			return dnsmessage.Message{
				Questions: []dnsmessage.Question{q},
				Answers:   []dnsmessage.Resource{record("example.com.", "192.0.2.66")},
			}
		}, false),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := serve(t, nil, bad, good)
			g.want("udp", "example.com.", yes, "192.0.2.1")
			alone := serve(t, nil, bad)
			alone.want("udp", "example.com.", dnsmessage.RCodeServerFailure)
			alone.wantAllowed()
		})
	}
}

// Without policies whatever is asked is answered, types that nobody here knows too; by EDNS where
// it was asked so.
func TestServe_NoPolicy(t *testing.T) {
	const caa = dnsmessage.Type(257)
	body := &dnsmessage.UnknownResource{Type: caa, Data: []byte("\x00\x05issueca.example")}
	up := upstream(t, func(q dnsmessage.Question) dnsmessage.Message {
		h := dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: dnsmessage.ClassINET, TTL: 30}
		if q.Type == caa {
			return dnsmessage.Message{Answers: []dnsmessage.Resource{{Header: h, Body: body}}}
		}
		return dnsmessage.Message{Answers: []dnsmessage.Resource{record(q.Name.String(), "10.0.0.1")}}
	}, false)
	open := serve(t, func(c *dnsproxy.Config) { c.Names = nil }, up)
	open.want("udp", "any.example.", yes, "10.0.0.1")
	closed := serve(t, nil, up)
	for _, tt := range []struct {
		guest *guest
		want  int
	}{{open, 1}, {closed, 0}} {
		q := question("example.com.", caa)
		q.Additionals = edns(t, false)
		m := tt.guest.exchange("tcp", q)
		if len(m.Answers) != tt.want || m.RCode != dnsmessage.RCodeSuccess {
			t.Errorf("got %+v, want %d records", m, tt.want)
		}
		if tt.want == 1 {
			if got, ok := m.Answers[0].Body.(*dnsmessage.UnknownResource); !ok || string(got.Data) != string(body.Data) {
				t.Errorf("got %+v", m.Answers[0].Body)
			}
		}
		if len(m.Additionals) != 1 || m.Additionals[0].Header.Type != dnsmessage.TypeOPT {
			t.Errorf("additional records %+v, want EDNS's", m.Additionals)
		}
	}
}

// edns is what a question has that is asked by EDNS.
func edns(t *testing.T, signed bool) []dnsmessage.Resource {
	t.Helper()
	h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(".")}
	if err := h.SetEDNS0(4096, dnsmessage.RCodeSuccess, signed); err != nil {
		t.Fatal(err)
	}
	return []dnsmessage.Resource{{Header: h, Body: &dnsmessage.OPTResource{}}}
}

// One datagram that is lost is no failure.
func TestServe_Lost(t *testing.T) {
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close() })
	good := upstream(t, names(record("example.com.", "192.0.2.1")), false)
	go func() {
		buf := make([]byte, 4096)
		for lost := false; ; lost = true {
			n, peer, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			if !lost {
				continue
			}
			c, err := net.Dial("udp", good.String())
			if err != nil {
				return
			}
			_, _ = c.Write(buf[:n])
			n, _ = c.Read(buf)
			_, _ = udp.WriteTo(buf[:n], peer)
			_ = c.Close()
		}
	}()
	g := serve(t, nil, udp.LocalAddr().(*net.UDPAddr).AddrPort())
	g.want("udp", "example.com.", yes, "192.0.2.1")
}

// What is too long for UDP comes by TCP, from the server and to the guest.
func TestServe_Truncated(t *testing.T) {
	var records []dnsmessage.Resource
	var want []string
	for i := range 60 {
		a := netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)}).String()
		records, want = append(records, record("example.com.", a)), append(want, a)
	}
	g := serve(t, nil, upstream(t, names(records...), true))
	g.want("udp", "example.com.", yes, "truncated")
	g.want("tcp", "example.com.", yes, want...)
}

// A name has all of its addresses or none: a part of them is no answer.
func TestServe_Many(t *testing.T) {
	many := func(n int) (records []dnsmessage.Resource, addresses []string) {
		for i := range n {
			a := netip.AddrFrom4([4]byte{198, 51, byte(100 + i>>8), byte(i)}).String()
			records, addresses = append(records, record("example.com.", a)), append(addresses, a)
		}
		return records, addresses
	}
	for name, change := range map[string]func(*dnsproxy.Config){
		"Policy": nil, "NoPolicy": func(c *dnsproxy.Config) { c.Names = nil },
	} {
		t.Run(name, func(t *testing.T) {
			records, addresses := many(256)
			serve(t, change, upstream(t, names(records...), true)).want("tcp", "example.com.", yes, addresses...)
			records, _ = many(257)
			serve(t, change, upstream(t, names(records...), true)).want("tcp", "example.com.", dnsmessage.RCodeServerFailure)
		})
	}
}

// What cannot be let through is not answered.
func TestServe_NotAllowed(t *testing.T) {
	g := serve(t, nil, upstream(t, names(record("example.com.", "192.0.2.1")), false))
	g.refuse = errors.New("no room")
	g.want("udp", "example.com.", dnsmessage.RCodeServerFailure)
}

// Whatever comes, the proxy lives, and nothing is let through that was not answered for a domain of
// its.
func FuzzServe(f *testing.F) {
	q := dnsmessage.Message{
		Questions: []dnsmessage.Question{
			{Name: dnsmessage.MustNewName("example.com."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
		},
	}
	packed, err := q.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed, packed)
	q.Response, q.Answers = true,
		[]dnsmessage.Resource{record("example.com.", "192.0.2.1"), record("example.com.", "x.test.")}
	answer, err := q.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed, answer)
	f.Fuzz(func(t *testing.T, query, answer []byte) {
		dnsproxy.ParseQuery(query)
		for _, a := range dnsproxy.ParseAnswer(answer, q.Questions[0]) {
			if !a.IsGlobalUnicast() || a.IsPrivate() || a.Is4In6() {
				t.Errorf("%s", a)
			}
		}
	})
}
