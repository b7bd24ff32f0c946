package network_test

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// nameServer serves names on the world's first address.
func (s *site) nameServer(names map[string]string) {
	s.t.Helper()
	s.outside.Must(func() error {
		p, err := net.ListenPacket("udp", world4+":53")
		if err != nil {
			return err
		}
		s.t.Cleanup(func() { p.Close() })
		go func() {
			buf := make([]byte, 1500)
			for {
				n, peer, err := p.ReadFrom(buf)
				if err != nil {
					return
				}
				var m dnsmessage.Message
				if m.Unpack(buf[:n]) != nil {
					continue
				}
				m.Response = true
				if a, err := netip.ParseAddr(names[m.Questions[0].Name.String()]); err == nil && m.Questions[0].Type == dnsmessage.TypeA {
					h := dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 60}
					m.Answers = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.AResource{A: a.As4()}}}
				}
				if packed, err := m.Pack(); err == nil {
					_, _ = p.WriteTo(packed, peer)
				}
			}
		}()
		return nil
	})
	// The host's, for this test.
	resolvConf := filepath.Join(s.t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolvConf, []byte("nameserver "+world4+"\n"), 0o644); err != nil {
		s.t.Fatal(err)
	}
	if err := unix.Mount(resolvConf, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		s.t.Fatal(err)
	}
}

// resolve asks a server for a name, from the guest.
func (g *guest) resolve(t *testing.T, server, name string) (address string) {
	t.Helper()
	g.Must(func() error {
		conn, err := net.Dial("udp", server)
		if err != nil {
			return err
		}
		defer conn.Close()
		m := dnsmessage.Message{
			Header:    dnsmessage.Header{ID: 1, RecursionDesired: true},
			Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		}
		packed, err := m.Pack()
		if err != nil {
			return err
		}
		if _, err := conn.Write(packed); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		n, err := conn.Read(buf)
		if err != nil {
			address = err.Error()
			return nil
		}
		if err := m.Unpack(buf[:n]); err != nil {
			return err
		}
		address = m.RCode.String()
		for _, r := range m.Answers {
			address = netip.AddrFrom4(r.Body.(*dnsmessage.AResource).A).String()
		}
		return nil
	})
	return address
}

// A guest reaches the addresses of a name that its policy allows once it has asked for it, and those of no other.
func TestNetwork_Names(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.nameServer(map[string]string{"good.example.": "203.0.113.9", "bad.example.": world4, "inner.example.": "172.30.0.1"})
	s.outside.Serve(":80", "world")
	var proxies attach.Proxies
	t.Cleanup(proxies.Close)
	g := s.guestWith(0, func(g *filter.Guest) {
		g.Policy = &policy.Policy{DefaultAction: policy.Deny, Rules: []policy.Rule{
			{Action: policy.Allow, Domain: "good.example", Ports: policy.Ports{{First: 80, Last: 80}}},
			{Action: policy.Allow, Domain: "inner.example"},
		}}
	}, func(g *guest) error {
		return proxies.Add(&g.filter, []attach.Interface{{Tap: g.filter.Tap, Network: s.config}}, slog.New(slog.DiscardHandler))
	})
	g.misses(t, "tcp", "203.0.113.9:80")
	for _, server := range []string{"172.30.0.1:53", "192.0.2.53:53"} { // whomever it asks
		for name, want := range map[string]string{
			"good.example.": "203.0.113.9", "bad.example.": "RCodeNameError", "x.good.example.": "RCodeNameError", "inner.example.": "RCodeSuccess",
		} {
			if got := g.resolve(t, server, name); got != want {
				t.Errorf("%s by %s: got %s, want %s", name, server, got, want)
			}
		}
	}
	g.reaches(t, "tcp", "203.0.113.9:80", "world from "+uplink4+"\n")
	g.misses(t, "udp", world4+":80")
	g.misses(t, "tcp", world4+":80")
	g.misses(t, "tcp", "203.0.113.9:81")
	proxies.Close()
	if got := g.resolve(t, "172.30.0.1:53", "good.example."); got == "203.0.113.9" {
		t.Error("there is an answer without a proxy")
	}
	s.remove(g)
}
