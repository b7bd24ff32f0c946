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
)

const (
	// maxHeader bounds an answer's status line and headers, in bytes. The VMM's take some 120.
	maxHeader = 16 << 10
	// maxBody bounds an answer's body, in bytes. Only the MMDS store can be large, as large as --mmds-size-limit.
	maxBody = 16 << 20
	// readBuffer is small because every idle VM has one.
	readBuffer = 512
	// maxDirectWrite is what an idle unix socket takes at once, its buffers being several times that, in bytes. It is
	// above the VMM's default limit for bodies, 51200.
	maxDirectWrite = 64 << 10
	// maxID bounds an id in a path, in bytes: the VMM reads the request line into a buffer of 1024.
	maxID = 512
)

// DialFunc connects to the API socket of one VMM.
type DialFunc func(ctx context.Context) (net.Conn, error)

// Client talks to one VMM. It dials at the first call, keeps that one connection, and dials anew after any error on
// it. Calls may be made from several goroutines; they are sent one after another.
//
// A call is bounded by its context only: pausing and snapshots legitimately take long.
type Client struct {
	dial DialFunc

	// turn is held, as its one element, for the length of an exchange, and protects version and reader.
	turn    chan struct{}
	version Version
	reader  *responseReader // of conn

	// mu protects conn and closed, so that Close can cut an exchange short. Taken after turn.
	mu     sync.Mutex
	conn   net.Conn
	closed bool
}

// New returns a client that has not connected yet. Version is that of the VMM, as `firecracker --version` tells; the
// zero Version makes the client ask the VMM before it first sends something that not every version since
// [MinVersion] has. The caller closes the client.
func New(dial DialFunc, version Version) *Client {
	return &Client{dial: dial, version: version, turn: make(chan struct{}, 1)}
}

// Close drops the connection and fails calls under way and later ones with [net.ErrClosed]. Closing again is allowed.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return c.dropLocked()
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

// call does one exchange once it is the caller's turn and returns the body of a successful answer.
func (c *Client) call(ctx context.Context, method, path string, body any) ([]byte, error) {
	var payload []byte
	if body != nil {
		var err error
		if payload, err = encode(body); err != nil {
			return nil, fmt.Errorf("%s %s: encode body: %w", method, path, err)
		}
	}
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%s %s: %w", method, path, contextError(ctx))
	}
	if err := c.checkGates(ctx, method, path, body); err != nil {
		return nil, err
	}
	return c.exchange(ctx, method, path, payload)
}

// encode is json.Marshal without the escapes meant for HTML, which would only spend the VMM's payload limit.
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
	if c.version.IsZero() && checkRequest(MinVersion, method, path, body) != nil {
		answer, err := c.exchange(ctx, http.MethodGet, "/version", nil)
		if err != nil {
			return fmt.Errorf("learn version: %w", err)
		}
		if c.version, err = decodeVersion(answer); err != nil {
			return fmt.Errorf("learn version: %w", err)
		}
	}
	if c.version.IsZero() {
		return nil
	}
	return checkRequest(c.version, method, path, body)
}

// exchange sends one request and reads its answer. The caller holds the turn. Whatever goes wrong drops the
// connection: nothing on it could be attributed to a request any more.
func (c *Client) exchange(ctx context.Context, method, path string, payload []byte) (body []byte, err error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	// Closing interrupts reads and writes on any kind of connection, and it is not to be used again anyhow.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	wait := startWrite(conn, requestBytes(method, path, payload))
	// The answer is read even after a failed write: a VMM with too many connections answers and closes unasked.
	resp, err := c.reader.read()
	writeErr := wait(err == nil && resp.ok())
	interrupted := !stop()
	switch {
	case err != nil:
		c.drop()
		return nil, fmt.Errorf("%s %s: %w", method, path, c.transportError(ctx, writeErr, err))
	case interrupted || writeErr != nil || !resp.reusable:
		c.drop()
	}
	if resp.ok() {
		return resp.body, nil
	}
	fault, structured := decodeFault(resp.body)
	if !structured {
		c.drop()
	}
	return nil, &APIError{Method: method, Path: path, Status: resp.status, Fault: fault}
}

// startWrite writes a request, and returns a function that says how that went, to be called once the answer is there.
// Taken says that the answer is a success, so the VMM read all of it. If not, and the request is too large to be sure
// to fit the socket's buffer, the write may never end: to a body over its limit the VMM answers at once and reads no
// further.
func startWrite(conn net.Conn, request []byte) (wait func(taken bool) error) {
	if len(request) <= maxDirectWrite {
		_, err := conn.Write(request)
		return func(bool) error { return err }
	}
	done := make(chan error, 1)
	go func() {
		_, err := conn.Write(request)
		done <- err
	}()
	return func(taken bool) error {
		if !taken {
			_ = conn.Close()
		}
		return <-done
	}
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
	c.mu.Lock()
	conn, closed := c.conn, c.closed
	c.mu.Unlock()
	switch {
	case closed:
		return nil, net.ErrClosed
	case ctx.Err() != nil:
		return nil, contextError(ctx)
	case conn != nil:
		return conn, nil
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	c.conn, c.reader = conn, newResponseReader(conn)
	return conn, nil
}

// drop closes the connection; the next call dials.
func (c *Client) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.dropLocked()
}

func (c *Client) dropLocked() error {
	if c.conn == nil {
		return nil
	}
	conn := c.conn
	c.conn = nil
	if err := conn.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// transportError picks what best explains a failed exchange: we gave up, we were closed, or the connection broke.
func (c *Client) transportError(ctx context.Context, writeErr, readErr error) error {
	c.mu.Lock()
	closed := c.closed
	c.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return contextError(ctx)
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

// ok reports whether the request was carried out.
func (r response) ok() bool { return r.status/100 == 2 }

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
	// One more than allowed, to tell a body that fills the bound from one that exceeds it. A longer wire form
	// (chunks) runs into the reader's own bound.
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
