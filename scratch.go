package smartvm

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"push.rocks/smartvm/spec"
)

// ReadScratch gives read the path of the ext4 that has what a VM of an image has written, while nothing in it changes: programs of a VM that
// runs stand still meanwhile. Returns ErrNotSupported for other VMs, and ErrState.
func (m *Machine) ReadScratch(ctx context.Context, read func(path string) error) error {
	p, err := m.host.proposal(m.rec())
	if err != nil {
		return err
	}
	all := devices(&m.rec().Spec, p)
	at := slices.IndexFunc(all, func(d device) bool { return d.id == spec.ScratchDrive })
	if at < 0 || !m.hasAgent() {
		return fmt.Errorf("read what VM %s has written: %w: it has no disk over an image", m.rec().ID, ErrNotSupported)
	}
	switch state, err := m.State(ctx); {
	case err != nil:
		return err
	case slices.Contains(transitions["start"], state):
		lock, err := m.acquire(ctx, "start")
		if err != nil {
			return err
		}
		return errors.Join(read(all[at].source), lock.Unlock())
	case state != Running:
		return &StateError{ID: m.rec().ID, Op: "read the disk of", State: state, Want: []State{Running, Stopped}}
	}
	hold, err := m.hold("read the disk of")
	if err != nil {
		return err
	}
	still, err := m.guest().Freeze(ctx, false)
	if err == nil {
		err = errors.Join(read(all[at].source), still.Close())
	}
	return errors.Join(err, hold.Release())
}
