// Package release installs releases of Firecracker: the VMM and its jailer, a directory for each
// version.
//
// A version is there whole or not at all, whatever is killed and when. Many processes share one
// directory.
package release

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/internal/store"
)

// DefaultURL is where Firecracker's releases are.
const DefaultURL = "https://github.com/firecracker-microvm/firecracker/releases"

// Options configure a Store. Dir is required.
type Options struct {
	Dir     string // a directory of ours alone, made if it is missing
	URL     string // of the releases. Default: DefaultURL
	Arch    string // "x86_64" or "aarch64". Default: this machine's
	Log     *slog.Logger
	Offline bool // fetch nothing
	// Progress is told how far a step is, in bytes; total 0 is unknown. It may be nil.
	Progress func(step string, done, total int64)
	// Waiting is told for what another process is waited for. It may be nil.
	Waiting func(what string)

	client *download.Client // nil: the default one
}

// ErrOffline says that something would have to be fetched, and must not.
var ErrOffline = download.ErrOffline

// Binary is an installed version.
type Binary struct {
	Version     string `json:"version"` // "v1.12.1"
	Firecracker string `json:"firecracker"`
	Jailer      string `json:"jailer"` // both are paths
	// Digests in hexadecimal, empty where another program than ours has installed it.
	FirecrackerSHA256 string `json:"firecrackerSha256,omitempty"`
	JailerSHA256      string `json:"jailerSha256,omitempty"`
	Source            string `json:"source,omitempty"` // URL of the archive
}

// Store is a directory of versions. It is safe for concurrent use.
type Store struct {
	opts   Options
	log    *slog.Logger
	unpack int64 // bytes that an archive may unpack to
}

// Names in a store's directory.
const (
	workDir    = ".work"        // what is being installed. Who has it locked installs
	recordFile = "release.json" // in a version's directory
)

// Open makes the store's directory if need be. It fetches nothing.
func Open(opts Options) (*Store, error) {
	if opts.Arch == "" {
		opts.Arch = HostArch()
	}
	if !slices.Contains([]string{"x86_64", "aarch64"}, opts.Arch) {
		return nil, fmt.Errorf("open binaries: %w: architecture %q: want x86_64 or aarch64", fs.ErrInvalid, opts.Arch)
	}
	opts.URL = strings.TrimRight(cmp.Or(opts.URL, DefaultURL), "/")
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.client == nil {
		opts.client = &download.Client{Transport: download.Transport{Log: opts.Log}}
	}
	if opts.Progress == nil {
		opts.Progress = func(string, int64, int64) {}
	}
	if opts.Waiting == nil {
		opts.Waiting = func(string) {}
	}
	if err := store.Secure(opts.Dir); err != nil {
		return nil, fmt.Errorf("open binaries: %w", err)
	}
	return &Store{opts: opts, log: opts.Log, unpack: maxUnpacked}, nil
}

// HostArch is this machine's architecture as Firecracker's releases name it.
func HostArch() string {
	if runtime.GOARCH == "arm64" {
		return "aarch64"
	}
	return "x86_64"
}

var versionPattern = regexp.MustCompile(`^v?((0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5}))$`)

// canonical is a version as the releases name it. What is none is fs.ErrInvalid.
func canonical(version string) (string, error) {
	m := versionPattern.FindStringSubmatch(version)
	if m == nil {
		return "", fmt.Errorf("version %.70q: %w: want vMAJOR.MINOR.PATCH", version, fs.ErrInvalid)
	}
	return "v" + m[1], nil
}

// Latest asks which release is the newest: "v1.12.1".
func (s *Store) Latest(ctx context.Context) (string, error) {
	if s.opts.Offline {
		return "", fmt.Errorf("look up the newest Firecracker: %w", ErrOffline)
	}
	return latest(ctx, s.opts.client, s.opts.URL)
}

// Latest asks which of the releases at a URL is the newest: "v1.12.1".
func Latest(ctx context.Context, url string) (string, error) {
	return latest(ctx, &download.Client{}, url)
}

func latest(ctx context.Context, client *download.Client, url string) (string, error) {
	last, err := client.Location(ctx, url+"/latest")
	if err != nil {
		return "", fmt.Errorf("look up the newest Firecracker: %w", err)
	}
	version, err := canonical(path.Base(last))
	if err != nil {
		return "", fmt.Errorf("look up the newest Firecracker: %w", err)
	}
	return version, nil
}

// Find looks a version up, "" being the newest installed. Returns fs.ErrNotExist, and fs.ErrInvalid
// for what is none.
func (s *Store) Find(version string) (Binary, error) {
	if version == "" {
		all, err := s.List()
		if err == nil && len(all) == 0 {
			err = fmt.Errorf("no version of Firecracker is installed: %w", fs.ErrNotExist)
		}
		if err != nil {
			return Binary{}, err
		}
		return all[0], nil
	}
	version, err := canonical(version)
	if err != nil {
		return Binary{}, err
	}
	dir := filepath.Join(s.opts.Dir, version)
	b, err := readRecord(filepath.Join(dir, recordFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Binary{}, fmt.Errorf("find Firecracker %s: %w", version, err)
	}
	b.Version, b.Firecracker, b.Jailer = version, filepath.Join(dir, "firecracker"), filepath.Join(dir, "jailer")
	for _, program := range []string{b.Firecracker, b.Jailer} {
		fi, err := os.Lstat(program)
		if err == nil && (!fi.Mode().IsRegular() || fi.Mode().Perm()&0o111 == 0) {
			err = fmt.Errorf("%s is no program: %w", program, fs.ErrNotExist)
		}
		if err != nil {
			return Binary{}, fmt.Errorf("find Firecracker %s: %w", version, err)
		}
	}
	return b, nil
}

func readRecord(path string) (Binary, error) {
	return atomicfile.ReadJSON[Binary](path, 64<<10, 0)
}

// List returns what is installed, the newest first.
func (s *Store) List() ([]Binary, error) {
	entries, err := os.ReadDir(s.opts.Dir)
	if err != nil {
		return nil, fmt.Errorf("list binaries: %w", err)
	}
	var all []Binary
	for _, e := range entries {
		if version, err := canonical(e.Name()); err != nil || version != e.Name() {
			continue
		}
		b, err := s.Find(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b Binary) int { return compare(b.Version, a.Version) })
	return all, nil
}

// compare orders canonical versions.
func compare(a, b string) int {
	v, _ := firecracker.ParseVersion(a)
	w, _ := firecracker.ParseVersion(b)
	return v.Compare(w)
}

// Remove takes a version away. VMs that run with it go on. Returns fs.ErrNotExist.
func (s *Store) Remove(version string) error {
	version, err := canonical(version)
	if err != nil {
		return err
	}
	// Out of sight first: a version is never half there. What a crash leaves of it goes with the next
	// installation.
	if err := os.MkdirAll(filepath.Join(s.opts.Dir, workDir), 0o700); err != nil {
		return fmt.Errorf("remove Firecracker %s: %w", version, err)
	}
	if err := s.setAside(version); err != nil {
		return fmt.Errorf("remove Firecracker %s: %w", version, err)
	}
	return nil
}

// setAside removes a version's directory at once.
func (s *Store) setAside(version string) error {
	gone := filepath.Join(s.opts.Dir, workDir, "gone-"+rand.Text())
	if err := os.Rename(filepath.Join(s.opts.Dir, version), gone); err != nil {
		return err
	}
	return errors.Join(atomicfile.SyncDir(s.opts.Dir), os.RemoveAll(gone))
}

// Ensure returns a version that is installed as it is, and else installs it. "" is the newest
// release.
func (s *Store) Ensure(ctx context.Context, version string) (Binary, error) {
	version, err := s.resolve(ctx, version)
	if err != nil {
		return Binary{}, err
	}
	if b, err := s.Find(version); !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	return s.Install(ctx, version)
}

// Install fetches a version, "" being the newest release, unless it is installed and what was
// fetched. Errors are fs.ErrInvalid for a version that is none, ErrOffline, *ArchiveError, and
// those of package download.
func (s *Store) Install(ctx context.Context, version string) (b Binary, err error) {
	version, err = s.resolve(ctx, version)
	if err != nil {
		return Binary{}, err
	}
	release, err := s.lock(ctx)
	if err != nil {
		return Binary{}, fmt.Errorf("install Firecracker %s: %w", version, err)
	}
	defer func() { err = errors.Join(err, release()) }()
	if b, err := s.Find(version); err == nil && intact(b) {
		return b, nil
	}
	if s.opts.Offline {
		return Binary{}, fmt.Errorf("install Firecracker %s: %w", version, ErrOffline)
	}
	if err := s.install(ctx, version); err != nil {
		return Binary{}, fmt.Errorf("install Firecracker %s: %w", version, err)
	}
	s.log.Info("installed Firecracker", "version", version)
	return s.Find(version)
}

func (s *Store) resolve(ctx context.Context, version string) (string, error) {
	if version == "" {
		return s.Latest(ctx)
	}
	return canonical(version)
}

// lock makes the working directory and waits until no other process installs.
func (s *Store) lock(ctx context.Context) (release func() error, err error) {
	dir := filepath.Join(s.opts.Dir, workDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return lock.Path(ctx, dir, lock.Exclusive, func() { s.opts.Waiting("another smartvm that installs Firecracker") })
}

// intact says whether the programs are those that were installed.
func intact(b Binary) bool {
	for program, want := range map[string]string{b.Firecracker: b.FirecrackerSHA256, b.Jailer: b.JailerSHA256} {
		if got, err := fileDigest(program); err != nil || got != want {
			return false
		}
	}
	return true
}

// writeRecord describes what is in dir.
func writeRecord(dir string, b Binary) error {
	data, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, recordFile), append(data, '\n'), 0o600)
}
