// Package server is what the agent does for the host once the guest is up: it runs programs in it,
// copies files, tells how it is. The host is trusted, and nobody else is heard.
package server

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/process"
)

// Server answers the host. Set its fields before Serve.
type Server struct {
	Reaper *process.Reaper
	Boot   *guest.Boot // whose environment, user and directory programs get. nil: those of an image without any
	// Secrets stores the files that the host tells, for the command's user. nil: they are there.
	Secrets func(files map[string][]byte) error
	// Identify makes the guest who it shall be. It returns what could not be done. It may be nil.
	Identify func(*agentproto.Identity) []error
	// SetClock sets the guest's clock: New has it set this machine's.
	SetClock func(time.Time) error
	// Stop stops programs and file systems: New has it stop this machine's.
	Stop func(dropCaches bool) Rest
	// ShutDown ends the guest, as Ctrl-Alt-Del does: New has it end this machine.
	ShutDown func() error

	frozen  freezer
	waiting atomic.Int32 // sessions that wait for their host

	mu       sync.Mutex
	sessions map[string]*session // that can be gone on with, by their tokens
	changed  chan struct{}       // closed at the next change of what follows
	phases   map[agentproto.Phase]time.Duration
	skew     time.Duration
	spent    *agentproto.Spent
	exit     *agentproto.Exit
	patience time.Duration // see Patience
	watches  int           // that have begun
	told     chan struct{} // closed when the host has told its secrets
	telling  sync.Mutex    // held while it does
	main     chan call     // gives the command away that waits for the host
	watchers sync.WaitGroup
	idle     *time.Timer // gives memory back; nil until something has ended
}

// Bounds of what the host may have under way, and of how long it may take to say what it wants.
const (
	maxConnections = 1024
	requestTimeout = 10 * time.Second
	closeTimeout   = 5 * time.Second
)

// New returns a server that knows nothing yet.
func New(reaper *process.Reaper, boot *guest.Boot) *Server {
	if boot == nil {
		boot = new(guest.Boot)
	}
	return &Server{
		Reaper: reaper, Boot: boot, changed: make(chan struct{}), phases: map[agentproto.Phase]time.Duration{},
		main: make(chan call),
		told: make(chan struct{}), sessions: map[string]*session{}, SetClock: setClock, Stop: stop,
		ShutDown: shutDown, patience: stopPatience,
	}
}

// Reached says that the guest has come so far, after so long a time since its kernel's start.
func (s *Server) Reached(p agentproto.Phase, at time.Duration) {
	s.update(func() { s.phases[p] = at })
}

// Spent says what of the way up was the kernel's.
func (s *Server) Spent(t agentproto.Spent) { s.update(func() { s.spent = &t }) }

func (s *Server) update(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// Ended tells the host how the image's command ended, and returns when it has heard, or does not
// listen.
func (s *Server) Ended(exit agentproto.Exit) {
	s.update(func() { s.exit = &exit })
	heard := make(chan struct{})
	go func() { s.watchers.Wait(); close(heard) }()
	s.await(heard)
}

// Serve answers connections until l is closed.
func (s *Server) Serve(l net.Listener) error {
	slots := make(chan struct{}, maxConnections)
	s.giveBack() // what the boot took
	for {
		c, err := l.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("listen to the host: %w", err)
		}
		select {
		case slots <- struct{}{}:
		default:
			_ = c.Close()
			continue
		}
		go func() {
			defer func() { <-slots; s.giveBack() }()
			s.answer(c)
		}()
	}
}

// idleTime is how long nothing need have ended until the guest gets back the memory that it took.
const idleTime = time.Second

// giveBack has memory that is free now go back to the guest soon.
func (s *Server) giveBack() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle == nil {
		s.idle = time.AfterFunc(idleTime, debug.FreeOSMemory)
		return
	}
	s.idle.Reset(idleTime)
}

// session is one request, and the connection that it came by.
type session struct {
	raw   net.Conn
	conn  *agentproto.Conn
	stdin *agentproto.Inbox
	req   agentproto.Request
	gone  chan struct{} // closed when the host has gone; nil until listen
	lost  error         // why, when it has
	resumable
}

// listen takes what the host sends, until it goes away. Handle, if not nil, gets what belongs to no
// stream.
func (ss *session) listen(handle func(k agentproto.Kind, payload []byte)) {
	ss.gone = make(chan struct{})
	go func() {
		defer close(ss.gone)
		for {
			k, payload, err := ss.conn.Receive()
			if err != nil {
				ss.lost = err
				return
			}
			if handle != nil {
				handle(k, payload)
			}
		}
	}()
}

func (s *Server) answer(raw net.Conn) {
	conn := agentproto.NewConn(raw)
	_ = raw.SetReadDeadline(time.Now().Add(requestTimeout))
	// The host does not wait for an answer before it sends more.
	stdin := conn.Inbox(agentproto.KindStdin)
	k, payload, err := conn.Receive()
	_ = raw.SetReadDeadline(time.Time{})
	if err != nil || k != agentproto.KindRequest {
		_ = conn.Close()
		return
	}
	req, err := agentproto.ParseJSON[agentproto.Request](payload)
	if err == nil && req.Version != agentproto.Version {
		err = fmt.Errorf("the guest's agent speaks version %d of the protocol, not %d: it is of another version of smartvm",
			agentproto.Version, req.Version)
	}
	do := map[agentproto.Op]func(*session) error{
		agentproto.OpExec: s.exec, agentproto.OpMain: s.command, agentproto.OpWatch: s.watch,
		agentproto.OpRead: s.read, agentproto.OpWrite: s.write, agentproto.OpDial: dial, agentproto.OpStats: stats,
		agentproto.OpSecrets: s.secrets, agentproto.OpProcesses: processes, agentproto.OpClock: s.clock,
		agentproto.OpFreeze: s.freeze, agentproto.OpThaw: s.thaw, agentproto.OpIdentify: s.identify,
		agentproto.OpStop: s.stop,
	}[req.Op]
	if err == nil && do == nil && req.Op != agentproto.OpResume {
		err = fmt.Errorf("the agent does not know how to %q", req.Op)
	}
	ss := &session{raw: raw, conn: conn, stdin: stdin, req: req}
	if err == nil && req.Op == agentproto.OpResume {
		if err = s.resume(ss); err == nil {
			return // it is another session's now
		}
	}
	if err == nil && len(req.Token) > 0 {
		err = s.enter(ss)
		defer s.leave(ss)
	}
	if err == nil {
		err = do(ss)
	}
	if err != nil {
		_ = ss.reply(agentproto.Reply{Error: err.Error()})
	}
	s.finish(ss)
}

func (ss *session) reply(r agentproto.Reply) error {
	r.Version = agentproto.Version
	return ss.conn.SendJSON(agentproto.KindReply, r)
}

// finish closes the connection when the host has: it reads all first that it was sent.
func (s *Server) finish(ss *session) {
	if ss.gone == nil {
		ss.listen(nil)
	}
	s.await(ss.gone)
	_ = ss.conn.Close()
}

// watch sets the clock and stirs the random numbers, and tells what happens until the command has
// ended.
func (s *Server) watch(ss *session) error {
	s.watchers.Add(1)
	defer s.watchers.Done()
	ss.conn.Resumable(0, agentproto.GiveUp)
	skew, mine := s.welcome(ss.req), 0
	s.update(func() {
		s.watches++
		mine = s.watches
		if skew != 0 {
			s.skew = skew
		}
	})
	if err := ss.reply(agentproto.Reply{}); err != nil {
		return err
	}
	ss.listen(nil)
	defer s.awaitWatch(ss, mine)
	for {
		s.mu.Lock()
		event, changed := agentproto.Event{Phases: maps.Clone(s.phases), Skew: s.skew, Exit: s.exit, Spent: s.spent},
			s.changed
		s.mu.Unlock()
		if err := ss.conn.SendJSON(agentproto.KindEvent, event); err != nil {
			return nil
		}
		if event.Exit != nil {
			s.finish(ss) // when the host has read it
			return nil
		}
		select {
		case <-changed:
		case <-ss.gone:
			return nil
		}
	}
}

// dial makes the connection one to a port of the guest.
func dial(ss *session) error {
	// Not every guest knows the name localhost.
	port := strconv.Itoa(int(ss.req.Port))
	to, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", port), requestTimeout)
	if err != nil {
		var err6 error
		if to, err6 = net.DialTimeout("tcp", net.JoinHostPort("::1", port), requestTimeout); err6 != nil {
			return err
		}
	}
	defer to.Close()
	ss.gone = make(chan struct{}) // there are no more frames
	close(ss.gone)
	if err := ss.reply(agentproto.Reply{}); err != nil {
		return nil
	}
	agentproto.Relay(to, ss.conn.Rest())
	return nil
}

// program is one to be run.
type program struct {
	args []string
	env  []string
	dir  string
	user string
}

// exec runs the request's program, for what it leaves open as the image has it.
func (s *Server) exec(ss *session) error {
	if len(ss.req.Args) == 0 || ss.req.Args[0] == "" {
		return errors.New("nothing to run")
	}
	exit := s.run(ss, program{
		args: ss.req.Args, env: append(s.Env(), ss.req.Env...),
		dir: cmp.Or(ss.req.Dir, s.Boot.WorkingDir, "/"), user: cmp.Or(ss.req.User, s.Boot.User),
	}, nil)
	_ = ss.conn.SendJSON(agentproto.KindExit, exit)
	return nil
}

// call is a host that wants the image's command.
type call struct {
	*session
	done chan struct{}
}

// command gives the host the image's command, if that waits for it.
func (s *Server) command(ss *session) error {
	s.watchers.Add(1)
	defer s.watchers.Done()
	c := call{ss, make(chan struct{})}
	select {
	case s.main <- c:
		<-c.done
		s.finish(ss) // before the end of the guest
		return nil
	case <-time.After(requestTimeout):
		return errors.New("the image's command does not wait for the host: it runs, or has run")
	}
}

// Main runs the image's command when a host asks for it, with the streams that the host has for it.
// Started, if not nil, is told its process. It returns false if stop came before.
func (s *Server) Main(stop <-chan os.Signal, started func(pid int)) (exit agentproto.Exit, ran bool) {
	select {
	case c := <-s.main:
		exit = s.run(c.session,
			program{args: s.Boot.Command, env: s.Env(), dir: cmp.Or(s.Boot.WorkingDir, "/"), user: s.Boot.User}, started)
		_ = c.conn.SendJSON(agentproto.KindExit, exit)
		close(c.done)
		return exit, true
	case <-stop:
		return exit, false
	}
}
