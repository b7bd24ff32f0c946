package download

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

const (
	// DefaultStall is how long a server may send nothing.
	DefaultStall = 30 * time.Second
	// MaxRedirects bounds how often a server may send us elsewhere.
	MaxRedirects = 5
	// MaxRetryAfter is the longest wait that a server can ask for.
	MaxRetryAfter = time.Minute

	maxTries   = 5 // without anything new in between
	firstPause = 500 * time.Millisecond
	longPause  = 10 * time.Second
)

// Client fetches. The zero value serves. It is safe for concurrent use.
type Client struct {
	// HTTP makes the requests. Nil: one that follows at most MaxRedirects redirects, and none from https to http.
	HTTP *http.Client
	// Log gets each further try. Nil: nobody does.
	Log *slog.Logger
	// Stall is how long a server may send nothing before it is tried again. Default: DefaultStall.
	Stall time.Duration
	// Pause waits before another try, and ends with ctx. Nil: by the clock.
	Pause func(ctx context.Context, d time.Duration) error
	// Waiting is told of the path that another process is fetching and we wait for. It may be nil.
	Waiting func(path string)
}

// Get returns a document of at most limit bytes. Errors are *StatusError, *SizeError and those of the network.
func (c *Client) Get(ctx context.Context, rawURL string, limit int64) (data []byte, err error) {
	err = c.retry(ctx, func() (bool, error) {
		resp, err := c.do(ctx, http.MethodGet, rawURL, nil)
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return false, statusError(resp, rawURL)
		}
		data, err = io.ReadAll(io.LimitReader(resp.Body, limit+1))
		if err == nil && int64(len(data)) > limit {
			err = &SizeError{URL: redact(rawURL), Want: limit, Got: -1}
		}
		return false, err
	})
	if err != nil {
		return nil, err
	}
	return data, nil
}

// Location follows redirects with HEAD requests and returns the URL at their end.
func (c *Client) Location(ctx context.Context, rawURL string) (last string, err error) {
	err = c.retry(ctx, func() (bool, error) {
		resp, err := c.do(ctx, http.MethodHead, rawURL, nil)
		if err != nil {
			return false, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return false, statusError(resp, rawURL)
		}
		last = resp.Request.URL.String()
		return false, nil
	})
	return last, err
}

// retry tries again what went wrong on the way, until it has gone wrong too often with nothing new in between.
func (c *Client) retry(ctx context.Context, try func() (news bool, err error)) error {
	for tries := 1; ; tries++ {
		news, err := try()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("download: %w", context.Cause(ctx))
		}
		if news {
			tries = 1
		}
		if !transient(err) || tries >= maxTries {
			return err
		}
		d := min(firstPause<<(tries-1), longPause)
		d = d/2 + rand.N(d)
		var status *StatusError
		if errors.As(err, &status) {
			d = max(d, min(status.RetryAfter, MaxRetryAfter))
		}
		if c.Log != nil {
			c.Log.Debug("download: try again", "err", err, "after", d)
		}
		pause := c.Pause
		if pause == nil {
			pause = Sleep
		}
		if err := pause(ctx, d); err != nil {
			return fmt.Errorf("download: %w", err)
		}
	}
}

// Sleep ends early with the context, whose cause it returns then.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// do makes one request. The caller closes the body.
func (c *Client) do(ctx context.Context, method, rawURL string, header http.Header) (*http.Response, error) {
	client := c.HTTP
	if client == nil {
		client = &http.Client{CheckRedirect: checkRedirect}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	s := &stream{ctx: ctx, cancel: cancel, stall: cmp.Or(c.Stall, DefaultStall), url: redact(rawURL)}
	req, err := http.NewRequestWithContext(ctx, method, rawURL, nil)
	if err != nil || req.URL.Scheme != "http" && req.URL.Scheme != "https" {
		cancel(nil)
		// What url.Parse says of it may hold a password.
		return nil, fmt.Errorf("get %s: %w: no URL of http or https", s.url, fs.ErrInvalid)
	}
	if header != nil {
		req.Header = header
	}
	req.Header.Set("User-Agent", "smartvm")
	// Nothing between the server and us shall change the bytes that we count.
	req.Header.Set("Accept-Encoding", "identity")
	s.watchdog = time.AfterFunc(s.stall, func() { cancel(ErrStalled) })
	resp, err := client.Do(req)
	s.watchdog.Stop()
	if err != nil {
		err = s.fail(err)
		cancel(nil)
		return nil, err
	}
	s.body, resp.Body = resp.Body, s
	return resp, nil
}

// checkRedirect is an http.Client's.
func checkRedirect(req *http.Request, via []*http.Request) error {
	from, to := via[len(via)-1].URL, req.URL
	switch {
	case len(via) > MaxRedirects:
		return fmt.Errorf("%w: more than %d of them", ErrRedirect, MaxRedirects)
	case to.Scheme != "https" && (to.Scheme != "http" || from.Scheme == "https"):
		return fmt.Errorf("%w: from %s to %s", ErrRedirect, from.Scheme, to.Scheme)
	}
	return nil
}

// cause takes the URL, and what is secret in it, out of an http.Client's error.
func cause(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// statusError describes an answer that is not what was asked for.
func statusError(resp *http.Response, rawURL string) error {
	e := &StatusError{URL: redact(rawURL), Code: resp.StatusCode}
	after := resp.Header.Get("Retry-After")
	if seconds, err := strconv.Atoi(after); err == nil && seconds > 0 {
		e.RetryAfter = time.Duration(min(seconds, int(MaxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(after); err == nil {
		e.RetryAfter = max(0, time.Until(at))
	}
	return e
}

// stream is a response's body that ends when the server sends nothing for too long.
type stream struct {
	ctx      context.Context // of the request: no longer than the stream itself
	cancel   context.CancelCauseFunc
	watchdog *time.Timer
	stall    time.Duration
	url      string
	body     io.ReadCloser
}

func (s *stream) Read(p []byte) (int, error) {
	s.watchdog.Reset(s.stall)
	n, err := s.body.Read(p)
	s.watchdog.Stop() // what is read may be long in the writing
	if err != nil && err != io.EOF {
		err = s.fail(err)
	}
	return n, err
}

func (s *stream) Close() error {
	s.watchdog.Stop()
	s.cancel(nil)
	return s.body.Close()
}

// fail says why there is no more to come.
func (s *stream) fail(err error) error {
	err = cause(err)
	if s.ctx.Err() != nil {
		err = context.Cause(s.ctx)
	}
	return &transportError{s.url, err}
}
