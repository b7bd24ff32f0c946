// Package warm keeps pools of VMs that are restored from a snapshot and paused, so that one that is
// wanted goes on at once.
//
// A pool is a file in the data directory. A VM of it is one like any other, with a file beside
// that, a Member, from before it is made until it has ended or somebody has it for good. Who makes
// or takes the VM has the file locked meanwhile. So one whose file nobody has locked and that is
// not paused, or was to go on once, was left by a process that died.
package warm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/supervise"
)

// Pool is one as it is stored.
type Pool struct {
	Name     string `json:"name"`
	Size     int    `json:"size"` // how many VMs are kept ready
	Snapshot string `json:"snapshot"`
	Hits     int    `json:"hits"`   // VMs that were ready when they were wanted
	Misses   int    `json:"misses"` // and that were not
}

// Listed is a pool and how many VMs are ready.
type Listed struct {
	Pool
	Ready int `json:"ready"`
}

// MaxSize bounds a pool.
const MaxSize = 4096

// atOnce is how many VMs are started at once.
const atOnce = 4

const maxFile = 64 << 10

// Store is where the pools of a host are.
type Store struct {
	host  *smartvm.Host
	dir   string
	start func(context.Context, *smartvm.Host, *smartvm.Machine) error
}

// Open opens the pools of h. Start starts a VM that runs on by itself.
func Open(h *smartvm.Host, start func(context.Context, *smartvm.Host, *smartvm.Machine) error) (*Store, error) {
	s := &Store{host: h, dir: filepath.Join(h.DataDir(), store.PoolDir), start: start}
	if err := store.Secure(s.dir); err != nil {
		return nil, fmt.Errorf("open pools: %w", err)
	}
	return s, nil
}

var validName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)

func (s *Store) file(name string) string { return filepath.Join(s.dir, name+".json") }

// Free returns ErrExists where there is a pool of that name.
func (s *Store) Free(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("pool %q: must be 1 to 64 of letters, digits, _ . -, the first a letter or digit", name)
	}
	if _, err := os.Lstat(s.file(name)); err == nil {
		return hint.Add(fmt.Errorf("pool %q: %w", name, smartvm.ErrExists), "smartvm pool rm %s removes it", name)
	}
	return nil
}

func (s *Store) read(name string) (p Pool, err error) {
	if !validName.MatchString(name) {
		return p, fmt.Errorf("pool %q: %w", name, smartvm.ErrNotFound)
	}
	p, err = atomicfile.ReadStrict[Pool](s.file(name), maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return p, hint.Add(fmt.Errorf("pool %q: %w", name, smartvm.ErrNotFound), "smartvm pool ls lists the pools there are")
	}
	if err == nil && p.Name != name {
		err = fmt.Errorf("it is that of %q", p.Name)
	}
	if err != nil {
		return p, fmt.Errorf("pool %q: %w", name, err)
	}
	return p, nil
}

// lock keeps other processes from changing pools.
func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	release, err := lock.Path(ctx, s.dir, lock.Exclusive, nil)
	if err != nil {
		return nil, fmt.Errorf("lock pools: %w", err)
	}
	return func() { _ = release() }, nil
}

// change rewrites a pool's file.
func (s *Store) change(ctx context.Context, name string, f func(*Pool)) error {
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	p, err := s.read(name)
	if err != nil {
		return err
	}
	f(&p)
	return atomicfile.WriteJSON(s.file(name), p)
}

// Create stores a pool and fills it. It claims its snapshot, which is removed with it.
func (s *Store) Create(ctx context.Context, p Pool) error {
	if err := s.store(ctx, p); err != nil {
		return err
	}
	return s.Fill(ctx, p.Name)
}

func (s *Store) store(ctx context.Context, p Pool) error {
	snapshots, err := s.host.Snapshots()
	if err != nil {
		return err
	}
	release, err := snapshots.Hold(ctx) // until it is claimed
	if err != nil {
		return err
	}
	defer func() { _ = release() }()
	sn, err := snapshots.Get(p.Snapshot)
	if err != nil {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.Free(p.Name); err != nil {
		return err
	}
	return errors.Join(atomicfile.WriteJSON(s.file(p.Name), p),
		os.Symlink(s.file(p.Name), filepath.Join(sn.UsersDir(), "pool-"+p.Name)))
}

// Fill makes VMs until the pool is full. Those in it that are not ready and that nobody is about to
// take are removed.
func (s *Store) Fill(ctx context.Context, name string) error {
	unlock, err := s.lockFill(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	p, err := s.read(name)
	if err != nil {
		return err
	}
	missing := p.Size
	members, err := s.members(name)
	if err != nil {
		return err
	}
	for _, b := range members {
		fate, err := s.tend(ctx, b, true)
		if err != nil {
			return err
		}
		if fate == ready {
			missing--
		}
	}
	errs := make([]error, max(missing, 0))
	slots := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			errs[i] = s.add(ctx, p)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// lockFill lets one process fill a pool at a time.
func (s *Store) lockFill(ctx context.Context, name string) (unlock func(), err error) {
	for {
		if _, err := s.read(name); err != nil {
			return nil, err
		}
		// The pool's own file is replaced now and then.
		path := filepath.Join(s.dir, "."+name+".lock")
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("fill pool %q: %w", name, err)
		}
		if err := lock.Wait(ctx, f, lock.Exclusive, nil); err != nil {
			return nil, errors.Join(fmt.Errorf("fill pool %q: %w", name, err), f.Close())
		}
		if lock.StillAt(f, path) { // else the pool was removed meanwhile, and may be there again
			return func() { _ = f.Close() }, nil
		}
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("fill pool %q: %w", name, err)
		}
	}
}

// add makes a VM for the pool.
func (s *Store) add(ctx context.Context, p Pool) error {
	b, err := s.Enlist(p.Name)
	if err != nil {
		return err
	}
	if _, err := s.make(ctx, b, p, smartvm.RestoreOptions{Paused: true}); err != nil {
		return err
	}
	return b.release()
}

// make restores and starts the VM of a member, of which nothing is left if that fails.
func (s *Store) make(ctx context.Context, b *Member, p Pool, o smartvm.RestoreOptions) (*smartvm.Machine, error) {
	o.ID, o.Labels = b.ID, map[string]string{"pool": p.Name}
	m, err := s.host.Restore(ctx, p.Snapshot, o)
	if err != nil {
		return nil, errors.Join(err, b.Leave())
	}
	if err := errors.Join(supervise.RemoveAtEnd(m), s.start(ctx, s.host, m)); err != nil {
		return nil, errors.Join(err, (&Taken{m, b}).End(context.WithoutCancel(ctx)))
	}
	return m, nil
}

// Take gives a VM of the pool away, which goes on: one that is ready, else one that is made now.
func (s *Store) Take(ctx context.Context, name string) (*Taken, error) {
	p, err := s.read(name)
	if err != nil {
		return nil, err
	}
	members, err := s.members(name)
	if err != nil {
		return nil, err
	}
	down := context.WithoutCancel(ctx)
	for _, b := range members {
		if !b.take() { // somebody else has
			continue
		}
		m, used, err := s.machine(ctx, b)
		if err != nil { // it has ended, which Fill sees to, or is another host's
			_ = b.release()
			continue
		}
		t := &Taken{m, b}
		if used || b.use() != nil || m.Resume(ctx) != nil { // somebody died with it, or it is half made or about to end
			if err := t.End(down); ctx.Err() != nil { // and the others are not to go the same way
				return nil, errors.Join(context.Cause(ctx), err)
			}
			continue
		}
		if err := s.change(ctx, name, func(p *Pool) { p.Hits++ }); err != nil {
			return nil, errors.Join(err, t.End(down))
		}
		return t, nil
	}
	if err := s.change(ctx, name, func(p *Pool) { p.Misses++ }); err != nil {
		return nil, err
	}
	b, err := s.Enlist(name)
	if err != nil {
		return nil, err
	}
	if err := b.use(); err != nil {
		return nil, errors.Join(err, b.Leave())
	}
	m, err := s.make(ctx, b, p, smartvm.RestoreOptions{})
	if err != nil {
		return nil, err
	}
	return &Taken{m, b}, nil
}

// Taken is a VM that somebody has taken. Keep or End; if his process dies before, it ends with the
// next Fill or Sweep.
type Taken struct {
	*smartvm.Machine
	member *Member
}

// Keep makes the VM one that runs on by itself.
func (t *Taken) Keep() error { return t.member.Leave() }

// End stops and removes it.
func (t *Taken) End(ctx context.Context) error {
	if err := End(ctx, t.Machine); err != nil {
		return errors.Join(err, t.member.release())
	}
	return t.member.Leave()
}

// End stops and removes a VM.
func End(ctx context.Context, m *smartvm.Machine) error {
	_, err := m.Stop(ctx, smartvm.StopOptions{})
	if err == nil {
		err = supervise.Remove(ctx, m)
	}
	if errors.Is(err, smartvm.ErrNotFound) { // its own process was quicker
		return nil
	}
	return err
}

// List returns all pools, by name. An error is about pools that cannot be read, which another
// version of smartvm may have made: all others are returned with it.
func (s *Store) List(ctx context.Context) ([]Listed, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return []Listed{}, fmt.Errorf("list pools: %w", err)
	}
	all := []Listed{}
	var errs []error
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		p, err := s.read(name)
		if errors.Is(err, smartvm.ErrNotFound) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		members, err := s.members(name)
		if err != nil {
			return nil, err
		}
		l := Listed{Pool: p}
		for _, b := range members {
			if s.isReady(ctx, b) {
				l.Ready++
			}
		}
		all = append(all, l)
	}
	return all, errors.Join(errs...)
}

// Remove removes a pool, its VMs that nobody has taken, and its snapshot unless others have started
// from it.
func (s *Store) Remove(ctx context.Context, name string) error {
	unlock, err := s.lockFill(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	p, err := s.read(name)
	if err != nil {
		return err
	}
	if err := os.Remove(s.file(name)); err != nil {
		return fmt.Errorf("remove pool %q: %w", name, err)
	}
	members, err := s.members(name)
	errs := []error{err}
	for _, b := range members {
		_, err := s.tend(ctx, b, false)
		errs = append(errs, err)
	}
	_ = os.Remove(s.file(name) + atomicfile.TempSuffix) // of a process that died
	errs = append(errs, os.Remove(filepath.Join(s.dir, "."+name+".lock")))
	err = s.host.RemoveSnapshot(ctx, p.Snapshot, false)
	if errors.Is(err, smartvm.ErrSnapshotInUse) || errors.Is(err, smartvm.ErrSnapshotNotFound) {
		err = nil
	}
	return errors.Join(append(errs, err)...)
}

// Sweep ends what processes have left that died while they filled pools, or had taken a VM. It
// returns the ids of those VMs.
func (s *Store) Sweep(ctx context.Context) (removed []string, err error) {
	members, err := s.members("*")
	errs := []error{err}
	for _, b := range members {
		_, err := s.read(b.pool)
		fate, err := s.tend(ctx, b, !errors.Is(err, smartvm.ErrNotFound))
		if errs = append(errs, err); fate == ended && err == nil {
			removed = append(removed, b.ID)
		}
	}
	return removed, errors.Join(errs...)
}
