package base

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/lock"
)

// index is what is known beyond bundles.
type index struct {
	Version int               `json:"version"`
	Presets map[string]string `json:"presets"` // what each was when it was last looked up: a bundle's id
	// Pins are digests of bundles that are gone: should they come back, they must be the same.
	Pins map[string]pin `json:"pins"`
}

type pin struct {
	Kernel string `json:"kernel"`
	Rootfs string `json:"rootfs"`
}

const maxIndex = 1 << 20 // bytes

func (s *Store) readIndex() (*index, error) {
	i, err := readJSON[index](s.path(indexFile), maxIndex)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err == nil && i.Version != 1 {
		return nil, fmt.Errorf("read %s: %w: version %d", s.path(indexFile), ErrCorrupt, i.Version)
	}
	if i.Presets == nil {
		i.Presets = map[string]string{}
	}
	if i.Pins == nil {
		i.Pins = map[string]pin{}
	}
	i.Version = 1
	return &i, nil
}

// change updates the index.
func (s *Store) change(ctx context.Context, update func(i *index)) error {
	release, err := s.lock(ctx)
	if err != nil {
		return err
	}
	i, err := s.readIndex()
	if err == nil {
		update(i)
		err = atomicfile.WriteJSON(s.path(indexFile), i)
	}
	return errors.Join(err, release())
}

// evict removes bundles that were not used for the longest time until there are no more than there
// may be. Those that VMs use or images have, and the one to keep, stay.
func (s *Store) evict(ctx context.Context, keep string) error {
	all, err := s.List()
	if err != nil {
		return err
	}
	for n := len(all); n > s.opts.MaxStored && len(all) > 0; {
		b := all[len(all)-1]
		all = all[:len(all)-1]
		if b.ID == keep || s.opts.Named(b.ID) {
			continue
		}
		err := s.takeIf(ctx, b.ID, true, func() {
			s.log.Warn("evicting a base image: more are stored than are kept", "bundle", b.ID, "kept", s.opts.MaxStored, "used",
				b.LastAccessedAt)
		})
		if errors.Is(err, ErrInUse) {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("evict bundle %s: %w", b.ID, err)
		}
		n--
	}
	return nil
}

// Remove takes a bundle away, and forgets what it was: should it be fetched again it may be
// another. Returns ErrInUse, fs.ErrNotExist.
func (s *Store) Remove(ctx context.Context, id string) error {
	err := s.take(ctx, id, false)
	if err == nil {
		err = s.change(ctx, func(i *index) { delete(i.Pins, id) })
	}
	if err != nil {
		return fmt.Errorf("remove bundle %.140q: %w", id, err)
	}
	return nil
}

func (s *Store) take(ctx context.Context, id string, remember bool) error {
	return s.takeIf(ctx, id, remember, func() {})
}

// takeIf removes a bundle unless it is in use, and calls last before. With remember, its digests
// are kept.
func (s *Store) takeIf(ctx context.Context, id string, remember bool, last func()) error {
	f, err := s.lockBundle(id, func(f *os.File) error { return lock.Try(f, lock.Exclusive) })
	if errors.Is(err, lock.ErrHeld) {
		return ErrInUse
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if s.opts.InUse(s.path(id)) {
		return ErrInUse
	}
	last()
	if b, err := s.read(id); err == nil && remember && !b.Hosted {
		err := s.change(ctx, func(i *index) { i.Pins[id] = pin{b.Kernel.SHA256, b.Rootfs.SHA256} })
		if err != nil {
			return err
		}
	}
	// Out of sight first: a bundle is never half there. What a crash leaves of it goes when the next
	// one is made.
	gone := s.path(workDir, "gone-"+rand.Text())
	if err := errors.Join(os.MkdirAll(s.path(workDir), 0o700), os.Rename(s.path(id), gone)); err != nil {
		return err
	}
	return errors.Join(atomicfile.SyncDir(s.opts.Dir), os.RemoveAll(gone))
}
