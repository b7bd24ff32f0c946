package base

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/stage"
)

// plan is a bundle that is to be made.
type plan struct {
	id, name, version, rootfsType, bootArgs string
	readOnly, hosted                        bool
	kernel, rootfs                          artifact
}

// artifact is a file that a bundle is to have.
type artifact struct {
	url, path    string // one of them
	sha256, etag string // empty: unknown
	size         int64  // bytes, 0: unknown
	fileName     string
}

func (a *artifact) source() string {
	if a.url != "" {
		return a.url
	}
	return a.path
}

// Limits of what a server can make us take.
const (
	maxKernel = 512 << 20 // bytes
	maxRootfs = 64 << 30  // bytes
)

// make makes a bundle. The caller has the working directory locked. What was fetched before an
// interruption of the same files is gone on with, and all else there is removed.
func (s *Store) make(ctx context.Context, p *plan) error {
	sum := sha256.Sum256(fmt.Appendf(nil, "%+v %+v", p.kernel, p.rootfs))
	work := s.path(workDir, p.id+"."+hex.EncodeToString(sum[:8]))
	entries, err := os.ReadDir(s.path(workDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != filepath.Base(work) {
			err = errors.Join(err, os.RemoveAll(s.path(workDir, e.Name())))
		}
	}
	if err = errors.Join(err, os.MkdirAll(filepath.Join(work, usersDir), 0o700)); err != nil {
		return err
	}
	if !p.hosted {
		i, err := s.readIndex()
		if err != nil {
			return err
		}
		pin := i.Pins[p.id]
		p.kernel.sha256, p.rootfs.sha256 = pin.Kernel, pin.Rootfs
	}
	b := &Bundle{
		Version: descVersion, ID: p.id, Name: p.name, Arch: s.opts.Arch, FirecrackerVersion: p.version,
		RootfsType:       p.rootfsType,
		RootfsIsReadOnly: p.readOnly, BootArgs: p.bootArgs, Hosted: p.hosted,
	}
	if b.Kernel, err = s.bring(ctx, "kernel", p.kernel, work); err == nil {
		b.Rootfs, err = s.bring(ctx, "rootfs", p.rootfs, work)
	}
	if err == nil {
		err = checkType(filepath.Join(work, p.rootfs.fileName), p.rootfsType)
	}
	if err != nil {
		return err
	}
	if err := errors.Join(atomicfile.WriteJSON(filepath.Join(work, descFile), b), atomicfile.SyncDir(work)); err != nil {
		return err
	}
	if err := os.Rename(work, s.path(p.id)); err != nil {
		return err
	}
	s.log.Info("fetched base image", "bundle", p.id)
	return atomicfile.SyncDir(s.opts.Dir)
}

// bring puts an artifact into the working directory, on disk and checked.
func (s *Store) bring(ctx context.Context, step string, a artifact, work string) (File, error) {
	path := filepath.Join(work, a.fileName)
	f := File{FileName: a.fileName, SHA256: a.sha256, Source: a.source()}
	limit := int64(maxRootfs)
	if step == "kernel" {
		limit = maxKernel
	}
	progress := func(done, total int64) { s.opts.Progress(step, done, total) }
	var err error
	switch {
	case a.path != "":
		f.SHA256 = ""
		err = copyFile(ctx, a, path, limit, progress)
	case s.opts.Offline:
		err = ErrOffline
	default:
		want := download.File{URL: a.url, SHA256: a.sha256, ETag: a.etag, Size: a.size, MaxSize: limit}
		err = s.opts.client.Fetch(ctx, want, path, progress)
	}
	if err == nil && f.SHA256 == "" {
		f.SHA256, err = s.digest(ctx, path)
	}
	if err == nil && a.sha256 != "" && f.SHA256 != a.sha256 {
		err = errors.Join(&download.DigestError{URL: a.path, Want: a.sha256, Got: f.SHA256}, os.Remove(path))
	}
	// Readable to all, since a VMM in a jail is another user; the directory above is nobody's but
	// ours.
	if err == nil {
		err = os.Chmod(path, 0o444)
	}
	if err == nil {
		f.Seen, err = stamp(path)
	}
	if err != nil {
		return f, fmt.Errorf("%s: %w", step, err)
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return f, fmt.Errorf("%s: %w", step, err)
	}
	f.Size = fi.Size()
	return f, nil
}

// copyFile copies a file of this machine's, by reflink where that can be.
func copyFile(ctx context.Context, a artifact, to string, limit int64, progress func(done, total int64)) error {
	fi, err := os.Stat(a.path)
	switch {
	case err != nil:
		return err
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%s: %w: no regular file", a.path, fs.ErrInvalid)
	case fi.Size() > limit:
		return &download.SizeError{URL: a.path, Want: limit, Got: -1}
	case a.size > 0 && fi.Size() != a.size:
		return &download.SizeError{URL: a.path, Want: a.size, Got: fi.Size()}
	}
	if err := os.Remove(to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	file := &stage.File{Source: a.path, Target: to, UID: -1, Progress: progress}
	if err := file.Apply(ctx); err != nil {
		return errors.Join(err, file.Revert(ctx))
	}
	f, err := os.Open(to)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// checkType looks whether a file system is of the type that it is said to be of.
func checkType(path, want string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	head := make([]byte, 2048)
	n, _ := f.ReadAt(head, 0) // what is too short is of no type
	got := "something else"
	switch {
	case n >= 4 && string(head[:4]) == "hsqs":
		got = "squashfs"
	case n >= 0x43a && head[0x438] == 0x53 && head[0x439] == 0xef:
		got = "ext4"
	}
	if got != want {
		return fmt.Errorf("rootfs: %w: it is %s, not %s", fs.ErrInvalid, got, want)
	}
	return nil
}
