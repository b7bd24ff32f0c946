package upkeep

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/resolvconf"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/dnsproxy"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/flowlog"
	"push.rocks/smartvm/network/wireguard"
)

// Add logs what a guest of the VM with that directory tries, has the other guests of a network know
// where this one is, if they reach it, and starts its DNS proxy, on the port that the guest has, or
// one that it then has. From a network that nothing leaves, questions do not either.
func (u *Upkeep) Add(vmDir string, g *network.Guest, all []attach.Interface, log *slog.Logger) error {
	n := slices.IndexFunc(all, func(i attach.Interface) bool { return i.Tap == g.Tap })
	if n >= 0 && all[n].Network.Bridged() {
		u.announce(g, log)
	}
	if n < 0 {
		return nil
	}
	of := &all[n].Network
	networks := filepath.Join(filepath.Dir(vmDir), store.NetworkDir)
	own := &names{guest: filter.Names{Guest: g.Guest}}
	u.record(vmDir, own, of, log)
	if of.Inside {
		return nil
	}
	c := dnsproxy.Config{Log: log.With("vm", g.Tap), Upstreams: newServers(all[n].DNS, false).all}
	if tried := u.tried; tried != nil {
		c.Answered = tried.Answered
		c.Refused = func(name, kind string, by int) {
			tried.Refused(of.Name,
				map[filter.Layer]string{filter.OfNetwork: flowlog.OfNetwork, filter.Own: flowlog.OfVM}[filter.Layer(by)], name,
				kind)
		}
	}
	if of.Mutual {
		c.Local = func(name string) []netip.Addr { return network.Named(networks, of.Name, name) }
	}
	now, via, err := network.Current(networks, of.Name) // it may have been changed since the VM was made
	if err == nil {
		err = own.follow(now.Policy, g.Policy)
	}
	if err != nil {
		return err
	}
	c.Names = own.current
	c.Rate = dnsproxy.Rate{PerSecond: now.DNSQuestions, Burst: 2 * now.DNSQuestions}
	if of.WireGuard != "" || of.WireGuardConfig != "" {
		// What guests ask leaves by no other way than all else of theirs.
		if via == "" {
			return fmt.Errorf("ask for names: network %s has no tunnel", of.Name)
		}
		c.Control = bindTo(via)
		own := all[n].DNS
		if own == nil && of.WireGuardConfig != "" {
			config, err := wireguard.Load(of.WireGuardConfig)
			if err != nil {
				return err
			}
			own = config.DNS
		}
		c.Upstreams = newServers(own, true).all
	}
	if c.TCP, c.UDP, err = listenDNS(of.Bridge, g.DNS); err != nil {
		return fmt.Errorf("listen for DNS queries: %w", err)
	}
	g.DNS = c.TCP.Addr().(*net.TCPAddr).AddrPort().Port()
	if u.names == nil {
		u.names = map[string]*names{}
	}
	u.names[g.Tap] = own
	u.sockets = append(u.sockets, socket{of.Bridge, c.TCP.(*net.TCPListener)}, socket{of.Bridge, c.UDP.(*net.UDPConn)})
	ctx, cancel := context.WithCancel(context.Background())
	u.cancel = append(u.cancel, cancel)
	u.work.Go(func() {
		if err := dnsproxy.Serve(ctx, c); err != nil {
			log.Warn("DNS proxy", "tap", g.Tap, "err", err)
		}
	})
	return nil
}

// servers are those that a guest's questions go to.
type servers struct {
	own       []netip.Addr // empty: the host's, as they are now
	elsewhere bool         // but for those that only the host itself reaches
	files     []*resolvconf.File
}

func newServers(own []netip.Addr, elsewhere bool) *servers {
	return &servers{own, elsewhere, []*resolvconf.File{{Path: resolvconf.Path}, {Path: resolvconf.Stub}}}
}

func (s *servers) all() (all []netip.AddrPort) {
	addresses := s.own
	for i := 0; i < len(s.files) && len(addresses) == 0; i++ {
		addresses = slices.Clone(s.files[i].Servers())
		if s.elsewhere {
			addresses = slices.DeleteFunc(addresses, attach.OnHost)
		}
	}
	for _, a := range addresses {
		all = append(all, netip.AddrPortFrom(a, 53))
	}
	return all
}

// Adopt starts the proxies of the guests among the effects of a VM's run, where they were, and
// reserves their ports again.
func (u *Upkeep) Adopt(vm attach.VM, effects []journal.Effect, all []attach.Interface, log *slog.Logger) {
	for _, e := range effects {
		g, ok := e.(*network.Guest)
		if !ok {
			continue
		}
		if err := u.adopt(vm, g, log); err != nil {
			log.Warn("published ports", "vm", vm.ID, "err", err)
		}
		if err := u.Add(vm.Store.Dir(vm.ID), g, all, log); err != nil {
			log.Warn("the guest has no names", "tap", g.Tap, "err", err)
		}
	}
}

// bindTo binds a socket to an interface.
func bindTo(device string) func(_, _ string, raw syscall.RawConn) error {
	return func(_, _ string, raw syscall.RawConn) error {
		var bindErr error
		err := raw.Control(func(fd uintptr) { bindErr = unix.BindToDevice(int(fd), device) })
		return errors.Join(err, bindErr)
	}
}

// listenDNS listens on all addresses of an interface and no other's. Port 0: one that is free.
func listenDNS(device string, port uint16) (net.Listener, net.PacketConn, error) {
	bound := net.ListenConfig{Control: bindTo(device)}
	var errs []error
	for range 16 { // a port may be free for the one and not for the other
		tcp, err := bound.Listen(context.Background(), "tcp", ":"+strconv.Itoa(int(port)))
		if err != nil {
			return nil, nil, err
		}
		udp, err := bound.ListenPacket(context.Background(), "udp", ":"+strconv.Itoa(tcp.Addr().(*net.TCPAddr).Port))
		if err == nil {
			return tcp, udp, nil
		}
		if errs = append(errs, err, tcp.Close()); port != 0 {
			break
		}
	}
	return nil, nil, errors.Join(errs...)
}
