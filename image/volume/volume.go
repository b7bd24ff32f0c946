// Package volume makes and changes disks: files with a file system in them.
//
// Of the host it needs mkfs.ext4 (e2fsprogs) or mkfs.xfs (xfsprogs) to make them, and resize2fs and
// e2fsck to change their size.
package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/disklock"
	"push.rocks/smartvm/internal/stage"
)

// ErrFormat says that a file is not, or not wholly, what it should be.
var ErrFormat = errors.New("not such a file system")

// Limits of a disk in bytes: what the tools take, and what a host's file system may hold as a
// sparse file.
const (
	MinSize = 1 << 20
	MaxSize = 16 << 40
)

// minXFS is the least that mkfs.xfs takes, in bytes.
const minXFS = 300 << 20

// Blank makes a sparse file of size bytes at path with an empty file system in it: "ext4" or "xfs".
// Path must not exist; it is there when all of it is. Returns exec.ErrNotFound where the tool is
// missing.
func Blank(ctx context.Context, path, kind string, size int64) error {
	if size < MinSize || size > MaxSize || kind == "xfs" && size < minXFS {
		return fmt.Errorf("make disk %s: %w: %d bytes of %s", path, fs.ErrInvalid, size, kind)
	}
	var tool []string
	switch kind {
	case "ext4":
		// What is not written now, the kernel writes when it is first needed: 4 GiB take 180 KiB.
		tool = []string{
			"mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^resize_inode", "-E",
			"lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0",
		}
	case "xfs":
		tool = []string{"mkfs.xfs", "-q"}
	default:
		return fmt.Errorf("make disk %s: %w: file system %q, want ext4 or xfs", path, fs.ErrInvalid, kind)
	}
	return build(path, func(temp *os.File) error {
		if err := temp.Truncate(size); err != nil {
			return err
		}
		return run(ctx, temp, append(tool, inChild)...)
	})
}

// Options of what is done to disks. The zero value serves where no VMs are.
type Options struct {
	// InUse says why the disk at a path must not be touched. It is called when no VM can start with
	// the disk any more. Nil: it may be.
	InUse func(path string) error
	// Progress, if set, is told of bytes copied so far and in all.
	Progress func(done, total int64)
}

func (o Options) check(path string) error {
	if o.InUse == nil {
		return nil
	}
	return o.InUse(path)
}

// Clone copies a disk by reflink, or else without its holes. Target must not exist; it is there
// when all of it is. Returns disklock.ErrBusy while another process changes the disk.
func Clone(ctx context.Context, source, target string, o Options) error {
	src, err := os.Open(source)
	if err != nil {
		return fmt.Errorf("clone disk: %w", err)
	}
	defer src.Close()
	if err := errors.Join(disklock.Lock(src, true), o.check(source)); err != nil {
		return fmt.Errorf("clone disk %s: %w", source, err)
	}
	return build(target, func(temp *os.File) error {
		return (&stage.File{Source: source, UID: -1, Progress: o.Progress}).Into(ctx, temp)
	})
}

// build makes a file without a name, and then gives it one: of a process that is killed nothing
// stays.
func build(path string, make func(temp *os.File) error) error {
	if _, err := os.Lstat(path); err == nil {
		return fmt.Errorf("make disk %s: %w", path, fs.ErrExist)
	}
	dir := filepath.Dir(path)
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) {
		return buildNamed(path, make)
	}
	if err != nil {
		return fmt.Errorf("make disk %s: %w", path, err)
	}
	temp := os.NewFile(uintptr(fd), path)
	defer temp.Close()
	if err := errors.Join(make(temp), temp.Sync()); err != nil {
		return fmt.Errorf("make disk %s: %w", path, err)
	}
	// Unlike a rename, it replaces nothing.
	if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, path,
		unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("make disk %s: %w", path, err)
	}
	return atomicfile.SyncDir(dir)
}

// buildNamed is build where files without names cannot be made, as on NFS. What a killed process
// leaves, the next one for the same path takes.
func buildNamed(path string, make func(temp *os.File) error) error {
	temp, err := os.OpenFile(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+atomicfile.TempSuffix),
		os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	defer temp.Close()
	if err := disklock.Lock(temp, false); err != nil {
		return fmt.Errorf("make disk %s: %w", path, err)
	}
	err = errors.Join(temp.Truncate(0), make(temp), temp.Sync())
	if err == nil {
		err = os.Link(temp.Name(), path)
	}
	if err = errors.Join(err, os.Remove(temp.Name())); err != nil {
		return fmt.Errorf("make disk %s: %w", path, err)
	}
	return atomicfile.SyncDir(filepath.Dir(path))
}

// openExt4 opens the disk at path, which no VM may have open, to change the ext4 in it. Errors say
// what was to be done.
func openExt4(verb, path string, o Options) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%s disk: %w", verb, err)
	}
	kind := ""
	if err = errors.Join(disklock.Lock(f, false), o.check(path)); err == nil {
		kind, err = Detect(path)
	}
	if err == nil && kind != "ext4" {
		err = fmt.Errorf("%w: want ext4", ErrFormat)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s disk %s: %w", verb, path, err), f.Close())
	}
	return f, nil
}

// Trim gives the host's file system back what is free in the ext4 of the disk at path, which no VM
// may have open: it becomes holes. Returns how many bytes less the disk takes. Errors are ErrFormat
// for other file systems, which fstrim trims in the guest if its VMM offers discard; and
// disklock.ErrBusy.
func Trim(ctx context.Context, path string, o Options) (freed int64, err error) {
	f, err := openExt4("trim", path, o)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	before, err := used(f)
	if err == nil {
		err = run(ctx, f, "e2fsck", "-f", "-p", "-E", "discard", inChild)
	}
	after, statErr := used(f)
	if err := errors.Join(err, statErr); err != nil {
		return 0, fmt.Errorf("trim disk %s: %w", path, err)
	}
	return before - after, nil
}

// used is what a file takes on the host, in bytes.
func used(f *os.File) (int64, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	return st.Blocks * 512, err
}

// Resize makes the disk at path, which no VM may have open, size bytes large, and an ext4 in it
// likewise. Once it has begun to, it does not stop for the end of ctx. Returns ErrFormat for other
// file systems: they grow while they are mounted, in the guest; and disklock.ErrBusy.
func Resize(ctx context.Context, path string, size int64, o Options) error {
	if size < MinSize || size > MaxSize {
		return fmt.Errorf("resize disk %s: %w: %d bytes", path, fs.ErrInvalid, size)
	}
	f, err := openExt4("resize", path, o)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("resize disk: %w", err)
	}
	if err := run(ctx, f, "e2fsck", "-f", "-p", inChild); err != nil {
		return fmt.Errorf("resize disk %s: %w", path, err)
	}
	if size > fi.Size() {
		if err := f.Truncate(size); err != nil {
			return fmt.Errorf("resize disk: %w", err)
		}
	}
	if err := run(context.WithoutCancel(ctx), f, "resize2fs", inChild, fmt.Sprintf("%dK", size>>10)); err != nil {
		return fmt.Errorf("resize disk %s: %w", path, err)
	}
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("resize disk: %w", err)
	}
	return nil
}

// inChild is the path of the disk in a tool that is run.
const inChild = "/proc/self/fd/3"

// run runs a tool of the host on a disk, whose lock it shares: where we are killed, it goes on. A
// terminal's Ctrl-C is for us alone. Its output is part of the error.
func run(ctx context.Context, disk *os.File, argv ...string) error {
	path, err := lookPath(argv[0])
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, path, argv[1:]...)
	cmd.WaitDelay = time.Second
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.ExtraFiles = []*os.File{disk} // as inChild
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && argv[0] == "e2fsck" && exit.ExitCode() == 1 {
		err = nil // it has put something right
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		text := strings.ReplaceAll(string(out[:min(len(out), 1<<10)]), inChild, disk.Name())
		return fmt.Errorf("%s: %w: %s", argv[0], err, strings.TrimSpace(text))
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
