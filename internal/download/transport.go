package download

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// DefaultStall is how long a server may send nothing: registries that fetch a layer from
	// elsewhere first take their time.
	DefaultStall = time.Minute
	// MaxRetryAfter is the longest wait that a server can ask for. A server that asks for more is
	// not tried again.
	MaxRetryAfter = time.Minute

	maxTries   = 6                      // without anything new in between
	firstPause = 200 * time.Millisecond // doubled each time
)

// Transport asks again when a server is busy or the connection is dropped, and ends requests and
// bodies that stall. A server that has never answered is not tried again when it cannot be reached:
// that says so at once where there is no network. The zero value serves.
type Transport struct {
	// Base makes the requests. Nil: http.DefaultTransport.
	Base http.RoundTripper
	// Log gets each further try. If nil, log records are discarded.
	Log *slog.Logger
	// Stall is how long a server may send nothing before it is tried again. Default: DefaultStall.
	Stall time.Duration
	// Pause waits before another try, and returns ctx's cause when that ends. Nil: by the clock.
	Pause func(ctx context.Context, d time.Duration) error

	answered atomic.Bool
}

// RoundTrip implements http.RoundTripper. Requests with a body are made once.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	for try := 1; ; try++ {
		resp, err := t.once(req)
		after, again := t.again(resp, err)
		if !again || try == maxTries || sends(req) || req.Context().Err() != nil {
			return resp, err
		}
		if resp != nil {
			err = errors.New(resp.Status)
			_ = resp.Body.Close()
		}
		if err := t.wait(req.Context(), try, after, "host", req.URL.Host, "err", err); err != nil {
			return nil, err
		}
	}
}

func sends(req *http.Request) bool { return req.Body != nil && req.Body != http.NoBody }

// again says whether another try may go better, and how long the server wants us to wait for it.
func (t *Transport) again(resp *http.Response, err error) (after time.Duration, yes bool) {
	if err != nil {
		return 0, dropped(err) || t.answered.Load() && !errors.As(err, new(*tls.CertificateVerificationError))
	}
	t.answered.Store(true)
	code := resp.StatusCode
	if code < http.StatusInternalServerError && code != http.StatusTooManyRequests && code != http.StatusRequestTimeout {
		return 0, false
	}
	text := resp.Header.Get("Retry-After")
	seconds, _ := strconv.ParseUint(text, 10, 32) // the most for what is more
	after = time.Duration(seconds) * time.Second
	if at, err := http.ParseTime(text); err == nil {
		after = time.Until(at)
	}
	return after, after <= MaxRetryAfter
}

// dropped says whether an error is a connection's end.
func dropped(err error) bool {
	for _, e := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, ErrStalled} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// wait returns when it is time for another try after those that failed, 1 being the first.
func (t *Transport) wait(ctx context.Context, failed int, atLeast time.Duration, why ...any) error {
	d := firstPause << (failed - 1)
	d = max(d/2+rand.N(d), atLeast)
	if t.Log != nil {
		t.Log.Debug("download: try again", append(why, "after", d)...)
	}
	if t.Pause != nil {
		return t.Pause(ctx, d)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// once makes a request, and ends it when nothing comes for too long.
func (t *Transport) once(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	s := &stream{ctx: ctx, cancel: cancel, stall: cmp.Or(t.Stall, DefaultStall)}
	s.watchdog = time.AfterFunc(s.stall, func() { cancel(fmt.Errorf("nothing came for %v: %w", s.stall, ErrStalled)) })
	sending := sends(req)
	if req = req.WithContext(ctx); sending {
		req.Body = &sent{req.Body, s}
	}
	resp, err := cmp.Or(t.Base, http.DefaultTransport).RoundTrip(req)
	s.watchdog.Stop()
	if err != nil {
		err = s.cause(err)
		cancel(nil)
		return nil, err
	}
	s.body, resp.Body = resp.Body, s
	return resp, nil
}

// sent is a request's body: while it is sent, the server need not answer.
type sent struct {
	io.ReadCloser
	answer *stream
}

func (s *sent) Read(p []byte) (int, error) {
	s.answer.watchdog.Reset(s.answer.stall)
	return s.ReadCloser.Read(p)
}

// stream is a response's body that ends when the server sends nothing for too long.
type stream struct {
	ctx      context.Context // of the request: no longer than the stream itself
	cancel   context.CancelCauseFunc
	watchdog *time.Timer
	stall    time.Duration
	body     io.ReadCloser
}

func (s *stream) Read(p []byte) (int, error) {
	s.watchdog.Reset(s.stall)
	n, err := s.body.Read(p)
	s.watchdog.Stop() // what is read may be long in the writing
	if err != nil && err != io.EOF {
		err = s.cause(err)
	}
	return n, err
}

func (s *stream) Close() error {
	s.watchdog.Stop()
	s.cancel(nil)
	return s.body.Close()
}

// cause says why there is no more to come.
func (s *stream) cause(err error) error {
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	return err
}
