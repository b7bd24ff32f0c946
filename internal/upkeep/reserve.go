package upkeep

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/relay"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
)

// reserved is a socket by which no other program of the host gets a port. What is sent there goes
// to the guest before it comes to the socket, but for what is sent to ::1: the socket gets that
// where all of IPv6, or ::1, is published.
type reserved struct {
	io.Closer
	port uint16
}

// reserve reserves a port on its addresses. Port 0: one that is free on all of them. Where nothing
// says which addresses, those of IPv6 may be missing, as the host may have none. With an error it
// returns those that were made before.
func reserve(p filter.Port) (all []reserved, err error) {
	for _, a := range attach.SpecPort(p).Addresses() {
		at := netip.AddrPortFrom(a, p.Host)
		var r reserved
		switch {
		case p.Protocol == "udp":
			r, err = reserveUDP(at)
		case a.Is6() && (a.IsUnspecified() || a.IsLoopback()):
			r, err = reserveTCP(at)
		default:
			r, err = bind(at)
		}
		if !p.Address.IsValid() && a.Is6() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		p.Host = r.port
		all = append(all, r)
	}
	return all, nil
}

func release(all []reserved) {
	for _, r := range all {
		_ = r.Close()
	}
}

// family is the network of an address as package net has it, where [::] is that of IPv6 alone.
func family(protocol string, a netip.Addr) string {
	if a.Is4() {
		return protocol + "4"
	}
	return protocol + "6"
}

func reserveTCP(at netip.AddrPort) (reserved, error) {
	l, err := net.ListenTCP(family("tcp", at.Addr()), net.TCPAddrFromAddrPort(at))
	if err != nil {
		return reserved{}, err
	}
	return reserved{l, l.Addr().(*net.TCPAddr).AddrPort().Port()}, nil
}

func reserveUDP(at netip.AddrPort) (reserved, error) {
	c, err := net.ListenUDP(family("udp", at.Addr()), net.UDPAddrFromAddrPort(at))
	if err != nil {
		return reserved{}, err
	}
	if at.Addr().Is4() || !at.Addr().IsUnspecified() && !at.Addr().IsLoopback() {
		_ = c.SetReadBuffer(0) // nobody reads it
	}
	return reserved{c, c.LocalAddr().(*net.UDPAddr).AddrPort().Port()}, nil
}

// fd is a socket that nothing is done with.
type fd int

func (f fd) Close() error { return unix.Close(int(f)) }

// bind reserves a TCP port without listening there: who comes while there are no rules is refused.
func bind(at netip.AddrPort) (r reserved, err error) {
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: int(at.Port()), Addr: [4]byte(at.Addr().AsSlice()[:4])}
	domain := unix.AF_INET
	if at.Addr().Is6() {
		domain, to = unix.AF_INET6, &unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()}
	}
	s, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return r, fmt.Errorf("reserve %s: %w", at, err)
	}
	defer func() {
		if err != nil {
			_ = unix.Close(s)
			r, err = reserved{}, fmt.Errorf("reserve %s: %w", at, err)
		}
	}()
	// Connections that a program had there which is gone (TIME_WAIT) are in nobody's way, but sockets
	// that are bound later are in ours.
	err = unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil && domain == unix.AF_INET6 {
		err = unix.SetsockoptInt(s, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	if err == nil {
		err = unix.Bind(s, to)
	}
	if err == nil {
		err = unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0)
	}
	if err != nil {
		return r, err
	}
	name, err := unix.Getsockname(s)
	switch name := name.(type) {
	case *unix.SockaddrInet4:
		return reserved{fd(s), uint16(name.Port)}, err
	case *unix.SockaddrInet6:
		return reserved{fd(s), uint16(name.Port)}, err
	}
	return r, err
}

// keep has a guest's port, with its sockets, until Close.
func (u *Upkeep) keep(g *network.Guest, p filter.Port, sockets []reserved) {
	u.ports = append(u.ports, attach.NewPort(p, false))
	to := netip.AddrPortFrom(g.IP4, p.Guest)
	if u.kept == nil {
		u.kept = map[filter.Port][]func(){}
	}
	for _, s := range sockets {
		ctx, cancel := context.WithCancel(context.Background())
		u.kept[p] = append(u.kept[p], func() { cancel(); _ = s.Close() })
		switch c := s.Closer.(type) {
		case *net.TCPListener:
			u.work.Go(func() { relay.TCP(ctx, c, to) })
		case *net.UDPConn:
			if a := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr(); a.Is6() && (a.IsUnspecified() || a.IsLoopback()) {
				u.work.Go(func() { relay.UDP(ctx, c, to) })
			}
		}
	}
}

// adopt reserves a guest's ports that nobody has kept from others for some time.
func (u *Upkeep) adopt(vm attach.VM, g *network.Guest, log *slog.Logger) error {
	for _, p := range g.Ports {
		sockets, err := reserve(p)
		if err == nil {
			u.keep(g, p, sockets)
			continue
		}
		release(sockets)
		log.Warn("something else listens at a published port: what is sent there goes to the VM", "vm", vm.ID, "port",
			attach.Flag(p), "err", err)
		u.ports = append(u.ports, attach.NewPort(p, true))
		u.lost = func() error { return u.regain(vm, g) }
	}
	return u.note(vm)
}

// regain reserves what could not be adopted, as far as that is possible now.
func (u *Upkeep) regain(vm attach.VM, g *network.Guest) error {
	was, found := u.ports, false
	u.ports, u.lost = nil, nil
	for _, p := range was {
		if !p.Shadows {
			u.ports = append(u.ports, p)
			continue
		}
		sockets, err := reserve(p.Filter())
		if err != nil {
			release(sockets)
			u.ports = append(u.ports, p)
			u.lost = func() error { return u.regain(vm, g) }
			continue
		}
		u.keep(g, p.Filter(), sockets)
		found = true
	}
	if !found {
		return nil
	}
	return u.note(vm)
}

// note writes down a VM's ports for Ports.
func (u *Upkeep) note(vm attach.VM) error {
	path := filepath.Join(vm.Store.Dir(vm.ID), store.PortsFile)
	if len(u.ports) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("write down ports: %w", err)
		}
		return nil
	}
	return atomicfile.WriteJSON(path, u.ports)
}
