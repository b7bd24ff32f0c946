package upkeep_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
)

// site is a host with addresses of its own, 198.51.100.1 and 2001:db8::1, and a runtime directory.
type site struct {
	t     *testing.T
	store *store.Store
}

func newSite(t *testing.T) *site {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "runtime")
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	nettest.New(t).Connect(
		nettest.Link{
			Name:      "uplink",
			Addresses: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("2001:db8::1/64")},
		},
		nettest.Link{Name: "eth0"})
	return &site{t, st}
}

// vm is one of the site with ports, and with IPv6 or without.
func (s *site) vm(id string, ipv6 bool, ports ...filter.Port) (attach.VM, *network.Guest) {
	s.t.Helper()
	if err := os.MkdirAll(s.store.Dir(id), 0o700); err != nil {
		s.t.Fatal(err)
	}
	g := &network.Guest{Guest: filter.Guest{IP4: netip.MustParseAddr("127.0.0.7"), Ports: ports}}
	if ipv6 {
		g.IP6 = netip.MustParseAddr("fd00::7")
	}
	return attach.VM{ID: id, Store: s.store}, g
}

func do(ctx context.Context, e journal.Effect) error { return e.Apply(ctx) }

// publish returns what Publish says, with what to end it with.
func (s *site) publish(vm attach.VM, g *network.Guest) (*upkeep.Upkeep, error) {
	s.t.Helper()
	u := new(upkeep.Upkeep)
	s.t.Cleanup(u.Close)
	return u, u.Publish(s.t.Context(), vm, g, do)
}

// listener is a service of the host: it listens in one way, on one address.
type listener struct {
	network, address string // as package net has them
	port             int
	option           int // of SOL_SOCKET, 0: none but what package net sets
}

func (l listener) String() string {
	return fmt.Sprintf("%s %s option %d", l.network, net.JoinHostPort(l.address, strconv.Itoa(l.port)), l.option)
}

func (l listener) listen() (io.Closer, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		if l.option != 0 {
			if controlErr := raw.Control(func(fd uintptr) {
				if l.option == unix.SO_BINDTODEVICE {
					err = unix.BindToDevice(int(fd), "uplink")
				} else {
					err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, l.option, 1)
				}
			}); controlErr != nil {
				return controlErr
			}
		}
		return err
	}}
	at := net.JoinHostPort(l.address, strconv.Itoa(l.port))
	if strings.HasPrefix(l.network, "udp") {
		return config.ListenPacket(context.Background(), l.network, at)
	}
	return config.Listen(context.Background(), l.network, at)
}

// What a service of the host has is not published, whatever address it has it on and in whatever
// way; what another address or protocol has is. And a service that comes later does not get what is
// published.
func TestPublish_Held(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t)
	const every4, every6 = "0.0.0.0", "::"
	local4, up4, local6, up6 := "127.0.0.1", "198.51.100.1", "::1", "2001:db8::1"
	port := 7000
	for _, proto := range []string{"tcp", "udp"} {
		for _, tt := range []struct {
			at       string // published there
			services []listener
			others   []listener // that are in nobody's way
		}{
			{"", []listener{
				{proto + "4", local4, 0, 0},
				{proto + "4", up4, 0, 0},
				{proto + "4", every4, 0, 0},
				{proto + "6", local6, 0, 0},
				{proto + "6", up6, 0, 0},
				{proto + "6", every6, 0, 0},
				{proto, "", 0, 0},
				{proto + "4", every4, 0, unix.SO_REUSEADDR},
				{proto + "6", every6, 0, unix.SO_REUSEADDR},
				{proto + "4", up4, 0, unix.SO_REUSEADDR},
				{proto + "4", every4, 0, unix.SO_REUSEPORT},
				{proto + "6", up6, 0, unix.SO_REUSEPORT},
				{proto + "4", every4, 0, unix.SO_BINDTODEVICE},
			}, nil},
			{
				every4,
				[]listener{{proto + "4", local4, 0, 0}, {proto, "", 0, 0}},
				[]listener{{proto + "6", every6, 0, 0}, {proto + "6", local6, 0, 0}},
			},
			{
				every6,
				[]listener{{proto + "6", local6, 0, 0}, {proto, "", 0, 0}},
				[]listener{{proto + "4", every4, 0, 0}, {proto + "4", local4, 0, 0}},
			},
			{
				local4,
				[]listener{{proto + "4", local4, 0, 0}, {proto + "4", every4, 0, 0}, {proto, "", 0, 0}},
				[]listener{{proto + "4", up4, 0, 0}, {proto + "6", every6, 0, 0}},
			},
			{
				up4,
				[]listener{{proto + "4", up4, 0, 0}, {proto + "4", every4, 0, 0}, {proto, "", 0, 0}},
				[]listener{{proto + "4", local4, 0, 0}},
			},
			{
				local6,
				[]listener{{proto + "6", local6, 0, 0}, {proto + "6", every6, 0, 0}, {proto, "", 0, 0}},
				[]listener{{proto + "6", up6, 0, 0}, {proto + "4", every4, 0, 0}},
			},
			{
				up6,
				[]listener{{proto + "6", up6, 0, 0}, {proto + "6", every6, 0, 0}, {proto, "", 0, 0}},
				[]listener{{proto + "6", local6, 0, 0}, {proto + "4", up4, 0, 0}},
			},
		} {
			for i, l := range slices.Concat(tt.services, tt.others) {
				port++
				l.port = port
				wrong := i < len(tt.services)
				t.Run(fmt.Sprintf("%s at %q, %s", proto, tt.at, l), func(t *testing.T) {
					p := filter.Port{Host: uint16(port), Guest: 80, Protocol: proto}
					if tt.at != "" {
						p.Address = netip.MustParseAddr(tt.at)
					}
					held, err := l.listen()
					if err != nil {
						t.Fatal(err)
					}
					vm, g := s.vm("vm"+strconv.Itoa(port), true, p)
					u, err := s.publish(vm, g)
					u.Close()
					if errors.Is(err, unix.EADDRINUSE) != wrong || (err != nil) != wrong {
						t.Errorf("it was there: got %v, want it refused: %v", err, wrong)
					}
					if err := held.Close(); err != nil {
						t.Fatal(err)
					}
					if u, err = s.publish(vm, g); err != nil {
						t.Fatalf("it is gone: %v", err)
					}
					held, err = l.listen()
					if errors.Is(err, unix.EADDRINUSE) != wrong || (err != nil) != wrong {
						t.Errorf("it came later: got %v, want it refused: %v", err, wrong)
					}
					if err == nil {
						err = held.Close()
					}
					if u.Close(); !wrong && err != nil {
						t.Error(err)
					}
					if held, err = l.listen(); err != nil {
						t.Fatalf("the VM has stopped: %v", err)
					}
					if err := held.Close(); err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// What a program has left that is gone is in nobody's way: a connection that it has ended itself.
func TestPublish_TimeWait(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t)
	l, err := net.Listen("tcp", ":7000")
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", "127.0.0.1:7000")
	if err != nil {
		t.Fatal(err)
	}
	served, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(served.Close(), l.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if state, err := os.ReadFile("/proc/net/tcp6"); err != nil || !strings.Contains(string(state), ":1B58 ") {
		t.Fatalf("nothing is left of the connection: %s, %v", state, err)
	}
	if _, err := s.publish(s.vm("vm", true, filter.Port{Host: 7000, Guest: 80, Protocol: "tcp"})); err != nil {
		t.Error(err)
	}
}

// Free ports are each VM's own, of those that the kernel gives programs, and known to who looks
// while the VM runs.
func TestPublish_Free(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t)
	// So few that those which are taken come up.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40007"), 0); err != nil {
		t.Fatal(err)
	}
	service := listener{"tcp6", "::1", 40003, 0}
	held, err := service.listen()
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	// A VM that no process supervises has its ports too.
	if err := s.store.Lease("port", "127.0.0.1 40005/tcp", "alone").Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	seen := map[uint16]bool{40003: true, 40005: true}
	for i := range 3 {
		vm, g := s.vm("vm"+strconv.Itoa(i), true, filter.Port{Guest: 80, Protocol: "tcp"},
			filter.Port{Guest: 81, Protocol: "tcp"})
		if _, err := s.publish(vm, g); err != nil {
			t.Fatal(err)
		}
		for _, p := range g.Ports {
			if seen[p.Host] || p.Host < 40000 || p.Host > 40007 {
				t.Errorf("VM %d has port %d", i, p.Host)
			}
			seen[p.Host] = true
			if owner := s.store.Holder("port", fmt.Sprintf(":: %d/tcp", p.Host)); owner != vm.ID {
				t.Errorf("port %d is leased by %q", p.Host, owner)
			}
		}
		dir := s.store.Dir(vm.ID)
		if all, err := attach.Published(dir); err != nil || all != nil {
			t.Errorf("the VM does not run: %v, %v", all, err)
		}
		if err := os.WriteFile(filepath.Join(dir, store.RunJournal), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if all, err := attach.Published(dir); err != nil || len(all) != 2 || all[1].Host != g.Ports[1].Host {
			t.Errorf("got %v, %v, want %v", all, err, g.Ports)
		}
	}
	_, err = s.publish(s.vm("last", true, filter.Port{Guest: 80, Protocol: "tcp"}))
	if err == nil || !strings.HasPrefix(err.Error(), "publish port 80: no port of the host is free: ") {
		t.Errorf("all are taken: got %v", err)
	}
	if _, err := s.publish(s.vm("udp", true, filter.Port{Guest: 80, Protocol: "udp"})); err != nil {
		t.Errorf("none is by UDP: %v", err)
	}
}

// One VM has a port on all addresses, another on one of them: neither gets in the other's way,
// supervised or not.
func TestPublish_Overlapping(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t)
	local := netip.MustParseAddr("127.0.0.1")
	if err := s.store.Lease("port", "0.0.0.0 8080/tcp", "first").Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := s.publish(s.vm("second", true, filter.Port{Address: local, Host: 8080, Guest: 80, Protocol: "tcp"}))
	if !errors.Is(err, unix.EADDRINUSE) ||
		!strings.Contains(err.Error(), "publish port 127.0.0.1:8080:80: it is taken by VM first") {
		t.Errorf("got %v", err)
	}
	for _, p := range []filter.Port{
		{Address: local, Host: 8080, Guest: 80, Protocol: "udp"},
		{Address: local, Host: 8081, Guest: 80, Protocol: "tcp"},
		{Address: netip.IPv6Loopback(), Host: 8080, Guest: 80, Protocol: "tcp"},
	} {
		if _, err := s.publish(s.vm("second", true, p)); err != nil {
			t.Errorf("%v: %v", p, err)
		}
	}
}

// IPv6 has to be there where it is asked for, and need not where it is not; ::1 is the host's own.
func TestPublish_Families(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t)
	for at, refused := range map[string]bool{"": false, "0.0.0.0": false, "::1": false, "::": true, "2001:db8::1": true} {
		p := filter.Port{Host: 8080, Guest: 80, Protocol: "tcp"}
		if at != "" {
			p.Address = netip.MustParseAddr(at)
		}
		u, err := s.publish(s.vm("four", false, p))
		if (err != nil) != refused || refused && !strings.Contains(err.Error(), "the VM's network has no IPv6") {
			t.Errorf("%q on a network without IPv6: %v", at, err)
		}
		u.Close()
	}
	if _, err := s.publish(
		s.vm("elsewhere", true,
			filter.Port{Address: netip.MustParseAddr("203.0.113.1"), Host: 8080, Guest: 80, Protocol: "tcp"})); !errors.Is(err,
		unix.EADDRNOTAVAIL) {
		t.Errorf("an address that the host does not have: %v", err)
	}
}

// What a program sends to ::1 comes to the guest, and back, by TCP with its end and by UDP; what
// cannot be reached is refused; nobody else is let in.
func TestPublish_Loopback(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t)
	// The guest is a server at 127.0.0.7.
	if err := nettest.Serve(t, "127.0.0.7:80", "web"); err != nil {
		t.Fatal(err)
	}
	vm, g := s.vm("vm", false, filter.Port{Host: 8080, Guest: 80, Protocol: "tcp"},
		filter.Port{Host: 8080, Guest: 80, Protocol: "udp"},
		filter.Port{Address: netip.IPv6Loopback(), Host: 8081, Guest: 80, Protocol: "tcp"},
		filter.Port{Host: 8082, Guest: 81, Protocol: "tcp"})
	u, err := s.publish(vm, g)
	if err != nil {
		t.Fatal(err)
	}
	for _, proto := range []string{"tcp", "udp"} {
		if got := nettest.Ask(proto, "[::1]:8080", 5*time.Second); got != "web from 127.0.0.1\n" {
			t.Errorf("%s: got %q", proto, got)
		}
		if got := nettest.Ask(proto, "[2001:db8::1]:8080", 300*time.Millisecond); got != "" {
			t.Errorf("%s by another address: got %q", proto, got)
		}
	}
	if got := nettest.Ask("tcp", "[::1]:8081", 5*time.Second); got != "web from 127.0.0.1\n" {
		t.Errorf("published there alone: got %q", got)
	}
	c, err := net.Dial("tcp", "[::1]:8082")
	if err == nil {
		_, err = io.ReadAll(c)
		_ = c.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the guest serves nothing there: %v", err)
	}
	echo, err := net.Listen("tcp", "127.0.0.7:81")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		c, err := echo.Accept()
		if err != nil {
			return
		}
		data, _ := io.ReadAll(c) // to its end, with the way back open
		_, _ = c.Write(data)
		_ = c.Close()
	}()
	if c, err = net.Dial("tcp", "[::1]:8082"); err != nil {
		t.Fatal(err)
	}
	sent := strings.Repeat("0123456789abcdef", 1<<16)
	go func() {
		_, _ = io.WriteString(c, sent)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || string(got) != sent {
		t.Errorf("got %d bytes back of %d, %v", len(got), len(sent), err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	u.Close()
	if _, err := net.Dial("tcp", "[::1]:8080"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the VM has stopped: %v", err)
	}
}

// A service that has come while nobody supervised the VM is told of, and the port is the VM's alone
// again when it is gone.
func TestUpkeep_AdoptShadowed(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t)
	vm, g := s.vm("vm", true, filter.Port{Host: 8080, Guest: 80, Protocol: "tcp"},
		filter.Port{Host: 8081, Guest: 80, Protocol: "tcp"})
	if err := os.WriteFile(filepath.Join(s.store.Dir(vm.ID), store.RunJournal), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	service := listener{"tcp", "", 8081, 0}
	held, err := service.listen()
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	var u upkeep.Upkeep
	defer u.Close()
	u.Adopt(vm, []journal.Effect{g}, nil, slog.New(slog.NewTextHandler(&log, nil)))
	shadows := func(want ...bool) {
		t.Helper()
		all, err := attach.Published(s.store.Dir(vm.ID))
		if err != nil || len(all) != 2 || all[0].Shadows != want[0] || all[1].Shadows != want[1] {
			t.Errorf("got %+v, %v, want %v", all, err, want)
		}
	}
	shadows(false, true)
	if !strings.Contains(log.String(), "something else listens at a published port") ||
		!strings.Contains(log.String(), "port=8081:80") {
		t.Errorf("logged: %s", &log)
	}
	if err := u.Heal(t.Context(), nil); err != nil {
		t.Error(err)
	}
	shadows(false, true)
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	if err := u.Heal(t.Context(), nil); err != nil {
		t.Error(err)
	}
	shadows(false, false)
	if _, err := service.listen(); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("the port is not the VM's again: %v", err)
	}
}
