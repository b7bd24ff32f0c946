// Package objects stores directories of files that never change, each once, named by what is in it:
// drafted beside, put in place whole, and compared with their digests before they are used. What
// they are is up to who stores them.
package objects

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/storelock"
)

// ErrCorrupt says that a stored file is not what was stored.
var ErrCorrupt = errors.New("corrupt image")

// File is a stored file and what it holds.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
	// Seen is the file's inode, size and time when its digest was last found right. While they stay,
	// it is.
	Seen string `json:"seen"`
}

// Object is an immutable directory.
type Object struct {
	ID      string `json:"id"`
	Type    string `json:"type,omitempty"`    // of a root: "ext4", "squashfs" or "erofs"
	Release string `json:"release,omitempty"` // of a kernel, as uname -r says it; empty if unknown
	Modules bool   `json:"modules,omitempty"` // of a kernel: modules.cpio is there
	Files   []File `json:"files"`             // the first is the object's own
}

// Store is a directory of objects. All fields are required.
type Store struct {
	Path  string         // of the directory
	IDs   *regexp.Regexp // what ids look like: they end in a dash and 64 hexadecimal digits
	Locks *storelock.Dir
	Log   *slog.Logger
	// Progress is told how far a step is, in bytes; total 0 is unknown.
	Progress func(step string, done, total int64)
}

// A description is a file of an object.
const (
	objectFile = "object.json"
	maxObject  = 1 << 20 // bytes
)

// oneSeen is the lock under which a description is written again.
const oneSeen = "seen"

// Dir is where an object is, or would be.
func (s *Store) Dir(id string) string { return filepath.Join(s.Path, id) }

// File is the path of an object's own file.
func (s *Store) File(o *Object) string { return filepath.Join(s.Dir(o.ID), o.Files[0].Name) }

// Get reads an object's description, with fs.ErrNotExist where there is none.
func (s *Store) Get(id string) (*Object, error) {
	if !s.IDs.MatchString(id) {
		return nil, fmt.Errorf("object %q: %w", id, fs.ErrInvalid)
	}
	o, err := ReadJSON[Object](filepath.Join(s.Dir(id), objectFile), maxObject)
	if err != nil {
		return nil, err
	}
	if o.ID != id || len(o.Files) == 0 || slices.ContainsFunc(o.Files, func(f File) bool {
		return f.Name != filepath.Base(f.Name)
	}) {
		return nil, fmt.Errorf("object %s: its description: %w", id, ErrCorrupt)
	}
	return &o, nil
}

// Use checks that an object's files are what was stored: by digest where they have changed since
// they last were looked at, or where full says so.
func (s *Store) Use(ctx context.Context, id string, full bool) (*Object, error) {
	o, err := s.Get(id)
	if err != nil {
		return nil, err
	}
	changed := false
	for i := range o.Files {
		f := &o.Files[i]
		path := filepath.Join(s.Dir(id), f.Name)
		seen, err := kept.Stamp(path)
		if err != nil {
			return nil, fmt.Errorf("object %s: %w: %w", id, ErrCorrupt, err)
		}
		if seen == f.Seen && !full {
			continue
		}
		digest, size, err := s.digest(ctx, path, "verify "+f.Name)
		if err != nil {
			return nil, fmt.Errorf("object %s: %w", id, err)
		}
		if digest != f.SHA256 || size != f.Size {
			return nil, hint.Add(fmt.Errorf("object %s: %s has digest %s, not %s: %w", id, f.Name, digest, f.SHA256, ErrCorrupt),
				"remove the image (smartvm image rm) and make or fetch it again")
		}
		changed = changed || seen != f.Seen
		f.Seen = seen
	}
	if !changed {
		return o, nil
	}
	release, err := s.Locks.One(ctx, oneSeen, id, "another smartvm that verifies the same image")
	if err != nil {
		return nil, err
	}
	return o, errors.Join(atomicfile.WriteJSON(filepath.Join(s.Dir(id), objectFile), o), release())
}

func (s *Store) digest(ctx context.Context, path, step string) (string, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	h := sha256.New()
	n, err := io.Copy(h, s.Watch(ctx, f, step, fi.Size()))
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// Watch is a reader that tells how far it is and ends with its context. It seeks where r does.
func (s *Store) Watch(ctx context.Context, r io.Reader, step string, total int64) io.Reader {
	w := &watched{ctx: ctx, r: r, tell: func(done int64) { s.Progress(step, done, total) }}
	if seeker, ok := r.(io.Seeker); ok {
		return watchedFile{w, seeker}
	}
	return w
}

type watched struct {
	ctx  context.Context
	r    io.Reader
	done int64
	tell func(done int64)
}

// watchedFile can be read from the start again.
type watchedFile struct {
	io.Reader
	io.Seeker
}

func (w *watched) Read(p []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, context.Cause(w.ctx)
	}
	n, err := w.r.Read(p)
	w.done += int64(n)
	w.tell(w.done)
	return n, err
}

// addressOf is an object's content address: its file's digest, or one of all their digests.
func addressOf(o *Object) string {
	if len(o.Files) == 1 {
		return o.Files[0].SHA256
	}
	h := sha256.New()
	for _, f := range o.Files {
		fmt.Fprintf(h, "%s %s\n", f.SHA256, f.Name)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// ReadJSON reads a document of at most limit bytes. The error is ErrCorrupt, and
// spec.ErrNotSupported too where another version of smartvm has written more than is known here:
// what can be made or fetched again is.
func ReadJSON[T any](path string, limit int) (v T, err error) {
	data, err := atomicfile.Read(path, int64(limit))
	if err != nil {
		return v, err
	}
	if v, err = atomicfile.DecodeStrict[T](data, limit); err != nil {
		return v, fmt.Errorf("read %s: %w: %w", path, ErrCorrupt, err)
	}
	return v, nil
}

// Take removes from a directory what is to be gone, and adds up what that frees.
func (s *Store) Take(dir string, freed *int64, which func(name string) (bool, error)) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		take, err := which(e.Name())
		if err != nil || !take {
			if err != nil {
				return err
			}
			continue
		}
		path := filepath.Join(dir, e.Name())
		size, err := kept.Usage(path)
		if err != nil {
			return err
		}
		// Out of sight first: nothing is ever half there.
		gone := filepath.Join(s.Locks.Temp, "gone-"+e.Name())
		if err := errors.Join(os.RemoveAll(gone), os.Rename(path, gone), os.RemoveAll(gone)); err != nil {
			return err
		}
		*freed += size
	}
	return nil
}

// Draft is an object that is made, but not in its place.
type Draft struct {
	*Object
	work *storelock.Work
	dir  string
}

// Close removes what was not put in its place. A nil Draft is none.
func (d *Draft) Close() error {
	if d == nil {
		return nil
	}
	return d.work.Close()
}

// Draft makes an object of what fill makes in a directory. The caller closes it.
func (s *Store) Draft(ctx context.Context, fill func(dir string) (*Object, error)) (*Draft, error) {
	w, err := s.Locks.Work()
	if err != nil {
		return nil, err
	}
	d := &Draft{work: w, dir: filepath.Join(w.Dir, "object")}
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

// Build stores what fill makes in a directory. The caller holds the store.
func (s *Store) Build(ctx context.Context, fill func(dir string) (*Object, error)) (*Object, error) {
	d, err := s.Draft(ctx, fill)
	if err != nil {
		return nil, err
	}
	return d.Object, errors.Join(s.Place(d), d.Close())
}

// seal describes a draft's files, of which only the names are known, makes them read-only, and has
// all on disk. Those that know a file's digest give it; with an id that ends in a dash, the first
// file's digest completes it.
func (s *Store) seal(ctx context.Context, d *Draft) error {
	for i := range d.Files {
		f := &d.Files[i]
		path := filepath.Join(d.dir, f.Name)
		var err error
		if f.SHA256 == "" {
			if f.SHA256, f.Size, err = s.digest(ctx, path, "digest "+f.Name); err != nil {
				return fmt.Errorf("store %s: %w", f.Name, err)
			}
		}
		// Readable to all, since a VMM in a jail is another user; the directory above is nobody's but
		// ours.
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
	err := errors.Join(atomicfile.WriteJSON(filepath.Join(d.dir, objectFile), d.Object),
		os.Mkdir(filepath.Join(d.dir, kept.UsersDir), 0o700),
		os.Chmod(d.dir, 0o700), atomicfile.SyncDir(d.dir))
	if err != nil {
		return fmt.Errorf("store image: %w", err)
	}
	return nil
}

// Place moves a draft to where objects are, or finds that it is there, whole. The caller holds the
// store until something refers to it.
func (s *Store) Place(d *Draft) error {
	to := s.Dir(d.ID)
	err := os.Rename(d.dir, to)
	if errors.Is(err, fs.ErrExist) || errors.Is(err, syscall.ENOTEMPTY) {
		if s.sameAs(d) {
			return nil
		}
		// What is there is damaged. VMs that say they use it stay its users.
		s.Log.Warn("stored image is damaged: replacing it", "object", d.ID)
		err = nil
		for _, f := range d.Files {
			err = errors.Join(err, os.Rename(filepath.Join(d.dir, f.Name), filepath.Join(to, f.Name)))
		}
		err = errors.Join(err, os.MkdirAll(filepath.Join(to, kept.UsersDir), 0o700),
			atomicfile.WriteJSON(filepath.Join(to, objectFile), d.Object))
	}
	if err != nil {
		return fmt.Errorf("store image: %w", err)
	}
	return atomicfile.SyncDir(s.Path)
}

// sameAs says whether the object in a draft's place is what it should be. What an id is made of may
// be the files' digests: then they must fit it.
func (s *Store) sameAs(d *Draft) bool {
	old, err := s.Get(d.ID)
	if err != nil {
		return false
	}
	byContent := strings.HasSuffix(d.ID, "-"+addressOf(d.Object))
	return (!byContent || strings.HasSuffix(d.ID, "-"+addressOf(old))) &&
		!slices.ContainsFunc(old.Files, func(f File) bool {
			seen, err := kept.Stamp(filepath.Join(s.Dir(d.ID), f.Name))
			return err != nil || seen != f.Seen
		})
}
