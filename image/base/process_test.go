package base_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/internal/testenv"
)

// The test program fetches Latest, if it is told to, into a directory from a bucket.
const childVariable = "SMARTVM_TEST_ENSURE"

func childOptions(dir, bucket string) base.Options {
	return base.Options{
		Dir: dir, BucketURL: bucket, Arch: "x86_64",
		ReleaseLatest: func(context.Context) (string, error) { return "v1.16.1", nil },
	}
}

func TestMain(m *testing.M) {
	testenv.OthersOut()
	dir, bucket, child := strings.Cut(os.Getenv(childVariable), "\n")
	if !child {
		os.Exit(m.Run())
	}
	s, err := base.Open(childOptions(dir, bucket))
	if err == nil {
		_, err = s.Ensure(context.Background(), base.Latest)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func child(t *testing.T, o base.Options) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+o.Dir+"\n"+o.BucketURL, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

const rootfsKey = "firecracker-ci/v1.16/x86_64/ubuntu-24.04.squashfs"

// half answers the first request for the root file system with half of it, and stops until goOn.
func half(b *bucket, data []byte, told chan<- struct{}, goOn <-chan struct{}) {
	first := true
	b.set(func(w http.ResponseWriter, r *http.Request) bool {
		if r.URL.Path != "/bucket/"+rootfsKey || !first {
			return false
		}
		first = false
		w.Header().Set("ETag", etag(data))
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		_, _ = w.Write(data[:len(data)/2])
		_ = http.NewResponseController(w).Flush()
		close(told)
		select {
		case <-goOn:
			_, _ = w.Write(data[len(data)/2:])
		case <-r.Context().Done():
		}
		return true
	})
}

// Killed in the middle of the root file system: what is there of it is of use only if it is of the
// same.
func TestEnsure_Killed(t *testing.T) {
	for _, changed := range []bool{false, true} {
		data := squashfs(strings.Repeat("rootfs", 10_000))
		halfSize := int64(len(data) / 2)
		b := newBucket(t, train("v1.16"))
		b.put(rootfsKey, data)
		o := childOptions(filepath.Join(t.TempDir(), "base"), b.URL+"/bucket")
		told := make(chan struct{})
		half(b, data, told, nil)
		cmd := child(t, o)
		<-told
		waitPartial(t, o.Dir, halfSize)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		s := open(t, o)
		wantIDs(t, s)
		if changed {
			data = squashfs(strings.Repeat("changed", 9_000))
			b.put(rootfsKey, data)
		}
		b.set(nil)
		b.gets()
		wantFile(t, ensure(t, s, base.Latest).RootfsPath, data)
		want := []string{fmt.Sprintf("ubuntu-24.04.squashfs bytes=%d-", halfSize)} // the kernel is there
		if changed {
			want = []string{"vmlinux-6.1.141", "ubuntu-24.04.squashfs"}
		}
		if diff := cmp.Diff(want, b.gets()); diff != "" {
			t.Errorf("changed %v: fetched, -want +got:\n%s", changed, diff)
		}
		if entries, err := os.ReadDir(filepath.Join(o.Dir, ".work")); err != nil || len(entries) > 0 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	}
}

// waitPartial waits until half of the root file system is on disk: all that the server sends.
func waitPartial(t *testing.T, dir string, size int64) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ; t.Context().Err() == nil; <-tick.C {
		found, err := filepath.Glob(filepath.Join(dir, ".work", "*", "*.squashfs.partial"))
		if err != nil {
			t.Fatal(err)
		}
		if len(found) == 1 {
			if fi, err := os.Stat(found[0]); err == nil && fi.Size() == size {
				return
			}
		}
	}
	t.Fatal("it never came")
}

func TestEnsure_TwoProcesses(t *testing.T) {
	data := squashfs("rootfs")
	b := newBucket(t, train("v1.16"))
	b.put(rootfsKey, data)
	o := childOptions(filepath.Join(t.TempDir(), "base"), b.URL+"/bucket")
	told, goOn := make(chan struct{}), make(chan struct{})
	half(b, data, told, goOn)
	cmd := child(t, o)
	<-told
	waits := 0
	o.Waiting = func(string) { waits++; close(goOn) }
	got := ensure(t, open(t, o), base.Latest)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	wantFile(t, got.RootfsPath, data)
	if gets := b.gets(); len(gets) != 2 || waits != 1 {
		t.Errorf("fetched %q, waited %d times", gets, waits)
	}
}

// Many at once use, fetch and remove: nobody sees anything half done.
func TestManyAtOnce(t *testing.T) {
	b := newBucket(t, merge(train("v1.16"), train("v1.7")))
	o := options(t, b, "v1.16.1")
	o.MaxStored = 1
	errs := make(chan error)
	work := func(preset string) error {
		s, err := base.Open(o)
		if err != nil {
			return err
		}
		for range 5 {
			got, err := s.Ensure(t.Context(), preset)
			if errors.Is(err, os.ErrNotExist) {
				continue // another has evicted it between two steps
			}
			if err != nil {
				return err
			}
			release, err := s.Hold(t.Context(), got.ID)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			rootfs, err := os.ReadFile(got.RootfsPath)
			if err = errors.Join(err, release()); err != nil {
				return err
			}
			if digest(rootfs) != got.Rootfs.SHA256 {
				return fmt.Errorf("%s: %q", got.ID, rootfs)
			}
		}
		return nil
	}
	for i := range 6 {
		go func() { errs <- work([]string{base.Latest, base.LTS}[i%2]) }()
	}
	for range 6 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if all := ids(t, open(t, o)); len(all) < 1 || len(all) > 2 {
		t.Errorf("%q", all)
	}
}

func TestEnsure_Cancelled(t *testing.T) {
	b := newBucket(t, train("v1.16"))
	o := options(t, b, "v1.16.1")
	reason := errors.New("enough")
	for _, step := range []string{"kernel", "rootfs", "verify"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		o.Progress = func(s string, done, _ int64) {
			if s == step && done > 0 {
				cancel(reason)
			}
		}
		s := open(t, o)
		if _, err := s.Ensure(ctx, base.Latest); !errors.Is(err, reason) {
			t.Errorf("%s: %v", step, err)
		}
		wantIDs(t, s)
	}
	o.Progress = nil
	ensure(t, open(t, o), base.Latest)
}

func TestEnsure_DiskFull(t *testing.T) {
	if !testenv.Apart(t) {
		return
	}
	dir := filepath.Join(t.TempDir(), "base")
	if err := errors.Join(os.Mkdir(dir, 0o700), unix.Mount("none", dir, "tmpfs", 0, "size=1m,mode=0700")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	b := newBucket(t, train("v1.16"))
	b.put(rootfsKey, squashfs(strings.Repeat("x", 4<<20)))
	o := options(t, b, "v1.16.1")
	o.Dir = dir
	s := open(t, o)
	if _, err := s.Ensure(t.Context(), base.Latest); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v, want ENOSPC", err)
	}
	// From a path as well.
	h := hosted(t, func(m object) { delete(m["rootfs"].(object), "sha256"); delete(m["rootfs"].(object), "sizeBytes") })
	big := append(ext4(""), bytes.Repeat([]byte("x"), 4<<20)...)
	if err := os.WriteFile(filepath.Join(filepath.Dir(h.ManifestPath), "root.ext4"), big, 0o600); err != nil {
		t.Fatal(err)
	}
	h.Dir = dir
	if _, err := open(t, h).Ensure(t.Context(), base.Hosted); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v, want ENOSPC", err)
	}
	wantIDs(t, s)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Bfree*uint64(st.Bsize) < 1<<19 {
		t.Errorf("%d blocks are free, %v", st.Bfree, err)
	}
	b.put(rootfsKey, squashfs("small"))
	ensure(t, s, base.Latest)
}
