package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/lock"
)

// Draft is a snapshot that is being made, in a directory that nobody else looks into. Commit or
// Abort ends it. When its process dies before, Sweep removes it. It is not for concurrent use.
type Draft struct {
	s    *Store
	id   string
	path string
	lock *os.File // the draft's directory, locked: its maker lives
}

// Begin makes an empty draft.
func (s *Store) Begin(ctx context.Context) (*Draft, error) { return s.begin(ctx, randomHex(6)) }

func (s *Store) begin(ctx context.Context, id string) (d *Draft, err error) {
	// Between mkdir and the lock the draft looks abandoned; Sweep waits for this shared lock.
	release, err := s.Hold(ctx)
	if err != nil {
		return nil, fmt.Errorf("begin snapshot: %w", err)
	}
	defer func() { err = errors.Join(err, release()) }()
	d = &Draft{s: s, id: id, path: s.temp(id + "." + randomHex(4))}
	if err := os.Mkdir(d.path, 0o700); err != nil {
		return nil, fmt.Errorf("begin snapshot: %w", err)
	}
	d.lock, err = os.Open(d.path)
	if err == nil {
		err = lock.Try(d.lock, lock.Exclusive)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("begin snapshot: %w", err), d.Abort())
	}
	return d, nil
}

// ID is what the snapshot's id will be.
func (d *Draft) ID() string { return d.id }

// Path is the draft's directory, for StateFile, MemoryFile and whatever else belongs to the
// snapshot.
func (d *Draft) Path() string { return d.path }

// Check says whether a snapshot may be called that, before anything is written for it. Commit asks
// again.
func (d *Draft) Check(name string, labels map[string]string) error {
	m := &Manifest{
		Version: manifestVersion, ID: d.id, Name: name, Labels: labels, MemSizeMiB: 1,
		Firecracker: "-", Arch: "-",
	}
	return errors.Join(m.validateSelf(), d.free(m))
}

// Abort removes the draft, unless it has been committed. It is idempotent.
func (d *Draft) Abort() error {
	var errs []error
	if d.path != "" {
		errs = append(errs, os.RemoveAll(d.path))
	}
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	d.path, d.lock = "", nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("abort snapshot: %w", err)
	}
	return nil
}

// Commit makes the draft a snapshot of this host: it takes the digests of all files, makes them
// read-only and ours, and when all is on disk renames the directory. ID, Arch and Files are filled
// in, and Created if it is zero. Returns ErrExists where the name is taken and ErrInvalid for what
// is no snapshot; the draft is then still one. Progress in bytes may be nil.
func (d *Draft) Commit(ctx context.Context, m Manifest, progress func(done, total int64)) (*Snapshot, error) {
	m.Version, m.ID, m.Arch = manifestVersion, d.id, runtime.GOARCH
	if m.Created.IsZero() {
		m.Created = time.Now().UTC().Truncate(time.Second)
	}
	seen, err := d.describe(ctx, &m, progress)
	if err != nil {
		return nil, fmt.Errorf("commit snapshot: %w", err)
	}
	return d.publish(ctx, &m, seen)
}

// publish gives the draft its name. What is in the manifest of its files is true, and seen their
// stamps.
func (d *Draft) publish(ctx context.Context, m *Manifest, seen map[string]string) (*Snapshot, error) {
	if err := m.validateFiles(); err != nil {
		return nil, fmt.Errorf("commit snapshot: %w", err)
	}
	text, err := m.encode()
	if err != nil {
		return nil, fmt.Errorf("commit snapshot: %w", err)
	}
	err = errors.Join(os.Mkdir(filepath.Join(d.path, kept.UsersDir), 0o700),
		atomicfile.WriteJSON(filepath.Join(d.path, seenFile), seen),
		atomicfile.Write(filepath.Join(d.path, manifestFile), text, 0o600),
		os.Chmod(d.path, 0o700), atomicfile.SyncDir(d.path))
	if err == nil {
		err = d.rename(ctx, m)
	}
	if err != nil {
		// So that the draft is again what it was.
		for _, name := range []string{kept.UsersDir, seenFile, manifestFile} {
			if rerr := os.Remove(filepath.Join(d.path, name)); !isNotExist(rerr) {
				err = errors.Join(err, rerr)
			}
		}
		return nil, fmt.Errorf("commit snapshot: %w", err)
	}
	d.path = "" // not ours to remove any more
	return &Snapshot{Manifest: *m, s: d.s}, d.Abort()
}

// rename is the moment in which a snapshot begins to exist. Those that make snapshots take turns in
// it, so that two do not get one name.
func (d *Draft) rename(ctx context.Context, m *Manifest) (err error) {
	release, err := d.s.lock(ctx, d.s.temp(""), lock.Exclusive, "another smartvm that makes a snapshot")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	if err := d.free(m); err != nil {
		return err
	}
	if err := os.Rename(d.path, d.s.Dir(m.ID)); err != nil {
		if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) {
			return fmt.Errorf("%w: %s", ErrExists, m.ID)
		}
		return err
	}
	return atomicfile.SyncDir(d.s.dir)
}

// free says whether nobody has the snapshot's name or id.
func (d *Draft) free(m *Manifest) error {
	all, err := d.s.List()
	if err != nil && !isUnreadable(err) {
		return err
	}
	for _, other := range all {
		switch {
		case m.Name != "" && (other.Name == m.Name || other.ID == m.Name):
			return fmt.Errorf("%w: %s is called %s", ErrExists, other.ID, m.Name)
		case other.ID == m.ID || other.Name == m.ID:
			return fmt.Errorf("%w: %s", ErrExists, m.ID)
		}
	}
	return nil
}

// describe finds the draft's files, secures them, and returns their stamps.
func (d *Draft) describe(ctx context.Context, m *Manifest, progress func(done, total int64)) (map[string]string,
	error,
) {
	sizes, dirs, err := d.walk()
	if err != nil {
		return nil, err
	}
	if err := errors.Join(m.validateSelf(), d.free(m)); err != nil {
		return nil, err // before the long part
	}
	var total, before int64
	for _, size := range sizes {
		total += size
	}
	m.Files = map[string]File{}
	seen := map[string]string{}
	for name, size := range sizes {
		tell := func(done, _ int64) {
			if progress != nil {
				progress(before+done, total)
			}
		}
		path := filepath.Join(d.path, name)
		if seen[name], err = secure(path); err != nil {
			return nil, err
		}
		f := File{Size: size}
		if !m.Ephemeral || name == StateFile {
			if f.Digest, f.Size, err = kept.Digest(ctx, path, tell); err != nil {
				return nil, err
			}
		}
		m.Files[name] = f
		before += size
	}
	for _, dir := range slices.Backward(dirs) { // the inner ones first
		if err := atomicfile.SyncDir(dir); err != nil {
			return nil, err
		}
	}
	return seen, nil
}

// walk returns the sizes of the draft's files by their paths in it, and its directories but for
// itself.
func (d *Draft) walk() (sizes map[string]int64, dirs []string, err error) {
	sizes = map[string]int64{}
	err = filepath.WalkDir(d.path, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == d.path {
			return err
		}
		name, err := filepath.Rel(d.path, path)
		switch {
		case err != nil:
			return err
		case !validPath(name) || len(sizes) == maxFiles:
			return fmt.Errorf("%w: file %s", ErrInvalid, name)
		case e.IsDir():
			dirs = append(dirs, path)
			return os.Chmod(path, 0o700)
		case !e.Type().IsRegular():
			return fmt.Errorf("%w: %s is no plain file", ErrInvalid, name)
		}
		fi, err := e.Info()
		if err == nil {
			sizes[name] = fi.Size()
		}
		return err
	})
	return sizes, dirs, err
}

// secure makes a file ours, read-only and durable, and returns its stamp. Readable to all, since a
// VMM in a jail is another user; the directory above is nobody's but ours.
func secure(path string) (stamp string, err error) {
	f, err := kept.OpenPlain(path)
	if err != nil {
		return "", err
	}
	fi, err := f.Stat()
	if err == nil && int(fi.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
		err = f.Chown(os.Geteuid(), os.Getegid()) // a jailed VMM wrote it
	}
	if err == nil {
		err = errors.Join(f.Chmod(0o444), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	return kept.Stamp(path)
}
