// Package relay leads what programs of the host send to its loopback address on to a guest, where
// the kernel does not.
package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// Bounds of one port: what is more waits (TCP), or has another's place that was silent for longest
// (UDP).
const (
	maxConns    = 512
	maxSessions = 256
	idleTime    = time.Minute // of a UDP session
	dialTimeout = 10 * time.Second
	maxDatagram = 65535
)

// TCP leads connections on to an address until ctx ends, then closes l and all of them. It ends
// those that did not come by the loopback.
func TCP(ctx context.Context, l *net.TCPListener, to netip.AddrPort) {
	var work sync.WaitGroup
	defer work.Wait()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	slots := make(chan struct{}, maxConns)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		c, err := l.AcceptTCP()
		if err != nil {
			<-slots
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			pause(ctx) // files are short
			continue
		}
		work.Go(func() {
			defer func() { <-slots }()
			lead(ctx, c, to)
		})
	}
}

// pause keeps from trying without end what has just gone wrong.
func pause(ctx context.Context) {
	select {
	case <-time.After(50 * time.Millisecond):
	case <-ctx.Done():
	}
}

func lead(ctx context.Context, c *net.TCPConn, to netip.AddrPort) {
	defer c.Close()
	if !isLoopback(c.RemoteAddr()) || !isLoopback(c.LocalAddr()) {
		_ = c.SetLinger(0)
		return
	}
	d := net.Dialer{Timeout: dialTimeout}
	up, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		_ = c.SetLinger(0) // as if it were the guest that refuses
		return
	}
	guest := up.(*net.TCPConn)
	defer guest.Close()
	defer context.AfterFunc(ctx, func() { c.Close(); guest.Close() })()
	var both sync.WaitGroup
	for _, way := range [2][2]*net.TCPConn{{c, guest}, {guest, c}} {
		both.Go(func() {
			if _, err := io.Copy(way[0], way[1]); err != nil {
				_ = way[0].SetLinger(0) // an end that was no good one is passed on
				_ = way[0].Close()
				_ = way[1].Close()
				return
			}
			_ = way[0].CloseWrite()
		})
	}
	both.Wait()
}

func isLoopback(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// session is what a program of the host and a guest send each other by UDP.
type session struct {
	*net.UDPConn
	used time.Time
}

// datagrams has the sessions of one port.
type datagrams struct {
	from *net.UDPConn
	to   netip.AddrPort
	work sync.WaitGroup

	mu  sync.Mutex
	all map[netip.AddrPort]*session
}

// UDP leads datagrams on to an address, and answers back, until ctx ends, then closes c. It drops
// those that do not come from the loopback.
func UDP(ctx context.Context, c *net.UDPConn, to netip.AddrPort) {
	d := &datagrams{from: c, to: to, all: map[netip.AddrPort]*session{}}
	defer d.end()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	buf := make([]byte, maxDatagram)
	for {
		n, peer, err := c.ReadFromUDPAddrPort(buf)
		switch {
		case ctx.Err() != nil, errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			pause(ctx)
		case peer.Addr().IsLoopback():
			if s := d.session(peer); s != nil {
				_, _ = s.Write(buf[:n]) // a datagram may be lost
			}
		}
	}
}

// session is that of a peer, or a new one. Returns nil where there can be none.
func (d *datagrams) session(peer netip.AddrPort) *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.all[peer]
	if s == nil {
		if len(d.all) == maxSessions {
			d.evict()
		}
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(d.to))
		if err != nil {
			return nil
		}
		s = &session{UDPConn: c}
		d.all[peer] = s
		d.work.Go(func() { d.answer(peer, s) })
	}
	d.touch(s)
	return s
}

// touch keeps a session. The caller has the lock.
func (*datagrams) touch(s *session) {
	s.used = time.Now()
	_ = s.SetReadDeadline(s.used.Add(idleTime))
}

// evict ends the session that was silent for longest. The caller has the lock.
func (d *datagrams) evict() {
	var oldest netip.AddrPort
	for peer, s := range d.all {
		if o := d.all[oldest]; o == nil || s.used.Before(o.used) {
			oldest = peer
		}
	}
	_ = d.all[oldest].Close()
	delete(d.all, oldest)
}

// answer sends a peer what the guest sends, until the session has been silent for long or is ended.
func (d *datagrams) answer(peer netip.AddrPort, s *session) {
	buf := make([]byte, maxDatagram)
	for {
		n, err := s.Read(buf)
		d.mu.Lock()
		if err != nil {
			_ = s.Close()
			if d.all[peer] == s {
				delete(d.all, peer)
			}
			d.mu.Unlock()
			return
		}
		d.touch(s)
		d.mu.Unlock()
		_, _ = d.from.WriteToUDPAddrPort(buf[:n], peer)
	}
}

func (d *datagrams) end() {
	d.mu.Lock()
	for _, s := range d.all {
		_ = s.Close()
	}
	d.mu.Unlock()
	d.work.Wait()
}
