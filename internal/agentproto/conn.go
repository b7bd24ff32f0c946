// Package agentproto is how host and agent speak: frames over vsock, requests and replies.
package agentproto

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"push.rocks/smartvm/guest"
)

// Port is the vsock port on which the agent listens. Below 1024, so that no program without
// privileges can be there before it.
const Port = 1023

// Version is that of the protocol. An agent answers requests of its own version alone.
const Version = 3

// Kind says what a frame is.
type Kind byte

// The kinds of frames. A frame is its kind, the length of what follows in three bytes (big-endian),
// and that.
const (
	KindRequest Kind = 1 + iota // to the guest, first: a Request
	KindReply                   // to the host: a Reply, the answer to the request
	KindEvent                   // to the host: an Event
	KindExit                    // to the host, last: an Exit
	KindWindow                  // both ways: a stream's kind, and four bytes: how many more of its bytes may come
	KindSignal                  // to the guest: a byte, the signal's number; Detach is none
	KindResize                  // to the guest: rows and columns, two bytes each
	// both ways, where a connection is resumable: eight bytes, how many of frames have come. It counts
	// for none
	KindAck
	KindStdin  // to the guest: bytes of a stream; none: it has ended
	KindStdout // to the host, likewise
	KindStderr // to the host, likewise
	kinds
)

const (
	// MaxData is how much of a stream is in one frame: with its head, as much as four packets of
	// virtio's vsock, of which the guest then tells its VMM once.
	MaxData    = 256<<10 - headerSize
	headerSize = 4
	maxControl = 4 << 20 // of anything else: arguments and environment
	// Window is how many bytes of a stream may be on their way, or wait for who takes them.
	Window = 1 << 20
	// windowStep is of how many that have been taken the other side is told at once.
	windowStep = Window / 2
	// bufferSize is what is read ahead of what does not go into a stream directly.
	bufferSize = 4 << 10
)

// ErrProtocol means that the other side does not keep to the protocol.
var ErrProtocol = errors.New("protocol violation")

// Conn carries frames both ways over a connection. Sending is safe for concurrent use, receiving is
// for one goroutine.
type Conn struct {
	conn net.Conn      // where it is resumable, guarded by mu
	in   *bufio.Reader // reads large parts of streams into their inboxes directly

	sending sync.Mutex
	out     []byte

	mu      sync.Mutex
	changed *sync.Cond
	credit  [kinds]int
	closed  error
	kept    *kept // nil: it is not resumable

	header  [headerSize]byte
	control []byte
	inboxes [kinds]*Inbox
}

// NewConn takes over a connection.
func NewConn(c net.Conn) *Conn {
	p := &Conn{conn: c, in: bufio.NewReaderSize(c, bufferSize)}
	p.changed = sync.NewCond(&p.mu)
	for k := KindStdin; k < kinds; k++ {
		p.credit[k] = Window
	}
	return p
}

// Rest is the connection, for what follows the frames. Nothing may be received any more.
func (c *Conn) Rest() net.Conn { return &rest{c.conn, c.in} }

type rest struct {
	net.Conn
	in *bufio.Reader
}

func (r *rest) Read(p []byte) (int, error) {
	if r.in.Buffered() == 0 {
		return r.Conn.Read(p)
	}
	return r.in.Read(p)
}

// CloseWrite ends what is sent.
func (r *rest) CloseWrite() error {
	if c, ok := r.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close ends the connection, and whatever waits on it.
func (c *Conn) Close() error {
	c.fail(net.ErrClosed)
	c.mu.Lock()
	err := c.conn.Close()
	c.mu.Unlock()
	if c.kept != nil {
		c.kept.all.Wait()
	}
	return err
}

func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed == nil {
		c.closed = err
		if c.kept != nil {
			close(c.kept.done)
		}
	}
	c.changed.Broadcast()
	for _, i := range c.inboxes {
		if i != nil {
			i.end(c.closed)
		}
	}
}

// Send sends a frame that belongs to no stream.
func (c *Conn) Send(k Kind, payload []byte) error {
	if len(payload) > maxControl {
		return fmt.Errorf("send to agent: %d bytes, at most %d", len(payload), maxControl)
	}
	if c.kept != nil {
		_, err := c.sendKept(k, payload)
		return err
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	c.out = append(append(c.out[:0], head(k, len(payload))...), payload...)
	_, err := c.conn.Write(c.out)
	if cap(c.out) > 2*MaxData {
		c.out = nil // the one large request
	}
	return err
}

// SendJSON sends v as a frame.
func (c *Conn) SendJSON(k Kind, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return c.Send(k, data)
}

// Frame is a request's, for a host that sends it before there is a Conn. Returns guest.ErrTooLarge.
func (r *Request) Frame() ([]byte, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if len(data) > maxControl {
		return nil, fmt.Errorf("%w: a request of %d bytes, at most %d: arguments and environment are too long",
			guest.ErrTooLarge, len(data), maxControl)
	}
	return append(head(KindRequest, len(data)), data...), nil
}

func head(k Kind, n int) []byte { return []byte{byte(k), byte(n >> 16), byte(n >> 8), byte(n)} }

// Receive returns the next frame that belongs to no stream; those that do go to their inboxes. The
// payload is good until the next call. Returns io.EOF at the end, ErrProtocol.
func (c *Conn) Receive() (Kind, []byte, error) {
	for {
		k, payload, err := c.receive()
		if err != nil && c.kept != nil && !errors.Is(err, ErrProtocol) {
			if err = c.resume(err); err == nil {
				continue
			}
		}
		if err != nil {
			c.fail(err)
		}
		return k, payload, err
	}
}

func (c *Conn) receive() (Kind, []byte, error) {
	for {
		if _, err := io.ReadFull(c.in, c.header[:]); err != nil {
			return 0, nil, err
		}
		k, n := Kind(c.header[0]), int(c.header[1])<<16|int(c.header[2])<<8|int(c.header[3])
		if k == 0 || k >= kinds || k >= KindStdin && n > MaxData || n > maxControl {
			return 0, nil, fmt.Errorf("%w: frame of kind %d with %d bytes", ErrProtocol, k, n)
		}
		if k >= KindStdin {
			if err := c.fill(k, n); err != nil {
				return 0, nil, err
			}
			c.count(k, n)
			continue
		}
		if cap(c.control) < n || cap(c.control) > MaxData {
			c.control = make([]byte, n)
		}
		c.control = c.control[:n]
		if _, err := io.ReadFull(c.in, c.control); err != nil {
			return 0, nil, unexpected(err)
		}
		if k == KindAck {
			if err := c.acknowledged(c.control); err != nil {
				return 0, nil, err
			}
			continue
		}
		c.count(k, n)
		if k == KindWindow {
			if err := c.grant(c.control); err != nil {
				return 0, nil, err
			}
			continue
		}
		return k, c.control, nil
	}
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// fill puts n bytes into a stream's inbox.
func (c *Conn) fill(k Kind, n int) error {
	i := c.inboxes[k]
	if i == nil {
		return fmt.Errorf("%w: a stream of kind %d that nobody has asked for", ErrProtocol, k)
	}
	if n == 0 {
		i.end(io.EOF)
		return nil
	}
	return i.fill(c.in, n)
}

// grant takes a window's frame.
func (c *Conn) grant(payload []byte) error {
	if len(payload) != 5 || Kind(payload[0]) < KindStdin || Kind(payload[0]) >= kinds {
		return fmt.Errorf("%w: window", ErrProtocol)
	}
	n := binary.BigEndian.Uint32(payload[1:])
	c.mu.Lock()
	defer c.mu.Unlock()
	if k := payload[0]; n > Window || c.credit[k]+int(n) > Window {
		return fmt.Errorf("%w: window of %d bytes", ErrProtocol, n)
	}
	c.credit[payload[0]] += int(n)
	c.changed.Broadcast()
	return nil
}

// take waits until some of n bytes of a stream may be sent, and says how many.
func (c *Conn) take(k Kind, n int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.credit[k] == 0 && c.closed == nil {
		c.changed.Wait()
	}
	if c.closed != nil {
		return 0, c.closed
	}
	n = min(n, c.credit[k], MaxData)
	if c.kept != nil {
		n = min(n, maxResumable)
	}
	c.credit[k] -= n
	return n, nil
}

// Writer sends a stream. Write waits while the other side takes nothing; Close ends the stream.
func (c *Conn) Writer(k Kind) io.WriteCloser { return &writer{c, k} }

type writer struct {
	c *Conn
	k Kind
}

func (w *writer) Write(p []byte) (written int, err error) {
	for len(p) > 0 {
		n, err := w.c.take(w.k, len(p))
		if err == nil {
			err = w.c.Send(w.k, p[:n])
		}
		if err != nil {
			return written, err
		}
		p, written = p[n:], written+n
	}
	return written, nil
}

func (w *writer) Close() error { return w.c.Send(w.k, nil) }

// Inbox takes a stream in: it holds what has come until somebody reads it.
type Inbox struct {
	c *Conn
	k Kind

	mu    sync.Mutex
	some  *sync.Cond
	ring  []byte // nil until the first byte
	first int
	count int
	taken int   // by readers, of which the other side has not been told
	err   error // io.EOF at the stream's own end
}

// Inbox expects a stream. It must be called before the stream's first frame is received.
func (c *Conn) Inbox(k Kind) *Inbox {
	i := &Inbox{c: c, k: k}
	i.some = sync.NewCond(&i.mu)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inboxes[k] = i
	return i
}

func (i *Inbox) end(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.err == nil {
		i.err = err
	}
	i.some.Broadcast()
}

// fill reads n bytes, at most MaxData, into the ring.
func (i *Inbox) fill(r io.Reader, n int) error {
	i.mu.Lock()
	if i.count+i.taken+n > Window {
		i.mu.Unlock()
		return fmt.Errorf("%w: more of a stream than was asked for", ErrProtocol)
	}
	i.grow(i.count + n)
	end := (i.first + i.count) % len(i.ring)
	ring := i.ring
	i.mu.Unlock()
	// Readers leave the free part alone, and only we make the ring larger.
	part := min(n, len(ring)-end)
	if _, err := io.ReadFull(r, ring[end:end+part]); err != nil {
		return unexpected(err)
	}
	if _, err := io.ReadFull(r, ring[:n-part]); err != nil {
		return unexpected(err)
	}
	i.mu.Lock()
	i.count += n
	i.some.Broadcast()
	i.mu.Unlock()
	return nil
}

// minRing is as large as the ring of most streams gets.
const minRing = 64 << 10

// grow makes room for n bytes in all.
func (i *Inbox) grow(n int) {
	size := max(len(i.ring), minRing)
	for size < n {
		size *= 2
	}
	if size == len(i.ring) {
		return
	}
	ring := make([]byte, size)
	if i.count > 0 {
		k := copy(ring, i.ring[i.first:min(i.first+i.count, len(i.ring))])
		copy(ring[k:], i.ring[:i.count-k])
	}
	i.ring, i.first = ring, 0
}

// Read returns what has come, and lets the other side send as much again. Returns io.EOF at the
// stream's end, and the connection's error where that ended before.
func (i *Inbox) Read(p []byte) (int, error) {
	i.mu.Lock()
	for i.count == 0 && i.err == nil {
		i.some.Wait()
	}
	if i.count == 0 {
		defer i.mu.Unlock()
		return 0, i.err
	}
	n := copy(p, i.ring[i.first:min(i.first+i.count, len(i.ring))])
	i.first, i.count, i.taken = (i.first+n)%len(i.ring), i.count-n, i.taken+n
	told := 0
	if i.taken >= windowStep {
		told, i.taken = i.taken, 0
	}
	ended := i.err != nil
	i.mu.Unlock()
	if ended || told == 0 {
		return n, nil // nothing more will come, or enough may
	}
	window := binary.BigEndian.AppendUint32([]byte{byte(i.k)}, uint32(told))
	_ = i.c.Send(KindWindow, window) // a connection that has ended shows in the next Read
	return n, nil
}

// Discard lets the rest of the stream come, and go.
func (i *Inbox) Discard() {
	_, _ = io.Copy(io.Discard, i)
}
