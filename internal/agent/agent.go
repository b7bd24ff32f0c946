// Package agent is the host's side of what goes on in a guest: it asks the guest's agent to run
// programs, copy files, tell how it is. The guest is not trusted: what it sends is bounded, and
// what it says is checked.
package agent

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
)

// Dialer connects to the socket behind which the VMM has the guest's vsock.
type Dialer func(context.Context) (net.Conn, error)

// Client asks one guest's agent. It holds nothing: each request is a connection of its own.
type Client struct{ Dial Dialer }

// Errors of this package.
var (
	// ErrNoAgent means that nobody in the guest answers: it is still booting, has no agent, or is
	// about to end.
	ErrNoAgent = errors.New("no agent answers in the guest")
	// ErrLost means that the guest, or its agent, went away meanwhile.
	ErrLost = errors.New("the connection to the guest's agent was lost")
	// ErrDetached means that the caller has left a program to itself.
	ErrDetached = errors.New("detached")
)

// GuestError is what the agent says went wrong in the guest.
type GuestError struct{ Text string }

func (e *GuestError) Error() string { return "guest: " + e.Text }

// VersionError says that the agent in the guest is of another version of smartvm, whose protocol is
// another one. A VM keeps the agent that it was made with.
type VersionError struct{ Agent, Host int }

func (e *VersionError) Error() string {
	return fmt.Sprintf("the guest's agent speaks version %d of the protocol, this smartvm version %d", e.Agent, e.Host)
}

// refused is what an agent that does not do as it is told says of it.
func refused(r agentproto.Reply) error {
	if r.Version != agentproto.Version && r.Version != 0 {
		return &VersionError{Agent: r.Version, Host: agentproto.Version}
	}
	return &GuestError{clean(r.Error)}
}

// connectTimeout bounds how long the VMM may take to pass a connection on.
const connectTimeout = 5 * time.Second

// maxGreeting is "OK ", a port and a line feed.
const maxGreeting = 32

// Connect connects to a vsock port of the guest. Returns ErrNoAgent where nobody listens.
func (c *Client) Connect(ctx context.Context, port uint32) (net.Conn, error) {
	return c.connect(ctx, port, nil, connectTimeout)
}

// connect sends first at once: the VMM keeps what comes behind its line for the guest. A patience
// of 0 is as long as ctx.
func (c *Client) connect(ctx context.Context, port uint32, first []byte, patience time.Duration) (net.Conn, error) {
	conn, err := c.Dial(ctx)
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline()
	if d := time.Now().Add(patience); patience > 0 && (deadline.IsZero() || d.Before(deadline)) {
		deadline = d
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	_ = conn.SetDeadline(deadline)
	_, err = conn.Write(append(fmt.Appendf(nil, "CONNECT %d\n", port), first...))
	if err == nil {
		err = greeting(conn)
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w (vsock port %d): %w", ErrNoAgent, port, err), conn.Close())
	}
	return conn, conn.SetDeadline(time.Time{})
}

// greeting reads the VMM's line, and nothing behind it.
func greeting(conn net.Conn) error {
	line := make([]byte, 0, maxGreeting)
	for len(line) < maxGreeting {
		b := line[len(line) : len(line)+1]
		if _, err := io.ReadFull(conn, b); err != nil {
			return err
		}
		if line = line[:len(line)+1]; b[0] == '\n' {
			if strings.HasPrefix(string(line), "OK ") {
				return nil
			}
			break
		}
	}
	return fmt.Errorf("the VMM said %q", line)
}

// open sends a request.
func (c *Client) open(ctx context.Context, req agentproto.Request) (*agentproto.Conn, error) {
	req.Version = agentproto.Version
	frame, err := req.Frame()
	if err != nil {
		return nil, err
	}
	patience := connectTimeout
	if req.Op == agentproto.OpResume { // the VM may be paused for long, and is not to find many requests then
		patience = 0
	}
	// What time it is, is sent when the guest listens: to get there may take seconds.
	timed := !req.Now.IsZero()
	if timed {
		frame = nil
	}
	raw, err := c.connect(ctx, agentproto.Port, frame, patience)
	if err != nil {
		return nil, err
	}
	if timed {
		req.Now = time.Now()
		if frame, err = req.Frame(); err == nil {
			_, err = raw.Write(frame)
		}
		if err != nil {
			return nil, errors.Join(lost(err), raw.Close())
		}
	}
	return agentproto.NewConn(raw), nil
}

func lost(err error) error { return fmt.Errorf("%w: %w", ErrLost, err) }

// replyTimeout bounds how long an agent may take to say that it does what it was asked for.
const replyTimeout = 30 * time.Second

// answer receives a reply.
func answer(conn *agentproto.Conn) (agentproto.Reply, error) {
	late := time.AfterFunc(replyTimeout, func() { _ = conn.Close() })
	k, payload, err := conn.Receive()
	if !late.Stop() {
		return agentproto.Reply{}, lost(fmt.Errorf("%w: it did not answer within %s", os.ErrDeadlineExceeded, replyTimeout))
	}
	if err != nil {
		return agentproto.Reply{}, lost(err)
	}
	if k != agentproto.KindReply {
		return agentproto.Reply{}, fmt.Errorf("%w: frame of kind %d for an answer", agentproto.ErrProtocol, k)
	}
	r, err := agentproto.ParseJSON[agentproto.Reply](payload)
	if err == nil && r.Error != "" {
		err = refused(r)
	}
	return r, err
}

// maxText bounds what a guest says of itself.
const maxText = 4 << 10

// clean keeps a guest from writing to somebody's terminal by an error.
func clean(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?' // a line feed too: what follows would seem to be of this program
		}
		return r
	}, text[:min(len(text), maxText)])
}

// Exec runs a program and returns when it has ended. When ctx ends before, the program gets SIGHUP.
// It survives a pause of its VM and the making of a snapshot; in a guest that is restored from that
// it gets SIGHUP. Returns ErrNoAgent, ErrLost, and what writing to Stdout and Stderr returns.
func (c *Client) Exec(ctx context.Context, cmd guest.Cmd) (guest.Exit, error) {
	if len(cmd.Args) == 0 {
		return guest.Exit{}, errors.New("nothing to run")
	}
	return c.run(ctx, agentproto.OpExec, cmd)
}

// Main runs the image's own command, which waits for that. Of cmd the streams, the terminal,
// signals and sizes count.
func (c *Client) Main(ctx context.Context, cmd guest.Cmd) (guest.Exit, error) {
	return c.run(ctx, agentproto.OpMain, cmd)
}

func (c *Client) run(ctx context.Context, op agentproto.Op, cmd guest.Cmd) (guest.Exit, error) {
	token := newToken()
	conn, err := c.open(ctx, agentproto.Request{
		Op: op, Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir, User: cmd.User, TTY: cmd.TTY,
		Rows: cmd.Size.Rows, Cols: cmd.Size.Cols, Term: cmd.Term, NoStdin: cmd.Stdin == nil, Token: token,
	})
	if err != nil {
		return guest.Exit{}, err
	}
	conn.Resumable(agentproto.PingTime, c.again(ctx, conn, token))
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	outputs := make(chan error, 2)
	for k, to := range map[agentproto.Kind]io.Writer{
		agentproto.KindStdout: cmd.Stdout,
		agentproto.KindStderr: cmd.Stderr,
	} {
		in := conn.Inbox(k)
		if to == nil {
			to = io.Discard
		}
		go func() {
			out := &output{to: to}
			if _, _ = io.Copy(out, struct{ io.Reader }{in}); out.err != nil {
				_ = conn.Close() // nobody wants to know any more
			}
			outputs <- out.err
		}()
	}
	if cmd.Stdin != nil {
		go func() {
			w := conn.Writer(agentproto.KindStdin)
			if _, err := io.Copy(struct{ io.Writer }{w}, cmd.Stdin); err == nil {
				_ = w.Close()
			}
		}()
	}
	var controls sync.WaitGroup
	defer controls.Wait()
	ended := make(chan struct{})
	defer close(ended)
	detached := make(chan struct{})
	controls.Go(func() { control(conn, cmd, ended, detached) })
	exit, err := awaitExit(conn)
	select {
	case <-detached:
		err = ErrDetached
	default:
	}
	_ = conn.Close() // what has come is in the inboxes
	outErr := errors.Join(<-outputs, <-outputs)
	switch {
	case outErr != nil:
		return exit, fmt.Errorf("pass on what the guest put out: %w", outErr)
	case ctx.Err() != nil:
		return exit, context.Cause(ctx)
	}
	return exit, err
}

// output remembers why it could not be written to, which says nothing of the connection.
type output struct {
	to  io.Writer
	err error
}

func (o *output) Write(p []byte) (n int, err error) {
	if n, err = o.to.Write(p); err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	o.err = err
	return n, err
}

// control passes signals and sizes on. It closes detached, and then the connection, when that is
// wanted.
func control(conn *agentproto.Conn, cmd guest.Cmd, ended <-chan struct{}, detached chan<- struct{}) {
	for {
		select {
		case <-ended:
			return
		case <-cmd.Detach:
			if conn.SendSurely(agentproto.KindSignal, []byte{agentproto.Detach}, detachPatience) == nil {
				close(detached)
			}
			_ = conn.Close()
			return
		case s := <-cmd.Signals:
			_ = conn.Send(agentproto.KindSignal, []byte{byte(s)})
		case s := <-cmd.Resize:
			_ = conn.Send(agentproto.KindResize,
				binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, s.Rows), s.Cols))
		}
	}
}

// ExitOf is what the agent says of a program's end.
func ExitOf(e agentproto.Exit) guest.Exit {
	return guest.Exit{Code: e.Code & 0xff, Signal: syscall.Signal(e.Signal), Reason: clean(e.Error)}
}

func awaitExit(conn *agentproto.Conn) (guest.Exit, error) {
	k, payload, err := conn.Receive()
	if err != nil {
		return guest.Exit{}, lost(err)
	}
	switch k {
	case agentproto.KindReply:
		r, err := agentproto.ParseJSON[agentproto.Reply](payload)
		if err == nil {
			err = refused(r)
		}
		return guest.Exit{}, err
	case agentproto.KindExit:
		e, err := agentproto.ParseJSON[agentproto.Exit](payload)
		return ExitOf(e), err
	}
	return guest.Exit{}, fmt.Errorf("%w: frame of kind %d for an exit", agentproto.ErrProtocol, k)
}

// maxEvents bounds those of one connection: a guest's life has few, and each is written down.
const maxEvents = 64

// Watch gives the guest the time and random numbers, and tells event what happens in it until its
// command has ended, the guest goes away or ctx ends.
func (c *Client) Watch(ctx context.Context, event func(agentproto.Event)) error {
	seed := make([]byte, 64)
	_, _ = rand.Read(seed) // never fails
	conn, err := c.open(ctx, agentproto.Request{Op: agentproto.OpWatch, Now: time.Now(), Entropy: seed})
	if err != nil {
		return err
	}
	conn.Resumable(agentproto.WatchPingTime, agentproto.GiveUp)
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	asked := time.Now()
	if _, err := answer(conn); err != nil {
		return err
	}
	if time.Since(asked) > closeEnough {
		_, _ = c.SetClock(ctx) // if that cannot be, the guest has the time as late as it heard it
	}
	for range maxEvents {
		k, payload, err := conn.Receive()
		if err != nil {
			return lost(err)
		}
		if k != agentproto.KindEvent || len(payload) > maxText {
			return fmt.Errorf("%w: frame of kind %d for an event", agentproto.ErrProtocol, k)
		}
		e, err := agentproto.ParseJSON[agentproto.Event](payload)
		if err != nil {
			return err
		}
		event(e)
		if e.Exit != nil {
			return nil
		}
	}
	return fmt.Errorf("%w: more than %d events", agentproto.ErrProtocol, maxEvents)
}

// ask sends a request that an answer is all there is to.
func (c *Client) ask(ctx context.Context, req agentproto.Request) (agentproto.Reply, error) {
	conn, err := c.open(ctx, req)
	if err != nil {
		return agentproto.Reply{}, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	return answer(conn)
}

// Processes asks what runs in the guest.
func (c *Client) Processes(ctx context.Context) ([]guest.Process, error) {
	r, err := c.ask(ctx, agentproto.Request{Op: agentproto.OpProcesses})
	for i := range r.Processes {
		p := &r.Processes[i]
		for _, text := range []*string{&p.User, &p.State, &p.Command} {
			*text = strings.ReplaceAll(clean(*text), "\n", "?")
		}
	}
	return r.Processes, err
}

// Stats asks how the guest is.
func (c *Client) Stats(ctx context.Context) (*guest.Stats, error) {
	r, err := c.ask(ctx, agentproto.Request{Op: agentproto.OpStats})
	if err == nil && r.Stats == nil {
		err = agentproto.ErrProtocol
	}
	return r.Stats, err
}

// Stop asks the guest to shut down, and returns when its agent has agreed to. The image's command
// may take as long as patience to end; then the agent kills it. An agent of an older smartvm, which
// does not know how, is a *GuestError.
func (c *Client) Stop(ctx context.Context, patience time.Duration) error {
	_, err := c.ask(ctx, agentproto.Request{Op: agentproto.OpStop, Patience: patience})
	return err
}

// Tell gives the guest's command what it waits for: files, by name, and environment. It is told
// once; again changes nothing.
func (c *Client) Tell(ctx context.Context, files map[string][]byte, env []string) error {
	_, err := c.ask(ctx, agentproto.Request{Op: agentproto.OpSecrets, Files: files, Env: env})
	if err != nil {
		return fmt.Errorf("tell the guest its secrets: %w", err)
	}
	return nil
}

// DialTCP connects to a TCP port in the guest, on its localhost.
func (c *Client) DialTCP(ctx context.Context, port uint16) (net.Conn, error) {
	conn, err := c.open(ctx, agentproto.Request{Op: agentproto.OpDial, Port: port})
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	if _, err := answer(conn); err != nil {
		return nil, errors.Join(fmt.Errorf("connect to port %d in the guest: %w", port, err), conn.Close())
	}
	if !stop() {
		return nil, context.Cause(ctx)
	}
	return conn.Rest(), nil
}

// bufferSize is that of copies of files.
const bufferSize = agentproto.MaxData
