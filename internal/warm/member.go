package warm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/lock"
)

// Member is the file of a VM that is in a pool, or is to be.
type Member struct {
	ID   string // the VM's
	pool string
	path string
	f    *os.File // not nil: this process has it locked
}

// memberFile is the name of a member's file: ".POOL.ID". What is in it is the runtime directory
// that the VM is in, as several may share a data directory; and, once the VM goes on, usedMark: who
// pauses it then does not give it back.
var memberFile = regexp.MustCompile(`^\.(.+)\.([0-9a-f]{12})$`)

const usedMark = "\x00used" // no path has that

// Enlist draws the id of a VM that is to be made, so that somebody removes the VM if this process
// dies before it is the pool's.
func (s *Store) Enlist(pool string) (*Member, error) {
	for range enlistTries {
		id := make([]byte, 6)
		_, _ = rand.Read(id) // never fails
		b := &Member{ID: hex.EncodeToString(id), pool: pool}
		b.path = filepath.Join(s.dir, "."+pool+"."+b.ID)
		f, err := os.OpenFile(b.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("fill pool %q: %w", pool, err)
		}
		if _, err := f.WriteString(s.host.RuntimeDir()); err != nil {
			return nil, errors.Join(fmt.Errorf("fill pool %q: %w", pool, err), os.Remove(b.path), f.Close())
		}
		// Until it is locked it looks abandoned.
		if b.lock(f) {
			return b, nil
		}
	}
	return nil, fmt.Errorf("fill pool %q: cannot lock files in %s", pool, s.dir)
}

const enlistTries = 100

// members are those of a pool, or of all as "*".
func (s *Store) members(pool string) ([]*Member, error) {
	// pools' names have nothing that a pattern would
	paths, err := filepath.Glob(filepath.Join(escape(s.dir), "."+pool+".*"))
	if err != nil {
		return nil, err
	}
	var all []*Member
	for _, path := range paths {
		m := memberFile.FindStringSubmatch(filepath.Base(path))
		if m != nil && (pool == "*" || pool == m[1]) {
			all = append(all, &Member{ID: m[2], pool: m[1], path: path})
		}
	}
	return all, nil
}

// escape makes a path a pattern for itself.
func escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
}

// take locks a member that nobody has.
func (b *Member) take() bool {
	f, err := os.OpenFile(b.path, os.O_RDWR, 0)
	return err == nil && b.lock(f)
}

func (b *Member) lock(f *os.File) bool {
	if lock.Try(f, lock.Exclusive) != nil || !lock.StillAt(f, b.path) {
		_ = f.Close()
		return false
	}
	b.f = f
	return true
}

// use notes, of a member that is locked, that the VM is about to go on.
func (b *Member) use() error {
	fi, err := b.f.Stat()
	if err == nil {
		_, err = b.f.WriteAt([]byte(usedMark), fi.Size())
	}
	return err
}

// release lets others have it.
func (b *Member) release() error { return b.f.Close() }

// Leave says that the VM is not the pool's any more.
func (b *Member) Leave() error { return errors.Join(os.Remove(b.path), b.f.Close()) }

// errElsewhere is about a VM in another runtime directory.
var errElsewhere = errors.New("in another runtime directory")

// machine is a member's VM, and whether it was to go on once. Returns ErrNotFound, errElsewhere.
func (s *Store) machine(ctx context.Context, b *Member) (m *smartvm.Machine, used bool, err error) {
	data, err := os.ReadFile(b.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, err
	}
	dir, _, used := strings.Cut(string(data), usedMark)
	if dir != "" && dir != s.host.RuntimeDir() { // who left it empty has made no VM
		return nil, used, errElsewhere
	}
	m, err = s.host.Machine(ctx, b.ID)
	if err == nil && m.ID() != b.ID {
		err = smartvm.ErrNotFound
	}
	return m, used, err
}

// isReady says whether a member's VM is paused where it was restored.
func (s *Store) isReady(ctx context.Context, b *Member) bool {
	m, used, err := s.machine(ctx, b)
	if used || err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	info, err := m.Info(ctx)
	return err == nil && info.State == firecracker.StatePaused
}

// askPatience is how long a VMM may take to say so: one that is only slow, as its host is busy, is
// not ended.
const askPatience = 10 * time.Second

// fate is what came of a member.
type fate int

const (
	left  fate = iota // to somebody who has it, or its VM was gone
	ready             // its VM is paused
	ended             // its VM was removed
)

// tend ends a member's VM if it is not ready, or may not stay, and nobody has it.
func (s *Store) tend(ctx context.Context, b *Member, stays bool) (fate, error) {
	if stays && s.isReady(ctx, b) {
		return ready, nil
	}
	if !b.take() {
		return left, nil
	}
	m, _, err := s.machine(ctx, b)
	switch {
	case errors.Is(err, smartvm.ErrNotFound):
		return left, b.Leave()
	case errors.Is(err, errElsewhere):
		return left, b.release()
	case err != nil:
		return left, errors.Join(err, b.release())
	}
	if stays && s.isReady(ctx, b) { // by now
		return ready, b.release()
	}
	return ended, (&Taken{m, b}).End(ctx)
}
