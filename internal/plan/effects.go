package plan

import (
	"push.rocks/smartvm/internal/cgroup"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
)

// Effects lists every kind of side effect that a VM can have on a host. docs/effects.md explains
// them and is checked against this list.
var Effects = journal.Kinds{
	"lease":   func() journal.Effect { return new(store.Lease) },
	"tree":    func() journal.Effect { return new(stage.Tree) },
	"file":    func() journal.Effect { return new(stage.File) },
	"content": func() journal.Effect { return new(stage.Content) },
	"kernel":  func() journal.Effect { return new(kernel.Extracted) },
	"share":   func() journal.Effect { return new(share.Image) },
	"owner":   func() journal.Effect { return new(stage.Owner) },
	"link":    func() journal.Effect { return new(stage.Link) },
	"cgroup":  func() journal.Effect { return new(cgroup.Group) },
	"use":     func() journal.Effect { return new(network.Use) },
	"tap":     func() journal.Effect { return new(network.Tap) },
	"slot":    func() journal.Effect { return new(network.Slot) },
	"guest":   func() journal.Effect { return new(network.Guest) },
	"bridged": func() journal.Effect { return new(bridged.Guest) },
	"process": func() journal.Effect { return new(vmm.Process) },
}
