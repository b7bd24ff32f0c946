package smartvm

import (
	"net/netip"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/inspect"
)

// Interface is one of a VM's on a network of ours, and what has gone through it since the VM's
// start.
type Interface struct {
	ID      string         `json:"id"`
	Network network.Config `json:"network"`
	Tap     string         `json:"tap"`
	MAC     string         `json:"mac"`
	MTU     int            `json:"mtu,omitempty"`
	IP4     netip.Addr     `json:"ip4,omitzero"`
	IP6     netip.Addr     `json:"ip6,omitzero"`
	// Namespace is the file of the VM's own namespace, if it has one. Tap, MAC, IP4 and IP6 are those
	// of the namespace then; in the guest they are always the same.
	Namespace string `json:"namespace,omitempty"`
	Warm      bool   `json:"warm,omitempty"` // the namespace was made before the VM: see Host.Warm
	// servers that the guest's questions go to; empty: those of the network, or of the host
	DNS []netip.Addr `json:"dns,omitempty"`

	SentBytes     uint64          `json:"sentBytes"` // by the guest
	ReceivedBytes uint64          `json:"receivedBytes"`
	Rules         []inspect.Count `json:"rules,omitempty"` // of the VM's policy
	Ports         []PublishedPort `json:"ports,omitempty"` // published, while the VM runs
}

// PublishedPort is a port of the host that leads to one of a guest's while the VM runs.
type PublishedPort struct {
	Address  netip.Addr `json:"address,omitzero"` // of the host; zero: all, of both families
	Host     uint16     `json:"host"`
	Guest    uint16     `json:"guest"`
	Protocol string     `json:"protocol"` // "tcp" or "udp"
	// Shadows says that a service of the host listens there too, which came while no process
	// supervised the VM: the guest receives what is sent there.
	Shadows bool `json:"shadows,omitempty"`
}

// Addresses are those of the host at which the port is.
func (p PublishedPort) Addresses() []netip.AddrPort { return attach.Port(p).Addresses() }

// String is the port as lists have it: "127.0.0.1:8080->80/tcp".
func (p PublishedPort) String() string { return attach.Port(p).String() }

func interfacesOf(all []attach.State) (list []Interface) {
	for _, s := range all {
		i := Interface{
			ID: s.ID, Network: s.Network, Tap: s.Tap, MAC: s.MAC, MTU: s.MTU, IP4: s.IP4, IP6: s.IP6, Namespace: s.File,
			Warm: s.Warm, DNS: s.DNS,
			SentBytes: s.SentBytes, ReceivedBytes: s.ReceivedBytes, Rules: s.Rules,
		}
		for _, p := range s.Ports {
			i.Ports = append(i.Ports, PublishedPort(p))
		}
		list = append(list, i)
	}
	return list
}

// Traffic is what has gone through the VM's interfaces on our networks since its start, in bytes.
func (i *Inspection) Traffic() (received, sent uint64) {
	for _, n := range i.Interfaces {
		received, sent = received+n.ReceivedBytes, sent+n.SentBytes
	}
	return received, sent
}

// Ports are those that are published of the VM while it runs.
func (i *Inspection) Ports() (all []PublishedPort) {
	for _, n := range i.Interfaces {
		all = append(all, n.Ports...)
	}
	return all
}
