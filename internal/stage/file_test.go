package stage_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/testenv"
)

// piece is data at an offset; between pieces there are holes.
type piece struct {
	off int64
	len int
}

// makeSparse writes a file of the given size and returns its content.
func makeSparse(t *testing.T, path string, size int64, pieces ...piece) []byte {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	content := make([]byte, size)
	for i, p := range pieces {
		data := bytes.Repeat([]byte{byte(i + 1)}, p.len)
		copy(content[p.off:], data)
		if _, err := f.WriteAt(data, p.off); err != nil {
			t.Fatal(err)
		}
	}
	return content
}

// allocated is how many bytes a file takes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

func TestFile_KeepsHoles(t *testing.T) {
	const mib = 1 << 20
	tests := []struct {
		name   string
		size   int64
		pieces []piece
	}{
		{"empty", 0, nil},
		{"nothing but a hole", 40 * mib, nil},
		{"no hole", 64 << 10, []piece{{0, 64 << 10}}},
		{"hole in front", 40 * mib, []piece{{39 * mib, mib}}},
		{"hole at the end", 40 * mib, []piece{{0, mib}}},
		{"many", 40 * mib, []piece{{4 << 10, 4 << 10}, {mib, 8 << 10}, {20 * mib, 10 * mib}, {40*mib - 3, 3}}},
		{"odd size", mib + 123, []piece{{mib, 123}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
			content := makeSparse(t, source, tt.size, tt.pieces...)
			var done, total int64
			f := &stage.File{Source: source, Target: target, UID: -1, Progress: func(d, n int64) {
				if d <= done || d > n || total != 0 && n != total {
					t.Errorf("progress %d of %d after %d of %d", d, n, done, total)
				}
				done, total = d, n
			}}
			if err := f.Apply(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(target); err != nil || !bytes.Equal(got, content) {
				t.Errorf("the copy differs: %d bytes of %d, %v", len(got), len(content), err)
			}
			if got, want := allocated(t, target), allocated(t, source); got > want+64<<10 {
				t.Errorf("the copy takes %d bytes, its source %d", got, want)
			}
			if done != total || f.Method == stage.Copy && len(tt.pieces) > 0 && total == 0 {
				t.Errorf("progress ended at %d of %d, method %s", done, total, f.Method)
			}
			if fi, err := os.Stat(target); err != nil || fi.Mode() != 0o600 {
				t.Errorf("mode of the copy: %v, %v", fi.Mode(), err)
			}
			for range 2 {
				if err := f.Revert(t.Context()); err != nil {
					t.Error(err)
				}
			}
			if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the copy stays: %v", err)
			}
		})
	}
}

func TestFile_Fails(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	makeSparse(t, source, 1<<20, piece{0, 1 << 20})

	err := (&stage.File{Source: filepath.Join(dir, "missing"), Target: target, UID: -1}).Apply(t.Context())
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no source: %v", err)
	}
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no source, and a target: %v", err)
	}

	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	f := &stage.File{Source: source, Target: target, UID: -1}
	if err := f.Apply(ctx); f.Method == stage.Copy && !errors.Is(err, gone) {
		t.Errorf("a copy whose caller has gone: %v, want %v", err, gone)
	}
	if err := f.Revert(ctx); err != nil {
		t.Error(err)
	}

	if err := os.WriteFile(target, []byte("foreign"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (&stage.File{Source: source, Target: target, UID: -1}).Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("target taken: %v", err)
	}
	if got, err := os.ReadFile(target); err != nil || string(got) != "foreign" {
		t.Errorf("what was there is now %q, %v", got, err)
	}

	if err := (&stage.File{Source: dir, Target: filepath.Join(dir, "other"), UID: -1}).Apply(t.Context()); err == nil {
		t.Error("a directory was copied")
	}
}

// A copy ends with its context, not only before it begins.
func TestFile_CancelledMidway(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	makeSparse(t, source, 20<<20, piece{0, 20 << 20})
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	f := &stage.File{Source: source, Target: filepath.Join(dir, "target"), UID: -1, Progress: func(int64, int64) {
		cancel(gone)
	}}
	if err := f.Apply(ctx); f.Method == stage.Copy && !errors.Is(err, gone) {
		t.Errorf("%v, want %v", err, gone)
	}
}

func TestFile_Owner(t *testing.T) {
	testenv.Require(t, testenv.Root)
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	makeSparse(t, source, 10, piece{0, 10})
	f := &stage.File{Source: source, Target: filepath.Join(dir, "target"), UID: 12345}
	if err := f.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantOwner(t, f.Target, 12345)
	wantOwner(t, source, 0)
}

func wantOwner(t *testing.T, path string, want uint32) {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if st := fi.Sys().(*syscall.Stat_t); st.Uid != want || st.Gid != want {
		t.Errorf("%s belongs to %d:%d, want %d", path, st.Uid, st.Gid, want)
	}
}

func mountTmpfs(t *testing.T, dir, options string) {
	t.Helper()
	if err := errors.Join(os.Mkdir(dir, 0o700), unix.Mount("none", dir, "tmpfs", 0, options)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
}

func TestFile_NoSpace(t *testing.T) {
	if !testenv.Apart(t) {
		return
	}
	dir := t.TempDir()
	small := filepath.Join(dir, "small")
	mountTmpfs(t, small, "size=4m")
	source := filepath.Join(dir, "source")
	makeSparse(t, source, 1<<30, piece{0, 8 << 20})
	f := &stage.File{Source: source, Target: filepath.Join(small, "target"), UID: -1}
	err := f.Apply(t.Context())
	var space *stage.SpaceError
	if !errors.As(err, &space) || !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("%v, want a *SpaceError", err)
	}
	if space.Need != 8<<20 || space.Free > 4<<20 || space.Free < 3<<20 || space.Source != source {
		t.Errorf("%+v", space)
	}
	if !strings.Contains(err.Error(), "needs 8 MiB, 4 MiB are free") &&
		!strings.Contains(err.Error(), "needs 8 MiB, 3 MiB are free") {
		t.Errorf("message %q", err)
	}
	if got := allocated(t, f.Target); got > 0 {
		t.Errorf("%d bytes were written of what does not fit", got)
	}
	if err := f.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	// What counts is the data, not the size.
	makeSparse(t, source, 1<<30, piece{0, 1 << 20})
	if err := f.Apply(t.Context()); err != nil {
		t.Errorf("1 MiB of data in 1 GiB: %v", err)
	}
}

// loop makes a block device of a file.
func loop(t *testing.T, path string) string {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("loop devices are missing: %v", err)
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		t.Skipf("no free loop device: %v", err)
	}
	name := fmt.Sprintf("/dev/loop%d", n)
	device, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Skipf("loop device: %v", err)
	}
	defer device.Close()
	backing, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer backing.Close()
	if err := unix.IoctlSetInt(int(device.Fd()), unix.LOOP_SET_FD, int(backing.Fd())); err != nil {
		t.Skipf("loop device: %v", err)
	}
	t.Cleanup(func() {
		d, err := os.Open(name)
		if err != nil {
			t.Error(err)
			return
		}
		defer d.Close()
		if err := unix.IoctlSetInt(int(d.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
			t.Error(err)
		}
	})
	return name
}

func TestFile_OfBlockDevice(t *testing.T) {
	testenv.Require(t, testenv.Root)
	dir := t.TempDir()
	backing := filepath.Join(dir, "backing")
	content := makeSparse(t, backing, 1<<20, piece{4096, 4096}, piece{1<<20 - 4096, 4096})
	f := &stage.File{Source: loop(t, backing), Target: filepath.Join(dir, "target"), UID: -1}
	if err := f.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	if f.Method != stage.Copy {
		t.Errorf("method %s", f.Method)
	}
	if got, err := os.ReadFile(f.Target); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the copy differs: %d bytes of %d, %v", len(got), len(content), err)
	}
}

func TestFile_Reflink(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	content := makeSparse(t, source, 4<<20, piece{0, 4 << 20})
	if !stage.CanReflink(source, dir) {
		t.Skipf("%s is on a file system without reflinks", dir)
	}
	f := &stage.File{Source: source, Target: filepath.Join(dir, "target"), UID: -1}
	if err := f.Apply(t.Context()); err != nil || f.Method != stage.Reflink {
		t.Fatalf("method %s, %v", f.Method, err)
	}
	if err := os.WriteFile(f.Target, []byte("changed"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(source); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the source changed: %v", err)
	}
}

func TestCanReflink_Not(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	makeSparse(t, source, 4096, piece{0, 4096})
	for name, args := range map[string][2]string{
		"no source":     {filepath.Join(dir, "missing"), dir},
		"no directory":  {source, filepath.Join(dir, "missing")},
		"another place": {source, "/dev/shm"},
	} {
		if stage.CanReflink(args[0], args[1]) {
			t.Errorf("%s: yes", name)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}
