package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"

	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/hostkernel"
	"push.rocks/smartvm/internal/objects"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/storelock"
)

// Errors of this package. Those of a file system, a registry or a base image's source come as they
// are.
var (
	// ErrNotFound says that there is no such image here.
	ErrNotFound = errors.New("no such image")
	// ErrOffline says that something would have to be fetched, and must not.
	ErrOffline = download.ErrOffline
	// ErrNoKernel says that an image without a kernel found none to boot with.
	ErrNoKernel = hostkernel.ErrNone
	// ErrCorrupt says that a stored file is not what was stored.
	ErrCorrupt = objects.ErrCorrupt
)

// InUseError says that VMs use what was to be removed.
type InUseError struct {
	Name string
	By   []string // directories of VMs
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("image %s is in use by %d VMs, one in %s", e.Name, len(e.By), e.By[0])
}

// Hint is what to do about it.
func (e *InUseError) Hint() string { return "remove the VM first: smartvm rm" }

// Options configure a Store. Dir is required.
type Options struct {
	Dir     string // a directory of ours alone, made if it is missing
	Offline bool   // fetch nothing
	// OCI is how registries are spoken to. Limits, Arch, TempDir and Log are filled in.
	OCI oci.Options
	// Limits bound what a root file system may hold that is made of layers, a tar or a directory,
	// directories of VMs included.
	Limits flatten.Limits
	// Base finds base images; nil: there are none.
	Base *base.Store
	// FetchKernel has a kernel fetched, by Base, for images without one where this machine's own is
	// not found or may not be read. Installed is told where it is; it may be nil.
	FetchKernel bool
	Installed   func(what, path string)
	// Agent is the guest's first program, smartvm-agent. Without it only images that boot by
	// themselves do.
	Agent []byte
	// Arch is what images are chosen for, as Go spells it: "amd64" or "arm64". Default: this
	// machine's.
	Arch string
	Log  *slog.Logger
	// Progress is told how far a step is, in bytes; total 0 is unknown. It may be nil, and is called
	// from any goroutine, one at a time for each step.
	Progress func(step string, done, total int64)
	// Waiting is told for what another process is waited for. It may be nil.
	Waiting func(what string)
	// Changed receives each name that an image was given ("tag") or has lost ("remove"), afterwards.
	// It may be nil.
	Changed func(action, name string)
}

// Store is a directory of images. It is safe for concurrent use, by many processes too.
type Store struct {
	opts    Options
	log     *slog.Logger
	locks   *storelock.Dir
	objects *objects.Store

	host hostkernel.Machine
}

// Names in a store's directory: docs/layout.md.
const (
	namesDir   = "names"   // a file an image
	objectsDir = "objects" // a directory an object
	layersDir  = "layers"  // compressed layers of OCI images, by digest
	tempDir    = "tmp"     // what is being made, each locked by who makes it; the rest is rubbish
)

// Open makes the store's directory if need be. It fetches nothing.
func Open(opts Options) (*Store, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.Arch == "" {
		opts.Arch = runtime.GOARCH
	}
	if opts.Progress == nil {
		opts.Progress = func(string, int64, int64) {}
	}
	if opts.Waiting == nil {
		opts.Waiting = func(string) {}
	}
	if opts.Changed == nil {
		opts.Changed = func(string, string) {}
	}
	if err := store.Secure(opts.Dir); err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	s := &Store{opts: opts, log: opts.Log}
	s.locks = &storelock.Dir{Path: opts.Dir, Gate: s.path(namesDir), Temp: s.path(tempDir), Waiting: opts.Waiting}
	s.objects = &objects.Store{
		Path: s.path(objectsDir), IDs: objectID, Locks: s.locks, Log: s.log,
		Progress: opts.Progress,
	}
	for _, d := range []string{namesDir, objectsDir, layersDir, tempDir} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return nil, fmt.Errorf("open images: %w", err)
		}
	}
	return s, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.opts.Dir}, elem...)...)
}

// Hold keeps others from removing anything until it is let go of. Those that hold a store do not
// exclude each other; who holds it must not hold it again, since a process that waits to remove
// something comes first.
func (s *Store) Hold(ctx context.Context) (release func() error, err error) {
	return s.locks.Share(ctx, "another smartvm to finish removing images")
}

// alone waits until nobody holds the store, and clears away what those that died were making.
func (s *Store) alone(ctx context.Context) (release func() error, err error) {
	return s.locks.Alone(ctx, "another smartvm to finish with its images")
}

// Kinds of what one process alone does: a lock of one kind may be taken under one of another, in
// this order.
const (
	onePull = "pull" // of a reference
	oneMake = "make" // of an object
	oneName = "name" // of an image's description
)

// isNotExist is for what may be missing.
func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
