// Package base keeps base images: bundles of a kernel and a root file system that fit each other,
// from the Firecracker project's CI or from a manifest of one's own.
//
// A bundle is an immutable directory that is there whole or not at all. Nobody publishes digests of
// what the CI has: what was fetched first is taken, and whatever comes later under that name must
// be the same. Few bundles are kept; which VMs use is never among those that go. Many processes
// share one directory.
package base

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"push.rocks/smartvm/image/release"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/internal/store"
)

// Presets name base images.
const (
	Latest = "latest" // of the newest Firecracker's CI
	LTS    = "lts"    // of the CI of LTSVersion
	Hosted = "hosted" // of the manifest in Options
)

const (
	// LTSVersion is the Firecracker that LTS is for.
	LTSVersion = "v1.7.0"
	// DefaultMaxStored is how many bundles are kept.
	DefaultMaxStored = 2
	// DefaultBucketURL is where the Firecracker project's CI puts its images. Its own documentation
	// lists it over plain http.
	DefaultBucketURL = "https://s3.amazonaws.com/spec.ccfc.min"
)

// Errors of this package. There are those of package download and of the file system besides.
var (
	// ErrOffline says that something would have to be fetched, and must not.
	ErrOffline = download.ErrOffline
	// ErrCorrupt says that a stored file is not what was stored.
	ErrCorrupt = errors.New("corrupt base image")
	// ErrInUse says that VMs use what was to be removed.
	ErrInUse = errors.New("base image is in use")
	// ErrConflict says that another bundle has the id already.
	ErrConflict = errors.New("another base image has this id")
)

// ResolveError says that the CI has nothing that fits.
type ResolveError struct{ Reason string }

func (e *ResolveError) Error() string { return "no suitable base image: " + e.Reason }

// Code is the original's.
func (e *ResolveError) Code() string { return "BASE_IMAGE_RESOLVE_FAILED" }

// Options configure a Store. Dir is required.
type Options struct {
	Dir       string // a directory of ours alone, made if it is missing
	MaxStored int    // bundles. Default: DefaultMaxStored
	// ManifestURL or ManifestPath, not both, is Hosted's.
	ManifestURL, ManifestPath string
	BucketURL                 string // default: DefaultBucketURL
	Arch                      string // "x86_64" or "aarch64". Default: this machine's
	// ReleaseLatest returns the newest Firecracker's version: "v1.12.1". Nil: the Firecracker project
	// is asked.
	ReleaseLatest func(ctx context.Context) (string, error)
	// Log gets a warning before a bundle is evicted.
	Log     *slog.Logger
	Offline bool // fetch nothing
	// Progress is told how far a step is, in bytes; total 0 is unknown. It may be nil.
	Progress func(step string, done, total int64)
	// Waiting is told for what another process is waited for. It may be nil.
	Waiting func(what string)
	// InUse says whether VMs use what is in a bundle's directory. Nil: they never do.
	InUse func(dir string) bool
	// Named says whether an image has a bundle, which then makes no room for others. Nil: none does.
	Named func(id string) bool

	client *download.Client // nil: the default one
}

// Store is a directory of bundles. It is safe for concurrent use.
type Store struct {
	opts Options
	log  *slog.Logger
}

// Names in a store's directory; all else is bundles, whose ids do not begin with a dot.
const (
	workDir   = ".work"       // what is being made. Who has it locked makes
	indexFile = ".index"      // what is known beyond bundles
	lockFile  = ".lock"       // held while a description is changed
	usersDir  = "users"       // in a bundle: for links to VMs' directories
	descFile  = "bundle.json" // in a bundle: its description
)

// Open makes the store's directory if need be. It fetches nothing.
func Open(opts Options) (*Store, error) {
	opts.Arch = cmp.Or(opts.Arch, release.HostArch())
	opts.MaxStored = cmp.Or(opts.MaxStored, DefaultMaxStored)
	opts.BucketURL = strings.TrimRight(cmp.Or(opts.BucketURL, DefaultBucketURL), "/")
	switch {
	case !slices.Contains([]string{"x86_64", "aarch64"}, opts.Arch):
		return nil, fmt.Errorf("open base images: %w: architecture %q: want x86_64 or aarch64", fs.ErrInvalid, opts.Arch)
	case opts.MaxStored < 0:
		return nil, fmt.Errorf("open base images: %w: %d of them are to be kept", fs.ErrInvalid, opts.MaxStored)
	case opts.ManifestURL != "" && opts.ManifestPath != "":
		return nil, fmt.Errorf("open base images: %w: a manifest's URL and a path", fs.ErrInvalid)
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.client == nil {
		opts.client = &download.Client{Transport: download.Transport{Log: opts.Log}}
	}
	if opts.ReleaseLatest == nil {
		opts.ReleaseLatest = func(ctx context.Context) (string, error) { return release.Latest(ctx, release.DefaultURL) }
	}
	if opts.Progress == nil {
		opts.Progress = func(string, int64, int64) {}
	}
	if opts.Waiting == nil {
		opts.Waiting = func(string) {}
	}
	if opts.InUse == nil {
		opts.InUse = func(string) bool { return false }
	}
	if opts.Named == nil {
		opts.Named = func(string) bool { return false }
	}
	if err := store.Secure(opts.Dir); err != nil {
		return nil, fmt.Errorf("open base images: %w", err)
	}
	return &Store{opts: opts, log: opts.Log}, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.opts.Dir}, elem...)...)
}

// Ensure returns a preset's bundle, checked, and fetches it if it is not here. Offline, it is the
// one that the preset was when it last was looked up. Errors are fs.ErrInvalid for another preset,
// ErrOffline, ErrCorrupt, ErrConflict, *ResolveError, *ManifestError, *download.DigestError and
// others of package download.
func (s *Store) Ensure(ctx context.Context, preset string) (*Bundle, error) {
	b, err := s.ensure(ctx, preset)
	if err != nil {
		return nil, fmt.Errorf("base image %.70q: %w", preset, err)
	}
	return b, nil
}

func (s *Store) ensure(ctx context.Context, preset string) (*Bundle, error) {
	if !slices.Contains([]string{Latest, LTS, Hosted}, preset) {
		return nil, fmt.Errorf("%w: there are %s, %s and %s", fs.ErrInvalid, Latest, LTS, Hosted)
	}
	if s.opts.Offline && (preset != Hosted || s.opts.ManifestPath == "") {
		return s.last(ctx, preset)
	}
	p, err := s.resolve(ctx, preset)
	if err != nil {
		return nil, err
	}
	b, err := s.cached(ctx, p)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrCorrupt) {
		b, err = s.makeAlone(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	return b, s.change(ctx, func(i *index) { i.Presets[preset] = b.ID })
}

// last returns the bundle that a preset was when it was last looked up.
func (s *Store) last(ctx context.Context, preset string) (*Bundle, error) {
	i, err := s.readIndex()
	if err != nil {
		return nil, err
	}
	id, ok := i.Presets[preset]
	if !ok {
		return nil, fmt.Errorf("%w: it was never fetched", ErrOffline)
	}
	b, err := s.Open(ctx, id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s is no longer here", ErrOffline, id)
	}
	return b, err
}

func (s *Store) resolve(ctx context.Context, preset string) (*plan, error) {
	switch preset {
	case Hosted:
		return s.hosted(ctx)
	case LTS:
		return s.ci(ctx, LTSVersion)
	}
	version, err := s.opts.ReleaseLatest(ctx)
	if err != nil {
		return nil, err
	}
	return s.ci(ctx, version)
}

// cached returns a plan's bundle if it is here, and else fs.ErrNotExist or ErrCorrupt.
func (s *Store) cached(ctx context.Context, p *plan) (*Bundle, error) {
	b, err := s.Open(ctx, p.id)
	if err != nil {
		return nil, err
	}
	other := func(want, got string) bool { return want != "" && want != got }
	if b.Hosted != p.hosted || other(p.kernel.sha256, b.Kernel.SHA256) || other(p.rootfs.sha256, b.Rootfs.SHA256) {
		return nil, hint.Add(fmt.Errorf("%w: %s", ErrConflict, p.id), "give the manifest a bundleId of its own")
	}
	return b, nil
}

// alone does something while no other process fetches anything.
func (s *Store) alone(ctx context.Context, do func() error) (err error) {
	if err := os.MkdirAll(s.path(workDir), 0o700); err != nil {
		return err
	}
	release, err := lock.Path(ctx, s.path(workDir), lock.Exclusive, func() {
		s.opts.Waiting("another smartvm that fetches a base image")
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release()) }()
	return do()
}

// makeAlone makes a bundle when no other process does, and evicts others for it.
func (s *Store) makeAlone(ctx context.Context, p *plan) (b *Bundle, err error) {
	err = s.alone(ctx, func() error {
		b, err = s.makeOrFind(ctx, p)
		return err
	})
	return b, err
}

func (s *Store) makeOrFind(ctx context.Context, p *plan) (*Bundle, error) {
	b, err := s.cached(ctx, p)
	switch {
	case errors.Is(err, ErrCorrupt):
		s.log.Warn("base image is corrupt: fetching it anew", "bundle", p.id, "err", err)
		if takeErr := s.take(ctx, p.id, true); takeErr != nil {
			return nil, errors.Join(err, takeErr)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return b, err // another has made it meanwhile
	}
	if err := s.make(ctx, p); err != nil {
		return nil, err
	}
	if b, err = s.Open(ctx, p.id); err != nil {
		return nil, err
	}
	if err := s.evict(ctx, p.id); err != nil {
		s.log.Warn("more base images are stored than are kept", "err", err)
	}
	return b, nil
}
