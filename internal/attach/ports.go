package attach

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/spec"
)

// Port is one of the host that leads to a guest's while the VM runs.
type Port struct {
	Address  netip.Addr `json:"address,omitzero"` // of the host; zero: all, of both families
	Host     uint16     `json:"host"`
	Guest    uint16     `json:"guest"`
	Protocol string     `json:"protocol"` // "tcp" or "udp"
	// Shadows says that something on the host listens there too, which came while no process
	// supervised the VM: the guest gets what is sent there.
	Shadows bool `json:"shadows,omitempty"`
}

// NewPort is a port as the tables have it.
func NewPort(p filter.Port, shadows bool) Port {
	return Port{p.Address, p.Host, p.Guest, p.Protocol, shadows}
}

// Filter is the port as the tables have it.
func (p Port) Filter() filter.Port {
	return filter.Port{Address: p.Address, Host: p.Host, Guest: p.Guest, Protocol: p.Protocol}
}

// Addresses are those of the host at which the port is.
func (p Port) Addresses() []netip.AddrPort {
	var all []netip.AddrPort
	for _, a := range SpecPort(p.Filter()).Addresses() {
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

// Flag is a port as -p takes it.
func Flag(p filter.Port) string {
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

// SpecPort is the port as a spec has it.
func SpecPort(p filter.Port) spec.Port {
	return spec.Port{HostIP: p.Address, HostPort: p.Host, GuestPort: p.Guest, Protocol: p.Protocol}
}

// Expose adds ports to a spec that publishes all which its image exposes, "80/tcp", but for those
// that it publishes anyhow. Returns a *spec.FieldError where they are too many.
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
		if !slices.ContainsFunc(Ports(s), func(q filter.Port) bool {
			return q.Guest == p.GuestPort && q.Protocol == protocol
		}) {
			s.Ports = append(s.Ports, p)
		}
	}
	if len(s.Ports) > spec.MaxPorts {
		return &spec.FieldError{
			Path: "ports", Value: len(s.Ports),
			Reason: fmt.Sprintf("must be at most %d, with those that the image exposes", spec.MaxPorts),
		}
	}
	return nil
}

// portLease is the kind of leases of ports.
const portLease = "port"

// PortLeases are those of a port.
func PortLeases(vm VM, p filter.Port) (all []journal.Effect) {
	for _, a := range SpecPort(p).Addresses() {
		all = append(all, vm.Store.Lease(portLease, fmt.Sprintf("%s %d/%s", a, p.Host, p.Protocol), vm.ID))
	}
	return all
}

// Overlapping is the VM that has a port on an address at which p is too, "" if none has.
func Overlapping(vm VM, p filter.Port) (owner string, at netip.Addr) {
	for name, owner := range vm.Store.Leases(portLease) {
		address, rest, _ := strings.Cut(name, " ")
		number, protocol, _ := strings.Cut(rest, "/")
		a, addressErr := netip.ParseAddr(address)
		n, err := strconv.ParseUint(number, 10, 16)
		if addressErr != nil || err != nil || owner == vm.ID {
			continue
		}
		if (spec.Port{HostIP: a, HostPort: uint16(n), Protocol: protocol}).Overlaps(SpecPort(p)) {
			return owner, a
		}
	}
	return "", at
}

const maxPorts = 1 << 20 // bytes of the file with them

// Published are the ports of a VM that runs, whose directory is dir; none of another.
func Published(dir string) ([]Port, error) {
	if _, err := os.Stat(filepath.Join(dir, store.RunJournal)); err != nil {
		return nil, nil
	}
	ports, err := atomicfile.ReadJSON[[]Port](filepath.Join(dir, store.PortsFile), maxPorts, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return ports, err
}
