// Package volume makes and changes disks: files with a file system in them.
//
// Of the host it needs mkfs.ext4 (e2fsprogs) or mkfs.xfs (xfsprogs) to make them, and resize2fs and e2fsck to change
// their size.
package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/stage"
)

// ErrFormat says that a file is not, or not wholly, what it should be.
var ErrFormat = errors.New("not such a file system")

// Limits of a disk in bytes: what the tools take, and what a host's file system may hold as a sparse file.
const (
	MinSize = 1 << 20
	MaxSize = 16 << 40
)

// minXFS is the least that mkfs.xfs takes, in bytes.
const minXFS = 300 << 20

// magics of file systems, by their place.
var magics = []struct {
	kind   string
	offset int
	magic  string
}{
	{"squashfs", 0, "hsqs"},
	{"xfs", 0, "XFSB"},
	{"ext4", 1024 + 0x38, "\x53\xef"}, // ext2 and ext3 too, which ext4 mounts
	{"erofs", 1024, "\xe2\xe1\xf5\xe0"},
	{"btrfs", 65536 + 0x40, "_BHRfS_M"},
}

// Detect says which file system a file holds: "ext4" (or ext2, ext3), "xfs", "btrfs", "squashfs", "erofs", or "" for
// anything else. Where the file is shorter than the file system says it is, that is ErrFormat.
func Detect(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	head := make([]byte, 65536+0x48)
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	head = head[:n]
	for _, m := range magics {
		if len(head) < m.offset+len(m.magic) || !bytes.Equal(head[m.offset:m.offset+len(m.magic)], []byte(m.magic)) {
			continue
		}
		if want := length(m.kind, head); want > uint64(fi.Size()) {
			return "", fmt.Errorf("%s: %w: it is cut off: %s of %d bytes in a file of %d", path, ErrFormat, m.kind, want, fi.Size())
		}
		return m.kind, nil
	}
	return "", nil
}

// length is a file system's in bytes, by its superblock; 0 if that does not tell.
func length(kind string, head []byte) uint64 {
	le := binary.LittleEndian
	switch {
	case kind == "squashfs" && len(head) >= 48:
		return le.Uint64(head[40:])
	case kind == "ext4" && len(head) >= 2048:
		shift := le.Uint32(head[1024+0x18:])
		blocks := uint64(le.Uint32(head[1024+0x4:]))
		if le.Uint32(head[1024+0x60:])&0x80 != 0 { // 64bit
			blocks |= uint64(le.Uint32(head[1024+0x150:])) << 32
		}
		if shift > 6 || blocks > MaxSize>>10 {
			return 1 << 63 // no block is larger than 64 KiB: nonsense
		}
		return blocks << (10 + shift)
	case kind == "erofs" && len(head) >= 1024+128:
		shift := head[1024+12]
		if shift > 16 {
			return 1 << 63
		}
		return uint64(le.Uint32(head[1024+36:])) << shift
	}
	return 0
}

// Blank makes a sparse file of size bytes at path with an empty file system in it: "ext4" or "xfs". Path must not
// exist; it is there when all of it is. Returns exec.ErrNotFound where the tool is missing.
func Blank(ctx context.Context, path, kind string, size int64) error {
	if size < MinSize || size > MaxSize || kind == "xfs" && size < minXFS {
		return fmt.Errorf("make disk %s: %w: %d bytes of %s", path, fs.ErrInvalid, size, kind)
	}
	var tool []string
	switch kind {
	case "ext4":
		// What is not written now, the kernel writes when it is first needed: 4 GiB take 180 KiB.
		tool = []string{"mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^resize_inode", "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"}
	case "xfs":
		tool = []string{"mkfs.xfs", "-q"}
	default:
		return fmt.Errorf("make disk %s: %w: file system %q, want ext4 or xfs", path, fs.ErrInvalid, kind)
	}
	return build(path, func(temp string) error {
		f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
			return err
		}
		return run(ctx, append(tool, temp)...)
	})
}

// Clone copies a disk by reflink, or else without its holes. Target must not exist; it is there when all of it is.
func Clone(ctx context.Context, source, target string, progress func(done, total int64)) error {
	return build(target, func(temp string) error {
		return (&stage.File{Source: source, Target: temp, UID: -1, Progress: progress}).Apply(ctx)
	})
}

// build makes a file under a temporary name, and then gives it its own.
func build(path string, make func(temp string) error) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("make disk %s: %w", path, fs.ErrExist)
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	temp := filepath.Join(dir, "disk")
	err = make(temp)
	if err == nil {
		err = syncFile(temp)
	}
	if err == nil {
		err = os.Link(temp, path) // unlike a rename, it replaces nothing
	}
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		return fmt.Errorf("make disk %s: %w", path, err)
	}
	return atomicfile.SyncDir(filepath.Dir(path))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Resize makes the disk at path, which no VM may have open, size bytes large, and an ext4 in it likewise. Returns
// ErrFormat for other file systems: they grow while they are mounted, in the guest.
func Resize(ctx context.Context, path string, size int64) error {
	if size < MinSize || size > MaxSize {
		return fmt.Errorf("resize disk %s: %w: %d bytes", path, fs.ErrInvalid, size)
	}
	kind, err := Detect(path)
	if err != nil {
		return fmt.Errorf("resize disk: %w", err)
	}
	fi, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("resize disk: %w", err)
	}
	if kind != "ext4" {
		return fmt.Errorf("resize disk %s: %w: want ext4", path, ErrFormat)
	}
	if err := run(ctx, "e2fsck", "-f", "-p", path); err != nil {
		return fmt.Errorf("resize disk %s: %w", path, err)
	}
	if size > fi.Size() {
		if err := os.Truncate(path, size); err != nil {
			return fmt.Errorf("resize disk: %w", err)
		}
	}
	if err := run(ctx, "resize2fs", path, fmt.Sprintf("%dK", size>>10)); err != nil {
		return fmt.Errorf("resize disk %s: %w", path, err)
	}
	if err := os.Truncate(path, size); err != nil {
		return fmt.Errorf("resize disk: %w", err)
	}
	return nil
}

// run runs a tool of the host. Its output is part of the error.
func run(ctx context.Context, argv ...string) error {
	path, err := lookPath(argv[0])
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, argv[1:]...)
	cmd.WaitDelay = time.Second
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && argv[0] == "e2fsck" && exit.ExitCode() == 1 {
		err = nil // it has put something right
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", argv[0], err, strings.TrimSpace(string(out[:min(len(out), 1<<10)])))
	}
	return nil
}

// lookPath finds a tool, also where only root has it in its path.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", err
}
