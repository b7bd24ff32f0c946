package agentproto

import (
	"encoding/binary"
	"fmt"
	"sync"
	"time"
)

// What carries a connection may be lost while both sides live: making a snapshot of a VM ends all
// that its guest's vsock has. A connection that is resumable goes on by another then. Both sides
// count the bytes of frames, keep those that the other side may not have, and send them again from
// where it stopped.

const (
	// TokenSize is that of what a session is known by, in bytes.
	TokenSize = 16
	// maxKept is how many bytes of frames are kept for the other side: who has more to send waits. A
	// single frame that is none of a stream may be larger.
	maxKept = 256 << 10
	// maxResumable is how much of a stream is in one frame: it is sent again from its beginning.
	maxResumable = 64<<10 - headerSize
	// minKept is as much as most sessions keep.
	minKept = 4 << 10
	// ackStep is of how many bytes that have come the other side is told at once.
	ackStep = 64 << 10
	// ackSize is a count of bytes.
	ackSize = 8
	// PingTime is how long a host hears nothing of a program until it says something itself, and
	// WatchPingTime likewise of the guest's life. When a snapshot has ended a guest's connections,
	// nothing tells the VMM, and so the host, before something is sent by one.
	PingTime      = time.Second
	WatchPingTime = 5 * time.Second
)

// Link is by what a connection goes on.
type Link struct {
	Conn     *Conn  // whose request and reply have been exchanged; it becomes part of the other
	Received uint64 // what the other side says that it has
}

// kept is what makes a connection resumable.
type kept struct {
	again func(lost error) (Link, error)
	ping  time.Duration
	done  chan struct{}  // closed with the connection
	due   chan struct{}  // of size 1: the other side is to be told what has come
	all   sync.WaitGroup // of the goroutine that does
	// Guarded by Conn.mu, as what follows, but that only who sends changes ring and sent:
	telling bool
	ring    []byte // the size is a power of 2. Byte n of what was sent is at n modulo that
	acked   uint64 // bytes of frames that the other side has
	sent    uint64 // that were, or will be, sent
	used    int    // of maxKept: kept, or about to be
	written uint64 // that the link was given
	down    bool   // the link is lost
	// Of what comes:
	received uint64
	told     uint64 // of that, the other side
	heard    bool   // something, by this link
	quiet    bool   // nothing, since the last look
}

// Resumable makes c outlive what carries it: when that is lost, Receive calls again, which returns
// another or the error that c ends with. From now on frames count, on both sides. With a ping other
// than 0, something is sent whenever nothing has come for so long. It must be called before any
// other goroutine uses c.
func (c *Conn) Resumable(ping time.Duration, again func(lost error) (Link, error)) {
	c.kept = &kept{again: again, ping: ping, done: make(chan struct{}), due: make(chan struct{}, 1), heard: true}
	if ping > 0 {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.startTelling()
	}
}

// GiveUp is what a connection does that does not go on, but shall be known to be lost.
func GiveUp(lost error) (Link, error) { return Link{}, lost }

// Done is closed when a resumable connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.kept.done }

// Received is how much has come, for who goes on.
func (c *Conn) Received() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kept.received
}

// Heard says whether anything has come by what carries the connection now.
func (c *Conn) Heard() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kept.heard
}

// Holds says whether the connection can go on with somebody who has received so much.
func (c *Conn) Holds(received uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed == nil && received >= c.kept.acked && received <= c.kept.sent
}

// SendSurely sends a frame that belongs to no stream, and waits until the other side has it, the
// connection ends, or patience does. The other side says at once that it has a signal.
func (c *Conn) SendSurely(k Kind, payload []byte, patience time.Duration) error {
	end, err := c.sendKept(k, payload)
	if err != nil {
		return err
	}
	late := false
	defer time.AfterFunc(patience, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		late = true
		c.changed.Broadcast()
	}).Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.kept.acked < end && c.closed == nil && !late {
		c.changed.Wait()
	}
	return nil
}

// sendKept sends a frame that is kept until the other side has it, and returns where it ends. It
// waits for room, not for the link.
func (c *Conn) sendKept(k Kind, payload []byte) (end uint64, err error) {
	p, n := c.kept, headerSize+len(payload)
	c.mu.Lock()
	for c.closed == nil && p.used >= ackStep && p.used+n > maxKept { // of less nobody may be told
		c.changed.Wait()
	}
	if err = c.closed; err == nil {
		p.used += n
	}
	c.mu.Unlock()
	if err != nil {
		return 0, err
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	end = c.keep(head(k, len(payload)), payload)
	c.transmit()
	return end, nil
}

// keep appends a frame to what is kept, and returns where it ends. Sending is held.
func (c *Conn) keep(parts ...[]byte) uint64 {
	p := c.kept
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, part := range parts {
		n += len(part)
	}
	p.grow(n)
	at := p.sent
	for _, part := range parts {
		for len(part) > 0 {
			m := copy(p.ring[at&uint64(len(p.ring)-1):], part)
			part, at = part[m:], at+uint64(m)
		}
	}
	p.sent = at
	return at
}

// grow makes room for n bytes more.
func (p *kept) grow(n int) {
	size := max(len(p.ring), minKept)
	for size < int(p.sent-p.acked)+n {
		size *= 2
	}
	if size == len(p.ring) {
		return
	}
	ring := make([]byte, size)
	for at := p.acked; at < p.sent; {
		at += uint64(copy(ring[at&uint64(size-1):], p.part(at)))
	}
	p.ring = ring
}

// part is what is kept from a byte on, as far as it lies in one piece.
func (p *kept) part(at uint64) []byte {
	first := int(at & uint64(len(p.ring)-1))
	return p.ring[first:min(first+int(p.sent-at), len(p.ring))]
}

// transmit gives the link what it has not had. Sending is held, so nobody changes the ring
// meanwhile. It may be another link by then.
func (c *Conn) transmit() {
	p := c.kept
	for {
		c.mu.Lock()
		link, at := c.conn, p.written
		if p.down || at >= p.sent {
			c.mu.Unlock()
			return
		}
		part := p.part(at)
		c.mu.Unlock()
		n, err := link.Write(part)
		c.mu.Lock()
		if c.conn == link {
			p.written += uint64(n)
			p.down = p.down || err != nil
		}
		c.mu.Unlock()
	}
}

// count counts a frame that has come whole. Who has sent a signal may wait for it to have come.
func (c *Conn) count(k Kind, n int) {
	p := c.kept
	if p == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p.heard, p.quiet = true, false
	p.received += uint64(headerSize + n)
	if k == KindSignal || p.received-p.told >= ackStep {
		c.tellSoon()
	}
}

// tellSoon has the other side told what has come. Mu is held. Receive cannot do it: who receives
// must never wait for who does not, or both sides may.
func (c *Conn) tellSoon() {
	select {
	case c.kept.due <- struct{}{}:
	default:
	}
	c.startTelling()
}

// startTelling starts the goroutine that does. Mu is held.
func (c *Conn) startTelling() {
	if p := c.kept; !p.telling && c.closed == nil {
		p.telling = true
		p.all.Go(c.tellAlways)
	}
}

func (c *Conn) tellAlways() {
	p := c.kept
	var tick <-chan time.Time
	if p.ping > 0 {
		t := time.NewTicker(p.ping)
		defer t.Stop()
		tick = t.C
	}
	for {
		select {
		case <-p.done:
			return
		case <-p.due:
		case <-tick:
			c.mu.Lock()
			quiet := p.quiet
			p.quiet = true
			c.mu.Unlock()
			if !quiet {
				continue
			}
		}
		c.tell()
	}
}

// tell tells the other side what has come, behind what the link has not had yet.
func (c *Conn) tell() {
	p := c.kept
	c.sending.Lock()
	defer c.sending.Unlock()
	for {
		c.transmit()
		c.mu.Lock()
		link, down, behind := c.conn, p.down, p.written < p.sent
		p.told = p.received
		frame := binary.BigEndian.AppendUint64(head(KindAck, ackSize), p.received)
		c.mu.Unlock()
		if down {
			return
		}
		if behind {
			continue // by another link
		}
		if _, err := link.Write(frame); err != nil {
			c.mu.Lock()
			p.down = p.down || c.conn == link
			c.mu.Unlock()
		}
		return
	}
}

// acknowledged takes what the other side says that it has.
func (c *Conn) acknowledged(payload []byte) error {
	if c.kept == nil || len(payload) != ackSize {
		return fmt.Errorf("%w: acknowledgement", ErrProtocol)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.kept.heard, c.kept.quiet = true, false
	return c.release(binary.BigEndian.Uint64(payload))
}

// release forgets what the other side has. Mu is held.
func (c *Conn) release(received uint64) error {
	p := c.kept
	if received < p.acked || received > p.sent {
		return fmt.Errorf("%w: %d bytes received of %d, of which it had %d", ErrProtocol, received, p.sent, p.acked)
	}
	p.used -= int(received - p.acked)
	p.acked = received
	c.changed.Broadcast()
	return nil
}

// resume has the connection go on when what carries it is lost.
func (c *Conn) resume(lost error) error {
	c.mu.Lock()
	closed := c.closed
	c.kept.down = true
	c.mu.Unlock()
	if closed != nil {
		return closed
	}
	link, err := c.kept.again(lost)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p, old := c.kept, c.conn
	if err = c.closed; err == nil {
		err = c.release(link.Received)
	}
	if err != nil {
		_ = link.Conn.conn.Close()
		return err
	}
	c.conn, c.in = link.Conn.conn, link.Conn.in
	p.written, p.down, p.heard, p.quiet = link.Received, false, false, false
	_ = old.Close()
	c.tellSoon() // and sent the rest
	return nil
}
