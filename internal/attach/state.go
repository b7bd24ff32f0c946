package attach

import (
	"github.com/vishvananda/netlink"

	"push.rocks/smartvm/network/filter"
)

// State is an interface and what has gone through it since the VM's start.
type State struct {
	Interface
	SentBytes     uint64         `json:"sentBytes"` // by the guest
	ReceivedBytes uint64         `json:"receivedBytes"`
	Rules         []filter.Count `json:"rules,omitempty"` // of the VM's policy
}

// States looks at interfaces. Those of a VM that does not run have sent nothing.
func States(all []Interface) (states []State) {
	for _, i := range all {
		s := State{Interface: i}
		if link, err := netlink.LinkByName(i.Tap); err == nil && link.Attrs().Statistics != nil {
			s.SentBytes, s.ReceivedBytes = link.Attrs().Statistics.RxBytes, link.Attrs().Statistics.TxBytes
			// Who may not look at tables sees the rest.
			s.Rules, _ = filter.Counts(i.Network.Table(), i.Tap)
		}
		states = append(states, s)
	}
	return states
}
