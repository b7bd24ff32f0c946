package download_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/testenv"
)

// childVariable makes the test program fetch its value's URL, to childPath.
const (
	childVariable = "SMARTVM_TEST_FETCH"
	childPath     = "SMARTVM_TEST_FETCH_TO"
)

func TestMain(m *testing.M) {
	url := os.Getenv(childVariable)
	if url == "" {
		os.Exit(m.Run())
	}
	data := content(1000)
	f := download.File{URL: url, SHA256: digest(data), Size: int64(len(data)), MaxSize: 1000}
	err := new(download.Client).Fetch(context.Background(), f, os.Getenv(childPath), func(done, _ int64) {
		fmt.Println(done)
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// child fetches in another process, and returns when that has n bytes.
func child(t *testing.T, url, path string, n int) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+url, childPath+"="+path, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if done, err := strconv.Atoi(lines.Text()); err == nil && done >= n {
			return cmd
		}
	}
	t.Fatalf("the other process did not fetch %d bytes: %v", n, cmd.Wait())
	return nil
}

func TestFetch_Killed(t *testing.T) {
	s := serve(t, content(1000))
	s.mu.Lock()
	s.answer = func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n > 1 {
			return false
		}
		w.Header().Set("Content-Length", "1000")
		_, _ = w.Write(s.content[:600])
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
		return true
	}
	s.mu.Unlock()
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	cmd := child(t, s.URL, path, 600)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	wantNames(t, dir, "file.partial")
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET  ", "GET bytes=600- ")
}

func TestFetch_TwoProcesses(t *testing.T) {
	s := serve(t, content(1000))
	goOn := make(chan struct{})
	s.mu.Lock()
	s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		w.Header().Set("Content-Length", "1000")
		_, _ = w.Write(s.content[:600])
		_ = http.NewResponseController(w).Flush()
		<-goOn
		_, _ = w.Write(s.content[600:])
		return true
	}
	s.mu.Unlock()
	path := filepath.Join(t.TempDir(), "file")
	cmd := child(t, s.URL, path, 600)

	// Who waits can stop waiting.
	ctx, cancel := context.WithCancel(t.Context())
	c := quick(nil)
	c.Waiting = func(string) { cancel() }
	if err := c.Fetch(ctx, s.file(), path, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	var waited []string
	c.Waiting = func(path string) { waited = append(waited, path); close(goOn) }
	if err := c.Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET  ")
	if len(waited) != 1 || waited[0] != path {
		t.Errorf("waited for %q", waited)
	}
}

// Many at once, of which some give up.
func TestFetch_ManyAtOnce(t *testing.T) {
	s := serve(t, content(100_000))
	path := filepath.Join(t.TempDir(), "file")
	errs := make(chan error)
	for range 10 {
		go func() { errs <- quick(nil).Fetch(t.Context(), s.file(), path, nil) }()
	}
	for range 10 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET  ")
}

func TestFetch_DiskFull(t *testing.T) {
	if !testenv.Apart(t) {
		return
	}
	dir := filepath.Join(t.TempDir(), "small")
	if err := errors.Join(os.Mkdir(dir, 0o700), unix.Mount("none", dir, "tmpfs", 0, "size=1m")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s := serve(t, content(4<<20))
	for _, announced := range []bool{true, false} {
		s.requests = nil
		f := s.file()
		written := int64(0)
		s.answer = nil
		if !announced {
			f.Size = 0
			s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool { chunked(s.content)(w); return true }
		}
		err := quick(nil).Fetch(t.Context(), f, filepath.Join(dir, "file"), func(done, _ int64) { written = done })
		if !errors.Is(err, unix.ENOSPC) {
			t.Errorf("%v, want ENOSPC", err)
		}
		if announced && written > 0 {
			t.Errorf("%d bytes were written of what does not fit", written)
		}
		wantNames(t, dir)
		s.wantRequests(t, "GET  ")
	}
}
