package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/strictjson"
)

// Kinds of objects; an object's id is its kind, a dash and 64 hexadecimal digits.
const (
	kindRoot   = "rootfs" // the digits are the file's SHA-256
	kindChain  = "chain"  // and a version: the digits are the layers' chain ID, which says nothing of the file
	kindKernel = "kernel"
	kindInitrd = "initrd"
)

// chainID is the id of what the layers of a chain make, as package flatten makes it now.
func chainID(chain string) string { return fmt.Sprint(kindChain, flatten.Version, "-", chain) }

// objectID is what ids look like. "root-" was both kinds once, and is only read.
var objectID = regexp.MustCompile(`^(root|rootfs|chain[0-9]{1,4}|kernel|initrd)-[0-9a-f]{64}$`)

// File is a stored file and what it holds.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
	// Seen is the file's inode, size and time when its digest was last found right. While they stay, it is.
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

// Names of files in objects.
const (
	objectFile  = "object.json"
	kernelFile  = "vmlinux"
	modulesFile = "modules.cpio" // the modules that a guest needs to find its root
	modulesDisk = "modules.ext4" // all of a kernel's modules
	initrdFile  = "initrd"
)

const maxObject = 1 << 20 // bytes of its description

func (s *Store) objectDir(id string) string { return s.path(objectsDir, id) }

// file is the path of an object's own file.
func (s *Store) file(o *Object) string { return filepath.Join(s.objectDir(o.ID), o.Files[0].Name) }

// object reads an object's description, with fs.ErrNotExist where there is none.
func (s *Store) object(id string) (*Object, error) {
	if !objectID.MatchString(id) {
		return nil, fmt.Errorf("object %q: %w", id, fs.ErrInvalid)
	}
	o, err := readJSON[Object](filepath.Join(s.objectDir(id), objectFile), maxObject)
	if err != nil {
		return nil, err
	}
	if o.ID != id || len(o.Files) == 0 || slices.ContainsFunc(o.Files, func(f File) bool { return f.Name != filepath.Base(f.Name) }) {
		return nil, fmt.Errorf("object %s: its description: %w", id, ErrCorrupt)
	}
	return &o, nil
}

// use checks that an object's files are what was stored: by digest where they have changed since they last were looked
// at, or where full says so.
func (s *Store) use(ctx context.Context, id string, full bool) (*Object, error) {
	o, err := s.object(id)
	if err != nil {
		return nil, err
	}
	changed := false
	for i := range o.Files {
		f := &o.Files[i]
		path := filepath.Join(s.objectDir(id), f.Name)
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
	release, err := s.locks.One(ctx, oneSeen, id, "another smartvm that verifies the same image")
	if err != nil {
		return nil, err
	}
	return o, errors.Join(atomicfile.WriteJSON(filepath.Join(s.objectDir(id), objectFile), o), release())
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
	n, err := io.Copy(h, s.watch(ctx, f, step, fi.Size()))
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// watch is a reader that tells how far it is and ends with its context.
func (s *Store) watch(ctx context.Context, r io.Reader, step string, total int64) io.Reader {
	return &watched{ctx: ctx, r: r, tell: func(done int64) { s.opts.Progress(step, done, total) }}
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

// InUse says whether VMs use what is in a directory that Boot has named as one of those that they do. When in doubt they do.
func InUse(dir string) bool {
	all, err := kept.Users(false, dir)
	return err != nil || len(all) > 0
}

func readJSON[T any](path string, limit int) (v T, err error) {
	f, err := os.Open(path)
	if err != nil {
		return v, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return v, err
	}
	if v, err = strictjson.Unmarshal[T](data, limit); err != nil {
		return v, fmt.Errorf("read %s: %w: %w", path, ErrCorrupt, err)
	}
	return v, nil
}
