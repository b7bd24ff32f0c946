package smartvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/configure"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/status"
)

// Pause stops the guest's CPUs and devices. What runs in it by Exec waits, and goes on with it;
// with Firecracker 1.16.0 and 1.16.1 other connections to the guest end by the Resume, see
// [firecracker.Client.Resume]. Returns ErrState while a snapshot of it is being made.
func (m *Machine) Pause(ctx context.Context) error {
	hold, err := m.vm.Freeze("pause")
	if err != nil {
		return err
	}
	err = m.vm.Call(ctx, "pause", "pause", func(c *firecracker.Client) error { return c.Pause(ctx) })
	if err == nil {
		m.vm.Event(status.EventPaused)
	}
	return errors.Join(err, hold.Release())
}

// Resume lets a paused guest go on. Returns ErrState while a snapshot of it is being made.
func (m *Machine) Resume(ctx context.Context) error {
	hold, err := m.vm.Freeze("resume")
	if err != nil {
		return err
	}
	err = m.vm.Call(ctx, "resume", "resume", func(c *firecracker.Client) error { return c.Resume(ctx) })
	if err == nil {
		m.vm.Event(status.EventResumed)
	}
	return errors.Join(err, hold.Release())
}

// Info is what the VMM says of itself. Before the VM is started, the error has Code NO_CLIENT.
func (m *Machine) Info(ctx context.Context) (info firecracker.InstanceInfo, err error) {
	err = m.vm.Call(ctx, "call", "get info", func(c *firecracker.Client) (err error) {
		info, err = c.GetInstanceInfo(ctx)
		return err
	})
	return info, err
}

// VMConfig is the configuration that the VMM has. Paths in it are those in its working directory.
func (m *Machine) VMConfig(ctx context.Context) (config firecracker.FullVMConfiguration, err error) {
	err = m.vm.Call(ctx, "call", "get VM config", func(c *firecracker.Client) (err error) {
		config, err = c.GetVMConfig(ctx)
		return err
	})
	return config, err
}

// FlushMetrics makes the VMM write its metrics now; by itself it does so every minute and at the
// end. The Spec must have Metrics.
func (m *Machine) FlushMetrics(ctx context.Context) error {
	return m.vm.Call(ctx, "call", "flush metrics", func(c *firecracker.Client) error { return c.FlushMetrics(ctx) })
}

// SetMetadata replaces the guest's metadata with anything that encodes to JSON. The Spec must have
// MMDS.
func (m *Machine) SetMetadata(ctx context.Context, metadata any) error {
	return m.vm.Call(ctx, "call", "set metadata", func(c *firecracker.Client) error { return c.PutMMDS(ctx, metadata) })
}

// PatchMetadata merges patch into the metadata, as RFC 7396 says: null removes.
func (m *Machine) PatchMetadata(ctx context.Context, patch any) error {
	return m.vm.Call(ctx, "call", "patch metadata", func(c *firecracker.Client) error { return c.PatchMMDS(ctx, patch) })
}

// Metadata returns the guest's metadata, {} if there is none.
func (m *Machine) Metadata(ctx context.Context) (metadata json.RawMessage, err error) {
	err = m.vm.Call(ctx, "call", "get metadata", func(c *firecracker.Client) (err error) {
		metadata, err = c.GetMMDS(ctx)
		return err
	})
	return metadata, err
}

// UpdateDrive changes the limits of a drive; a nil bucket stays, one of zeros is taken away. With
// reread the VMM looks at the size of the drive's file again and tells the guest.
func (m *Machine) UpdateDrive(ctx context.Context, driveID string, limit *RateLimiter, reread bool) error {
	d := firecracker.PartialDrive{DriveID: driveID, RateLimiter: configure.RateLimiter(limit)}
	if reread {
		d.PathOnHost = configure.DevicePath(driveID)
	}
	return m.vm.Call(ctx, "call", "update drive", func(c *firecracker.Client) error { return c.PatchDrive(ctx, d) })
}

// UpdatePmem changes the limits of a pmem device; a nil bucket stays, one of zeros is taken away.
// What is bounded are flushes, each of the whole file. Returns ErrNotSupported before Firecracker
// 1.16.
func (m *Machine) UpdatePmem(ctx context.Context, id string, limit *RateLimiter) error {
	p := firecracker.PartialPmem{ID: id, RateLimiter: configure.RateLimiter(limit)}
	return m.vm.Call(ctx, "call", "update pmem", func(c *firecracker.Client) error {
		has := slices.ContainsFunc(m.rec().Spec.Pmem, func(p Pmem) bool { return p.ID == id })
		if err := m.needs(p, has, "pmem device "+id); err != nil {
			return err
		}
		return c.PatchPmem(ctx, p)
	})
}

// UpdateNetworkInterface changes the limits of an interface; a nil bucket stays, one of zeros is
// taken away.
func (m *Machine) UpdateNetworkInterface(ctx context.Context, ifaceID string, rx, tx *RateLimiter) error {
	n := firecracker.PartialNetworkInterface{
		IfaceID: ifaceID, RxRateLimiter: configure.RateLimiter(rx),
		TxRateLimiter: configure.RateLimiter(tx),
	}
	return m.vm.Call(ctx, "call", "update network interface", func(c *firecracker.Client) error {
		return c.PatchNetworkInterface(ctx, n)
	})
}

// UpdateBalloon sets how many MiB the balloon takes from the guest. The VMM refuses until the
// guest's driver is active.
func (m *Machine) UpdateBalloon(ctx context.Context, amountMiB uint32) error {
	return m.vm.Call(ctx, "call", "update balloon", func(c *firecracker.Client) error {
		return c.PatchBalloon(ctx, amountMiB)
	})
}

// UpdateBalloonStats sets the seconds between the balloon's statistics; it cannot switch them on or
// off.
func (m *Machine) UpdateBalloonStats(ctx context.Context, intervalS uint16) error {
	return m.vm.Call(ctx, "call", "update balloon statistics", func(c *firecracker.Client) error {
		return c.PatchBalloonStats(ctx, intervalS)
	})
}

// BalloonStats tells about the guest's memory, if the Spec asked for statistics.
func (m *Machine) BalloonStats(ctx context.Context) (stats firecracker.BalloonStats, err error) {
	err = m.vm.Call(ctx, "call", "get balloon statistics", func(c *firecracker.Client) (err error) {
		stats, err = c.GetBalloonStats(ctx)
		return err
	})
	return stats, err
}

// BalloonHinting is how far the guest has come with saying which of its memory is free. Commands
// are virtio's: 0 is stop, 1 is done, and others are the number of a run.
type BalloonHinting struct {
	HostCommand  uint64  `json:"hostCommand"`
	GuestCommand *uint64 `json:"guestCommand,omitempty"` // nil until the guest gave one
}

// hints calls f of a VM whose balloon has FreePageHinting.
func (m *Machine) hints(ctx context.Context, name string, f func(*firecracker.Client) error) error {
	return m.vm.Call(ctx, "call", name, func(c *firecracker.Client) error {
		b := m.rec().Spec.Balloon
		if err := m.needs(firecracker.Balloon{FreePageHinting: true}, b != nil &&
			b.FreePageHinting, "balloon.freePageHinting"); err != nil {
			return err
		}
		return f(c)
	})
}

// StartBalloonHinting has the guest say once which of its memory is free, and the host takes that
// back. It returns at once: BalloonHinting says how far the guest has come. The VMM refuses until
// the guest's driver is active. Returns ErrState if the Spec's Balloon has no FreePageHinting, and
// ErrNotSupported before Firecracker 1.14.
func (m *Machine) StartBalloonHinting(ctx context.Context) error {
	return m.hints(ctx, "start balloon hinting", func(c *firecracker.Client) error {
		return c.StartBalloonHinting(ctx, true)
	})
}

// StopBalloonHinting ends that before the guest is done. Errors are those of StartBalloonHinting.
func (m *Machine) StopBalloonHinting(ctx context.Context) error {
	return m.hints(ctx, "stop balloon hinting", func(c *firecracker.Client) error { return c.StopBalloonHinting(ctx) })
}

// BalloonHinting returns how far the guest has come. Errors are those of StartBalloonHinting.
func (m *Machine) BalloonHinting(ctx context.Context) (state BalloonHinting, err error) {
	err = m.hints(ctx, "get balloon hinting", func(c *firecracker.Client) error {
		got, err := c.GetBalloonHinting(ctx)
		state = BalloonHinting(got)
		return err
	})
	return state, err
}

// needs refuses what the VM's Firecracker is too old for, by the oldest version that takes body,
// and what is about a device that the VM does not have. Device is the device's field in a Spec.
func (m *Machine) needs(body any, has bool, device string) error {
	if err := firecracker.CheckVersion(m.rec().VMM(), body); err != nil {
		return hint.Add(fmt.Errorf("%w: %w", ErrNotSupported, err), "make the VM anew with a newer Firecracker")
	}
	if !has {
		return hint.Add(fmt.Errorf("%w: its configuration has no %s", ErrState, device), "make the VM anew with %s", device)
	}
	return nil
}

// MemoryHotplugStatus is the state of memory that can be plugged in while a VM runs. MiB
// throughout.
type MemoryHotplugStatus struct {
	TotalSizeMiB     uint64 `json:"totalSizeMib"`
	SlotSizeMiB      uint64 `json:"slotSizeMib"`
	BlockSizeMiB     uint64 `json:"blockSizeMib"`
	PluggedSizeMiB   uint64 `json:"pluggedSizeMib"` // what the guest has
	RequestedSizeMiB uint64 `json:"requestedSizeMib"`
}

// UpdateMemoryHotplug sets how much memory the guest has besides MemSizeMiB, in whole blocks of the
// Spec's MemoryHotplug. It returns at once: MemoryHotplug says how far the guest has come, and a
// guest may give back less than it is asked for. The size is part of snapshots, and ends with the
// run: a VM that is started has none. The VMM refuses until the guest's driver is active. Returns a
// *FieldError for a size that cannot be, ErrState if the Spec has no MemoryHotplug, and
// ErrNotSupported before Firecracker 1.14.
func (m *Machine) UpdateMemoryHotplug(ctx context.Context, sizeMiB int) error {
	return m.vm.Call(ctx, "call", "update memory hotplug", func(c *firecracker.Client) error {
		h := m.rec().Spec.MemoryHotplug
		err := m.needs(firecracker.MemoryHotplugConfig{}, h != nil, "memoryHotplug")
		if err == nil {
			err = h.Check(sizeMiB)
		}
		if err != nil {
			return err
		}
		return c.PatchMemoryHotplug(ctx, uint64(sizeMiB))
	})
}

// MemoryHotplug returns how much memory is plugged in. Errors are those of UpdateMemoryHotplug.
func (m *Machine) MemoryHotplug(ctx context.Context) (s MemoryHotplugStatus, err error) {
	err = m.vm.Call(ctx, "call", "get memory hotplug", func(c *firecracker.Client) error {
		if err := m.needs(firecracker.MemoryHotplugConfig{}, m.rec().Spec.MemoryHotplug != nil, "memoryHotplug"); err != nil {
			return err
		}
		got, err := c.GetMemoryHotplug(ctx)
		s = MemoryHotplugStatus(got)
		return err
	})
	return s, err
}
