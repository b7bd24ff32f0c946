package download_test

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"push.rocks/smartvm/internal/download"
)

type roundTrip func(r *http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// A server that cannot be reached is said to be so at once; one that was reached before may come
// back.
func TestTransport_Unreachable(t *testing.T) {
	s := serve(t, []byte("content"))
	var asked, from, to int // the server cannot be reached from one request to another
	var waits []time.Duration
	c := quick(&waits)
	c.Base = roundTrip(func(r *http.Request) (*http.Response, error) {
		if asked++; from <= asked && asked < to {
			return nil, syscall.ECONNREFUSED
		}
		return http.DefaultTransport.RoundTrip(r)
	})
	get := func(from1, to1, tries int, want error) {
		t.Helper()
		asked, from, to = 0, from1, to1
		if _, err := c.Get(t.Context(), s.URL, 10); !errors.Is(err, want) || asked != tries {
			t.Errorf("%v after %d tries, want %v after %d", err, asked, want, tries)
		}
	}
	get(1, 100, 1, syscall.ECONNREFUSED)
	get(2, 100, 1, nil)
	get(1, 4, 4, nil)
	get(1, 100, 6, syscall.ECONNREFUSED)
}

// A server may take as long as it likes for what is sent to it, as long as it takes something. What
// is sent is sent once.
func TestTransport_Sends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests := 0
		send := func(last time.Duration) error {
			transport := &download.Transport{Base: roundTrip(func(r *http.Request) (*http.Response, error) {
				requests++
				for _, pause := range []time.Duration{download.DefaultStall * 3 / 4, download.DefaultStall * 3 / 4, last} {
					if _, err := r.Body.Read(make([]byte, 1)); err != nil {
						return nil, err
					}
					time.Sleep(pause)
				}
				return &http.Response{StatusCode: http.StatusServiceUnavailable, Body: http.NoBody}, context.Cause(r.Context())
			})}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://test", strings.NewReader("content"))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := transport.RoundTrip(req)
			if err != nil {
				return err
			}
			return resp.Body.Close()
		}
		if err := send(0); err != nil {
			t.Errorf("a slow server: %v", err)
		}
		if err := send(download.DefaultStall + 1); !errors.Is(err, download.ErrStalled) {
			t.Errorf("a silent server: %v, want ErrStalled", err)
		}
		if requests != 2 {
			t.Errorf("%d requests for 2", requests)
		}
	})
}
