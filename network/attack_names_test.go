package network_test

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// A guest asks for names as itself, and its own network's resolver: it opens nothing for another by
// asking in its name, learns nothing from the resolvers of other networks, and hears and is heard
// by nobody who asks all.
func TestAttack_Names(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	s := newSite(t, nil)
	s.nameServer(map[string]string{"good.example.": "203.0.113.9", "free.example.": "192.0.2.1"})
	s.outside.Serve(":80", "world")
	closed := &policy.Policy{
		DefaultAction: policy.Deny,
		Rules:         []policy.Rule{{Action: policy.Allow, Domain: "good.example"}},
	}
	attacker, _ := s.namedGuest(0, nil)
	victim, _ := s.namedGuest(1, closed)
	question := func(from string) []byte {
		m := dnsmessage.Message{
			Header: dnsmessage.Header{ID: 1, RecursionDesired: true},
			Questions: []dnsmessage.Question{
				{Name: dnsmessage.MustNewName("good.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
			},
		}
		packed, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		return datagram(from+":1000", "172.30.0.1:53", string(packed))
	}
	out, own := attacker.wire(t), victim.wire(t)
	for _, mac := range []string{attacker.filter.MAC, victim.filter.MAC} {
		out.send(frameTo(s.bridgeMAC(), mac, unix.ETH_P_IP, question("172.30.0.3")))
	}
	if got := attacker.resolve(t, "172.30.0.1:53", "free.example."); got != "192.0.2.1" {
		t.Fatalf("the attacker's own question: %s", got)
	}
	victim.misses(t, "tcp", "203.0.113.9:80")
	// The same from the victim opens the way.
	own.seen(nil, "good", func() {
		own.send(frameTo(s.bridgeMAC(), victim.filter.MAC, unix.ETH_P_IP, question("172.30.0.3")))
	})
	victim.reaches(t, "tcp", "203.0.113.9:80", "world from "+uplink4+"\n")

	other := *s
	other.config = network.New("other", "svbr1", netip.MustParsePrefix("172.30.1.0/24"))
	stranger, _ := other.namedGuest(3, closed)
	// Whom it asks makes no difference to a guest whose policy has names; the one without is refused.
	plain, _ := other.namedGuest(4, nil)
	if got := plain.resolve(t, "172.30.1.1:53", "free.example."); got != "192.0.2.1" {
		t.Errorf("of its own resolver: %s", got)
	}
	for name, g := range map[string]*guest{"free.example.": plain, "good.example.": plain} {
		if got := g.resolve(t, "172.30.0.1:53", name); got == "192.0.2.1" || got == "203.0.113.9" {
			t.Errorf("%s: another network's resolver says %s", name, got)
		}
	}
	if got := stranger.resolve(t, "172.30.0.1:53", "free.example."); got != "RCodeNameError" {
		t.Errorf("what its own resolver says, whomever it asks: %s", got)
	}

	// Multicast DNS: the host hears those who may reach it alone.
	friend := s.guest(2, func(g *filter.Guest) { g.Policy = allowHost })
	mdns := listen(t, ":5353")
	to := "224.0.0.251"
	if mdns.heard("attack", "end", func() {
		out.send(frameTo("01:00:5e:00:00:fb", attacker.filter.MAC, unix.ETH_P_IP,
			datagram("172.30.0.2:5353", to+":5353", "attack")))
		out.send(frameTo(s.bridgeMAC(), attacker.filter.MAC, unix.ETH_P_IP,
			datagram("172.30.0.2:5353", "172.30.0.1:5353", "attack")))
		friend.Must(func() error { return sendTo("172.30.0.1:5353", "end") })
	}) {
		t.Error("the host hears who asks all")
	}
}

// resolveBy asks a server by UDP or TCP.
func (g *guest) resolveBy(t *testing.T, network, server, name string) (answer string) {
	t.Helper()
	if network == "udp" {
		return g.resolve(t, server, name)
	}
	m := dnsmessage.Message{
		Header: dnsmessage.Header{ID: 1, RecursionDesired: true},
		Questions: []dnsmessage.Question{
			{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
		},
	}
	packed, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	g.Must(func() error {
		c, err := net.DialTimeout(network, server, 5*time.Second)
		if err != nil {
			answer = err.Error()
			return nil
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		if _, err := c.Write(append([]byte{0, byte(len(packed))}, packed...)); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		n, err := io.ReadAtLeast(c, buf, 14)
		if err != nil {
			return err
		}
		if err := m.Unpack(buf[2:n]); err != nil {
			return err
		}
		answer = m.RCode.String()
		for _, r := range m.Answers {
			if a, ok := r.Body.(*dnsmessage.AResource); ok {
				answer = netip.AddrFrom4(a.A).String()
			}
		}
		return nil
	})
	return answer
}

// By UDP and TCP, over IPv4 and IPv6, a guest's questions for names end at its resolver: all of
// them where its policy or its network's has names, else those to the gateway.
func TestAttack_NamesEveryWay(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	for _, by := range []string{"udp", "tcp"} {
		for _, named := range []string{"nobody", "guest", "network"} {
			names := &policy.Policy{
				DefaultAction: policy.Deny,
				Rules:         []policy.Rule{{Action: policy.Allow, Domain: "good.example"}},
			}
			s := newSite(t, func(c *network.Config) {
				if named == "network" {
					c.Policy = names
				}
			})
			s.nameServer(map[string]string{"good.example.": "203.0.113.9", "bad.example.": "203.0.113.9"})
			if named != "guest" {
				names = nil
			}
			g, _ := s.namedGuest(0, names)
			_, gateway6 := s.config.Gateway()
			servers := []string{"172.30.0.1:53", "[" + gateway6.String() + "]:53"}
			bad := "203.0.113.9"
			if named != "nobody" {
				servers, bad = append(servers, "192.0.2.53:53", "["+world6+"]:53"), "RCodeNameError"
			}
			for _, server := range servers {
				for name, want := range map[string]string{"good.example.": "203.0.113.9", "bad.example.": bad} {
					if got := g.resolveBy(t, by, server, name); got != want {
						t.Errorf("names of %s, by %s, %s of %s: got %s, want %s", named, by, name, server, got, want)
					}
				}
			}
			s.remove(g)
			clearNetwork(t)
			cutCables(t)
		}
	}
}
