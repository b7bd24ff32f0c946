package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/spec"
)

// Port is one of the host that leads to a guest's while the VM runs.
type Port struct {
	Address  netip.Addr `json:"address,omitzero"` // of the host; zero: all, of both families
	Host     uint16     `json:"host"`
	Guest    uint16     `json:"guest"`
	Protocol string     `json:"protocol"` // "tcp" or "udp"
	// Shadows says that something on the host listens there too, which came while no process supervised the VM: the guest gets what is sent there.
	Shadows bool `json:"shadows,omitempty"`
}

func newPort(p filter.Port, shadows bool) Port {
	return Port{p.Address, p.Host, p.Guest, p.Protocol, shadows}
}

func (p Port) filter() filter.Port {
	return filter.Port{Address: p.Address, Host: p.Host, Guest: p.Guest, Protocol: p.Protocol}
}

// Addresses are those of the host at which the port is.
func (p Port) Addresses() []netip.AddrPort {
	var all []netip.AddrPort
	for _, a := range specPort(p.filter()).Addresses() {
		all = append(all, netip.AddrPortFrom(a, p.Host))
	}
	return all
}

// String is the port as lists have it.
func (p Port) String() string {
	host := strconv.Itoa(int(p.Host))
	if p.Address.IsValid() {
		host = netip.AddrPortFrom(p.Address, p.Host).String()
	}
	return fmt.Sprintf("%s->%d/%s", host, p.Guest, p.Protocol)
}

// flag is a port as -p takes it.
func flag(p filter.Port) string {
	host := ""
	if p.Host != 0 {
		host = strconv.Itoa(int(p.Host))
	}
	if p.Address.IsValid() {
		host = net.JoinHostPort(p.Address.String(), host)
	}
	text := strings.TrimPrefix(fmt.Sprintf("%s:%d", host, p.Guest), ":")
	if p.Protocol == "udp" {
		text += "/udp"
	}
	return text
}

func specPort(p filter.Port) spec.Port {
	return spec.Port{HostIP: p.Address, HostPort: p.Host, GuestPort: p.Guest, Protocol: p.Protocol}
}

// Expose adds ports to a spec that publishes all which its image exposes, "80/tcp", but for those that it publishes anyhow. Returns a *spec.FieldError
// where they are too many.
func Expose(s *spec.Spec, exposed []string, log *slog.Logger) error {
	if !s.PublishAll {
		return nil
	}
	if len(exposed) == 0 {
		log.Warn("nothing is published: the image exposes no port", "image", s.Image)
	}
	s.PublishAll, s.Ports = false, slices.Clone(s.Ports)
	for _, text := range exposed {
		number, protocol, _ := strings.Cut(text, "/")
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil {
			return fmt.Errorf("publish what image %s exposes: %w", s.Image, err)
		}
		p := spec.Port{GuestPort: uint16(n), Protocol: protocol}
		if !slices.ContainsFunc(Ports(s), func(q filter.Port) bool { return q.Guest == p.GuestPort && q.Protocol == protocol }) {
			s.Ports = append(s.Ports, p)
		}
	}
	if len(s.Ports) > spec.MaxPorts {
		return &spec.FieldError{Path: "ports", Value: len(s.Ports), Reason: fmt.Sprintf("must be at most %d, with those that the image exposes", spec.MaxPorts)}
	}
	return nil
}

// portLease is the kind of leases of ports.
const portLease = "port"

// portLeases are those of a port.
func portLeases(vm VM, p filter.Port) (all []journal.Effect) {
	for _, a := range specPort(p).Addresses() {
		all = append(all, vm.Store.Lease(portLease, fmt.Sprintf("%s %d/%s", a, p.Host, p.Protocol), vm.ID))
	}
	return all
}

func lease(ctx context.Context, vm VM, p filter.Port, do Do) error {
	for _, l := range portLeases(vm, p) {
		if err := do(ctx, l); err != nil {
			return err
		}
	}
	return nil
}

// Publish takes the ports of a guest from the host's other programs until Close, and chooses those that are 0. Leases of the others have been taken.
// Where the guest's network is up it leads what comes to ::1 on to the guest. Returns an error that is EADDRINUSE where something listens at a port.
func (u *Upkeep) Publish(ctx context.Context, vm VM, g *network.Guest, do Do) error {
	if len(g.Ports) == 0 {
		return nil
	}
	var errs []error
	for i := range g.Ports {
		p := &g.Ports[i]
		var err error
		switch {
		case p.Address.Is6() && !p.Address.IsLoopback() && !g.IP6.IsValid():
			err = errors.New("the VM's network has no IPv6")
		case p.Host == 0:
			err = u.choose(ctx, vm, g, p, do)
		default:
			err = u.take(vm, g, *p)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("publish port %s: %w", flag(*p), err))
		}
	}
	return errors.Join(append(errs, u.note(vm))...)
}

// take keeps a port from others.
func (u *Upkeep) take(vm VM, g *network.Guest, p filter.Port) error {
	if owner, at := overlapping(vm, p); owner != "" {
		return fmt.Errorf("it is taken by VM %s, at %s: %w", owner, at, unix.EADDRINUSE)
	}
	sockets, err := reserve(p)
	if err != nil {
		release(sockets)
		return hint.Add(err, "stop what listens there (ss -ltnup), or publish another port: -p HOST:%d", p.Guest)
	}
	u.keep(g, p, sockets)
	return nil
}

// maxTries is how many free ports are tried: one may be free for one address or protocol and not for the other, or be a stopped host's VM's.
const maxTries = 32

// choose takes a port that is free, of those that the kernel gives programs which ask for none.
func (u *Upkeep) choose(ctx context.Context, vm VM, g *network.Guest, p *filter.Port, do Do) error {
	var tried []reserved // the kernel is not to give them again
	defer func() { release(tried) }()
	var last error
	for range maxTries {
		now := *p
		sockets, err := reserve(now)
		tried = append(tried, sockets...)
		if errors.Is(err, unix.EADDRINUSE) && len(sockets) > 0 {
			last = err
			continue
		}
		if err != nil {
			last = err
			break
		}
		last = fs.ErrExist
		if now.Host = sockets[0].port; !isLeased(vm, now) {
			last = lease(ctx, vm, now, do)
		}
		if last == nil {
			*p, tried = now, tried[:len(tried)-len(sockets)]
			u.keep(g, now, sockets)
			return nil
		}
		if !errors.Is(last, fs.ErrExist) {
			return last
		}
	}
	return fmt.Errorf("no port of the host is free: %w", last)
}

// overlapping is the VM that has a port on an address at which p is too, "" if none has.
func overlapping(vm VM, p filter.Port) (owner string, at netip.Addr) {
	for name, owner := range vm.Store.Leases(portLease) {
		address, rest, _ := strings.Cut(name, " ")
		number, protocol, _ := strings.Cut(rest, "/")
		a, addressErr := netip.ParseAddr(address)
		n, err := strconv.ParseUint(number, 10, 16)
		if addressErr != nil || err != nil || owner == vm.ID {
			continue
		}
		if (spec.Port{HostIP: a, HostPort: uint16(n), Protocol: protocol}).Overlaps(specPort(p)) {
			return owner, a
		}
	}
	return "", at
}

func isLeased(vm VM, p filter.Port) bool {
	owner, _ := overlapping(vm, p)
	return owner != ""
}
