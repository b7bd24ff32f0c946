package agent_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/server"
)

// brittle is a VMM that cuts connections off, as one does that makes a snapshot.
type brittle struct {
	net.Listener
	mu     sync.Mutex
	lasts  []int         // how many bytes each connection lasts; those that follow last for ever
	paused chan struct{} // closed when connections are accepted again; nil: they are
	open   map[*cuttable]bool
}

func (b *brittle) Accept() (net.Conn, error) {
	c, err := b.Listener.Accept()
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	conn := &cuttable{Conn: c, vmm: b, left: -1}
	if len(b.lasts) > 0 {
		conn.left, b.lasts = b.lasts[0], b.lasts[1:]
	}
	b.open[conn] = true
	paused := b.paused
	b.mu.Unlock()
	if paused != nil {
		<-paused
	}
	return conn, nil
}

// cut cuts all connections off. While it is paused no others get through.
func (b *brittle) cut() {
	b.mu.Lock()
	all := b.open
	b.open = map[*cuttable]bool{}
	b.mu.Unlock()
	for c := range all {
		c.cut()
	}
}

func (b *brittle) pause() (resume func()) {
	paused := make(chan struct{})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.paused = paused
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.paused = nil
		close(paused)
	}
}

type cuttable struct {
	net.Conn
	vmm *brittle

	mu   sync.Mutex
	left int // bytes until it is cut off; -1: it is not
	off  bool
}

func (c *cuttable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off = true
	_ = c.Conn.Close()
}

// take says how much of n bytes may pass.
func (c *cuttable) take(n int) (int, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left < 0 || c.off {
		return n, c.off
	}
	n = min(n, c.left)
	c.left -= n
	return n, c.left == 0
}

func (c *cuttable) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	n, off := c.take(n)
	if off {
		c.cut()
		err = server.ErrCutOff
	}
	return n, err
}

func (c *cuttable) Write(p []byte) (int, error) {
	n, off := c.take(len(p))
	n, err := c.Conn.Write(p[:n])
	if off {
		c.cut()
		err = server.ErrCutOff
	}
	return n, err
}

func newBrittle(t *testing.T, lasts ...int) (*brittle, *server.Server, *agent.Client) {
	t.Helper()
	l, c := listen(t)
	b := &brittle{Listener: l, lasts: lasts, open: map[*cuttable]bool{}}
	s := server.New(reaper(), nil)
	s.SetClock = func(time.Time) error { return nil }
	go func() {
		if err := s.Serve(b); err != nil {
			t.Error(err)
		}
	}()
	return b, s, c
}

// requestSize is more than an exec's request has that names a short program.
const requestSize = 400

// However often connections are cut off, and wherever, what a program gets and puts out is whole.
func TestExec_CutOff(t *testing.T) {
	lasts := []int{requestSize}
	for range 200 {
		lasts = append(lasts, mathrand.IntN(200<<10))
	}
	_, _, c := newBrittle(t, lasts...)
	in := make([]byte, 10<<20)
	_, _ = rand.Read(in)
	var out, errs bytes.Buffer
	exit, err := c.Exec(t.Context(),
		guest.Cmd{Args: sh("tee /dev/stderr; exit 7"), Stdin: bytes.NewReader(in), Stdout: &out, Stderr: &errs})
	if err != nil || exit.Code != 7 || !bytes.Equal(out.Bytes(), in) || !bytes.Equal(errs.Bytes(), in) {
		t.Errorf("%+v, %v, %d and %d bytes of %d", exit, err, out.Len(), errs.Len(), len(in))
	}
}

// A connection is cut off at every byte of what follows the request, and the next at every byte of
// all.
func TestExec_CutOffAnywhere(t *testing.T) {
	_, _, plain := newBrittle(t)
	run := func(c *agent.Client) (string, error) {
		var out bytes.Buffer
		exit, err := c.Exec(t.Context(),
			guest.Cmd{Args: sh("read x; echo $x; exit 3"), Stdin: strings.NewReader("some\n"), Stdout: &out})
		return fmt.Sprint(exit.Code, out.String()), err
	}
	if got, err := run(plain); err != nil || got != "3some\n" {
		t.Fatalf("%q, %v", got, err)
	}
	request, err := json.Marshal(
		agentproto.Request{
			Version: agentproto.Version, Op: agentproto.OpExec, Args: sh("read x; echo $x; exit 3"),
			Token: make([]byte, agentproto.TokenSize),
		})
	if err != nil {
		t.Fatal(err)
	}
	size := 4 + len(request)
	for n := range 120 {
		_, _, c := newBrittle(t, size+1+n, 1+3*n)
		if got, err := run(c); err != nil || got != "3some\n" {
			t.Errorf("cut off after %d bytes: %q, %v", n, got, err)
		}
	}
}

// Signals and sizes that come while the VM is paused, and its connections are cut off, reach the
// program.
func TestExec_CutOffControl(t *testing.T) {
	b, _, c := newBrittle(t)
	signals, sizes := make(chan syscall.Signal), make(chan guest.Size)
	var out transcript
	done := make(chan error, 1)
	go func() {
		exit, err := c.Exec(t.Context(), guest.Cmd{
			Args: sh(`trap 'echo told; exit 5' USR1; echo ready; while [ "$(stty size)" != "25 99" ] && ` + tested +
				`; do sleep 0.01; done; echo resized; while ` + tested + `; do sleep 0.01; done`),
			TTY: true, Stdout: &out, Signals: signals, Resize: sizes,
		})
		if err == nil && exit.Code != 5 {
			err = fmt.Errorf("it ended with %+v", exit)
		}
		done <- err
	}()
	out.await(t, "ready")
	resume := b.pause()
	b.cut()
	sizes <- guest.Size{Rows: 25, Cols: 99}
	resume()
	out.await(t, "resized")
	resume = b.pause()
	b.cut()
	signals <- syscall.SIGUSR1
	resume()
	if err := <-done; err != nil {
		t.Error(err)
	}
	out.await(t, "told")
}

// transcript is what comes, for who waits for it.
type transcript struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *transcript) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *transcript) await(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		o.mu.Lock()
		got := o.text.String()
		o.mu.Unlock()
		if strings.Contains(got, text) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%q did not come, but %q", text, got)
		}
	}
}

// hanging runs a program that notes its hang-up in the file said, says so when there is a file ask,
// and ends when there is a file go; and how the call ends.
func hanging(ctx context.Context, t *testing.T, c *agent.Client, detach <-chan struct{}) (dir string, out *transcript,
	done <-chan error,
) {
	t.Helper()
	dir, out = t.TempDir(), new(transcript)
	ended := make(chan error, 1)
	go func() {
		_, err := c.Exec(ctx, guest.Cmd{
			Args: sh("trap 'echo hup >said; exit' HUP; echo ready; while [ ! -e go ] && " + tested +
				"; do [ ! -e ask ] || echo asked; sleep 0.01; done; echo on >said"), Dir: dir, Stdout: out, Detach: detach,
		})
		ended <- err
	}()
	out.await(t, "ready")
	return dir, out, ended
}

func said(t *testing.T, dir string) string {
	t.Helper()
	await(t, dir+"/said")
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if text, err := os.ReadFile(dir + "/said"); err != nil || len(text) > 0 || time.Now().After(end) {
			return string(text)
		}
	}
}

// A host that goes away hangs its program up at once, as it would without a snapshot before.
func TestExec_CutOffHangup(t *testing.T) {
	b, _, c := newBrittle(t)
	ctx, cancel := context.WithCancel(t.Context())
	dir, out, done := hanging(ctx, t, c, nil)
	b.cut()
	if err := os.WriteFile(dir+"/ask", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	out.await(t, "asked") // it goes on, and its connection is another one
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if got := said(t, dir); got != "hup\n" {
		t.Errorf("it said %q", got)
	}
}

// A program that is left to itself while its connection is cut off is not hung up.
func TestExec_CutOffDetach(t *testing.T) {
	b, _, c := newBrittle(t)
	detach := make(chan struct{})
	dir, _, done := hanging(t.Context(), t, c, detach)
	resume := b.pause()
	b.cut()
	close(detach)
	resume()
	if err := <-done; !errors.Is(err, agent.ErrDetached) {
		t.Errorf("got %v", err)
	}
	if err := os.WriteFile(dir+"/go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := said(t, dir); got != "on\n" {
		t.Errorf("it said %q", got)
	}
}

// In a guest that is restored nobody comes back: what hung on another host is hung up when the
// guest is told who it is. That host hears that nobody knows it.
func TestExec_CutOffRestored(t *testing.T) {
	b, _, c := newBrittle(t)
	resume := b.pause()
	resume()
	dir, _, done := hanging(t.Context(), t, &agent.Client{Dial: once(c.Dial)}, nil)
	b.cut()
	if err := <-done; !errors.Is(err, agent.ErrLost) || errors.Is(err, agent.ErrNoAgent) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(dir + "/said"); err == nil {
		t.Error("it was hung up at once")
	}
	if _, _, err := c.Identify(t.Context(), &agentproto.Identity{}); err != nil {
		t.Error(err)
	}
	if got := said(t, dir); got != "hup\n" {
		t.Errorf("it said %q", got)
	}
	// What was begun before the guest knew who it is goes on, but not without its connection.
	dir, _, done = hanging(t.Context(), t, c, nil)
	if _, _, err := c.Identify(t.Context(), &agentproto.Identity{}); err != nil {
		t.Error(err)
	}
	b.cut()
	if err := <-done; !errors.Is(err, agent.ErrLost) || !strings.Contains(err.Error(), "no such session") {
		t.Errorf("got %v", err)
	}
	if got := said(t, dir); got != "hup\n" {
		t.Errorf("it said %q", got)
	}
}

// once is for one connection: then the socket is gone.
func once(dial agent.Dialer) agent.Dialer {
	var used sync.Once
	return func(ctx context.Context) (conn net.Conn, err error) {
		err = syscall.ECONNREFUSED
		used.Do(func() { conn, err = dial(ctx) })
		return conn, err
	}
}

// Who watches hears how the guest's command has ended, though it did while the connection was cut
// off: the guest does not end before.
func TestWatch_CutOff(t *testing.T) {
	b, s, c := newBrittle(t)
	seen, ended := make(chan agentproto.Event, 16), make(chan struct{})
	watched := make(chan error, 1)
	watch := func() {
		watched <- c.Watch(t.Context(), func(e agentproto.Event) {
			select {
			case <-ended:
				t.Error("the guest has ended")
			default:
			}
			seen <- e
		})
	}
	go watch()
	<-seen
	resume := b.pause()
	b.cut()
	if err := <-watched; !errors.Is(err, agent.ErrLost) {
		t.Errorf("got %v", err)
	}
	go func() { s.Ended(agentproto.Exit{Code: 9}); close(ended) }()
	resume()
	go watch()
	if e := <-seen; e.Exit == nil {
		e = <-seen
		if e.Exit == nil || e.Exit.Code != 9 {
			t.Errorf("got %+v", e)
		}
	}
	if err := <-watched; err != nil {
		t.Error(err)
	}
	<-ended
}

// raw sends a request and returns the connection, and what is answered to anything but a program.
func raw(t *testing.T, c *agent.Client, req agentproto.Request) (*agentproto.Conn, agentproto.Reply) {
	t.Helper()
	req.Version = agentproto.Version
	frame, err := req.Frame()
	if err != nil {
		t.Fatal(err)
	}
	socket, err := c.Connect(t.Context(), agentproto.Port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	if _, err := socket.Write(frame); err != nil {
		t.Fatal(err)
	}
	conn := agentproto.NewConn(socket)
	if req.Op != agentproto.OpResume {
		conn.Resumable(0, agentproto.GiveUp)
		return conn, agentproto.Reply{}
	}
	k, payload, err := conn.Receive()
	if err != nil || k != agentproto.KindReply {
		t.Fatalf("frame of kind %d, %v", k, err)
	}
	r, err := agentproto.ParseJSON[agentproto.Reply](payload)
	if err != nil {
		t.Fatal(err)
	}
	conn.Resumable(0, agentproto.GiveUp)
	return conn, r
}

// What does not fit a session is refused and does it no harm. Who comes twice has it by the later
// connection.
func TestResume_Hostile(t *testing.T) {
	_, c := newServer(t, nil)
	token := bytes.Repeat([]byte{1}, agentproto.TokenSize)
	exec := agentproto.Request{Op: agentproto.OpExec, Args: sh("echo ready; read x; echo got $x; exit 4"), Token: token}
	first, _ := raw(t, c, exec)
	out := first.Inbox(agentproto.KindStdout)
	superseded := make(chan error, 2)
	end := func(conn *agentproto.Conn) {
		_, _, err := conn.Receive()
		superseded <- err
	}
	go end(first)
	if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	const received = 4 + 6 // a frame
	for name, req := range map[string]agentproto.Request{
		"no token": {}, "another token": {Token: make([]byte, agentproto.TokenSize)}, "half a token": {Token: token[:8]},
		"more than was sent": {Token: token, Received: received + 1}, "much more": {Token: token, Received: 1<<64 - 1},
	} {
		req.Op = agentproto.OpResume
		if _, r := raw(t, c, req); r.Error == "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
	for name, req := range map[string]agentproto.Request{
		"the same token": exec, "a short token": {Op: agentproto.OpExec, Args: sh("true"), Token: token[:4]},
		"a token for what has none": {Op: agentproto.OpStats, Token: make([]byte, agentproto.TokenSize)},
	} {
		conn, _ := raw(t, c, req)
		k, payload, err := conn.Receive()
		if err != nil || k != agentproto.KindReply || !strings.Contains(string(payload), "error") {
			t.Errorf("%s: frame of kind %d, %s, %v", name, k, payload, err)
		}
	}
	// The first connection lives all the time.
	resume := agentproto.Request{Op: agentproto.OpResume, Token: token, Received: received}
	second, r := raw(t, c, resume)
	if r.Error != "" || r.Received != 0 {
		t.Fatalf("%+v", r)
	}
	go end(second)
	third, r := raw(t, c, resume)
	if r.Error != "" {
		t.Fatalf("%+v", r)
	}
	for range 2 {
		if err := <-superseded; err == nil || errors.Is(err, agentproto.ErrProtocol) {
			t.Errorf("a connection that was superseded: %v", err)
		}
	}
	out = third.Inbox(agentproto.KindStdout)
	if _, err := third.Writer(agentproto.KindStdin).Write([]byte("it\n")); err != nil {
		t.Fatal(err)
	}
	k, payload, err := third.Receive()
	if err != nil || k != agentproto.KindExit || !strings.Contains(string(payload), `"code":4`) {
		t.Errorf("frame of kind %d, %s, %v", k, payload, err)
	}
	_ = third.Close()
	if got, _ := io.ReadAll(out); string(got) != "got it\n" {
		t.Errorf("got %q", got)
	}
	// One that nobody comes back for any more is forgotten.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, r := raw(t, c, resume); strings.Contains(r.Error, "no such session") {
			break
		} else if time.Now().After(end) {
			t.Fatalf("%+v", r)
		}
	}
}
