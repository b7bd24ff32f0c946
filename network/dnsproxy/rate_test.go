package dnsproxy_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"push.rocks/smartvm/network/dnsproxy"
)

// wire is a net.PacketConn and a net.Listener without a network, so that time can be the test's.
type wire struct {
	questions chan []byte
	answers   atomic.Int64
	conns     chan net.Conn
	closed    context.Context
	close     context.CancelFunc
}

func (w *wire) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case q := <-w.questions:
		return copy(b, q), w.Addr(), nil
	case <-w.closed.Done():
		return 0, nil, net.ErrClosed
	}
}

func (w *wire) WriteTo(b []byte, _ net.Addr) (int, error) {
	w.answers.Add(1)
	return len(b), nil
}

func (w *wire) Accept() (net.Conn, error) {
	select {
	case c := <-w.conns:
		return c, nil
	case <-w.closed.Done():
		return nil, net.ErrClosed
	}
}

func (w *wire) Close() error                     { w.close(); return nil }
func (w *wire) LocalAddr() net.Addr              { return w.Addr() }
func (w *wire) Addr() net.Addr                   { return &net.UDPAddr{} }
func (w *wire) SetDeadline(time.Time) error      { return nil }
func (w *wire) SetReadDeadline(time.Time) error  { return nil }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

// Questions over the rate have no answer by UDP, are counted, and that is logged, once a minute; by
// TCP they wait. When the guest asks less it is answered as before.
func TestServe_Rate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dropped atomic.Uint64
		var log bytes.Buffer
		w := &wire{questions: make(chan []byte), conns: make(chan net.Conn)}
		w.closed, w.close = context.WithCancel(t.Context())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- dnsproxy.Serve(ctx, dnsproxy.Config{
				UDP: w, TCP: w, Rate: dnsproxy.Rate{PerSecond: 10, Burst: 20}, Dropped: &dropped,
				Log:   slog.New(slog.NewTextHandler(&log, nil)),
				Local: func(string) []netip.Addr { return []netip.Addr{netip.MustParseAddr("172.30.0.2")} },
			})
		}()
		m := question("db.", dnsmessage.TypeA)
		packed, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		ask := func(n int, answered, over uint64) {
			t.Helper()
			w.answers.Store(0)
			before := dropped.Load()
			for range n {
				w.questions <- packed
				synctest.Wait()
			}
			if got, not := uint64(w.answers.Load()), dropped.Load()-before; got != answered || not != over {
				t.Errorf("of %d questions %d have an answer and %d none, want %d and %d", n, got, not, answered, over)
			}
		}
		ask(50, 20, 30)
		time.Sleep(time.Second) // the test's: no time passes
		ask(50, 10, 40)
		time.Sleep(time.Minute)
		ask(20, 20, 0)

		// 20 more by TCP: 10 a second.
		ours, theirs := net.Pipe()
		w.conns <- theirs
		start := time.Now()
		for range 20 {
			writeTCP(ours, packed)
			if _, err := readTCP(ours); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start).Round(time.Second); took != 2*time.Second {
			t.Errorf("20 questions by TCP took %v, want 2s", took)
		}
		ask(1, 0, 1)
		if got := strings.Count(log.String(), "too many"); got != 2 || !strings.Contains(log.String(), "dropped=71 ") {
			t.Errorf("log %q, want a line for each of the minutes", &log)
		}
		_ = ours.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
