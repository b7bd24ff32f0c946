package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/lock"
)

// Remove removes a snapshot. While VMs use it, or it is being exported, it is an *InUseError; with
// force it goes all the same, and VMs that are to be restored from it cannot be: those that run
// have its files open. Who holds the store would wait for himself. Returns ErrNotFound.
func (s *Store) Remove(ctx context.Context, ref string, force bool) error {
	release, err := s.alone(ctx)
	if err != nil {
		return err
	}
	return errors.Join(s.remove(ref, force), release())
}

func (s *Store) remove(ref string, force bool) error {
	id, err := s.resolve(ref)
	if err != nil {
		return err
	}
	if err := s.idle(id); err != nil && !(force && errors.Is(err, ErrInUse)) {
		return err
	}
	return s.take(id)
}

// idle returns an *InUseError for a snapshot that VMs use, or that is being exported. The caller
// has the store alone.
func (s *Store) idle(id string) error {
	by, err := kept.Users(true, s.Dir(id))
	if err != nil {
		return err
	}
	exported, err := s.exported(id)
	if err == nil && (exported || len(by) > 0) {
		err = &InUseError{ID: id, By: by, Exported: exported}
	}
	return err
}

// keep keeps this snapshot alone from being removed, until it is let go of or the process dies: for
// what may take as long as somebody else likes.
func (sn *Snapshot) keep(ctx context.Context) (release func() error, err error) {
	free, err := sn.s.Hold(ctx) // until it is kept
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, free()) }()
	if _, err := sn.s.read(sn.ID); err != nil {
		return nil, err
	}
	return sn.s.lock(ctx, sn.UsersDir(), lock.Shared, "another smartvm that looks at the same snapshot")
}

// exported says whether somebody keeps a snapshot.
func (s *Store) exported(id string) (bool, error) {
	f, err := os.Open(filepath.Join(s.Dir(id), kept.UsersDir))
	if isNotExist(err) || errors.Is(err, unix.ENOTDIR) {
		return false, nil // it is damaged
	}
	if err != nil {
		return false, fmt.Errorf("look for exports: %w", err)
	}
	defer f.Close()
	if err := lock.Try(f, lock.Exclusive); errors.Is(err, lock.ErrHeld) {
		return true, nil
	} else if err != nil {
		return false, fmt.Errorf("look for exports: %w", err)
	}
	return false, nil
}

// take removes a snapshot. Out of sight first: nothing is ever half there.
func (s *Store) take(id string) error {
	gone := s.temp(id + ".gone")
	err := errors.Join(os.RemoveAll(gone), os.Rename(s.Dir(id), gone))
	if err == nil {
		err = errors.Join(atomicfile.SyncDir(s.dir), os.RemoveAll(gone))
	}
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", id, err)
	}
	return nil
}

// Prune removes the snapshots that nobody uses and that keep does not want, and returns their ids.
// A nil keep wants none. Those that cannot be read stay.
func (s *Store) Prune(ctx context.Context, keep func(*Snapshot) bool) (removed []string, err error) {
	release, err := s.alone(ctx)
	if err != nil {
		return nil, err
	}
	removed, err = s.prune(keep)
	return removed, errors.Join(err, release())
}

func (s *Store) prune(keep func(*Snapshot) bool) (removed []string, err error) {
	all, err := s.List()
	if isUnreadable(err) {
		err = nil
	}
	for _, sn := range all {
		if keep != nil && keep(sn) {
			continue
		}
		terr := s.idle(sn.ID)
		if errors.Is(terr, ErrInUse) {
			continue
		}
		if terr == nil {
			terr = s.take(sn.ID)
		}
		if terr != nil {
			err = errors.Join(err, terr)
			continue
		}
		removed = append(removed, sn.ID)
	}
	return removed, err
}

// Sweep removes what nobody will miss: drafts of processes that died, what was half removed, and
// ephemeral snapshots without users, whose ids it returns. Where somebody holds the store it does
// nothing: there will be another time.
func (s *Store) Sweep(context.Context) (removed []string, err error) {
	f, err := os.Open(s.dir)
	if err != nil {
		return nil, fmt.Errorf("sweep snapshots: %w", err)
	}
	release := f.Close
	if err := lock.Try(f, lock.Exclusive); errors.Is(err, lock.ErrHeld) {
		return nil, release()
	} else if err != nil {
		return nil, errors.Join(fmt.Errorf("sweep snapshots: %w", err), release())
	}
	removed, err = s.prune(func(sn *Snapshot) bool { return !sn.Ephemeral })
	return removed, errors.Join(err, s.tidy(), release())
}

// tidy removes the drafts whose makers are gone. The caller has the store alone, so nobody begins
// one.
func (s *Store) tidy() error {
	entries, err := os.ReadDir(s.temp(""))
	if err != nil {
		return fmt.Errorf("clear away unfinished snapshots: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, s.tidyOne(s.temp(e.Name())))
	}
	return errors.Join(errs...)
}

func (s *Store) tidyOne(path string) error {
	f, err := kept.OpenPlain(path)
	if isNotExist(err) {
		return nil // its maker has just ended it
	}
	if err == nil {
		defer f.Close()
		if lock.Try(f, lock.Exclusive) != nil {
			return nil // its maker lives
		}
		err = os.RemoveAll(path)
	}
	if err != nil {
		return fmt.Errorf("clear away unfinished snapshots: %w", err)
	}
	return nil
}
