package firecracker_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/testenv"
)

var (
	v1_7    = firecracker.MinVersion
	v1_12_1 = firecracker.Version{Major: 1, Minor: 12, Patch: 1}
	v1_16_1 = firecracker.Version{Major: 1, Minor: 16, Patch: 1}
)

// listen serves connections on a unix socket with handle, which gets the connection's number, from
// 1. It returns how to dial it and the number of connections so far. The test waits for every
// handle to end.
func listen(t *testing.T, handle func(conn net.Conn, number int)) (firecracker.DialFunc, *atomic.Int64) {
	t.Helper()
	path := testenv.Socket(t, filepath.Join(t.TempDir(), "s"))
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var (
		served sync.WaitGroup
		count  atomic.Int64
	)
	served.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			number := int(count.Add(1))
			served.Go(func() {
				defer conn.Close()
				handle(conn, number)
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		served.Wait()
	})
	var dialer net.Dialer
	return func(ctx context.Context) (net.Conn, error) { return dialer.DialContext(ctx, "unix", path) }, &count
}

// newClient returns a client that is closed before the server of an earlier listen waits for its
// handlers.
func newClient(t *testing.T, dial firecracker.DialFunc, v firecracker.Version) *firecracker.Client {
	t.Helper()
	c := firecracker.New(dial, v)
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// answer is how Firecracker frames an answer: without a reason phrase, and without a length for
// 204.
func answer(status int, body string) string {
	if status == http.StatusNoContent {
		return "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
	}
	return fmt.Sprintf("HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"+
		"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
}

// answering serves every connection by reading requests and sending what reply says to each.
func answering(reply func(method, path, body string) string) func(net.Conn, int) {
	return func(conn net.Conn, _ int) {
		reader := bufio.NewReader(conn)
		for {
			r, err := http.ReadRequest(reader)
			if err != nil {
				return
			}
			body, err := io.ReadAll(r.Body)
			if err != nil {
				return
			}
			if _, err := io.WriteString(conn, reply(r.Method, r.RequestURI, string(body))); err != nil {
				return
			}
		}
	}
}

// always answers everything with the same bytes.
func always(text string) func(net.Conn, int) {
	return answering(func(string, string, string) string { return text })
}
