// Package snapshot keeps snapshots of VMs: directories that never change once they have their name.
// It knows what is in the files as far as that tells a good one from a bad one, and nothing of how
// VMs are made of them.
//
// A snapshot is made as a Draft, which nobody else sees, and gets its name by one rename when all
// of it is on disk. A VM claims the one that it uses by a link; a claim ends with the VM's
// directory. Who looks for a snapshot to claim it holds the store meanwhile, and who removes one
// has the store alone. An export holds its snapshot alone: it takes as long as whoever reads it
// likes.
package snapshot

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/internal/store"
)

// Errors of this package. Those of a file system come as they are.
var (
	ErrNotFound = errors.New("no such snapshot")
	ErrExists   = errors.New("snapshot exists")
	// ErrDamaged is what every *DamagedError is.
	ErrDamaged = errors.New("damaged snapshot")
	// ErrInUse is what every *InUseError is.
	ErrInUse = errors.New("snapshot in use")
	// ErrInvalid says that something cannot be a snapshot: a directory, a manifest or an archive.
	ErrInvalid = errors.New("invalid snapshot")
)

// DamagedError says which file of a snapshot is not what was stored.
type DamagedError struct {
	ID     string
	File   string // path in the snapshot's directory, or of a file elsewhere that it needs
	Reason string
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("snapshot %s is damaged: %s %s", e.ID, e.File, e.Reason)
}

func (e *DamagedError) Is(target error) bool { return target == ErrDamaged }

// Hint is what to do about it.
func (e *DamagedError) Hint() string {
	return "make the snapshot again, or import it again, and remove this one: smartvm snapshot rm --force " + e.ID
}

// InUseError says that somebody uses what was to be removed.
type InUseError struct {
	ID       string
	By       []string // directories of VMs
	Exported bool     // by an export
}

func (e *InUseError) Error() string {
	var by []string
	if e.Exported {
		by = append(by, "an export")
	}
	if len(e.By) > 0 {
		by = append(by, fmt.Sprintf("%d VMs, one in %s", len(e.By), e.By[0]))
	}
	return fmt.Sprintf("snapshot %s is in use by %s", e.ID, strings.Join(by, " and by "))
}

func (e *InUseError) Is(target error) bool { return target == ErrInUse }

// Hint is what to do about it.
func (e *InUseError) Hint() string {
	if len(e.By) == 0 {
		return "wait for the export or end it; with -f it is cut off"
	}
	return "remove the VMs first: smartvm rm"
}

// Names in a store's directory and in a snapshot's: docs/layout.md.
const (
	StateFile    = "state"  // what the VMM saved but for the guest's memory
	MemoryFile   = "memory" // the guest's memory
	DrivesDir    = "drives" // drives, by device id
	manifestFile = "manifest.json"
	seenFile     = "seen.json" // stamps of the files when they were last found whole
	tempDir      = ".tmp"      // drafts, each locked by its maker, and what is being removed
)

// Store is a directory of snapshots. It is safe for concurrent use, by many processes too.
type Store struct {
	dir string
	// Waiting, if set, is told for what another process is waited for.
	Waiting func(what string)
}

// Open makes the store's directory if need be: one of ours alone.
func Open(dir string) (*Store, error) {
	if err := store.Secure(dir); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, tempDir), 0o700); err != nil {
		return nil, fmt.Errorf("open snapshots: %w", err)
	}
	return &Store{dir: dir}, nil
}

// Dir is where a snapshot's files are, whether or not it is there.
func (s *Store) Dir(id string) string { return filepath.Join(s.dir, id) }

func (s *Store) temp(name string) string { return filepath.Join(s.dir, tempDir, name) }

// Hold keeps others from removing anything until it is let go of. Those that hold a store do not
// exclude each other. Who makes a snapshot that is Ephemeral holds the store from before its Commit
// until there is a VM that uses it.
func (s *Store) Hold(ctx context.Context) (release func() error, err error) {
	return s.lock(ctx, s.dir, lock.Shared, "another smartvm to finish removing snapshots")
}

// alone waits until nobody holds the store.
func (s *Store) alone(ctx context.Context) (release func() error, err error) {
	return s.lock(ctx, s.dir, lock.Exclusive, "another smartvm to finish with its snapshots")
}

// lock takes a lock on a directory, which must be there. The lock dies with the process.
func (s *Store) lock(ctx context.Context, path string, how lock.Mode, what string) (release func() error, err error) {
	waiting := func() {
		if s.Waiting != nil {
			s.Waiting(what)
		}
	}
	if release, err = lock.Path(ctx, path, how, waiting); err != nil {
		return nil, fmt.Errorf("lock snapshots: %w", err)
	}
	return release, nil
}

// validID says whether s can be a snapshot's id, as it can a VM's.
func validID(s string) bool { return validChars(s, "-") }

// validName says whether s can be a snapshot's name.
func validName(s string) bool { return validChars(s, "-_.") && validChars(s[:1], "") }

func validChars(s, extra string) bool {
	odd := func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && !strings.ContainsRune(extra, r)
	}
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, odd)
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
