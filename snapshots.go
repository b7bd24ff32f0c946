package smartvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"push.rocks/smartvm/internal/restore"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/snapshot"
	"push.rocks/smartvm/status"
)

// What goes wrong with snapshots; test with errors.Is.
var (
	ErrSnapshotNotFound = snapshot.ErrNotFound
	ErrSnapshotExists   = snapshot.ErrExists
	ErrSnapshotInUse    = snapshot.ErrInUse
	ErrSnapshotDamaged  = snapshot.ErrDamaged
)

// Snapshots is where the snapshots of this host are.
func (h *Host) Snapshots() (*snapshot.Store, error) {
	if err := store.Secure(h.opts.DataDir); err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	return snapshot.Open(filepath.Join(h.opts.DataDir, store.SnapshotDir))
}

// Snapshot finds a snapshot by its id, its name or the beginning of its id. Returns
// snapshot.ErrNotFound.
func (h *Host) Snapshot(ref string) (*Snapshot, error) {
	all, err := h.Snapshots()
	if err != nil {
		return nil, err
	}
	sn, err := all.Get(ref)
	if err != nil {
		return nil, err
	}
	return h.AsSnapshot(sn), nil
}

// AsSnapshot is one of Snapshots as Host.Snapshot returns it.
func (h *Host) AsSnapshot(sn *snapshot.Snapshot) *Snapshot { return &Snapshot{Snapshot: sn, host: h} }

// RemoveSnapshot removes a snapshot. While VMs that started from it are there it is a
// *snapshot.InUseError; with force they run on, and cannot be started again. Returns
// snapshot.ErrNotFound.
func (h *Host) RemoveSnapshot(ctx context.Context, ref string, force bool) error {
	all, err := h.Snapshots()
	if err != nil {
		return err
	}
	id := ref // of one that is damaged
	if sn, err := all.Get(ref); err == nil {
		id = sn.ID
	}
	if err := all.Remove(ctx, ref, force); err != nil {
		return err
	}
	return h.removed([]string{id})
}

// PruneSnapshots removes those that no VM has started from, and returns their ids.
func (h *Host) PruneSnapshots(ctx context.Context) ([]string, error) {
	all, err := h.Snapshots()
	if err != nil {
		return nil, err
	}
	removed, err := all.Prune(ctx, nil)
	return removed, errors.Join(err, h.removed(removed))
}

// sweepSnapshots removes what is half made, and what was made for forks that are gone.
func (h *Host) sweepSnapshots(ctx context.Context) error {
	if _, err := os.Lstat(filepath.Join(h.opts.DataDir, store.SnapshotDir)); err != nil {
		return nil // there never was one
	}
	all, err := h.Snapshots()
	if err != nil {
		return err
	}
	removed, err := all.Sweep(ctx)
	errs := []error{err, h.removed(removed)}
	// The process that made one may have died before it referred to its image, and that of an imported
	// one may have come since.
	list, _ := all.List() // of those that cannot be read nothing is known
	for _, sn := range list {
		err := h.data().Refer(sn)
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, snapshot.ErrDamaged) && !errors.Is(err, ErrNotSupported) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removed says of snapshots that they are gone, in the images that they referred to and as events.
func (h *Host) removed(snapshots []string) error {
	for _, id := range snapshots {
		h.ring.Append(
			status.Event{Type: status.EventSnapshot, Attributes: map[string]string{"action": "remove", "snapshot": id}})
	}
	return h.data().Unrefer(snapshots)
}

// Image is what the snapshot's VM was made of, which is not in the snapshot. "": of no image.
func (sn *Snapshot) Image() string {
	s, _ := restore.Read(sn.Snapshot) // for people to read
	return s.Spec.Image
}

// Lacks says what of this host VMs of the snapshot would read that is not here, and what to do
// about it.
func (sn *Snapshot) Lacks() error {
	s, err := restore.Read(sn.Snapshot)
	if err != nil {
		return err
	}
	return sn.host.data().Missing(s)
}

func (h *Host) data() restore.Data { return restore.Data(h.opts.DataDir) }
