package server

import (
	"errors"
	"net"
	"sync/atomic"
	"time"

	"push.rocks/smartvm/internal/agentproto"
)

// resumable is what lets a session go on by another connection. The VMM ends all connections when a
// snapshot is made: in the guest that goes on, whose host connects again, and in those that are
// restored, which have another one.
type resumable struct {
	// Guarded by Server.mu:
	next    *session // what it shall go on by
	carrier net.Conn // what it goes on by

	came     chan struct{} // of size 1: there is a next
	orphaned chan struct{} // closed when nobody will come any more
	detached atomic.Bool   // the host has said that it goes
}

// ErrCutOff is how the connections of a listener end that the VMM has cut off, and not the host.
var ErrCutOff = errors.New("the VMM has cut off the connection")

const (
	// resumePatience is how long a session waits for its host.
	resumePatience = 30 * time.Second
	// step is what time is counted in: where the VM was paused for minutes, the clock jumps by those,
	// and that counts as one.
	step = time.Second / 2
)

// await waits for done, closeTimeout at most. Hosts that are about to come back are waited for.
func (s *Server) await(done <-chan struct{}) {
	for left := closeTimeout; left > 0; {
		select {
		case <-done:
			return
		case <-time.After(step):
			if s.waiting.Load() == 0 {
				left -= step
			}
		}
	}
}

// awaitWatch waits, after the n-th watch, for another one where that was cut off: the guest is not
// to end before its host has heard how.
func (s *Server) awaitWatch(ss *session, n int) {
	select {
	case <-ss.gone:
	default:
		return
	}
	if !errors.Is(ss.lost, ErrCutOff) {
		return
	}
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	for left := resumePatience; left > 0; {
		s.mu.Lock()
		watches, changed := s.watches, s.changed
		s.mu.Unlock()
		if watches > n {
			return
		}
		select {
		case <-changed:
		case <-time.After(step):
			left -= step
		}
	}
}

// enter makes a session known by its token.
func (s *Server) enter(ss *session) error {
	if len(ss.req.Token) != agentproto.TokenSize || ss.req.Op != agentproto.OpExec && ss.req.Op != agentproto.OpMain {
		return errors.New("that cannot be gone on with later")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[string(ss.req.Token)] != nil {
		return errors.New("there is such a session already")
	}
	ss.carrier, ss.came, ss.orphaned = ss.raw, make(chan struct{}, 1), make(chan struct{})
	ss.conn.Resumable(0, func(lost error) (agentproto.Link, error) { return s.again(ss, lost) })
	s.sessions[string(ss.req.Token)] = ss
	return nil
}

// leave forgets a session that has ended.
func (s *Server) leave(ss *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sessions[string(ss.req.Token)] == ss {
		delete(s.sessions, string(ss.req.Token))
		ss.supersede(nil)
	}
}

// supersede changes what a session shall go on by. Server.mu is held.
func (ss *session) supersede(by *session) {
	if ss.next != nil {
		_ = ss.next.conn.Close()
	}
	ss.next = by
}

// awaitSession returns when a session is there, or was not for a step: its own request may have
// come just before.
func (s *Server) awaitSession(token []byte) {
	for end := time.Now().Add(step); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		ss := s.sessions[string(token)]
		s.mu.Unlock()
		if ss != nil || time.Now().After(end) {
			return
		}
	}
}

// resume gives a connection to the session that the host wants to go on with: the latest counts.
// What carried that before is cut, as it may not show that it is dead.
func (s *Server) resume(by *session) error {
	s.awaitSession(by.req.Token)
	s.mu.Lock()
	defer s.mu.Unlock()
	ss := s.sessions[string(by.req.Token)]
	switch {
	case ss == nil:
		return errors.New("there is no such session any more")
	case !ss.conn.Holds(by.req.Received):
		return errors.New("what has been received does not fit the session")
	}
	ss.supersede(by)
	_ = ss.carrier.Close()
	select {
	case ss.came <- struct{}{}:
	default:
	}
	return nil
}

// again returns what a session goes on by whose connection was lost, or why it does not. A host
// that has gone is not waited for, but for one that has given up a connection before it was heard
// by it: it took too long, and there will be another.
func (s *Server) again(ss *session, lost error) (agentproto.Link, error) {
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	wait := errors.Is(lost, ErrCutOff) || !ss.conn.Heard()
	for left := resumePatience; ; {
		by := s.take(ss)
		if by != nil { // it may be why what was before is lost
			if by.reply(agentproto.Reply{Received: ss.conn.Received()}) == nil {
				return agentproto.Link{Conn: by.conn, Received: by.req.Received}, nil
			}
			_ = by.conn.Close()
			wait = true
		}
		if !wait || left <= 0 || ss.detached.Load() {
			return agentproto.Link{}, lost
		}
		select {
		case <-ss.came:
		case <-ss.orphaned:
			wait = false
		case <-ss.conn.Done():
			wait = false
		case <-time.After(step):
			left -= step
		}
	}
}

// take gives a session what it shall go on by, nil if there is nothing.
func (s *Server) take(ss *session) *session {
	s.mu.Lock()
	defer s.mu.Unlock()
	by := ss.next
	if by != nil {
		ss.next, ss.carrier = nil, by.raw
	}
	return by
}

// hangUp ends what hung on another host than this one: programs are hung up as soon as their
// connections are lost, if they are not yet. A host that has begun before it told the guest who it
// is cannot be told from one of before; it only cannot go on later.
func (s *Server) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for token, ss := range s.sessions {
		close(ss.orphaned)
		ss.supersede(nil)
		delete(s.sessions, token)
	}
}
