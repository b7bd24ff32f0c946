package smartvm_test

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/policy"
)

// datagrams returns the files that are asked for by a socket (RFC 1350), each once, until one is:
// those before it too, as who is not answered asks again. It has the guest send again until then.
func datagrams(t *testing.T, c net.PacketConn, until string, send func()) (all []string) {
	t.Helper()
	buf := make([]byte, 64)
	for range 5 {
		send()
		for {
			if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
				t.Fatal(err)
			}
			n, _, err := c.ReadFrom(buf)
			if err != nil {
				break
			}
			text, _, _ := strings.Cut(string(buf[min(n, 2):n]), "\x00")
			if text == until {
				return all
			}
			if !slices.Contains(all, text) {
				all = append(all, text)
			}
		}
	}
	t.Fatalf("%q does not come, but %q", until, all)
	return nil
}

// A guest's own kernel sends what it must not: to the host by frames that bridges pass by, under
// another MAC and under another address, and more connections than it may have. See network for all
// that a guest could send.
func TestLinuxNetwork_Attack(t *testing.T) {
	if !nettest.Rough(t) {
		return
	}
	const most = 10
	h := imageHost(t, smartvm.LaunchJailed)
	world := nettest.New(t)
	world.Connect(nettest.Link{Name: "uplink", Addresses: prefixes("198.51.100.1/24")},
		nettest.Link{Name: "eth0", Addresses: prefixes("198.51.100.2/24")})
	networks, err := h.Networks()
	if err != nil {
		t.Fatal(err)
	}
	tight, err := networks.Create(network.Config{Name: "tight", Settings: network.Settings{MaxConnections: most}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := networks.Remove("tight"); err != nil {
			t.Error(err)
		}
	})
	m := linuxGuest(t, h, "attacker", "tight", "while :; do sleep 1; done", func(s *smartvm.Spec) {
		s.Policy = &policy.Policy{AllowHost: true}
	})
	host, err := net.ListenPacket("udp4", ":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	var outside net.PacketConn
	world.Must(func() (err error) { outside, err = net.ListenPacket("udp4", "198.51.100.2:9"); return err })
	defer outside.Close()
	gateway4, _ := tight.Gateway()
	gateway := gateway4.String()
	other := netip.PrefixFrom(gateway4.Next().Next().Next(), tight.Subnet.Bits())

	// By what the guest has, which is busybox: it asks for a file of that name, and is not answered.
	say := func(text, to string) string {
		return fmt.Sprintf("timeout 2 tftp -g -l /dev/null -r %s %s 2>/dev/null; ", text, to)
	}
	mac := told(t, m, "ping -c 1 -w 5 "+gateway+" >/dev/null; grep -w "+gateway+
		" /proc/net/arp | tr -s ' ' | cut -d' ' -f4")
	for _, n := range []int{3, 14} {
		end := fmt.Sprint("plain", n)
		got := datagrams(t, host, end, func() {
			told(t, m, fmt.Sprintf("arp -s %s 01:80:c2:00:00:%02x && ", gateway, n)+say("attack", gateway+" 9000")+
				"arp -s "+gateway+" "+mac+" && "+say(end, gateway+" 9000")+":")
		})
		if slices.Contains(got, "attack") {
			t.Errorf("to 01:80:c2:00:00:%02x: the host gets %q", n, got)
		}
	}
	got := datagrams(t, outside, "own", func() {
		told(t, m, "ip addr add "+other.String()+" dev eth0 && ip route add 198.51.100.2 via "+gateway+" src "+
			other.Addr().String()+" && "+say("address", "198.51.100.2 9")+
			"ip route del 198.51.100.2 && ip addr del "+other.String()+" dev eth0 && "+say("own", "198.51.100.2 9")+":")
	})
	if slices.Contains(got, "address") {
		t.Errorf("from another address comes %q", got)
	}
	got = datagrams(t, outside, "own-mac", func() {
		told(t, m, "own=$(cat /sys/class/net/eth0/address); route=$(ip route | grep default); "+
			"ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; ip route add $route; arp -s "+gateway+" "+mac+"; "+say("mac", "198.51.100.2 9")+
			"ip link set eth0 down; ip link set eth0 address $own; ip link set eth0 up; ip route add $route; "+
			say("own-mac", "198.51.100.2 9")+":")
	})
	if slices.Contains(got, "mac") {
		t.Errorf("from another MAC comes %q", got)
	}
	// Of its connections some are known still. What the host sends itself shows that all before it has
	// come.
	got = datagrams(t, outside, "end", func() {
		told(t, m, fmt.Sprintf("for i in $(seq %d); do ("+say("$i", "198.51.100.2 9")+") & done; wait", 4*most))
		c, err := net.Dial("udp", "198.51.100.2:9")
		if err == nil {
			_, err = c.Write([]byte("\x00\x01end\x00"))
			_ = c.Close()
		}
		if err != nil {
			t.Error(err)
		}
	})
	slices.Sort(got)
	if len(got) < 1 || len(got) > most+3 {
		t.Errorf("of %d connections %d begin, want at most about %d: %q", 4*most, len(got), most, got)
	}
	if err := h.StopAll(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
		t.Error(err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}
