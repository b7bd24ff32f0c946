package attach

import (
	"push.rocks/smartvm/network"
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
		warm := ""
		if i.Warm {
			warm = i.File
		}
		if sent, received, err := network.Traffic(i.Tap, warm); err == nil {
			s.SentBytes, s.ReceivedBytes = sent, received
			// Who may not look at tables sees the rest.
			s.Rules, _ = filter.Counts(i.Network.Table(), i.Tap)
		}
		states = append(states, s)
	}
	return states
}
