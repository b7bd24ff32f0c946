package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"push.rocks/smartvm/internal/disklock"
)

// Store is a directory of named disks, which outlive VMs, and of empty ones, which are only ever
// copied. It is safe for concurrent use, by many processes too.
type Store struct {
	dir   string
	names string // where the named ones are, in dir
}

// Names in a store's directory: docs/layout.md.
const (
	namedDir = "named"
	dataDir  = "data"
	blankDir = "blank" // kind-bytes
)

// Volumes has names of its own, for disks that are mounted in guests at a path.
func (s *Store) Volumes() *Store { return &Store{s.dir, dataDir} }

// Open makes a store in a directory of ours alone.
func Open(dir string) (*Store, error) {
	for _, d := range []string{namedDir, dataDir, blankDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("open disks: %w", err)
		}
	}
	return &Store{dir, namedDir}, nil
}

var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]*$`)

const maxName = 64 // bytes

// ValidName says whether a disk can have a name: 1-64 of [A-Za-z0-9_.-], beginning with a letter or
// digit.
func ValidName(name string) error {
	if len(name) > maxName || !namePattern.MatchString(name) {
		return fmt.Errorf("disk name %q: %w: want up to 64 letters, digits and ._-, beginning with a letter or digit", name,
			fs.ErrInvalid)
	}
	return nil
}

// Blank returns an empty ext4 of size bytes, made if need be. It must only be copied.
func (s *Store) Blank(ctx context.Context, size int64) (string, error) {
	path := filepath.Join(s.dir, blankDir, fmt.Sprintf("ext4-%d", size))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := Blank(ctx, path, "ext4", size); err != nil && !errors.Is(err, fs.ErrExist) { // another was faster
		return "", err
	}
	return path, nil
}

// Named returns the disk of a name; one that is not there is made, empty, of size bytes.
func (s *Store) Named(ctx context.Context, name string, size int64) (string, error) {
	if err := ValidName(name); err != nil {
		return "", err
	}
	path := s.named(name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := Blank(ctx, path, "ext4", size); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return path, nil
}

// what they are called.
func (s *Store) what() string { return map[string]string{namedDir: "disk", dataDir: "volume"}[s.names] }

// Create makes a named disk, empty, of size bytes. Returns fs.ErrExist.
func (s *Store) Create(ctx context.Context, name string, size int64) (Disk, error) {
	if err := ValidName(name); err != nil {
		return Disk{}, err
	}
	if err := Blank(ctx, s.named(name), "ext4", size); err != nil {
		return Disk{}, err
	}
	return s.Find(name)
}

// Find returns a named disk. Returns fs.ErrNotExist.
func (s *Store) Find(name string) (Disk, error) {
	if err := ValidName(name); err != nil {
		return Disk{}, err
	}
	fi, err := os.Lstat(s.named(name))
	if err == nil && !fi.Mode().IsRegular() {
		err = fs.ErrNotExist
	}
	if err != nil {
		return Disk{}, fmt.Errorf("find %s %s: %w", s.what(), name, err)
	}
	return s.disk(name, fi), nil
}

func (s *Store) disk(name string, fi fs.FileInfo) Disk {
	return Disk{Name: name, Path: s.named(name), Size: fi.Size(), Used: fi.Sys().(*syscall.Stat_t).Blocks * 512}
}

func (s *Store) named(name string) string { return filepath.Join(s.dir, s.names, name+".ext4") }

// Disk is a named disk.
type Disk struct {
	Name string `json:"name"`
	Path string `json:"path"`
	Size int64  `json:"size"` // bytes that the guest sees
	Used int64  `json:"used"` // bytes that it takes on the host
}

// List returns the named disks, by name.
func (s *Store) List() ([]Disk, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, s.names))
	if err != nil {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	var all []Disk
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".ext4")
		fi, err := e.Info()
		if !ok || err != nil || !fi.Mode().IsRegular() {
			continue
		}
		all = append(all, s.disk(name, fi))
	}
	return all, nil
}

// Remove deletes a named disk. Returns fs.ErrNotExist, disklock.ErrBusy.
func (s *Store) Remove(name string, o Options) error {
	if err := ValidName(name); err != nil {
		return err
	}
	path := s.named(name)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("remove %s %s: %w", s.what(), name, err)
	}
	defer f.Close()
	if err := errors.Join(disklock.Lock(f, false), o.check(path)); err != nil {
		return fmt.Errorf("remove %s %s: %w", s.what(), name, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove %s %s: %w", s.what(), name, err)
	}
	return nil
}
