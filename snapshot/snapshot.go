package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/internal/strictjson"
	"push.rocks/smartvm/spec"
)

// Snapshot is one that is there, or was when it was looked up.
type Snapshot struct {
	Manifest
	s *Store
}

// Dir is the snapshot's directory. What is in it must not be written.
func (sn *Snapshot) Dir() string { return sn.s.Dir(sn.ID) }

// Path is where one of Files is, by its path in the snapshot.
func (sn *Snapshot) Path(name string) string {
	return filepath.Join(sn.Dir(), filepath.FromSlash(name))
}

// UsersDir is the directory in which a VM says that it uses the snapshot, by a symbolic link to its
// own directory. Who makes one holds the store.
func (sn *Snapshot) UsersDir() string { return filepath.Join(sn.Dir(), kept.UsersDir) }

// Users returns the directories of the VMs that use the snapshot.
func (sn *Snapshot) Users() ([]string, error) { return kept.Users(false, sn.Dir()) }

// Usage is how many bytes the snapshot takes of its disk. What it shares with other files
// (reflinks) counts in full.
func (sn *Snapshot) Usage() (int64, error) { return kept.Usage(sn.Dir()) }

// Get returns the snapshot of an id, a name, or what only one id begins with. Returns ErrNotFound,
// ErrDamaged, and spec.ErrNotSupported for one that another version of smartvm has made.
func (s *Store) Get(ref string) (*Snapshot, error) {
	id, err := s.resolve(ref)
	if err != nil {
		return nil, err
	}
	return s.read(id)
}

func (s *Store) read(id string) (*Snapshot, error) {
	m, err := readManifest(s.Dir(id))
	if isNotExist(err) {
		if _, derr := os.Lstat(s.Dir(id)); isNotExist(derr) {
			return nil, fmt.Errorf("%w: %s", ErrNotFound, id)
		}
		return nil, &DamagedError{ID: id, File: manifestFile, Reason: "is missing"}
	}
	if err != nil {
		return nil, err
	}
	return &Snapshot{Manifest: *m, s: s}, nil
}

// resolve finds a snapshot's id. Those without a readable manifest can be found by their ids too.
func (s *Store) resolve(ref string) (string, error) {
	ids, err := s.ids()
	if err != nil {
		return "", err
	}
	if slices.Contains(ids, ref) {
		return ref, nil
	}
	all, err := s.List()
	if err != nil && !isUnreadable(err) {
		return "", err
	}
	for _, sn := range all {
		if sn.Name != "" && sn.Name == ref {
			return sn.ID, nil
		}
	}
	found := slices.DeleteFunc(ids, func(id string) bool { return ref == "" || !strings.HasPrefix(id, ref) })
	switch len(found) {
	case 0:
		return "", hint.Add(fmt.Errorf("%w: %.64q", ErrNotFound, ref), "smartvm snapshot ls lists those that there are")
	case 1:
		return found[0], nil
	}
	return "", hint.Add(fmt.Errorf("%w: %.64q is the beginning of %d of them", ErrNotFound, ref, len(found)),
		"give more of the id: %s", strings.Join(found[:2], " or "))
}

func (s *Store) ids() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if e.IsDir() && validID(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// isUnreadable says whether an error is about single snapshots: all others are as they shall be.
func isUnreadable(err error) bool {
	return errors.Is(err, ErrDamaged) || errors.Is(err, spec.ErrNotSupported)
}

// List returns all snapshots, the oldest first. Those whose manifest cannot be read are left out,
// and in the error, which then is ErrDamaged, or spec.ErrNotSupported for those that another
// version of smartvm has made.
func (s *Store) List() ([]*Snapshot, error) {
	ids, err := s.ids()
	if err != nil {
		return nil, err
	}
	var all []*Snapshot
	var errs []error
	for _, id := range ids {
		sn, err := s.read(id)
		switch {
		case err == nil:
			all = append(all, sn)
		case errors.Is(err, ErrNotFound): // it has gone meanwhile
		case isUnreadable(err):
			errs = append(errs, err)
		default:
			return nil, fmt.Errorf("list snapshots: %w", err)
		}
	}
	slices.SortFunc(all, func(a, b *Snapshot) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	return all, errors.Join(errs...)
}

// Check looks whether all of the snapshot is what was stored, before each use: the sizes of its
// files, the digest of its state, and the digests of those files that have changed since they last
// were found whole. Returns a *DamagedError.
func (sn *Snapshot) Check(ctx context.Context) error { return sn.check(ctx, false, nil) }

// Verify is Check with all digests. Progress in bytes may be nil. An ephemeral snapshot has but
// that of its state: the rest has stamps.
func (sn *Snapshot) Verify(ctx context.Context, progress func(done, total int64)) error {
	return sn.check(ctx, true, progress)
}

func (sn *Snapshot) check(ctx context.Context, full bool, progress func(done, total int64)) error {
	// It may have been replaced since it was looked up; a stamp's file that cannot be read costs
	// digests, no more.
	if _, err := sn.s.read(sn.ID); err != nil {
		return err
	}
	seen := sn.readSeen()
	now := map[string]string{}
	var total, before int64
	for _, f := range sn.Files {
		total += f.Size
	}
	for _, name := range slices.Sorted(maps.Keys(sn.Files)) {
		f := sn.Files[name]
		stamp, err := kept.Stamp(sn.Path(name))
		if err != nil {
			return sn.damaged(name, err)
		}
		fi, err := os.Lstat(sn.Path(name))
		if err != nil {
			return sn.damaged(name, err)
		}
		if fi.Size() != f.Size {
			return &DamagedError{ID: sn.ID, File: name, Reason: fmt.Sprintf("has %d bytes, not %d", fi.Size(), f.Size)}
		}
		if full || name == StateFile || stamp != seen[name] {
			if err := sn.checkDigest(ctx, name, func(done, _ int64) {
				if progress != nil {
					progress(before+done, total)
				}
			}); err != nil {
				return err
			}
		}
		if stamp != seen[name] && f.Digest == "" {
			return &DamagedError{ID: sn.ID, File: name, Reason: "has changed since it was made"}
		}
		before += f.Size
		now[name] = stamp
	}
	if err := sn.checkExternal(); err != nil {
		return err
	}
	if maps.Equal(seen, now) {
		return nil
	}
	return sn.writeSeen(ctx, now)
}

// damaged is for an error about a file, which is damage if the file is not there or no file.
func (sn *Snapshot) damaged(name string, err error) error {
	switch {
	case isNotExist(err):
		return &DamagedError{ID: sn.ID, File: name, Reason: "is missing"}
	case errors.Is(err, fs.ErrInvalid), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
		return &DamagedError{ID: sn.ID, File: name, Reason: "is no plain file"}
	case errors.Is(err, unix.EIO):
		return &DamagedError{ID: sn.ID, File: name, Reason: "cannot be read: " + err.Error()}
	}
	return fmt.Errorf("check snapshot %s: %w", sn.ID, err)
}

func (sn *Snapshot) checkDigest(ctx context.Context, name string, progress func(done, total int64)) error {
	f := sn.Files[name]
	if f.Digest == "" {
		return nil
	}
	digest, _, err := kept.Digest(ctx, sn.Path(name), progress)
	if err != nil {
		return sn.damaged(name, err)
	}
	if digest != f.Digest {
		return &DamagedError{ID: sn.ID, File: name, Reason: fmt.Sprintf("has digest %s, not %s", digest, f.Digest)}
	}
	return nil
}

func (sn *Snapshot) checkExternal() error {
	var errs []error
	for _, e := range sn.External {
		fi, err := os.Stat(e.Path)
		switch {
		case isNotExist(err):
			errs = append(errs,
				&DamagedError{ID: sn.ID, File: e.Path, Reason: fmt.Sprintf("is missing, which %s needs", e.Device)})
		case err != nil:
			errs = append(errs, fmt.Errorf("check snapshot %s: %w", sn.ID, err))
		case fi.Mode().IsRegular() && fi.Size() != e.Size: // a block device has no size
			errs = append(errs,
				&DamagedError{
					ID: sn.ID, File: e.Path,
					Reason: fmt.Sprintf("has %d bytes, not %d, which %s needs", fi.Size(), e.Size, e.Device),
				})
		}
	}
	return errors.Join(errs...)
}

const maxSeen = 1 << 20 // bytes

// readSeen reads the stamps; none where they cannot be read.
func (sn *Snapshot) readSeen() map[string]string {
	data, err := os.ReadFile(filepath.Join(sn.Dir(), seenFile))
	if err != nil {
		return nil
	}
	seen, err := strictjson.Unmarshal[map[string]string](data, maxSeen)
	if err != nil {
		return nil
	}
	return seen
}

// writeSeen stores the stamps, one process at a time.
func (sn *Snapshot) writeSeen(ctx context.Context, now map[string]string) error {
	release, err := sn.s.lock(ctx, sn.Dir(), lock.Exclusive, "another smartvm that checks the same snapshot")
	if err != nil {
		return err
	}
	return errors.Join(atomicfile.WriteJSON(filepath.Join(sn.Dir(), seenFile), now), release())
}
