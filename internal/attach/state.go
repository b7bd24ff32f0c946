package attach

import (
	"path/filepath"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/inspect"
)

// State is an interface and what has gone through it since the VM's start.
type State struct {
	Interface
	SentBytes     uint64          `json:"sentBytes"` // by the guest
	ReceivedBytes uint64          `json:"receivedBytes"`
	Rules         []inspect.Count `json:"rules,omitempty"` // of the VM's policy
	Ports         []Port          `json:"ports,omitempty"` // published, while the VM runs
}

// States looks at interfaces of a VM whose directory is dir. Those of one that does not run have
// sent nothing. Their networks have the settings that they are up with or, after refresh, would be.
func States(all []Interface, dir string, refresh func(*network.Config) error) (states []State, err error) {
	for n, i := range all {
		now, _, err := network.Current(filepath.Join(filepath.Dir(dir), store.NetworkDir), i.Network.Name)
		if err == nil && now.Name == "" {
			now = i.Network
			err = refresh(&now)
		}
		if err != nil {
			return nil, err
		}
		i.Network.Settings = now.Settings
		s := State{Interface: i}
		if n == 0 {
			s.Ports, _ = Published(dir)
		}
		warm := ""
		if i.Warm {
			warm = i.File
		}
		if sent, received, err := network.Traffic(i.Tap, warm); err == nil {
			s.SentBytes, s.ReceivedBytes = sent, received
			// Who may not look at tables sees the rest.
			s.Rules, _ = inspect.Counts(i.Network.Table(), i.Tap)
		}
		states = append(states, s)
	}
	return states, nil
}
