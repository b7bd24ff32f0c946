// Package warm keeps pools of VMs that are restored from a snapshot and paused, so that one that is wanted goes on at once.
//
// A pool is a file in the data directory. A VM of it is one like any other, with a marker in its directory; who takes the marker
// away has the VM.
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

	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/strictjson"
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
	data, err := os.ReadFile(s.file(name))
	if errors.Is(err, fs.ErrNotExist) {
		return p, hint.Add(fmt.Errorf("pool %q: %w", name, smartvm.ErrNotFound), "smartvm pool ls lists the pools there are")
	}
	if err == nil {
		p, err = strictjson.Unmarshal[Pool](data, maxFile)
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
func (s *Store) lock() (unlock func(), err error) {
	f, err := os.Open(s.dir)
	if err != nil {
		return nil, fmt.Errorf("lock pools: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock pools: %w", err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// change rewrites a pool's file.
func (s *Store) change(name string, f func(*Pool)) error {
	unlock, err := s.lock()
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
	sn, err := s.host.Snapshot(p.Snapshot)
	if err != nil {
		return err
	}
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	err = s.Free(p.Name)
	if err == nil {
		err = errors.Join(atomicfile.WriteJSON(s.file(p.Name), p), os.Symlink(s.file(p.Name), filepath.Join(sn.UsersDir(), "pool-"+p.Name)))
	}
	unlock()
	if err != nil {
		return err
	}
	return s.Fill(ctx, p.Name)
}

// marker is in the directory of a VM that nobody has taken.
func marker(m *smartvm.Machine, pool string) string {
	return filepath.Join(m.RuntimeDir(), store.PoolMarker+pool)
}

// ready returns the VMs of a pool that nobody has taken.
func (s *Store) ready(ctx context.Context, pool string) ([]*smartvm.Machine, error) {
	marked, err := filepath.Glob(filepath.Join(s.host.RuntimeDir(), "*", store.PoolMarker+pool)) // names have nothing that a pattern would
	if err != nil {
		return nil, err
	}
	var all []*smartvm.Machine
	for _, path := range marked {
		m, err := s.host.Machine(ctx, filepath.Base(filepath.Dir(path)))
		if errors.Is(err, smartvm.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, m)
	}
	return all, nil
}

// Fill makes VMs until the pool is full. Those in it that do not run are removed.
func (s *Store) Fill(ctx context.Context, name string) error {
	unlock, err := s.lockFill(name)
	if err != nil {
		return err
	}
	defer unlock()
	p, err := s.read(name)
	if err != nil {
		return err
	}
	ready, err := s.ready(ctx, name)
	if err != nil {
		return err
	}
	missing := p.Size
	for _, m := range ready {
		if state, err := m.State(ctx); err == nil && state == smartvm.Paused {
			missing--
		} else if err == nil && os.Remove(marker(m, name)) == nil {
			if err := End(ctx, m); err != nil {
				return err
			}
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
func (s *Store) lockFill(name string) (unlock func(), err error) {
	if _, err := s.read(name); err != nil {
		return nil, err
	}
	// The pool's own file is replaced now and then.
	f, err := os.OpenFile(filepath.Join(s.dir, "."+name+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("fill pool %q: %w", name, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("fill pool %q: %w", name, err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// add makes a VM and gives it to the pool once it stands ready.
func (s *Store) add(ctx context.Context, p Pool) error {
	m, err := s.host.Restore(ctx, p.Snapshot, smartvm.RestoreOptions{Paused: true, Labels: map[string]string{"pool": p.Name}})
	if err != nil {
		return err
	}
	err = supervise.RemoveAtEnd(m)
	if err == nil {
		err = s.start(ctx, s.host, m)
	}
	if err == nil {
		err = os.WriteFile(marker(m, p.Name), nil, 0o600)
	}
	if err != nil {
		return errors.Join(err, End(context.WithoutCancel(ctx), m))
	}
	return nil
}

// Take gives a VM of the pool away, which goes on: one that is ready, else one that is made now.
func (s *Store) Take(ctx context.Context, name string) (*smartvm.Machine, error) {
	p, err := s.read(name)
	if err != nil {
		return nil, err
	}
	ready, err := s.ready(ctx, name)
	if err != nil {
		return nil, err
	}
	for _, m := range ready {
		if os.Remove(marker(m, name)) != nil {
			continue // somebody else has
		}
		if err := m.Resume(ctx); err != nil { // it has ended, or is about to
			_ = End(context.WithoutCancel(ctx), m)
			continue
		}
		return m, s.change(name, func(p *Pool) { p.Hits++ })
	}
	if err := s.change(name, func(p *Pool) { p.Misses++ }); err != nil {
		return nil, err
	}
	m, err := s.host.Restore(ctx, p.Snapshot, smartvm.RestoreOptions{Labels: map[string]string{"pool": name}})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(supervise.RemoveAtEnd(m), s.start(ctx, s.host, m)); err != nil {
		return nil, errors.Join(err, End(context.WithoutCancel(ctx), m))
	}
	return m, nil
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

// List returns all pools, by name.
func (s *Store) List(ctx context.Context) ([]Listed, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("list pools: %w", err)
	}
	all := []Listed{}
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
			return nil, err
		}
		ready, err := s.ready(ctx, name)
		if err != nil {
			return nil, err
		}
		all = append(all, Listed{p, len(ready)})
	}
	return all, nil
}

// Remove removes a pool, its VMs that nobody has taken, and its snapshot unless others have started from it.
func (s *Store) Remove(ctx context.Context, name string) error {
	p, err := s.read(name)
	if err != nil {
		return err
	}
	unlock, err := s.lockFill(name)
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.Remove(s.file(name)); err != nil {
		return fmt.Errorf("remove pool %q: %w", name, err)
	}
	ready, err := s.ready(ctx, name)
	errs := []error{err}
	for _, m := range ready {
		if os.Remove(marker(m, name)) == nil {
			errs = append(errs, End(ctx, m))
		}
	}
	errs = append(errs, os.Remove(filepath.Join(s.dir, "."+name+".lock")))
	err = s.host.RemoveSnapshot(ctx, p.Snapshot, false)
	if errors.Is(err, smartvm.ErrSnapshotInUse) || errors.Is(err, smartvm.ErrSnapshotNotFound) {
		err = nil
	}
	return errors.Join(append(errs, err)...)
}
