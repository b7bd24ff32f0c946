package dnsproxy_test

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"push.rocks/smartvm/network/dnsproxy"
)

// A guest that opens connections and says next to nothing takes neither more than some of them nor
// its own names by UDP, and has them for a while only, however often it says a byte.
func TestServe_Slow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &wire{questions: make(chan []byte), conns: make(chan net.Conn)}
		w.closed, w.close = context.WithCancel(t.Context())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- dnsproxy.Serve(ctx, dnsproxy.Config{
				UDP: w, TCP: w, Dropped: new(atomic.Uint64), Log: slog.New(slog.DiscardHandler),
				Local: func(string) []netip.Addr { return []netip.Addr{netip.MustParseAddr("172.30.0.2")} },
			})
		}()
		m := question("db.", dnsmessage.TypeA)
		packed, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		var closed atomic.Int32
		open := func() net.Conn {
			ours, theirs := net.Pipe()
			w.conns <- theirs
			return ours
		}
		slow := func() {
			c := open()
			go func() {
				for _, b := range append([]byte{0, 100}, make([]byte, 100)...) {
					if _, err := c.Write([]byte{b}); err != nil {
						break
					}
					time.Sleep(4 * time.Second)
				}
				closed.Add(1)
			}()
		}
		for range 100 {
			slow()
		}
		synctest.Wait()
		time.Sleep(5 * time.Second) // the test's: no time passes
		synctest.Wait()
		if n := closed.Load(); n != 100-16 {
			t.Errorf("of 100 slow connections %d are ended at once, want %d", n, 100-16)
		}
		w.questions <- packed
		synctest.Wait()
		if n := w.answers.Load(); n != 1 {
			t.Errorf("meanwhile %d answers by UDP, want 1", n)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := closed.Load(); n != 100 {
			t.Errorf("after a while %d of 100 are ended", n)
		}
		c := open()
		writeTCP(c, packed)
		if _, err := readTCP(c); err != nil {
			t.Errorf("a connection after them: %v", err)
		}
		_ = c.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
