package agent_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/server"
)

// severed is a connection of the guest's that the VMM cuts off. The test hears when the guest has
// read some of it, and each time that it closes it.
type severed struct {
	net.Conn
	off          atomic.Bool
	read, closed chan struct{}
}

func (c *severed) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	select {
	case c.read <- struct{}{}:
	default:
	}
	if err != nil && c.off.Load() {
		err = server.ErrCutOff
	}
	return n, err
}

func (c *severed) Close() error {
	c.closed <- struct{}{}
	return c.Conn.Close()
}

func (c *severed) cut() {
	c.off.Store(true)
	_ = c.Conn.Close()
}

func (c *severed) awaitClose(t *testing.T) {
	t.Helper()
	receive(t, c.closed, "the end of a connection")
}

func receive[T any](t *testing.T, from <-chan T, what string) (got T) {
	t.Helper()
	select {
	case got = <-from:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s did not come", what)
	}
	return got
}

type severing struct {
	net.Listener
	conns chan *severed
}

func (l severing) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	conn := &severed{Conn: c, read: make(chan struct{}, 1), closed: make(chan struct{}, 8)}
	l.conns <- conn
	return conn, nil
}

// still is a guest that notes when it stands still, goes on, and is told who it is.
type still struct {
	*agent.Client
	conns <-chan *severed
	dir   string // has a file "on" once programs go on
	mu    sync.Mutex
	log   []string
}

func (g *still) did(what string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.log = append(g.log, what)
}

func (g *still) want(t *testing.T, want ...string) {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if !slices.Equal(g.log, want) {
		t.Errorf("it did %q, want %q", g.log, want)
	}
}

// conn is that of the latest request.
func (g *still) conn(t *testing.T) *severed { t.Helper(); return receive(t, g.conns, "a connection") }

func newStill(t *testing.T) *still {
	t.Helper()
	l, c := listen(t)
	conns := make(chan *severed, 64)
	g := &still{Client: c, conns: conns, dir: t.TempDir()}
	s := server.New(reaper(), nil)
	s.SetClock = func(time.Time) error { return nil }
	s.Identify = func(*agentproto.Identity) []error { g.did("identify"); return nil }
	s.Stop = func(bool) server.Rest {
		g.did("stop")
		return server.Rest{Files: func() { g.did("files") }, Programs: func() {
			g.did("programs")
			_ = os.WriteFile(filepath.Join(g.dir, "on"), nil, 0o600) // after a test's end there is no such directory
		}}
	}
	go func() {
		if err := s.Serve(severing{l, conns}); err != nil {
			t.Error(err)
		}
	}()
	return g
}

func (g *still) freeze(t *testing.T) (host interface{ Close() error }, guest *severed) {
	t.Helper()
	host, err := g.Freeze(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	return host, g.conn(t)
}

// A frozen guest goes on when its host says so.
func TestFreeze_Thaw(t *testing.T) {
	g := newStill(t)
	first, conn := g.freeze(t)
	if _, err := g.Freeze(t.Context(), false); err == nil || !strings.Contains(err.Error(), "frozen already") {
		t.Errorf("frozen twice: %v", err)
	}
	g.conn(t)
	g.want(t, "stop")
	if err := g.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.conn(t)
	g.want(t, "stop", "files", "programs")
	// The end of the first request is not that of the second one.
	g.freeze(t)
	first.Close()
	conn.awaitClose(t)
	g.want(t, "stop", "files", "programs", "stop")
}

// It goes on when its host has gone.
func TestFreeze_HostGone(t *testing.T) {
	g := newStill(t)
	host, conn := g.freeze(t)
	host.Close()
	conn.awaitClose(t)
	g.want(t, "stop", "files", "programs")
}

// In a guest that was restored, whose host has been cut off, nothing goes on until it knows who it
// is, however long that takes.
func TestFreeze_Restored(t *testing.T) {
	g := newStill(t)
	_, conn := g.freeze(t)
	conn.cut()
	conn.awaitClose(t) // it knows
	g.want(t, "stop")
	if _, _, err := g.Identify(t.Context(), &agentproto.Identity{}); err != nil {
		t.Fatal(err)
	}
	g.want(t, "stop", "files", "identify", "files", "programs") // names are written to file systems
}

// A program that is asked for while others stand still starts when they go on.
func TestFreeze_Exec(t *testing.T) {
	g := newStill(t)
	g.freeze(t)
	exits := make(chan guest.Exit, 1)
	go func() {
		exit, err := g.Exec(t.Context(), guest.Cmd{Args: sh("test -e on"), Dir: g.dir})
		if err != nil {
			t.Error(err)
		}
		exits <- exit
	}()
	g.conn(t)
	if _, err := g.Stats(t.Context()); err != nil { // others are answered
		t.Error(err)
	}
	if err := g.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exit := receive(t, exits, "the program's end"); exit.Code != 0 {
		t.Errorf("it was started before others went on: %+v", exit)
	}
}

// In a guest that was restored nobody wants it any more.
func TestFreeze_ExecRestored(t *testing.T) {
	g := newStill(t)
	_, frozen := g.freeze(t)
	ended := make(chan error, 1)
	go func() {
		_, err := g.Exec(t.Context(), guest.Cmd{Args: sh("echo >run"), Dir: g.dir})
		ended <- err
	}()
	conn := g.conn(t)
	receive(t, conn.read, "the request") // which is read at once
	conn.cut()
	conn.awaitClose(t) // the host goes on with it by another connection
	frozen.cut()
	if _, _, err := g.Identify(t.Context(), &agentproto.Identity{}); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, ended, "the call's end"); !errors.Is(err, agent.ErrLost) {
		t.Errorf("exec: %v", err)
	}
	conn.awaitClose(t) // the guest has done with it
	if _, err := os.Stat(filepath.Join(g.dir, "run")); err == nil {
		t.Error("the program was run")
	}
	g.want(t, "stop", "files", "identify", "files", "programs")
}
