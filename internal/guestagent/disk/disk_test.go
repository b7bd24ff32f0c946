package disk_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/guestagent/disk"
	"push.rocks/smartvm/internal/testenv"
)

// A disk has at first what the image has in its place, with owners, modes, links and FIFOs, and
// then what was written.
func TestPut(t *testing.T) {
	testenv.Require(t, testenv.Root)
	runtime.LockOSThread() // and not unlocked: the thread ends with the test, and its mounts
	if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
		t.Fatal(err)
	}
	defer unix.Umask(unix.Umask(0o022)) // modes are compared
	dir := t.TempDir()
	target, at := filepath.Join(dir, "image/data"), filepath.Join(dir, "disk")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(target, "sub/empty"), 0o755), os.Chmod(target, 0o750|fs.ModeSetgid),
		os.Chown(target, 70, 71), os.Chmod(target, 0o750|fs.ModeSetgid),
		os.WriteFile(filepath.Join(target, "sub/file"), []byte("image"), 0o640),
		os.Chown(filepath.Join(target, "sub/file"), 7, 8),
		os.Link(filepath.Join(target, "sub/file"), filepath.Join(target, "again")),
		os.Symlink("sub/file", filepath.Join(target, "link")),
		unix.Mkfifo(filepath.Join(target, "fifo"), 0o600), os.Mkdir(at, 0o755), unix.Mount("tmpfs", at, "tmpfs", 0, ""),
		// of a guest that was killed
		os.MkdirAll(filepath.Join(at, "lost+found"), 0o700), os.MkdirAll(filepath.Join(at, guest.DiskDir+".new/half"), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(at, unix.MNT_DETACH) })
	put := func(d guest.Disk) {
		t.Helper()
		if err := disk.Put(at, d); err != nil {
			t.Fatal(err)
		}
	}
	d := guest.Disk{Device: "/dev/vdc", Target: target}
	put(d)
	wantTree(t, target,
		"again file 640 7:8 2,fifo fifo 600 0:71 1,link link,sub dir 755 0:0 3,sub/empty dir 755 0:0 2,sub/file file 640 7:8 2,")
	if fi, err := os.Stat(target); err != nil || fi.Mode().Perm() != 0o750 || fi.Mode()&fs.ModeSetgid == 0 ||
		fi.Sys().(*syscall.Stat_t).Uid != 70 || fi.Sys().(*syscall.Stat_t).Gid != 71 {
		t.Errorf("its root: %v, %v", fi.Mode(), err)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(target, "new"), []byte("guest"), 0o600),
		os.RemoveAll(filepath.Join(target, "sub"))); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(target, 0); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(target, "sub/file")); err != nil || string(got) != "image" {
		t.Errorf("the image's own: %q, %v", got, err)
	}
	// The next guest, which only reads.
	d.ReadOnly = true
	put(d)
	defer func() { _ = unix.Unmount(target, unix.MNT_DETACH) }()
	wantTree(t, target, "again file 640 7:8 1,fifo fifo 600 0:71 1,link link,new file 600 0:71 1,")
	if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("written, read-only: %v", err)
	}
	// Where the image has nothing.
	nowhere := filepath.Join(dir, "image/no/where")
	if err := os.RemoveAll(filepath.Join(at, guest.DiskDir)); err == nil {
		put(guest.Disk{Device: "/dev/vdc", Target: nowhere})
		defer func() { _ = unix.Unmount(nowhere, unix.MNT_DETACH) }()
		wantTree(t, nowhere, "")
	}
}

// The host is told of what is free on drives that take it, and no other.
func TestOptions(t *testing.T) {
	sys := t.TempDir()
	for device, limit := range map[string]string{"vda": "0\n", "vdb": "2147483136\n", "vdc": ""} {
		queue := filepath.Join(sys, "block", device, "queue")
		err := os.MkdirAll(queue, 0o755)
		if limit != "" {
			err = errors.Join(err, os.WriteFile(filepath.Join(queue, "discard_max_bytes"), []byte(limit), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for device, want := range map[string]string{"vda": "", "vdb": "discard", "vdc": "", "vdd": ""} {
		if got := disk.Options(sys, "/dev/"+device); got != want {
			t.Errorf("%s is mounted with %q, want %q", device, got, want)
		}
	}
}

// wantTree compares what is below a directory: name, kind, mode, owner, names of the inode.
func wantTree(t *testing.T, dir, want string) {
	t.Helper()
	got := ""
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		got += describeEntry(dir, path) + ","
		return nil
	})
	if err != nil || got != want {
		t.Errorf("got %q, %v\nwant %q", got, err, want)
	}
}

func describeEntry(dir, path string) string {
	rel, _ := filepath.Rel(dir, path)
	fi, err := os.Lstat(path)
	if err != nil {
		return err.Error()
	}
	kind := map[fs.FileMode]string{
		0: "file", fs.ModeDir: "dir", fs.ModeSymlink: "link",
		fs.ModeNamedPipe: "fifo",
	}[fi.Mode().Type()]
	if kind == "link" {
		return rel + " link"
	}
	st := fi.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%s %s %o %d:%d %d", rel, kind, fi.Mode().Perm(), st.Uid, st.Gid, st.Nlink)
}
