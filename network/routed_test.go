package network_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// Guests of a routed network reach each other as policies allow, the network's and their own, of
// IPv4 and IPv6; what is about the internet is not about them. The host answers for them all.
func TestNetwork_Routed(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	rules := func(d policy.Action, all ...policy.Rule) *policy.Policy {
		return &policy.Policy{DefaultAction: d, Rules: all}
	}
	toA := policy.Rule{Action: policy.Deny, Destination: "172.30.0.2", Protocol: "tcp"}
	for _, on := range []bool{false, true} {
		for _, internal := range []bool{false, true} {
			t.Run(fmt.Sprintf("bridge netfilter %v, internal %v", on, internal), func(t *testing.T) {
				s := newSite(t, func(c *network.Config) {
					c.Mutual, c.Routed, c.Inside = true, true, internal
					c.Policy = rules(policy.Allow,
						policy.Rule{Action: policy.Deny, Destination: "172.30.0.0/24", Ports: policy.Ports{{First: 81, Last: 81}}})
				})
				t.Cleanup(func() { clearNetwork(t); cutCables(t) })
				if err := s.config.Validate(); err != nil {
					t.Fatal(err)
				}
				nettest.BridgeNetfilter(t, on)
				before := hosts(t)
				a, b := s.guest(0, nil), s.guest(1, nil)
				narrow := s.guest(2, func(g *filter.Guest) { g.Policy = rules(policy.Allow, toA) })
				none := s.guest(3, func(g *filter.Guest) { g.Policy = rules(policy.Deny) })
				public := s.guest(4, func(g *filter.Guest) { g.Policy = &policy.Policy{Egress: policy.EgressPublic} })
				for g, word := range map[*guest]string{a: "a", b: "b", none: "none"} {
					for _, port := range []string{":80", ":81"} {
						g.Serve(port, word)
					}
				}
				a4, a6 := a.filter.IP4.String(), "["+a.filter.IP6.String()+"]"
				for _, g := range []*guest{b, public} {
					g.reaches(t, "tcp", a4+":80", "a from "+g.filter.IP4.String()+"\n")
					g.reaches(t, "udp", a6+":80", "a from "+g.filter.IP6.String()+"\n")
					g.misses(t, "tcp", a4+":81") // the network's policy
				}
				b.reaches(t, "tcp", a6+":81", "a from "+b.filter.IP6.String()+"\n") // which is about IPv4
				narrow.misses(t, "tcp", a4+":80")
				narrow.reaches(t, "udp", a4+":80", "a from "+narrow.filter.IP4.String()+"\n")
				narrow.reaches(t, "tcp", b.filter.IP4.String()+":80", "b from "+narrow.filter.IP4.String()+"\n")
				none.misses(t, "tcp", a4+":80")
				a.reaches(t, "tcp", none.filter.IP4.String()+":80", "none from "+a4+"\n") // its answers are not what it begins
				bridge, err := netlink.LinkByName(s.config.Bridge)
				if err != nil {
					t.Fatal(err)
				}
				for _, ip := range []netip.Addr{a.filter.IP4, a.filter.IP6} {
					if got := b.knows(ip, ""); got != bridge.Attrs().HardwareAddr.String() {
						t.Errorf("%s is at %q, want the bridge's %s", ip, got, bridge.Attrs().HardwareAddr)
					}
				}
				// What is sent to all goes to nobody else.
				out, near := b.wire(t), a.wire(t)
				out.send(append(frame(b.filter.MAC, unix.ETH_P_IP, udp4(b.filter.IP4.String(), 9)), mark("to all")...))
				b.Must(func() error {
					c, err := net.Dial("udp", a4+":9")
					if err == nil {
						_, err = c.Write(mark("end"))
						err = errors.Join(err, c.Close())
					}
					return err
				})
				if seen := near.until(mark("end")); slices.Contains(seen, string(mark("to all"))) {
					t.Error("another guest sees what one sends to all")
				}
				// A guest that looks whether its address is in use is not told that it is.
				address := &netlink.Addr{IPNet: &net.IPNet{IP: b.filter.IP6.AsSlice(), Mask: net.CIDRMask(64, 128)}}
				b.Must(func() error {
					link, err := netlink.LinkByName("eth0")
					if err != nil {
						return err
					}
					if err := netlink.AddrDel(link, address); err != nil {
						return err
					}
					if err := netlink.AddrAdd(link, address); err != nil {
						return err
					}
					for deadline := time.Now().Add(testenv.Patience(10 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
						all, err := netlink.AddrList(link, netlink.FAMILY_V6)
						if err != nil {
							return err
						}
						n := slices.IndexFunc(all, func(a netlink.Addr) bool { return a.IP.Equal(address.IP) })
						switch {
						case n < 0 || all[n].Flags&unix.IFA_F_DADFAILED != 0:
							return fmt.Errorf("the address is in use: %+v", all)
						case all[n].Flags&unix.IFA_F_TENTATIVE == 0:
							return nil
						case time.Now().After(deadline):
							return fmt.Errorf("still tentative: %+v", all)
						}
					}
				})
				for _, g := range []*guest{a, b, narrow, none, public} {
					s.remove(g)
				}
				if after := hosts(t); !slices.Equal(before, after) {
					t.Errorf("before %q, after %q", before, after)
				}
			})
		}
	}
}
