package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/storelock"
)

// draft is an object that is made, but not in its place.
type draft struct {
	*Object
	work *storelock.Work
	dir  string
}

// Close removes what was not put in its place. A nil draft is none.
func (d *draft) Close() error {
	if d == nil {
		return nil
	}
	return d.work.Close()
}

// draft makes an object of what fill makes in a directory. The caller closes it.
func (s *Store) draft(ctx context.Context, fill func(dir string) (*Object, error)) (*draft, error) {
	w, err := s.locks.Work()
	if err != nil {
		return nil, err
	}
	d := &draft{work: w, dir: filepath.Join(w.Dir, "object")}
	if err = os.Mkdir(d.dir, 0o700); err == nil {
		d.Object, err = fill(d.dir)
	}
	if err == nil {
		err = s.seal(ctx, d)
	}
	if errors.Is(err, unix.ENOSPC) {
		err = hint.Add(err, "free space there (smartvm image prune), or name another --data-dir")
	}
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return d, nil
}

// build stores what fill makes in a directory. The caller holds the store.
func (s *Store) build(ctx context.Context, fill func(dir string) (*Object, error)) (*Object, error) {
	return s.placed(s.draft(ctx, fill))
}

// placed puts a draft in its place and closes it. The caller holds the store.
func (s *Store) placed(d *draft, err error) (*Object, error) {
	if err != nil {
		return nil, err
	}
	return d.Object, errors.Join(s.place(d), d.Close())
}

// seal describes a draft's files, of which only the names are known, makes them read-only, and has all on disk. Those that
// know a file's digest give it; with an id that ends in a dash, the first file's digest completes it.
func (s *Store) seal(ctx context.Context, d *draft) error {
	for i := range d.Files {
		f := &d.Files[i]
		path := filepath.Join(d.dir, f.Name)
		var err error
		if f.SHA256 == "" {
			if f.SHA256, f.Size, err = s.digest(ctx, path, "digest "+f.Name); err != nil {
				return fmt.Errorf("store %s: %w", f.Name, err)
			}
		}
		// Readable to all, since a VMM in a jail is another user; the directory above is nobody's but ours.
		if err := errors.Join(syncFile(path), os.Chmod(path, 0o444)); err != nil {
			return fmt.Errorf("store %s: %w", f.Name, err)
		}
		if f.Seen, err = kept.Stamp(path); err != nil {
			return fmt.Errorf("store %s: %w", f.Name, err)
		}
	}
	if strings.HasSuffix(d.ID, "-") {
		d.ID += addressOf(d.Object)
	}
	err := errors.Join(atomicfile.WriteJSON(filepath.Join(d.dir, objectFile), d.Object), os.Mkdir(filepath.Join(d.dir, kept.UsersDir), 0o700),
		os.Chmod(d.dir, 0o700), atomicfile.SyncDir(d.dir))
	if err != nil {
		return fmt.Errorf("store image: %w", err)
	}
	return nil
}

// place moves a draft to where objects are, or finds that it is there, whole. The caller holds the store until something
// refers to it.
func (s *Store) place(d *draft) error {
	to := s.objectDir(d.ID)
	err := os.Rename(d.dir, to)
	if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) {
		if s.sameAs(d) {
			return nil
		}
		// What is there is damaged. VMs that say they use it stay its users.
		s.log.Warn("stored image is damaged: replacing it", "object", d.ID)
		err = nil
		for _, f := range d.Files {
			err = errors.Join(err, os.Rename(filepath.Join(d.dir, f.Name), filepath.Join(to, f.Name)))
		}
		err = errors.Join(err, os.MkdirAll(filepath.Join(to, kept.UsersDir), 0o700), atomicfile.WriteJSON(filepath.Join(to, objectFile), d.Object))
	}
	if err != nil {
		return fmt.Errorf("store image: %w", err)
	}
	return atomicfile.SyncDir(s.path(objectsDir))
}

// sameAs says whether the object in a draft's place is what it should be. What an id is made of may be the files' digests:
// then they must fit it.
func (s *Store) sameAs(d *draft) bool {
	old, err := s.object(d.ID)
	if err != nil {
		return false
	}
	byContent := strings.HasSuffix(d.ID, "-"+addressOf(d.Object))
	return (!byContent || strings.HasSuffix(d.ID, "-"+addressOf(old))) && !slices.ContainsFunc(old.Files, func(f File) bool {
		seen, err := kept.Stamp(filepath.Join(s.objectDir(d.ID), f.Name))
		return err != nil || seen != f.Seen
	})
}
