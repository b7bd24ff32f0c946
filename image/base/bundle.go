package base

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/lock"
)

// Bundle is a kernel and a root file system. Its files must not be written.
type Bundle struct {
	Version            int       `json:"version"`
	ID                 string    `json:"bundleId"`
	Name               string    `json:"name"`
	Arch               string    `json:"arch"`                         // "x86_64" or "aarch64"
	FirecrackerVersion string    `json:"firecrackerVersion,omitempty"` // "v1.12.1"; empty: a manifest that says nothing
	RootfsType         string    `json:"rootfsType"`                   // "ext4" or "squashfs"
	RootfsIsReadOnly   bool      `json:"rootfsIsReadOnly"`             // its guest needs a layer to write on
	BootArgs           string    `json:"bootArgs,omitempty"`           // kernel command line; empty: the default
	Hosted             bool      `json:"hosted"`                       // it is of a manifest
	Kernel             File      `json:"kernel"`
	Rootfs             File      `json:"rootfs"`
	LastAccessedAt     time.Time `json:"lastAccessedAt"`

	Dir        string `json:"-"`
	KernelPath string `json:"-"`
	RootfsPath string `json:"-"`
}

// File is a stored file.
type File struct {
	FileName string `json:"fileName"`
	SHA256   string `json:"sha256"`
	Size     int64  `json:"sizeBytes"`
	Source   string `json:"source"` // URL or path
	// Seen is the file's inode, size and time when its digest was last found right. While they stay,
	// it is.
	Seen string `json:"seen"`
}

const (
	descVersion = 1
	maxDesc     = 64 << 10 // bytes of a description
)

var idPattern = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]*$`)

const maxID = 128 // bytes

func validID(id string) bool { return len(id) <= maxID && idPattern.MatchString(id) }

func (s *Store) read(id string) (*Bundle, error) {
	if !validID(id) {
		return nil, fmt.Errorf("bundle %.140q: %w: want 1 to 128 of A-Z a-z 0-9 . _ -, not a dot first", id, fs.ErrInvalid)
	}
	b, err := readJSON[Bundle](s.path(id, descFile), maxDesc)
	if _, dirErr := os.Lstat(s.path(id)); errors.Is(err, fs.ErrNotExist) && dirErr == nil {
		return nil, fmt.Errorf("bundle %s: %w: it has no description", id, ErrCorrupt)
	}
	if err != nil {
		return nil, fmt.Errorf("bundle %s: %w", id, err)
	}
	if b.Version != descVersion || b.ID != id || !plainName(b.Kernel.FileName) || !plainName(b.Rootfs.FileName) {
		return nil, fmt.Errorf("bundle %s: its description: %w", id, ErrCorrupt)
	}
	b.Dir, b.KernelPath, b.RootfsPath = s.path(id), s.path(id, b.Kernel.FileName), s.path(id, b.Rootfs.FileName)
	return &b, nil
}

// plainName says whether a foreign name is one of a file, and none of ours.
func plainName(name string) bool {
	return name != "" && len(name) <= 200 && name[0] != '.' && name != descFile && name != usersDir &&
		!strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f || r == '/' || r == '\\' }) &&
		!strings.HasPrefix(name, descFile+".") && !strings.HasSuffix(name, download.PartialSuffix)
}

// List returns the bundles, the last used first, as they are described. What cannot be read is left
// out, and in the error.
func (s *Store) List() ([]*Bundle, error) {
	entries, err := os.ReadDir(s.opts.Dir)
	if err != nil {
		return nil, fmt.Errorf("list base images: %w", err)
	}
	var all []*Bundle
	var errs []error
	for _, e := range entries {
		if !e.IsDir() || !validID(e.Name()) {
			continue
		}
		b, err := s.read(e.Name())
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
			continue
		}
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b *Bundle) int { return b.LastAccessedAt.Compare(a.LastAccessedAt) })
	return all, errors.Join(errs...)
}

// Open returns a bundle for use. Its files are compared with their digests if they have changed
// since that was last done. Returns fs.ErrNotExist, ErrCorrupt.
func (s *Store) Open(ctx context.Context, id string) (*Bundle, error) { return s.use(ctx, id, false) }

// Verify reads all of a bundle and compares it with what was stored. Returns fs.ErrNotExist,
// ErrCorrupt.
func (s *Store) Verify(ctx context.Context, id string) error {
	_, err := s.use(ctx, id, true)
	return err
}

func (s *Store) use(ctx context.Context, id string, full bool) (b *Bundle, err error) {
	hold, err := s.Hold(ctx, id)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, hold()) }()
	if b, err = s.read(id); err != nil {
		return nil, err
	}
	for _, f := range []*File{&b.Kernel, &b.Rootfs} {
		path := s.path(id, f.FileName)
		seen, err := stamp(path)
		if err != nil {
			return nil, fmt.Errorf("bundle %s: %w: %w", id, ErrCorrupt, err)
		}
		if seen == f.Seen && !full {
			continue
		}
		digest, err := s.digest(ctx, path)
		if err != nil {
			return nil, fmt.Errorf("bundle %s: %w", id, err)
		}
		if digest != f.SHA256 {
			return nil, fmt.Errorf("bundle %s: %w: the sha256 of %s is %s, not %s", id, ErrCorrupt, f.FileName, digest, f.SHA256)
		}
		f.Seen = seen
	}
	b.LastAccessedAt = time.Now().UTC()
	release, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	err = atomicfile.WriteJSON(s.path(id, descFile), b)
	return b, errors.Join(err, release())
}

// Hold keeps a bundle from being removed until release. A process that makes a VM holds it until
// InUse sees the VM. Returns fs.ErrNotExist.
func (s *Store) Hold(ctx context.Context, id string) (release func() error, err error) {
	f, err := s.lockBundle(id, func(f *os.File) error { return lock.Wait(ctx, f, lock.Shared, nil) })
	if err != nil {
		return nil, fmt.Errorf("hold bundle %.140q: %w", id, err)
	}
	return f.Close, nil
}

// lockBundle opens and locks a bundle's directory, which is still there then.
func (s *Store) lockBundle(id string, take func(f *os.File) error) (*os.File, error) {
	if !validID(id) {
		return nil, fs.ErrInvalid
	}
	f, err := os.Open(s.path(id))
	if err != nil {
		return nil, err
	}
	if err = take(f); err == nil && !lock.StillAt(f, s.path(id)) {
		err = fs.ErrNotExist
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Dir is where a bundle is, whether or not it is there.
func (s *Store) Dir(id string) string { return s.path(id) }

// stamp changes when the file at path does. That is for noticing accidents: who can write here can
// do as he likes.
func stamp(path string) (string, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() {
		return "", fmt.Errorf("%s: %w: no regular file", path, fs.ErrInvalid)
	}
	return fmt.Sprint(fi.Sys().(*syscall.Stat_t).Ino, " ", fi.Size(), " ", fi.ModTime().UnixNano()), nil
}

func (s *Store) digest(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	h, buf := sha256.New(), make([]byte, 256<<10)
	for done := int64(0); ; {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		n, err := f.Read(buf)
		h.Write(buf[:n])
		done += int64(n)
		s.opts.Progress("verify", done, fi.Size())
		if err == io.EOF {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// lock excludes others from changing descriptions, for a moment.
func (s *Store) lock(ctx context.Context) (release func() error, err error) {
	f, err := os.OpenFile(s.path(lockFile), os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lock.Wait(ctx, f, lock.Exclusive, nil); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

func readJSON[T any](path string, limit int) (v T, err error) {
	data, err := atomicfile.Read(path, int64(limit))
	if err != nil {
		return v, err
	}
	if v, err = atomicfile.DecodeStrict[T](data, limit); err != nil {
		return v, fmt.Errorf("read %s: %w: %w", path, ErrCorrupt, err)
	}
	return v, nil
}
