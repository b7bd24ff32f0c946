package download_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/internal/download"
)

func TestFetch_DroppedConnections(t *testing.T) {
	s := serve(t, content(1000))
	s.answer = func(w http.ResponseWriter, r *http.Request, n int) bool {
		// Ten times a little, which is more often than it may go wrong without anything new.
		if n <= 10 {
			from := 0
			if text, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
				_, _ = fmt.Sscanf(text, "%d-", &from)
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-999/1000", from))
				w.Header().Set("ETag", s.etag)
				w.Header().Set("Content-Length", fmt.Sprint(1000-from))
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(s.content[from : from+50])
				_ = http.NewResponseController(w).Flush()
				panic(http.ErrAbortHandler)
			}
			s.part(w, 50)
		}
		return false
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
	want := []string{"GET  "}
	for i := range 10 {
		want = append(want, fmt.Sprintf(`GET bytes=%d- "one"`, 50*(i+1)))
	}
	s.wantRequests(t, want...)
}

// Whoever always sends the same and breaks off is not asked for ever.
func TestFetch_NothingNew(t *testing.T) {
	s := serve(t, content(1000))
	s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool { s.part(w, 300); return true }
	dir := t.TempDir()
	var waits []time.Duration
	if err := quick(&waits).Fetch(t.Context(), s.file(), filepath.Join(dir, "file"), nil); err == nil {
		t.Error("it was fetched")
	}
	// The first try brings something, the next ones are too many.
	if len(s.requests) < 3 || len(s.requests) > 10 || len(waits) != len(s.requests)-1 {
		t.Errorf("%d requests, %d waits", len(s.requests), len(waits))
	}
	wantNames(t, dir, "file.partial")
}

// The content changes between two requests: the parts are not joined.
func TestFetch_ContentChanges(t *testing.T) {
	s := serve(t, content(2000)[1000:])
	old := content(1000)
	s.answer = func(w http.ResponseWriter, _ *http.Request, n int) bool {
		if n > 1 {
			return false
		}
		w.Header().Set("ETag", `"old"`)
		w.Header().Set("Content-Length", "1000")
		_, _ = w.Write(old[:500])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	f := s.file()
	f.SHA256 = ""
	path := filepath.Join(t.TempDir(), "file")
	if err := quick(nil).Fetch(t.Context(), f, path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET  ", `GET bytes=500- "old"`)

	// A server that ignores the name has the parts joined, which the digest shows.
	s.requests, s.etag = nil, ""
	path = filepath.Join(t.TempDir(), "file")
	answer := s.answer
	s.answer = func(w http.ResponseWriter, r *http.Request, n int) bool {
		r.Header.Del("If-Range")
		return answer(w, r, n)
	}
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET  ", `GET bytes=500- "old"`, "GET  ")
}

func TestStatus(t *testing.T) {
	date := time.Now().Add(time.Hour).UTC().Format(http.TimeFormat)
	for _, tt := range []struct {
		code       int
		retryAfter string
		requests   int           // with the server never getting better
		wait       time.Duration // at least, before each further try
		longest    time.Duration
	}{
		{code: 404, requests: 1},
		{code: 403, requests: 1},
		{code: 401, requests: 1},
		{code: 206, requests: 1}, // not asked for
		{code: 204, requests: 1},
		{code: 416, requests: 1}, // nor that
		{code: 408, requests: 6, longest: 10 * time.Second},
		{code: 500, requests: 6, longest: 10 * time.Second},
		{code: 503, retryAfter: "7", requests: 6, wait: 7 * time.Second, longest: 10 * time.Second},
		{code: 503, retryAfter: "0", requests: 6, wait: 100 * time.Millisecond, longest: 10 * time.Second},
		{code: 429, requests: 6, longest: 10 * time.Second},
		{code: 429, retryAfter: "20", requests: 6, wait: 20 * time.Second, longest: 20 * time.Second},
		{code: 429, retryAfter: "60", requests: 6, wait: download.MaxRetryAfter, longest: download.MaxRetryAfter},
		{code: 429, retryAfter: "61", requests: 1},
		{code: 429, retryAfter: date, requests: 1},
		{code: 429, retryAfter: "99999999999999999999", requests: 1},
		{code: 429, retryAfter: "-5", requests: 6, longest: 10 * time.Second},
		{code: 429, retryAfter: "Thu, 01 Jan 1970 00:00:00 GMT", requests: 6, longest: 10 * time.Second},
	} {
		t.Run(fmt.Sprint(tt.code, " ", tt.retryAfter), func(t *testing.T) {
			s := serve(t, content(1000))
			s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool {
				if tt.retryAfter != "" {
					w.Header().Set("Retry-After", tt.retryAfter)
				}
				w.WriteHeader(tt.code)
				return true
			}
			dir := t.TempDir()
			for name, fetch := range map[string]func(c *download.Client) error{
				"fetch": func(c *download.Client) error { return c.Fetch(t.Context(), s.file(), filepath.Join(dir, "file"), nil) },
				"get":   func(c *download.Client) error { _, err := c.Get(t.Context(), s.URL+"/?secret", 10); return err },
				"head":  func(c *download.Client) error { _, err := c.Location(t.Context(), s.URL+"/?secret"); return err },
			} {
				s.requests = nil
				var waits []time.Duration
				err := fetch(quick(&waits))
				var status *download.StatusError
				if !errors.As(err, &status) || status.Code != tt.code || strings.Contains(err.Error(), "secret") {
					t.Errorf("%s: %v", name, err)
				}
				if len(s.requests) != tt.requests || len(waits) != tt.requests-1 {
					t.Errorf("%s: %d requests, %d waits, want %d", name, len(s.requests), len(waits), tt.requests)
				}
				if len(waits) > 0 && (slices.Min(waits) < tt.wait || slices.Max(waits) > tt.longest) {
					t.Errorf("%s: waits %v, want %v to %v", name, waits, tt.wait, tt.longest)
				}
			}
			wantNames(t, dir)
		})
	}
}

func TestFetch_GetsBetter(t *testing.T) {
	s := serve(t, content(1000))
	s.answer = func(w http.ResponseWriter, _ *http.Request, n int) bool {
		switch n {
		case 1:
			w.WriteHeader(http.StatusTooManyRequests)
		case 2:
			s.part(w, 400)
		case 3:
			w.WriteHeader(http.StatusBadGateway)
		default:
			return false
		}
		return true
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
}

func TestFetch_Stalled(t *testing.T) {
	s := serve(t, content(1000))
	s.answer = func(w http.ResponseWriter, r *http.Request, n int) bool {
		switch n {
		case 1: // before the header
		case 2:
			w.Header().Set("ETag", s.etag)
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write(s.content[:400])
			_ = http.NewResponseController(w).Flush()
		default:
			return false
		}
		<-r.Context().Done()
		return true
	}
	c := quick(nil)
	c.Stall = time.Second
	path := filepath.Join(t.TempDir(), "file")
	if err := c.Fetch(t.Context(), s.file(), path, nil); err != nil {
		t.Fatal(err)
	}
	wantContent(t, path, s.content)
	s.wantRequests(t, "GET  ", "GET  ", `GET bytes=400- "one"`)
}

func TestGet_Stalled(t *testing.T) {
	s := serve(t, nil)
	s.answer = func(_ http.ResponseWriter, r *http.Request, _ int) bool { <-r.Context().Done(); return true }
	c := quick(nil)
	c.Stall = 10 * time.Millisecond
	if _, err := c.Get(t.Context(), s.URL, 10); !errors.Is(err, download.ErrStalled) {
		t.Errorf("%v, want ErrStalled", err)
	}
}

func TestGet_BreaksOff(t *testing.T) {
	s := serve(t, []byte("0123456789"))
	broken := 5
	s.answer = func(w http.ResponseWriter, _ *http.Request, n int) bool {
		if n <= broken {
			s.part(w, 5)
		}
		return false
	}
	if got, err := quick(nil).Get(t.Context(), s.URL, 10); err != nil || string(got) != "0123456789" {
		t.Errorf("%q, %v", got, err)
	}
	s.requests, broken = nil, 100
	var waits []time.Duration
	if got, err := quick(&waits).Get(t.Context(), s.URL+"/?secret", 10); !errors.Is(err, io.ErrUnexpectedEOF) ||
		len(waits) != 5 || strings.Contains(err.Error(), "secret") {
		t.Errorf("%q, %v after %d further tries", got, err, len(waits))
	}
}

func TestFetch_Cancelled(t *testing.T) {
	reason := errors.New("the user has had enough")
	t.Run("before the header", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		s := serve(t, content(1000))
		s.answer = func(_ http.ResponseWriter, r *http.Request, _ int) bool {
			cancel(reason)
			<-r.Context().Done()
			return true
		}
		dir := t.TempDir()
		if err := quick(nil).Fetch(ctx, s.file(), filepath.Join(dir, "file"), nil); !errors.Is(err, reason) {
			t.Errorf("%v", err)
		}
		wantNames(t, dir)
		s.wantRequests(t, "GET  ")
	})
	t.Run("in the body", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		s := serve(t, content(1000))
		s.answer = func(w http.ResponseWriter, r *http.Request, _ int) bool {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write(s.content[:400])
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return true
		}
		dir := t.TempDir()
		got := func(done, _ int64) {
			if done > 0 {
				cancel(reason)
			}
		}
		if err := quick(nil).Fetch(ctx, s.file(), filepath.Join(dir, "file"), got); !errors.Is(err, reason) {
			t.Errorf("%v", err)
		}
		wantNames(t, dir, "file.partial") // for another time
	})
	t.Run("in a pause", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		s := serve(t, nil)
		s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			w.Header().Set("Retry-After", "50")
			w.WriteHeader(http.StatusServiceUnavailable)
			time.AfterFunc(10*time.Millisecond, func() { cancel(reason) })
			return true
		}
		begun := time.Now()
		if _, err := new(download.Client).Get(ctx, s.URL, 10); !errors.Is(err, reason) || time.Since(begun) > 40*time.Second {
			t.Errorf("%v", err)
		}
	})
	t.Run("already", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(reason)
		s := serve(t, content(10))
		dir := t.TempDir()
		if err := quick(nil).Fetch(ctx, s.file(), filepath.Join(dir, "file"), nil); !errors.Is(err, reason) {
			t.Errorf("%v", err)
		}
		wantNames(t, dir)
	})
}

func TestGet(t *testing.T) {
	s := serve(t, []byte("0123456789"))
	for limit, want := range map[int64]string{10: "0123456789", 9: ""} {
		got, err := quick(nil).Get(t.Context(), s.URL+"/?secret", limit)
		if string(got) != want {
			t.Errorf("limit %d: %q", limit, got)
		}
		if want == "" {
			wantError(t, err, new(download.SizeError))
		}
	}
}

func TestLocation(t *testing.T) {
	s := serve(t, nil)
	s.answer = func(w http.ResponseWriter, r *http.Request, _ int) bool {
		// As the project's site does.
		if r.URL.Path == "/releases/latest" {
			http.Redirect(w, r, "/releases/tag/v1.16.1", http.StatusFound)
			return true
		}
		return false
	}
	if got, err := quick(nil).Location(t.Context(), s.URL+"/releases/latest"); err != nil ||
		got != s.URL+"/releases/tag/v1.16.1" {
		t.Errorf("%q, %v", got, err)
	}
	s.wantRequests(t, "HEAD  ", "HEAD  ")
}

func TestRedirects(t *testing.T) {
	s := serve(t, []byte("content"))
	hops := 0
	s.answer = func(w http.ResponseWriter, r *http.Request, n int) bool {
		if n > hops {
			return false
		}
		http.Redirect(w, r, "/?secret", http.StatusFound)
		return true
	}
	for hops = range 8 {
		s.requests = nil
		_, err := quick(nil).Get(t.Context(), s.URL, 10)
		if hops <= download.MaxRedirects && err != nil {
			t.Errorf("%d redirects: %v", hops, err)
		}
		if hops > download.MaxRedirects {
			wantError(t, err, download.ErrRedirect)
			if len(s.requests) != download.MaxRedirects+1 {
				t.Errorf("%d requests", len(s.requests))
			}
		}
	}
	for _, to := range []string{"file:///etc/passwd", "ftp://host/"} {
		s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusFound)
			return true
		}
		_, err := quick(nil).Get(t.Context(), s.URL, 10)
		wantError(t, err, download.ErrRedirect)
	}
}

func TestRedirects_FromHTTPS(t *testing.T) {
	plain := serve(t, []byte("content"))
	secure := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
	t.Cleanup(secure.Close)
	c := quick(nil)
	c.Base = secure.Client().Transport
	_, err := c.Get(t.Context(), secure.URL, 10)
	wantError(t, err, download.ErrRedirect)
	plain.wantRequests(t)
}

// Who shows a wrong certificate is not asked again.
func TestBadCertificate(t *testing.T) {
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	t.Cleanup(secure.Close)
	leads := httptest.NewServer(http.RedirectHandler(secure.URL, http.StatusFound))
	t.Cleanup(leads.Close)
	for _, url := range []string{secure.URL, leads.URL} {
		var waits []time.Duration
		if _, err := quick(&waits).Get(t.Context(), url, 10); err == nil || len(waits) > 0 {
			t.Errorf("%v, %d further tries", err, len(waits))
		}
	}
}

func TestErrors_TellNoSecrets(t *testing.T) {
	s := serve(t, nil)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	s.Close() // nobody answers
	u.User, u.RawQuery, u.Fragment = url.UserPassword("user", "secret"), "token=secret", "secret"
	for _, raw := range []string{
		u.String(), "http://user:secret@[/", "http://secret:secret@/x?secret",
		"http://host.invalid:secret/",
	} {
		_, err := quick(nil).Get(t.Context(), raw, 10)
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%v", err)
		}
		err = quick(nil).Fetch(t.Context(), download.File{URL: raw, MaxSize: 10}, filepath.Join(t.TempDir(), "file"), nil)
		if err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%v", err)
		}
	}
}

func TestFetch_KeepsThePartialOfAStatus(t *testing.T) {
	s := serve(t, content(1000))
	s.answer = func(w http.ResponseWriter, _ *http.Request, _ int) bool {
		w.WriteHeader(http.StatusInternalServerError)
		return true
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path+download.PartialSuffix, s.content[:300], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := quick(nil).Fetch(t.Context(), s.file(), path, nil); err == nil {
		t.Error("it was fetched")
	}
	wantNames(t, dir, "file.partial")
}
