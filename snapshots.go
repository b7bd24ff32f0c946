package smartvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/snapshot"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/stranger"
	"push.rocks/smartvm/spec"
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

// Snapshot finds a snapshot by its id, its name or the beginning of its id. Returns snapshot.ErrNotFound.
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

// RemoveSnapshot removes a snapshot. While VMs that started from it are there it is a *snapshot.InUseError; with force they run on,
// and cannot be started again. Returns snapshot.ErrNotFound.
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
	return h.unclaim([]string{id})
}

// PruneSnapshots removes those that no VM has started from, and returns their ids.
func (h *Host) PruneSnapshots(ctx context.Context) ([]string, error) {
	all, err := h.Snapshots()
	if err != nil {
		return nil, err
	}
	removed, err := all.Prune(ctx, nil)
	return removed, errors.Join(err, h.unclaim(removed))
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
	errs := []error{err, h.unclaim(removed)}
	// Who made one may have died before it claimed its image, and that of one that was imported may have come since.
	list, _ := all.List() // of those that are damaged nothing is known
	for _, sn := range list {
		if err := h.claim(sn); !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, snapshot.ErrDamaged) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// claim says in the image that a snapshot needs it. The VM that it was made of does so too.
func (h *Host) claim(sn *snapshot.Snapshot) error {
	s, err := readSaved(sn)
	if err != nil {
		return err
	}
	for _, users := range s.Images {
		if sn.Imported && !stranger.IsUsers(users) {
			continue
		}
		err := os.Symlink(sn.Dir(), filepath.Join(h.local(users), claimName(sn.ID)))
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("claim image for snapshot %s: %w", sn.ID, err)
		}
	}
	return nil
}

// Image is what the snapshot's VM was made of, which is not in the snapshot. "": of no image.
func (sn *Snapshot) Image() string {
	s, _ := readSaved(sn.Snapshot) // for people to read
	return s.Spec.Image
}

// Lacks says what of this host VMs of the snapshot would read that is not here, and what to do about it.
func (sn *Snapshot) Lacks() error {
	s, err := readSaved(sn.Snapshot)
	if err != nil {
		return err
	}
	var errs []error
	lacks := func(id, path string) {
		if slices.Contains(s.Drives, id) {
			return
		}
		_, err := os.Stat(sn.host.local(path))
		switch {
		case err != nil && id == spec.ModulesDrive:
			err = hint.Add(fmt.Errorf("the kernel's modules are not here, or not the same: drive %s: %w", id, err), "smartvm image import --kernel VMLINUZ --modules DIR kernel, with those of its kernel")
		case err != nil && !filepath.IsAbs(path) && s.Spec.Image != "":
			err = hint.Add(fmt.Errorf("image %s is not here, or not the same: drive %s: %w", s.Spec.Image, id, err), "smartvm image pull %s", s.Spec.Image)
		case err != nil:
			err = hint.Add(fmt.Errorf("drive %s: %w", id, err), "bring it back: the guest has it open")
		}
		errs = append(errs, err)
	}
	for _, d := range s.Spec.Drives {
		lacks(d.DriveID, d.PathOnHost)
	}
	for _, d := range s.Spec.Pmem {
		lacks(d.ID, d.PathOnHost)
	}
	return errors.Join(errs...)
}

// unclaim lets images go that snapshots needed which are gone.
func (h *Host) unclaim(snapshots []string) error {
	var errs []error
	for _, id := range snapshots {
		for _, dir := range []string{store.ImageDir + "/objects", store.BaseDir} {
			claims, _ := filepath.Glob(filepath.Join(h.opts.DataDir, dir, "*/users", claimName(id))) // the pattern is well-formed
			for _, claim := range claims {
				if err := os.Remove(claim); err != nil && !errors.Is(err, fs.ErrNotExist) {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// claimName is how a snapshot says in an image that it needs it.
func claimName(id string) string { return "snapshot-" + id }

// portable makes a path below the data directory relative to it.
func (h *Host) portable(path string) string {
	if rel, err := filepath.Rel(h.opts.DataDir, path); err == nil && filepath.IsLocal(rel) {
		return rel
	}
	return path
}

// local is the reverse of portable.
func (h *Host) local(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(h.opts.DataDir, path)
}

// releaseHold lets a VM go on that a process which has died held still for a snapshot.
func (h *Host) releaseHold(ctx context.Context, id string) error {
	hold, err := h.store.Abandoned(id)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, store.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	rec, err := readRecord(h.store, id)
	if errors.Is(err, fs.ErrNotExist) { // it is being removed
		return hold.Release()
	}
	if err != nil {
		return errors.Join(err, hold.Release())
	}
	m := h.machine(rec)
	state, sure, err := m.look(ctx)
	if err != nil {
		return errors.Join(err, hold.Abandon())
	}
	if sure && state != Paused && state != Running {
		return hold.Release()
	}
	// A VMM that still writes the snapshot answers when it has done so.
	ctx, cancel := context.WithTimeout(ctx, resumePatience)
	defer cancel()
	c := m.dialClient()
	if hold.Resumes() && (state == Paused || !sure) {
		if err = c.Resume(ctx); err == nil {
			h.log.Warn("went on after a snapshot that was given up", "vm", id)
		}
	}
	if mib, ok := hold.Deflates(); ok && err == nil {
		err = c.PatchBalloon(ctx, mib)
	}
	if g, guestErr := m.Guest(); hold.Resumes() && err == nil && guestErr == nil && m.hasAgent() && g.Ready() {
		err = m.guest().Thaw(ctx)
	}
	if err = errors.Join(err, c.Close()); err != nil {
		return errors.Join(err, hold.Abandon()) // it is tried again
	}
	return hold.Release()
}

// resumePatience bounds how long a VM is waited for that is to go on after a snapshot.
const resumePatience = time.Minute
