package firecracker

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

const (
	// maxHeader bounds an answer's status line and headers, in bytes. The VMM's take some 120.
	maxHeader = 16 << 10
	// maxBody bounds an answer's body, in bytes. Only the MMDS store can be large, as large as
	// --mmds-size-limit.
	maxBody = 16 << 20
	// readBuffer is small because every idle VM has one.
	readBuffer = 512
	// closeGrace is how long Close leaves the VMM to answer.
	closeGrace = 5 * time.Second
	// hangUpGrace is how long a half-closed connection stays open for the VMM to close it.
	hangUpGrace = 40 * time.Millisecond
	// maxID bounds an id in a path, in bytes: the VMM reads the request line into a buffer of 1024.
	maxID = 512
)

// MaxPayload is the largest request body that is sent, in bytes: the VMM's default for
// --http-api-max-payload-size. More is refused here, because the VMM does not skip a body that it
// refuses: it takes it for requests, answers them, and dies of the answers that nobody reads any
// more (Firecracker 1.12).
const MaxPayload = 51200

// DialFunc connects to the API socket of one VMM.
type DialFunc func(ctx context.Context) (net.Conn, error)

// Client talks to one VMM. It dials at the first call, keeps that one connection, and dials anew
// after any error on it. Calls may be made from several goroutines; they are sent one after
// another.
//
// A call is bounded by its context only: pausing and snapshots legitimately take long. When the
// context ends, the connection is given up, and the next call dials. The call then returns at once
// if the VMM is free, and within hangUpGrace otherwise. A request that the VMM has not read by then
// is never carried out; one that it has read is, and later ones wait for it at the VMM.
//
// Giving up a connection takes two steps, because Firecracker 1.12 dies of an answer that it writes
// to a closed one (SIGPIPE, whose handler breaks the seccomp filter). It never writes to one whose
// other side it knows to be closed for writing. So that is closed first, while an answer that is
// about to be written can still be received, and the rest once the VMM has closed its side, or
// after hangUpGrace: a VMM that has not by then is not about to write.
type Client struct {
	dial DialFunc

	// turn is held, as its one element, for the length of an exchange, and protects reader.
	turn   chan struct{}
	reader *responseReader // of conn

	// mu protects what follows. Taken after turn.
	mu        sync.Mutex
	version   Version
	conn      net.Conn
	abortDial context.CancelFunc // nil unless dialling
	closed    bool
}

// New returns a client that has not connected yet. Version is that of the VMM, as `firecracker
// --version` tells; the zero Version makes the client ask the VMM before it first sends something
// that not every version since [MinVersion] has, or resumes a VM. The caller closes the client.
func New(dial DialFunc, version Version) *Client {
	return &Client{dial: dial, version: version, turn: make(chan struct{}, 1)}
}

// Close fails later calls with [net.ErrClosed], waits closeGrace at most for the answer to a call
// under way, and gives the connection up, whereupon that call fails too. A VMM that hangs or is not
// wanted any more is better killed first: then there is no wait. Closing again is allowed.
func (c *Client) Close() error {
	c.mu.Lock()
	c.closed = true
	if c.abortDial != nil {
		c.abortDial()
	}
	c.mu.Unlock()
	grace := time.NewTimer(closeGrace)
	defer grace.Stop()
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
		return c.drop()
	case <-grace.C:
	}
	c.mu.Lock()
	conn := c.conn
	c.mu.Unlock()
	if conn != nil {
		hangUp(conn)
	}
	c.turn <- struct{}{} // at the end of the exchange that was cut short
	<-c.turn
	return nil
}

// get asks for path and decodes the answer into out.
func (c *Client) get(ctx context.Context, path string, out any) error {
	answer, err := c.call(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("GET %s: decode answer: %w", path, err)
	}
	return nil
}

// send sends body, encoded as JSON if not nil, and expects nothing back.
func (c *Client) send(ctx context.Context, method, path string, body any) error {
	_, err := c.call(ctx, method, path, body)
	return err
}

// sendTo is send to the object id of a collection.
func (c *Client) sendTo(ctx context.Context, method, collection, id string, body any) error {
	if err := checkID(id); err != nil {
		return fmt.Errorf("%s %s: %w", method, collection, err)
	}
	return c.send(ctx, method, collection+"/"+id, body)
}

// checkID accepts what the VMM accepts as an object's id in a path.
func checkID(id string) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("id of %d bytes, want 1 to %d", len(id), maxID)
	}
	for _, r := range []byte(id) {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_') {
			return fmt.Errorf("id %q: want letters, digits and _ only", id)
		}
	}
	return nil
}

// call does one exchange and returns the body of a successful answer.
func (c *Client) call(ctx context.Context, method, path string, body any) ([]byte, error) {
	var payload []byte
	if body != nil {
		var err error
		if payload, err = encode(body); err != nil {
			return nil, fmt.Errorf("%s %s: encode body: %w", method, path, err)
		}
		if len(payload) > MaxPayload {
			return nil, fmt.Errorf("%s %s: body of %d bytes, want at most %d", method, path, len(payload), MaxPayload)
		}
	}
	if err := c.checkGates(ctx, method, path, body); err != nil {
		return nil, err
	}
	return c.run(ctx, method, path, payload)
}

// run does an exchange once it is the caller's turn.
func (c *Client) run(ctx context.Context, method, path string, payload []byte) ([]byte, error) {
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%s %s: %w", method, path, contextError(ctx))
	}
	return c.exchange(ctx, method, path, payload)
}

// encode is json.Marshal without the escapes meant for HTML, which would only spend the VMM's
// payload limit.
func encode(body any) ([]byte, error) {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(body); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// checkGates refuses what the VMM is too old for, learning its version first if it must.
func (c *Client) checkGates(ctx context.Context, method, path string, body any) error {
	if checkRequest(MinVersion, method, path, body) == nil {
		return nil
	}
	version, err := c.learnVersion(ctx)
	if err != nil {
		return err
	}
	return checkRequest(version, method, path, body)
}

// learnVersion returns the VMM's version, which it asks for if it is not known.
func (c *Client) learnVersion(ctx context.Context) (Version, error) {
	c.mu.Lock()
	version := c.version
	c.mu.Unlock()
	if !version.IsZero() {
		return version, nil
	}
	version, err := c.GetVersion(ctx)
	if err != nil {
		return Version{}, fmt.Errorf("learn version: %w", err)
	}
	c.mu.Lock()
	c.version = version
	c.mu.Unlock()
	return version, nil
}

// exchange sends one request and reads its answer. The caller holds the turn. Whatever goes wrong
// drops the connection: nothing on it could be attributed to a request any more.
func (c *Client) exchange(ctx context.Context, method, path string, payload []byte) ([]byte, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	stop := context.AfterFunc(ctx, func() { hangUp(conn) })
	_, writeErr := conn.Write(requestBytes(method, path, payload))
	// The answer is read even after a failed write: a VMM with too many connections answers and closes
	// unasked.
	resp, err := c.reader.read()
	givenUp := !stop()
	if err != nil {
		_ = c.drop()
		if givenUp {
			return nil, fmt.Errorf("%s %s: %w", method, path, contextError(ctx))
		}
		return nil, fmt.Errorf("%s %s: %w", method, path, c.transportError(writeErr, err))
	}
	if writeErr != nil || !resp.reusable || givenUp {
		_ = c.drop()
	}
	if resp.status/100 == 2 {
		return resp.body, nil
	}
	fault, structured := decodeFault(resp.body)
	if !structured {
		_ = c.drop()
	}
	return nil, &APIError{Method: method, Path: path, Status: resp.status, Fault: fault}
}

// hangUp makes the VMM close a connection, and ends the exchange on it within hangUpGrace: see
// Client.
func hangUp(conn net.Conn) {
	if c, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite() // it fails if the other side is closed
	}
	_ = conn.SetDeadline(time.Now().Add(hangUpGrace))
}

// requestBytes returns the whole request, so that it leaves in one write.
func requestBytes(method, path string, payload []byte) []byte {
	b := make([]byte, 0, len(method)+len(path)+len(payload)+128)
	b = append(b, method...)
	b = append(b, ' ')
	b = append(b, path...)
	b = append(b, " HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"...)
	if payload != nil {
		b = append(b, "Content-Type: application/json\r\nContent-Length: "...)
		b = strconv.AppendInt(b, int64(len(payload)), 10)
		b = append(b, "\r\n"...)
	}
	b = append(b, "\r\n"...)
	return append(b, payload...)
}

// connect returns the kept connection or dials one.
func (c *Client) connect(ctx context.Context) (net.Conn, error) {
	if ctx.Err() != nil {
		return nil, contextError(ctx)
	}
	c.mu.Lock()
	if c.closed || c.conn != nil {
		defer c.mu.Unlock()
		if c.closed {
			return nil, net.ErrClosed
		}
		return c.conn, nil
	}
	dialling, abort := context.WithCancel(ctx)
	defer abort()
	c.abortDial = abort
	c.mu.Unlock()
	conn, err := c.dial(dialling)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.abortDial = nil
	switch {
	case c.closed:
		if err == nil {
			_ = conn.Close()
		}
		return nil, net.ErrClosed
	case err != nil:
		return nil, err
	}
	c.conn, c.reader = conn, newResponseReader(conn)
	return conn, nil
}

// drop closes the connection; the next call dials.
func (c *Client) drop() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		return nil
	}
	conn := c.conn
	c.conn = nil
	return conn.Close()
}

// transportError picks what best explains a failed exchange: we were closed, or the connection
// broke.
func (c *Client) transportError(writeErr, readErr error) error {
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	switch {
	case closed:
		return net.ErrClosed
	case writeErr != nil:
		return writeErr
	}
	return readErr
}

// contextError tells why ctx is done: its error, and the cause if one was given.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	if errors.Is(err, cause) {
		return err
	}
	return fmt.Errorf("%w: %w", err, cause)
}

// response is one answer, read whole.
type response struct {
	status   int
	body     []byte
	reusable bool // the connection stands at the start of the next answer
}

// responseReader reads answers off one connection, each within bounds.
type responseReader struct {
	limit  io.LimitedReader
	buffer *bufio.Reader
}

func newResponseReader(conn net.Conn) *responseReader {
	r := &responseReader{limit: io.LimitedReader{R: conn}}
	r.buffer = bufio.NewReaderSize(&r.limit, readBuffer)
	return r
}

// read reads the next answer. An error means that the connection is of no more use.
func (r *responseReader) read() (response, error) {
	r.limit.N = maxHeader
	resp, err := http.ReadResponse(r.buffer, nil)
	if err != nil {
		if r.limit.N <= 0 {
			return response{}, fmt.Errorf("read answer: headers over %d bytes", maxHeader)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return response{}, fmt.Errorf("read answer: connection closed by the VMM: %w", io.ErrUnexpectedEOF)
		}
		return response{}, fmt.Errorf("read answer: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 {
		return response{}, fmt.Errorf("read answer: unexpected status %d", resp.StatusCode)
	}
	// One more than allowed, to tell a body that fills the bound from one that exceeds it. A longer
	// wire form (chunks) runs into the reader's own bound.
	r.limit.N = 2 * maxBody
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	switch {
	case err != nil:
		return response{}, fmt.Errorf("read answer: %w", err)
	case len(body) > maxBody:
		return response{}, fmt.Errorf("read answer: body over %d bytes", maxBody)
	}
	// Bytes after the answer belong to no request.
	reusable := !resp.Close && r.buffer.Buffered() == 0
	return response{status: resp.StatusCode, body: body, reusable: reusable}, nil
}
