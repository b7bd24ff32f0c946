package download_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/download"
)

// content is the same in each process.
func content(size int) []byte {
	data := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
	return data
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// server serves content with ranges, unless answer does it.
type server struct {
	*httptest.Server
	content []byte
	etag    string
	answer  func(w http.ResponseWriter, r *http.Request, n int) (done bool) // n counts from 1

	mu       sync.Mutex // of answer while another process asks, and of requests
	requests []string   // method, Range and If-Range
}

func serve(t *testing.T, content []byte) *server {
	s := &server{content: content, etag: `"one"`}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.requests = append(s.requests, fmt.Sprint(r.Method, " ", r.Header.Get("Range"), " ", r.Header.Get("If-Range")))
		n, answer := len(s.requests), s.answer
		s.mu.Unlock()
		if answer != nil && answer(w, r, n) {
			return
		}
		if s.etag != "" {
			w.Header().Set("ETag", s.etag)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(s.content))
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *server) wantRequests(t *testing.T, want ...string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if diff := cmp.Diff(want, s.requests); diff != "" {
		t.Errorf("requests, -want +got:\n%s", diff)
	}
}

func (s *server) file() download.File {
	return download.File{
		URL: s.URL + "/file?secret=1", SHA256: digest(s.content), Size: int64(len(s.content)),
		MaxSize: 1 << 30,
	}
}

// part sends the first n bytes of a whole answer, and then breaks the connection.
func (s *server) part(w http.ResponseWriter, n int) {
	if s.etag != "" {
		w.Header().Set("ETag", s.etag)
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(s.content)))
	_, _ = w.Write(s.content[:n])
	_ = http.NewResponseController(w).Flush()
	panic(http.ErrAbortHandler)
}

// quick does not wait before another try, and records how long it would have.
func quick(waits *[]time.Duration) *download.Client {
	var mu sync.Mutex
	return &download.Client{Transport: download.Transport{Pause: func(_ context.Context, d time.Duration) error {
		mu.Lock()
		defer mu.Unlock()
		if waits != nil {
			*waits = append(*waits, d)
		}
		return nil
	}}}
}

func wantContent(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes with digest %s, %v, want %d with %s", len(got), digest(got), err, len(want), digest(want))
	}
	wantNames(t, filepath.Dir(path), filepath.Base(path))
}

func wantNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files, -want +got:\n%s", diff)
	}
}

func TestFetch(t *testing.T) {
	s := serve(t, content(1_000_000))
	path := filepath.Join(t.TempDir(), "file")
	var last [2]int64
	for range 2 { // the second finds it
		if err := quick(nil).Fetch(t.Context(), s.file(), path, func(done, total int64) {
			last = [2]int64{done, total}
		}); err != nil {
			t.Fatal(err)
		}
	}
	if last != [2]int64{1_000_000, 1_000_000} {
		t.Errorf("progress ended with %v", last)
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET  ")
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
}

func TestFetch_ReplacesAnother(t *testing.T) {
	s := serve(t, content(1000))
	path := filepath.Join(t.TempDir(), "file")
	for _, other := range [][]byte{[]byte("short"), make([]byte, 1000)} {
		if err := os.WriteFile(path, other, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err != nil {
			t.Fatal(err)
		}
		wantContent(t, path, s.content)
	}
}

func TestFetch_Resumes(t *testing.T) {
	data := content(1000)
	for _, tt := range []struct {
		name    string
		partial []byte
		change  func(f *download.File, s *server)
		want    []string
	}{
		{"a part", data[:400], nil, []string{"GET bytes=400- "}},
		{"a part, the name of its content is known", data[:400], func(f *download.File, s *server) {
			f.ETag = s.etag
		}, []string{`GET bytes=400- "one"`}},
		{"by name alone", data[:400], func(f *download.File, s *server) {
			f.SHA256, f.ETag = "", s.etag
		}, []string{`GET bytes=400- "one"`}},
		{"another content now", data[:400], func(f *download.File, _ *server) {
			f.SHA256, f.ETag = "", `"old"`
		}, []string{`GET bytes=400- "old"`}},
		{"nothing says what it is of", data[:400], func(f *download.File, _ *server) { f.SHA256 = "" }, []string{"GET  "}},
		{"all", data, nil, nil},
		{"all, of unknown size", data, func(f *download.File, _ *server) { f.Size = 0 }, nil},
		{"more than all", make([]byte, 1001), nil, []string{"GET  "}},
		{"more than all, of unknown size", make([]byte, 1001), func(f *download.File, _ *server) {
			f.Size = 0
		}, []string{"GET bytes=1001- ", "GET  "}},
		{"more than there may be", make([]byte, 1001), func(f *download.File, _ *server) {
			f.Size, f.MaxSize = 0, 1000
		}, []string{"GET  "}},
		{"a part of another", make([]byte, 400), nil, []string{"GET bytes=400- ", "GET  "}},
		{"all of another", make([]byte, 1000), nil, []string{"GET  "}},
		{"an empty one", nil, nil, []string{"GET  "}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t, data)
			path := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(path+download.PartialSuffix, tt.partial, 0o600); err != nil {
				t.Fatal(err)
			}
			f := s.file()
			if tt.change != nil {
				tt.change(&f, s)
			}
			if err := quick(nil).Fetch(t.Context(), f, path, nil); err != nil {
				t.Fatal(err)
			}
			wantContent(t, path, data)
			s.wantRequests(t, tt.want...)
		})
	}
}

func TestFetch_ServerIgnoresRange(t *testing.T) {
	s := serve(t, content(1000))
	s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		_, _ = w.Write(s.content)
		return true
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path+download.PartialSuffix, s.content[:300], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
}

// A server that answers with another part than that asked for does not get it written.
func TestFetch_AnotherPart(t *testing.T) {
	s := serve(t, content(1000))
	s.answer = func(w http.ResponseWriter, r *http.Request, _ int) bool {
		if r.Header.Get("Range") == "" {
			return false
		}
		w.Header().Set("Content-Range", "bytes 200-999/1000")
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(s.content[200:])
		return true
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path+download.PartialSuffix, s.content[:300], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET bytes=300- ", "GET  ")
}

func TestFetch_BadContent(t *testing.T) {
	data := content(300_000) // more than is written at once
	for _, tt := range []struct {
		name   string
		change func(f *download.File)
		answer func(w http.ResponseWriter)
		want   error
	}{
		{"another digest", func(f *download.File) { f.SHA256 = digest(nil) }, nil, new(download.DigestError)},
		{"longer than it should be", func(f *download.File) { f.Size-- }, nil, new(download.SizeError)},
		{"shorter than it should be", func(f *download.File) { f.Size++ }, nil, new(download.SizeError)},
		{"longer than allowed", func(f *download.File) { f.Size, f.MaxSize = 0, 299_999 }, nil, new(download.SizeError)},
		{"longer than allowed, unannounced", func(f *download.File) {
			f.Size, f.MaxSize = 0, 299_999
		}, chunked(data), new(download.SizeError)},
		{"size and bound", func(f *download.File) { f.MaxSize = 299_999 }, nil, new(download.SizeError)},
		{"no digest", func(f *download.File) { f.SHA256 = "abc" }, nil, fs.ErrInvalid},
		{"no bound", func(f *download.File) { f.MaxSize = 0 }, nil, fs.ErrInvalid},
		{"no URL", func(f *download.File) { f.URL = "ftp://user:secret@host/" }, nil, fs.ErrInvalid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := serve(t, data)
			if tt.answer != nil {
				s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool { tt.answer(w); return true }
			}
			f := s.file()
			tt.change(&f)
			dir := t.TempDir()
			written := int64(0)
			err := quick(nil).Fetch(t.Context(), f, filepath.Join(dir, "file"), func(done, _ int64) { written = done })
			wantError(t, err, tt.want)
			wantNames(t, dir)
			if errors.As(err, new(*download.SizeError)) && tt.answer == nil && written > 0 {
				t.Errorf("%d bytes were written of what has another size", written)
			}
			if len(s.requests) > 1 {
				t.Errorf("%d requests", len(s.requests))
			}
		})
	}
}

// What ends early without having said how long it is may come the next time; it is no other
// content.
func TestFetch_EndsEarly(t *testing.T) {
	s := serve(t, content(1000))
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	s.answer = func(w http.ResponseWriter, _ *http.Request, n int) bool { chunked(s.content[:400])(w); return true }
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); !errors.Is(err, io.ErrUnexpectedEOF) ||
		!strings.Contains(err.Error(), s.URL) {
		t.Errorf("%v, want io.ErrUnexpectedEOF of %s", err, s.URL)
	}
	wantNames(t, dir, "file.partial")
	s.requests, s.answer = nil, nil
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET bytes=400- ")
}

// Servers may send less of a range than they are asked for, and say so.
func TestFetch_ShortRanges(t *testing.T) {
	s := serve(t, content(1000))
	s.answer = func(w http.ResponseWriter, r *http.Request, n int) bool {
		var from int
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil {
			s.part(w, 100)
		}
		last := min(from+299, 999)
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/1000", from, last))
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(s.content[from : last+1])
		return true
	}
	s.etag = ""
	for _, size := range []int64{1000, 0} {
		path := filepath.Join(t.TempDir(), "file")
		f := s.file()
		f.Size, s.requests = size, nil
		if err := quick(nil).Fetch(t.Context(), f, path, nil); err != nil {
			t.Fatal(err)
		}
		wantContent(t, path, s.content)
		s.wantRequests(t, "GET  ", "GET bytes=100- ", "GET bytes=400- ", "GET bytes=700- ")
	}
}

func chunked(data []byte) func(w http.ResponseWriter) {
	return func(w http.ResponseWriter) {
		_ = http.NewResponseController(w).Flush()
		_, _ = w.Write(data)
	}
}

// wantError compares by type where want is one of ours, and else by errors.Is. No error may tell
// secrets.
func wantError(t *testing.T, err, want error) {
	t.Helper()
	ok := errors.Is(err, want)
	switch want.(type) {
	case *download.DigestError:
		ok = errors.As(err, new(*download.DigestError))
	case *download.SizeError:
		ok = errors.As(err, new(*download.SizeError))
	}
	if !ok {
		t.Errorf("%v, want %T %v", err, want, want)
	}
	if err != nil && bytes.Contains([]byte(err.Error()), []byte("secret")) {
		t.Errorf("it tells a secret: %v", err)
	}
}

func TestFetch_RefusesWhatIsNoFile(t *testing.T) {
	s := serve(t, content(10))
	dir := t.TempDir()
	for name, prepare := range map[string]func(path string) error{
		"directory":             func(path string) error { return os.Mkdir(path, 0o700) },
		"link in the way":       func(path string) error { return os.Symlink("elsewhere", path+download.PartialSuffix) },
		"directory in the way":  func(path string) error { return os.Mkdir(path+download.PartialSuffix, 0o700) },
		"there is no directory": func(path string) error { return nil },
	} {
		path := filepath.Join(dir, name)
		if name == "there is no directory" {
			path = filepath.Join(dir, "none", "file")
		}
		if err := prepare(path); err != nil {
			t.Fatal(err)
		}
		if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err == nil {
			t.Errorf("%s: it was fetched", name)
		}
	}
	s.wantRequests(t)
}
