package firecracker_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
)

func info(c *firecracker.Client, ctx context.Context) error {
	_, err := c.GetInstanceInfo(ctx)
	return err
}

const goodInfo = `{"app_name":"Firecracker","id":"vm","state":"Running","vmm_version":"1.12.1"}`

// TestClient_bytes sees the request as the VMM does: its length announced, in one piece, short
// lines.
func TestClient_bytes(t *testing.T) {
	got := make(chan string, 1)
	dial, _ := listen(t, func(conn net.Conn, _ int) {
		buffer := make([]byte, 4096)
		n, _ := conn.Read(buffer) // of a stream socket, but one write into an empty one is read whole
		got <- string(buffer[:n])
		_, _ = io.WriteString(conn, answer(204, ""))
	})
	c := newClient(t, dial, v1_12_1)
	if err := c.PutMMDS(t.Context(), map[string]string{"key": "wert <ü>"}); err != nil {
		t.Fatal(err)
	}
	const want = "PUT /mmds HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n" +
		"Content-Type: application/json\r\nContent-Length: 19\r\n\r\n" + `{"key":"wert <ü>"}`
	if got := <-got; got != want {
		t.Errorf("sent %q\nwant %q", got, want)
	}
}

func TestClient_keepsOneConnection(t *testing.T) {
	dial, dials := listen(t, answering(func(method, _, _ string) string {
		if method == "GET" {
			return answer(200, goodInfo)
		}
		return answer(400, `{"fault_message":"no"}`)
	}))
	c := newClient(t, dial, v1_12_1)
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 20 {
				if err := info(c, t.Context()); err != nil {
					t.Error(err)
				}
				var fault *firecracker.APIError
				if err := c.Pause(t.Context()); !errors.As(err, &fault) || fault.Fault != "no" {
					t.Errorf("got %v, want the VMM's refusal", err)
				}
			}
		})
	}
	callers.Wait()
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// TestClient_redials has the first connection spoilt in some way, and the next call succeed on
// another.
func TestClient_redials(t *testing.T) {
	for name, row := range map[string]struct {
		first string // sent to the first request
		fails bool
	}{
		"nothing":         {"", true},
		"garbage":         {"\x00\xff\n\n", true},
		"not HTTP":        {"220 smtp ready\r\n", true},
		"status line":     {"HTTP/1.1 204 \r\n", true},
		"no status":       {"HTTP/1.1 \r\n\r\n", true},
		"interim status":  {"HTTP/1.1 100 Continue\r\n\r\n" + answer(204, ""), true},
		"half a body":     {"HTTP/1.1 200 \r\nContent-Length: 100\r\n\r\n{", true},
		"negative length": {"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n{}", true},
		"bad chunks":      {"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", true},
		"endless header":  {"HTTP/1.1 200 \r\nX: " + strings.Repeat("x", 1<<20), true},
		"many headers":    {"HTTP/1.1 200 \r\n" + strings.Repeat("X: y\r\n", 100_000), true},
		"parse error":     {answer(400, "{ \"error\": \"Invalid\n header\" }"), true},
		"too many": {"HTTP/1.1 503 \r\nConnection: close\r\nContent-Length: 41\r\n\r\n" +
			`{ "error": "Too many open connections" } `, true},
		"more than asked": {answer(200, goodInfo) + answer(204, ""), false},
		"closing":         {"HTTP/1.1 200 \r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}", false},
		"until the end":   {"HTTP/1.1 200 \r\n\r\n{}", false},
	} {
		t.Run(name, func(t *testing.T) {
			dial, dials := listen(t, func(conn net.Conn, number int) {
				if number > 1 {
					always(answer(200, goodInfo))(conn, number)
					return
				}
				if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
					t.Error(err)
				}
				_, _ = io.WriteString(conn, row.first)
				if half, ok := conn.(*net.UnixConn); ok && !strings.HasPrefix(name, "more") {
					_ = half.CloseWrite()
				}
				_, _ = io.Copy(io.Discard, conn) // until the client drops it
			})
			c := newClient(t, dial, v1_12_1)
			err := info(c, t.Context())
			if (err != nil) != row.fails {
				t.Errorf("first call: %v", err)
			}
			if err != nil && len(err.Error()) > 300 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			if err := info(c, t.Context()); err != nil {
				t.Errorf("second call: %v", err)
			}
			if n := dials.Load(); n != 2 {
				t.Errorf("%d connections, want 2", n)
			}
		})
	}
}

func TestClient_badAnswer(t *testing.T) {
	for _, body := range []string{"", "null", "[]", `{"id":1}`, "{", "\xff"} {
		dial, _ := listen(t, always(answer(200, body)))
		c := newClient(t, dial, v1_12_1)
		err := info(c, t.Context())
		if (err != nil) != (body != "null") {
			t.Errorf("%q: %v", body, err)
		}
	}
	dial, _ := listen(t, always(answer(204, "")))
	if err := info(newClient(t, dial, v1_12_1), t.Context()); err == nil {
		t.Error("no error though nothing was answered")
	}
}

func TestClient_oversizedAnswer(t *testing.T) {
	for name, row := range map[string]struct{ header, want string }{
		"announced":    {"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n", "body over 16777216 bytes"},
		"until end":    {"HTTP/1.1 200 \r\n\r\n", "body over 16777216 bytes"},
		"header":       {"HTTP/1.1 200 \r\nX: ", "headers over 16384 bytes"},
		"status line":  {"HTTP/1.1 200 ", "headers over 16384 bytes"},
		"one byte off": {"HTTP/1.1 200 \r\nContent-Length: 16777217\r\n\r\n", "body over 16777216 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			dial, _ := listen(t, func(conn net.Conn, _ int) {
				if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
					t.Error(err)
				}
				if _, err := io.WriteString(conn, row.header); err != nil {
					t.Error(err)
				}
				block := make([]byte, 1<<20)
				for {
					if _, err := conn.Write(block); err != nil {
						return // the client would not have it
					}
				}
			})
			c := newClient(t, dial, v1_12_1)
			_, err := c.GetMMDS(t.Context())
			if err == nil || !strings.Contains(err.Error(), row.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// TestClient_largeBody sends the largest body, and refuses a larger one.
func TestClient_largeBody(t *testing.T) {
	var got int
	dial, _ := listen(t, answering(func(_, _, body string) string {
		got = len(body)
		return answer(204, "")
	}))
	c := newClient(t, dial, v1_12_1)
	if err := c.PutMMDS(t.Context(), strings.Repeat("x", firecracker.MaxPayload-2)); err != nil ||
		got != firecracker.MaxPayload {
		t.Errorf("%d bytes arrived, %v", got, err)
	}
	got = 0
	err := c.PutMMDS(t.Context(), strings.Repeat("x", firecracker.MaxPayload-1))
	if err == nil || err.Error() != "PUT /mmds: body of 51201 bytes, want at most 51200" || got != 0 {
		t.Errorf("%d bytes arrived, %v", got, err)
	}
}

// TestClient_refusedUnread is what the eleventh connection sees: an answer, and a request that
// cannot be written.
func TestClient_refusedUnread(t *testing.T) {
	refused := make(chan struct{})
	dial, _ := listen(t, func(conn net.Conn, _ int) {
		_, _ = io.WriteString(conn, "HTTP/1.1 503 \r\nConnection: close\r\nContent-Length: 40\r\n\r\n"+
			`{ "error": "Too many open connections" }`)
		_ = conn.Close()
		close(refused)
	})
	c := newClient(t, func(ctx context.Context) (net.Conn, error) {
		conn, err := dial(ctx)
		<-refused
		return conn, err
	}, v1_12_1)
	var fault *firecracker.APIError
	if err := c.Pause(t.Context()); !errors.As(err, &fault) || fault.Status != 503 ||
		fault.Fault != "Too many open connections" {
		t.Errorf("got %v, want the refusal", err)
	}
}

// hanging is a server that tells when it read its first request, and answers it once released.
func hanging(t *testing.T) (dial firecracker.DialFunc, asked, release chan struct{}) {
	asked, release = make(chan struct{}), make(chan struct{})
	var first sync.Once
	dial, _ = listen(t, answering(func(string, string, string) string {
		first.Do(func() {
			close(asked)
			<-release
		})
		return answer(200, goodInfo)
	}))
	return dial, asked, release
}

// shut is a connection that tells when one of its directions is closed, and when all of it is.
type shut struct {
	net.Conn
	half, whole chan struct{}
	once        sync.Once
}

func (s *shut) CloseWrite() error { close(s.half); return nil }
func (s *shut) Close() error      { s.once.Do(func() { close(s.whole) }); return s.Conn.Close() }

// TestClient_cancel gives a call up. Its connection is half-closed, and only closed when the VMM
// has had time for an answer, or has closed it: an answer to a closed connection could kill the
// VMM. The next call must not take that answer for its own. Time is fake.
func TestClient_cancel(t *testing.T) {
	const grace = 40 * time.Millisecond
	for name, row := range map[string]struct {
		vmm  func(net.Conn) // after the connection is half-closed
		took time.Duration
	}{
		"closes": {func(c net.Conn) { _ = c.Close() }, 0},
		"hangs":  {func(net.Conn) {}, grace},
		"answers": {func(c net.Conn) {
			time.Sleep(grace / 2)
			if _, err := io.WriteString(c, answer(204, "")); err != nil {
				t.Errorf("the VMM answers: %v", err)
			}
		}, grace / 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				first := &shut{Conn: ours, half: make(chan struct{}), whole: make(chan struct{})}
				dials := 0
				c := newClient(t, func(context.Context) (net.Conn, error) {
					if dials++; dials == 1 {
						return first, nil
					}
					ours, theirs := net.Pipe()
					go always(answer(200, goodInfo))(theirs, dials)
					return ours, nil
				}, v1_12_1)
				cause := errors.New("user lost patience")
				ctx, cancel := context.WithCancelCause(t.Context())
				var vmm sync.WaitGroup
				defer vmm.Wait()
				vmm.Go(func() {
					if _, err := http.ReadRequest(bufio.NewReader(theirs)); err != nil {
						t.Error(err)
					}
					cancel(cause)
					select {
					case <-first.half:
					case <-first.whole:
					}
					select {
					case <-first.whole:
						t.Error("the connection is closed before the VMM can know that its answer is not wanted")
						return
					default:
					}
					row.vmm(theirs)
				})
				begun := time.Now()
				err := c.InstanceStart(ctx)
				if name != "answers" && (!errors.Is(err, context.Canceled) || !errors.Is(err, cause)) {
					t.Errorf("got %v, want %v and %v", err, context.Canceled, cause)
				}
				if took := time.Since(begun); took != row.took {
					t.Errorf("it took %v, want %v", took, row.took)
				}
				select {
				case <-first.whole:
				default:
					t.Error("the connection stays open")
				}
				if err := info(c, ctx); !errors.Is(err, context.Canceled) {
					t.Errorf("call that waits for its turn: %v", err)
				}
				for range 3 {
					if err := info(c, t.Context()); err != nil {
						t.Errorf("next call: %v", err)
					}
				}
			})
		})
	}
}

func TestClient_deadline(t *testing.T) {
	dial, asked, release := hanging(t)
	defer close(release)
	c := newClient(t, dial, v1_12_1)
	go func() { _ = info(c, t.Context()) }()
	<-asked
	ctx, cancel := context.WithTimeout(t.Context(), 1)
	defer cancel()
	if err := info(c, ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
}

// TestClient_cancelBefore sends nothing.
func TestClient_cancelBefore(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := info(firecracker.New(noDial, v1_12_1), ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// TestClient_closeDialling closes while the VMM's socket is awaited.
func TestClient_closeDialling(t *testing.T) {
	dialling := make(chan struct{})
	c := firecracker.New(func(ctx context.Context) (net.Conn, error) {
		close(dialling)
		<-ctx.Done()
		return nil, ctx.Err()
	}, v1_12_1)
	done := make(chan error)
	go func() { done <- info(c, t.Context()) }()
	<-dialling
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

// TestClient_Close closes while the VMM works on a request, which it answers in time or never. Time
// is fake.
func TestClient_Close(t *testing.T) {
	for name, row := range map[string]struct {
		answers bool
		want    error
	}{
		"answers": {true, nil},
		"hangs":   {false, net.ErrClosed},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				c := firecracker.New(func(context.Context) (net.Conn, error) { return ours, nil }, v1_12_1)
				go func() {
					defer theirs.Close()
					if _, err := http.ReadRequest(bufio.NewReader(theirs)); err != nil {
						t.Error(err)
					}
					time.Sleep(time.Second)
					if row.answers {
						_, _ = io.WriteString(theirs, answer(200, goodInfo))
					}
					_, _ = io.Copy(io.Discard, theirs) // until the client drops it
				}()
				done := make(chan error)
				go func() { done <- info(c, t.Context()) }()
				synctest.Wait()
				closed := make(chan error)
				go func() { closed <- c.Close() }()
				if err := <-done; !errors.Is(err, row.want) {
					t.Errorf("call under way: %v, want %v", err, row.want)
				}
				if err := errors.Join(<-closed, c.Close()); err != nil {
					t.Error(err)
				}
				if err := info(c, t.Context()); !errors.Is(err, net.ErrClosed) {
					t.Errorf("later call: %v", err)
				}
			})
		})
	}
	if err := firecracker.New(noDial, v1_12_1).Close(); err != nil {
		t.Error(err)
	}
}

func TestClient_dialError(t *testing.T) {
	err := info(firecracker.New(noDial, v1_12_1), t.Context())
	if !errors.Is(err, errDialed) || err.Error() != "GET /: dialled" {
		t.Errorf("got %v", err)
	}
}

func TestClient_badID(t *testing.T) {
	c := firecracker.New(noDial, v1_16_1)
	for _, id := range []string{"", "a-b", "a/b", "..", "a b", "a?b", "a\r\nX: y", "ü", strings.Repeat("x", 513)} {
		for name, err := range map[string]error{
			"drive":            c.PutDrive(t.Context(), firecracker.Drive{DriveID: id}),
			"drive update":     c.PatchDrive(t.Context(), firecracker.PartialDrive{DriveID: id}),
			"drive removal":    c.DeleteDrive(t.Context(), id),
			"interface":        c.PutNetworkInterface(t.Context(), firecracker.NetworkInterface{IfaceID: id}),
			"interface update": c.PatchNetworkInterface(t.Context(), firecracker.PartialNetworkInterface{IfaceID: id}),
			"pmem":             c.PutPmem(t.Context(), firecracker.Pmem{ID: id}),
		} {
			if err == nil || errors.Is(err, errDialed) {
				t.Errorf("%s %q: %v, want it refused", name, id, err)
			}
		}
	}
}

func TestClient_badBody(t *testing.T) {
	c := firecracker.New(noDial, v1_16_1)
	if err := c.PutMMDS(t.Context(), make(chan int)); err == nil || errors.Is(err, errDialed) {
		t.Errorf("got %v, want it refused", err)
	}
}

// TestClient_size bounds what an idle client and its connection cost of the heap.
func TestClient_size(t *testing.T) {
	const clients, limit = 64, 8 << 10
	conns := make([]conn, clients)
	for i := range conns {
		conns[i].answers = strings.NewReader(strings.Repeat(answer(200, goodInfo), 2))
	}
	kept := make([]*firecracker.Client, clients)
	var before, after runtime.MemStats
	collect(&before)
	for i := range kept {
		kept[i] = firecracker.New(func(context.Context) (net.Conn, error) { return &conns[i], nil }, v1_12_1)
		if err := info(kept[i], t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	collect(&after)
	each := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / clients
	runtime.KeepAlive(kept)
	if each > limit {
		t.Errorf("%d bytes a client, want at most %d", each, limit)
	}
	t.Logf("%d bytes a client", each)
}

// collect takes two rounds, because a sync.Pool survives one.
func collect(stats *runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(stats)
}

// conn is a connection whose answers are there before anything is asked.
type conn struct {
	net.Conn
	answers io.Reader
}

func (c *conn) Read(p []byte) (int, error)  { return c.answers.Read(p) }
func (c *conn) Write(p []byte) (int, error) { return len(p), nil }
func (c *conn) Close() error                { return nil }

// A client that was not told the VMM's version asks before it resumes: some lose the guest's vsock
// by that.
func TestClient_ResumeLearnsVersion(t *testing.T) {
	for version, want := range map[string][]string{
		"1.12.1": {"GET /version", "PATCH /vm", "PATCH /vm"},
		"1.16.1": {"GET /version", "PUT /snapshot/create", "PATCH /vm", "PUT /snapshot/create", "PATCH /vm"},
	} {
		var got []string
		dial, _ := listen(t, answering(func(method, path, _ string) string {
			got = append(got, method+" "+path)
			if method == "GET" {
				return answer(200, `{"firecracker_version":"`+version+`"}`)
			}
			return answer(204, "")
		}))
		c := newClient(t, dial, firecracker.Version{})
		for range 2 {
			if err := c.Resume(t.Context()); err != nil {
				t.Errorf("%s: %v", version, err)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: -want +got:\n%s", version, diff)
		}
	}
}

// Calls that learn the version at the same time share nothing unprotected: a test for the race
// detector.
func TestClient_LearnsVersionAtOnce(t *testing.T) {
	dial, _ := listen(t, answering(func(method, _, _ string) string {
		if method == "GET" {
			return answer(200, `{"firecracker_version":"1.16.2"}`)
		}
		return answer(204, "")
	}))
	c := newClient(t, dial, firecracker.Version{})
	var calls sync.WaitGroup
	for range 4 {
		calls.Go(func() {
			err := errors.Join(c.Resume(t.Context()),
				c.PutNetworkInterface(t.Context(), firecracker.NetworkInterface{IfaceID: "eth0", MTU: 1500}))
			if err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
}
