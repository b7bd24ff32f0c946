package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/netns"
	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/network/subnet"
	"push.rocks/smartvm/spec"
)

// networkSite is a network with a guest and a world outside, which are namespaces.
type networkSite struct {
	ctx          context.Context
	dir          string
	config       network.Config
	guest, world *netns.Namespace
	cable        network.Guest // the guest's part
	use          *network.Use
	host         *host // whose VMs are on the network too
	idle         string
	iperf3       string
	samples      *samples
}

// Addresses between the host and the world.
const (
	benchUplink = "198.51.100.1"
	benchWorld  = "198.51.100.2"
)

// networks measures networks, in one that this process has for itself.
func (b *bench) networks(ctx context.Context) (err error) {
	s := &networkSite{
		ctx:     network.NewContext(ctx, &network.Shared{Reaper: new(network.Reaper)}),
		dir:     filepath.Join(b.runtimeDir(), store.NetworkDir),
		idle:    b.idle,
		iperf3:  b.IPerf3,
		samples: &b.samples,
	}
	if s.host, err = b.host(smartvm.LaunchDirect); err != nil {
		return err
	}
	defer s.host.Close()
	if err := s.open(); err != nil {
		return err
	}
	for range guestTurns {
		if err := s.guests(b.Rounds / guestTurns); err != nil {
			return err
		}
	}
	if err := s.teardown(); err != nil {
		return err
	}
	if err := s.warm(b.Rounds / 3); err != nil {
		return err
	}
	if err := s.names(b.Rounds); err != nil {
		return err
	}
	if err := s.heal(); err != nil {
		return err
	}
	return s.throughput()
}

// end is one end of a cable.
type end struct {
	name, address, gateway string
	mac                    net.HardwareAddr
}

func (e end) configure() error {
	link, err := netlink.LinkByName(e.name)
	if err != nil {
		return err
	}
	if e.address != "" {
		a, err := netlink.ParseAddr(e.address)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil || e.gateway == "" {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(e.gateway)})
}

func connect(to *netns.Namespace, near, far end) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = near.name
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: far.name, PeerHardwareAddr: far.mac,
		PeerNamespace: netlink.NsFd(to.Fd()),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	return errors.Join(near.configure(), to.Do(far.configure))
}

func (s *networkSite) open() (err error) {
	if s.config, err = network.NewDefault("", ""); err != nil {
		return err
	}
	if s.guest, err = netns.New(); err != nil {
		return err
	}
	if s.world, err = netns.New(); err != nil {
		return err
	}
	if err := connect(s.world, end{name: "uplink", address: benchUplink + "/24"},
		end{name: "eth0", address: benchWorld + "/24", gateway: benchUplink}); err != nil {
		return err
	}
	s.use = &network.Use{Dir: s.dir, Network: s.config, VM: "bench", VMDir: "/"}
	if err := s.use.Apply(s.ctx); err != nil {
		return err
	}
	s.cable = s.part(0)
	mac, err := net.ParseMAC(s.cable.MAC)
	if err != nil {
		return err
	}
	if err := connect(s.guest, end{name: s.cable.Tap},
		end{name: "eth0", mac: mac, address: netip.PrefixFrom(s.cable.IP4, 24).String()}); err != nil {
		return err
	}
	if err := errors.Join(s.tap(0).Join(), s.cable.Apply(s.ctx)); err != nil {
		return err
	}
	gateway, _ := s.config.Gateway()
	return s.guest.Do(func() error { return netlink.RouteAdd(&netlink.Route{Gw: gateway.AsSlice()}) })
}

// part is the n-th guest's.
func (s *networkSite) part(n int) network.Guest {
	vm := strconv.Itoa(n)
	c := s.config
	c.Subnet = netip.MustParsePrefix("172.16.0.0/12") // with room for all: the tables do not mind
	ip4, ip6 := c.Guest(n)
	if n == 0 {
		ip4, ip6 = s.config.Guest(0)
	}
	return network.Guest{Guest: filter.Guest{
		Table: s.config.Table(), Tap: network.TapName(s.config.Bridge, vm, "", "eth0"), MAC: network.MAC(vm, "eth0").String(),
		IP4: ip4, IP6: ip6,
	}}
}

func (s *networkSite) tap(n int) *network.Tap {
	return &network.Tap{Name: s.part(n).Tap, Bridge: s.config.Bridge}
}

// add makes the n-th guest's tap and rules.
func (s *networkSite) add(n int) error {
	part := s.part(n)
	return errors.Join(s.tap(n).Apply(s.ctx), part.Apply(s.ctx))
}

func (s *networkSite) remove(n int) error {
	part := s.part(n)
	return errors.Join(part.Revert(s.ctx), s.tap(n).Revert(s.ctx))
}

// many is how many guests there are when there are many.
const many = 500

// guestTurns is how often it goes from one guest to many, so that what else the machine does is the
// same for both.
const guestTurns = 5

// guests measures making a tap and rules, and a packet's way there and back, beside one guest and
// beside many.
func (s *networkSite) guests(rounds int) error {
	for _, beside := range []struct {
		name  string
		count int
	}{{"-1", 1}, {"-500", many}} {
		for n := 1; n < beside.count; n++ {
			if err := s.add(n); err != nil {
				return err
			}
		}
		for range rounds / 3 {
			part := s.part(many)
			begun := time.Now()
			if err := s.tap(many).Apply(s.ctx); err != nil {
				return err
			}
			tapped := time.Now()
			if err := part.Apply(s.ctx); err != nil {
				return err
			}
			s.samples.time("cold-tap"+beside.name, time.Since(begun))
			s.samples.time("cold-rules"+beside.name, time.Since(tapped))
			if err := s.remove(many); err != nil {
				return err
			}
		}
		for range rounds / 5 {
			if err := s.start("start-net" + beside.name); err != nil {
				return err
			}
		}
		if err := s.roundTrips("round-trip" + beside.name); err != nil {
			return err
		}
		if err := s.changes(beside.name, rounds/5); err != nil {
			return err
		}
	}
	return s.each(1, many, s.remove)
}

// changeRest is how long the kernel has to clear away what a change has replaced: it takes another
// one after some 20 ms.
const changeRest = 100 * time.Millisecond

// changes gives the network and the guest other policies, of a hundred rules, while they are up.
func (s *networkSite) changes(suffix string, rounds int) error {
	part := s.cable
	for n := range rounds {
		p := &policy.Policy{Rules: []policy.Rule{{Action: policy.Allow, Domain: fmt.Sprintf("n%d.example.com", n%2)}}}
		for i := range 100 {
			p.Rules = append(p.Rules,
				policy.Rule{
					Action: policy.Deny, Protocol: "tcp", Destination: fmt.Sprintf("10.%d.%d.0/24", n%2, i),
					Ports: policy.Ports{{First: 80, Last: 443}},
				})
		}
		nap(changeRest)
		begun := time.Now()
		if err := network.Update(s.ctx, s.dir,
			network.Config{Name: s.config.Name, Settings: network.Settings{Policy: p}}); err != nil {
			return err
		}
		s.samples.time("policy-change"+suffix, time.Since(begun))
		part.Policy = p
		nap(changeRest)
		begun = time.Now()
		if err := part.Replace(s.ctx); err != nil {
			return err
		}
		s.samples.time("own-policy-change"+suffix, time.Since(begun))
	}
	return errors.Join(network.Update(s.ctx, s.dir, network.Config{Name: s.config.Name, Settings: network.Settings{}}),
		s.cable.Replace(s.ctx))
}

// start starts a VM on the network, and removes it.
func (s *networkSite) start(name string) error {
	m, err := s.host.Create(s.ctx, smartvm.Spec{
		BootSource:        smartvm.BootSource{KernelImagePath: s.idle},
		MachineConfig:     smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
		NetworkInterfaces: []smartvm.NetworkInterface{{IfaceID: "eth0"}},
	})
	if err != nil {
		return err
	}
	begun := time.Now()
	first, err := s.host.start(s.ctx, m)
	if err == nil {
		s.samples.time(name, first.Sub(begun))
	}
	_, stopErr := m.Stop(s.ctx, smartvm.StopOptions{})
	return errors.Join(err, stopErr, m.Remove(s.ctx))
}

// each does something to guests at once.
func (s *networkSite) each(first, last int, do func(int) error) error {
	errs := make([]error, last)
	var all sync.WaitGroup
	for n := first; n < last; n++ {
		all.Go(func() { errs[n] = do(n) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// roundTrips sends packets from the guest to the world and back, a new connection's each, and tells
// the mean of a hundred.
func (s *networkSite) roundTrips(name string) error {
	var echo net.PacketConn
	err := s.world.Do(func() (err error) { echo, err = net.ListenPacket("udp", benchWorld+":7"); return err })
	if err != nil {
		return err
	}
	defer echo.Close()
	go func() {
		buf := make([]byte, 64)
		for {
			n, peer, err := echo.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = echo.WriteTo(buf[:n], peer)
		}
	}()
	for range 8 {
		var took time.Duration
		for range 100 {
			var c net.Conn
			if err := s.guest.Do(func() (err error) { c, err = net.Dial("udp", benchWorld+":7"); return err }); err != nil {
				return err
			}
			begun := time.Now()
			_, err := c.Write([]byte("?"))
			if err == nil {
				_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
				_, err = c.Read(make([]byte, 1))
			}
			took += time.Since(begun)
			if err := errors.Join(err, c.Close()); err != nil {
				return err
			}
		}
		s.samples.time(name, took/100)
	}
	return nil
}

// warm measures what a VM waits for that takes a warm slot: its lease, its part in the network, the
// slot, its rules.
func (s *networkSite) warm(rounds int) error {
	st, err := store.Open(filepath.Join(s.dir, "warm"))
	if err != nil {
		return err
	}
	c := s.config
	c.Name, c.Bridge, c.Subnet = "warm", "svwarm", netip.MustParsePrefix("172.30.1.0/24")
	c.Subnet6 = subnet.Local(c.Bridge)
	pool := &attach.Pool{Store: st, Network: c}
	if _, err := pool.Resize(s.ctx, 8); err != nil {
		return err
	}
	do := func(ctx context.Context, e journal.Effect) error { return e.Apply(ctx) }
	for n := range rounds {
		vm := attach.VM{ID: "vm" + strconv.Itoa(n), Nonce: "n", Store: st}
		spec := &spec.Spec{Policy: &policy.Policy{Rules: []policy.Rule{{Action: policy.Deny, Destination: "10.0.0.0/8"}}}}
		all := []attach.Interface{{ID: "eth0", Network: c, File: "none yet"}}
		begun := time.Now()
		if err := attach.Address(s.ctx, vm, all, do); err != nil {
			return err
		}
		effects := attach.Effects(vm, all, spec)
		for _, e := range effects {
			if err := e.Apply(s.ctx); err != nil {
				return err
			}
		}
		s.samples.time("warm-slot", time.Since(begun))
		if !all[0].Warm {
			return errors.New("no slot was warm")
		}
		for _, e := range slices.Backward(effects) {
			if err := e.Revert(s.ctx); err != nil {
				return err
			}
		}
		if err := st.Lease("slot", c.Name+"/"+filepath.Base(filepath.Dir(all[0].File)), vm.ID).Revert(s.ctx); err != nil {
			return err
		}
	}
	_, err = pool.Resize(s.ctx, 0)
	return err
}

// teardown removes one guest, and a hundred at once.
func (s *networkSite) teardown() error {
	for range 10 {
		for _, count := range []int{1, 100} {
			for n := 1; n <= count; n++ {
				if err := s.add(n); err != nil {
					return err
				}
			}
			begun := time.Now()
			if err := s.each(1, count+1, s.remove); err != nil {
				return err
			}
			s.samples.time("teardown-"+strconv.Itoa(count), time.Since(begun))
		}
	}
	return nil
}
