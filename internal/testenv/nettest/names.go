package nettest

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// ServeNames is the function of that name in the namespace.
func (n *Namespace) ServeNames(address string, names map[string]string) {
	n.t.Helper()
	n.Must(func() error { return ServeNames(n.t, address, names) })
}

// ServeNames answers DNS queries on port 53 of an address of the thread's network, by UDP: for each
// name, with a final dot, its addresses.
func ServeNames(t *testing.T, address string, names map[string]string) error {
	p, err := net.ListenPacket("udp", net.JoinHostPort(address, "53"))
	if err != nil {
		return err
	}
	t.Cleanup(func() { p.Close() })
	go func() {
		buf := make([]byte, 1500)
		for {
			k, peer, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:k]) != nil || len(m.Questions) != 1 {
				continue
			}
			m.Response = true
			h := dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 60}
			for _, text := range strings.Fields(names[h.Name.String()]) {
				switch a := netip.MustParseAddr(text); {
				case a.Is4() && m.Questions[0].Type == dnsmessage.TypeA:
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
				case a.Is6() && m.Questions[0].Type == dnsmessage.TypeAAAA:
					m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
				}
			}
			if packed, err := m.Pack(); err == nil {
				_, _ = p.WriteTo(packed, peer)
			}
		}
	}()
	return nil
}

// Resolver makes an address the DNS server of this process, which has mounts of its own.
func Resolver(t *testing.T, address string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver "+address+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(path, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc/resolv.conf", 0); err != nil {
			t.Error(err)
		}
	})
}
