package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"push.rocks/smartvm/internal/download"
)

const (
	tries      = 6
	firstPause = 100 * time.Millisecond // doubled each time
	maxPause   = time.Minute            // a server that wants more is given up
	stallTime  = time.Minute            // without a byte
)

// errStalled says that a server said nothing for stallTime.
var errStalled = fmt.Errorf("nothing came for %v: %w", stallTime, download.ErrStalled)

// manners is how servers are spoken to: not in plain text unless they are on this machine, again when they are busy or
// hang up, and with an end to waiting.
type manners struct {
	base     http.RoundTripper
	log      *slog.Logger
	local    bool // the registry is on this machine; another could lead us to this machine's own services
	insecure bool // somebody has said that plain HTTP will do
}

func (m *manners) RoundTrip(req *http.Request) (*http.Response, error) {
	switch plain, near := req.URL.Scheme != "https", here(req.URL.Hostname()); {
	case plain && !near && !m.insecure:
		return nil, fmt.Errorf("%s: %w", req.URL.Host, ErrPlainHTTP)
	case plain && near && !m.local:
		return nil, fmt.Errorf("a registry elsewhere leads to %s: %w", req.URL.Host, ErrPlainHTTP)
	}
	for try := 0; ; try++ {
		resp, err := m.once(req)
		wait, again := pause(resp, err, try)
		if !again || try == tries-1 || req.Body != nil && req.Body != http.NoBody || req.Context().Err() != nil {
			return resp, err
		}
		attrs := []any{"host", req.URL.Host, "pause", wait, "err", err}
		if resp != nil {
			attrs = append(attrs, "status", resp.StatusCode)
			_ = resp.Body.Close()
		}
		m.log.Debug("asking again", attrs...)
		if err := download.Sleep(req.Context(), wait); err != nil {
			return nil, err
		}
	}
}

// once asks, and cancels when nothing comes for too long.
func (m *manners) once(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(stallTime, func() { cancel(errStalled) })
	req = req.WithContext(ctx)
	if req.Body != nil && req.Body != http.NoBody {
		req.Body = &sent{req.Body, timer}
	}
	resp, err := m.base.RoundTrip(req)
	timer.Stop()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		cancel(nil)
		return nil, err
	}
	resp.Body = &body{ReadCloser: resp.Body, ctx: ctx, timer: timer, cancel: cancel}
	return resp, nil
}

// sent is a request's body: while it is sent, the server need not answer.
type sent struct {
	io.ReadCloser
	timer *time.Timer
}

func (s *sent) Read(p []byte) (int, error) {
	s.timer.Reset(stallTime)
	return s.ReadCloser.Read(p)
}

// pause says whether to ask again, and when.
func pause(resp *http.Response, err error, try int) (time.Duration, bool) {
	wait := firstPause << try
	if err != nil {
		return wait, download.Dropped(err)
	}
	if resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode < http.StatusInternalServerError {
		return 0, false
	}
	after := resp.Header.Get("Retry-After")
	if s, err := strconv.ParseUint(after, 10, 16); err == nil {
		wait = time.Duration(s) * time.Second
	} else if t, err := http.ParseTime(after); err == nil {
		wait = max(time.Until(t), 0)
	}
	return wait, wait <= maxPause
}

// body is a response's that must not stall. Its timer runs while something is read: what has come may be long in the writing.
type body struct {
	io.ReadCloser
	ctx    context.Context
	timer  *time.Timer
	cancel context.CancelCauseFunc
}

func (b *body) Read(p []byte) (int, error) {
	b.timer.Reset(stallTime)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if err != nil && !errors.Is(err, io.EOF) && b.ctx.Err() != nil {
		err = context.Cause(b.ctx)
	}
	return n, err
}

func (b *body) Close() error {
	b.timer.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
