package agent_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
)

// hostile is a guest that answers whatever it is asked with data, and then closes or waits.
func hostile(t *testing.T, data []byte, wait bool) *agent.Client {
	t.Helper()
	l, c := listen(t)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				go func() { _, _ = io.Copy(io.Discard, conn) }()
				_, _ = conn.Write(data)
				if !wait {
					_ = conn.Close()
				}
			}()
		}
	}()
	return c
}

func frame(k agentproto.Kind, payload []byte) []byte {
	return append(append([]byte{byte(k)}, binary.BigEndian.AppendUint32(nil, uint32(len(payload)))[1:]...), payload...)
}

// A guest that lies makes errors, not waits or memory.
func TestClient_Hostile(t *testing.T) {
	flood := bytes.Repeat(frame(agentproto.KindStdout, make([]byte, 32<<10)), 2*agentproto.Window>>15)
	for name, data := range map[string][]byte{
		"nothing":               nil,
		"half a frame":          {byte(agentproto.KindExit), 0, 0},
		"half a payload":        frame(agentproto.KindExit, []byte("{}"))[:5],
		"unknown kind":          frame(99, nil),
		"kind 0":                make([]byte, 4),
		"too long":              {byte(agentproto.KindReply), 0xff, 0xff, 0xff},
		"too much of a stream":  flood,
		"a stream of the host":  frame(agentproto.KindStdin, []byte("x")),
		"no JSON":               frame(agentproto.KindExit, []byte("}")),
		"window of too much":    frame(agentproto.KindWindow, []byte{byte(agentproto.KindStdin), 0xff, 0xff, 0xff, 0xff}),
		"window of nothing":     frame(agentproto.KindWindow, nil),
		"an event for an exit":  frame(agentproto.KindEvent, []byte("{}")),
		"a request":             frame(agentproto.KindRequest, []byte("{}")),
		"an error with escapes": frame(agentproto.KindReply, []byte(`{"error":"\u001b[2Jx"}`)),
	} {
		t.Run(name, func(t *testing.T) {
			c := hostile(t, data, false)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			slow, w := io.Pipe()
			defer slow.Close()
			go func() { // takes what comes, but slowly
				_, _ = io.Copy(io.Discard, io.LimitReader(slow, 1000))
				time.Sleep(time.Millisecond)
				_ = slow.Close()
			}()
			for what, do := range map[string]func() error{
				"exec":  func() error { _, err := c.Exec(ctx, guest.Cmd{Args: []string{"x"}, Stdout: w}); return err },
				"stats": func() error { _, err := c.Stats(ctx); return err },
				"watch": func() error { return c.Watch(ctx, func(agentproto.Event) {}) },
				"from":  func() error { return c.CopyFrom(ctx, "/x", "-", io.Discard, guest.CopyOptions{}) },
				"to":    func() error { return c.CopyTo(ctx, "-", "/x", bytes.NewReader(nil), guest.CopyOptions{}) },
				"dial":  func() error { _, err := c.DialTCP(ctx, 1); return err },
			} {
				err := do()
				if err == nil || ctx.Err() != nil {
					t.Errorf("%s: %v, %v", what, err, ctx.Err())
				}
				if err != nil && bytes.ContainsRune([]byte(err.Error()), 0x1b) {
					t.Errorf("%s: the guest writes to the terminal: %q", what, err)
				}
			}
		})
	}
	// One that says nothing is waited for as long as the caller likes.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := hostile(t, nil, true).Stats(ctx); err == nil {
		t.Error("an answer of nobody")
	}
}

// A guest that tells of itself without end is not listened to without end.
func TestWatch_Flood(t *testing.T) {
	data := frame(agentproto.KindReply, []byte("{}"))
	for range 10000 {
		data = append(data, frame(agentproto.KindEvent, []byte("{}"))...)
	}
	events := 0
	err := hostile(t, data, true).Watch(t.Context(), func(agentproto.Event) { events++ })
	if !errors.Is(err, agentproto.ErrProtocol) || events > 100 {
		t.Errorf("%d events, %v", events, err)
	}
}

// A program that ends without an end of its streams, or before all has been read, is no wait
// either.
func TestClient_ExitEarly(t *testing.T) {
	c := hostile(t,
		append(frame(agentproto.KindStdout, []byte("some")), frame(agentproto.KindExit, []byte(`{"code":300}`))...), true)
	var out bytes.Buffer
	exit, err := c.Exec(t.Context(), guest.Cmd{Args: []string{"x"}, Stdout: &out})
	if err != nil || exit.Code != 300&0xff || out.String() != "some" {
		t.Errorf("%+v, %v, %q", exit, err, &out)
	}
}

// A guest that goes away while an archive is read for it is what the copy failed by, not the bytes
// that it did not take, and who gives the archive is not waited for.
func TestCopyTo_Lost(t *testing.T) {
	silent, w := io.Pipe()
	defer w.Close()
	endless, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer endless.Close()
	for name, in := range map[string]io.Reader{"silent": silent, "endless": endless} {
		c := hostile(t, frame(agentproto.KindReply, []byte(`{"isDir":true}`)), false)
		if err := c.CopyTo(t.Context(), "-", "/x", in, guest.CopyOptions{}); !errors.Is(err, agent.ErrLost) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// An agent of another version says so, to the host that is older than it and to the one that is
// newer; the error names both.
func TestVersions(t *testing.T) {
	const others = agentproto.Version + 1
	c := hostile(t, frame(agentproto.KindReply, fmt.Appendf(nil, `{"version":%d,"error":"no"}`, others)), true)
	for what, do := range map[string]func() error{
		"exec":  func() error { _, err := c.Exec(t.Context(), guest.Cmd{Args: []string{"x"}}); return err },
		"stats": func() error { _, err := c.Stats(t.Context()); return err },
		"watch": func() error { return c.Watch(t.Context(), func(agentproto.Event) {}) },
		"from":  func() error { return c.CopyFrom(t.Context(), "/x", "-", io.Discard, guest.CopyOptions{}) },
	} {
		var version *agent.VersionError
		if err := do(); !errors.As(err, &version) || version.Agent != others || version.Host != agentproto.Version {
			t.Errorf("%s: %v", what, err)
		}
	}
	// The agent refuses a host likewise, whatever else it wants.
	_, real := newServer(t, nil)
	conn, err := real.Connect(t.Context(), agentproto.Port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write(
		frame(agentproto.KindRequest,
			fmt.Appendf(nil, `{"version":%d,"op":"exec","args":["true"],"new":true}`, others))); err != nil {
		t.Fatal(err)
	}
	k, payload, err := agentproto.NewConn(conn).Receive()
	if err != nil || k != agentproto.KindReply {
		t.Fatalf("frame of kind %d, %v", k, err)
	}
	r, err := agentproto.ParseJSON[agentproto.Reply](payload)
	if err != nil || r.Version != agentproto.Version ||
		!strings.Contains(r.Error, fmt.Sprintf("version %d of the protocol, not %d", agentproto.Version, others)) {
		t.Errorf("%+v, %v", r, err)
	}
}

// However many connections there are, the agent has so many and no more, and serves again when
// there are fewer.
func TestServer_Connections(t *testing.T) {
	const most = 1024 // as many as the VMM's device has, and one
	_, c := newServer(t, nil)
	var open []net.Conn
	defer func() {
		for _, conn := range open {
			_ = conn.Close()
		}
	}()
	for range most {
		conn, err := c.Connect(t.Context(), agentproto.Port)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, conn)
	}
	for range 100 {
		conn, err := c.Connect(t.Context(), agentproto.Port)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Fatalf("one too many: %v", err)
		}
		_ = conn.Close()
	}
	for _, conn := range open[:most/2] {
		_ = conn.Close()
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := c.Stats(t.Context()); err == nil {
			return
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// FuzzReceive: frames that anybody may send are read, or are an error, and no more of a stream is
// held than its window.
func FuzzReceive(f *testing.F) {
	f.Add(frame(agentproto.KindRequest, []byte(`{"version":1,"op":"stats"}`)), true)
	f.Add(append(frame(agentproto.KindStdout, []byte("some")), frame(agentproto.KindExit, []byte(`{"code":1}`))...), true)
	f.Add(append(frame(agentproto.KindStdout, make([]byte, 40<<10)), frame(agentproto.KindStdout, nil)...), false)
	f.Add(frame(agentproto.KindWindow, []byte{byte(agentproto.KindStdin), 0, 0, 0, 1}), false)
	f.Add(bytes.Repeat(frame(agentproto.KindStderr, make([]byte, 60<<10)), 20), false)
	f.Fuzz(func(t *testing.T, data []byte, taken bool) {
		p, q := net.Pipe()
		conn := agentproto.NewConn(q)
		var all sync.WaitGroup
		all.Go(func() { // whose answers are nobody's
			_, _ = io.Copy(io.Discard, p)
		})
		held := &held{}
		for _, k := range []agentproto.Kind{agentproto.KindStdin, agentproto.KindStdout, agentproto.KindStderr} {
			in := conn.Inbox(k)
			if taken {
				all.Go(func() { _, _ = io.Copy(held, in) })
			} else {
				defer func() { _, _ = io.Copy(held, in) }()
			}
		}
		all.Go(func() {
			_, _ = p.Write(data)
			_ = p.Close()
		})
		for {
			if _, _, err := conn.Receive(); err != nil {
				break
			}
		}
		_ = conn.Close()
		all.Wait()
		if n := held.n.Load(); !taken && n > 3*agentproto.Window || n > int64(len(data)) {
			t.Errorf("%d bytes of %d were held", n, len(data))
		}
	})
}

type held struct{ n atomic.Int64 }

func (h *held) Write(p []byte) (int, error) { h.n.Add(int64(len(p))); return len(p), nil }
