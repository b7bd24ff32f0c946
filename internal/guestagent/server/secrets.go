package server

import (
	"slices"

	"push.rocks/smartvm/internal/agentproto"
)

// Told is closed when the host has told its secrets.
func (s *Server) Told() <-chan struct{} { return s.told }

// Env is the environment of programs: the image's, and what the host has told of it.
func (s *Server) Env() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.Boot.Env)
}

// secrets takes what the host has for the command and for nobody else. It may come twice, where the
// process that first told it has died: what counts is the first.
func (s *Server) secrets(ss *session) error {
	s.telling.Lock()
	defer s.telling.Unlock()
	select {
	case <-s.told:
		return ss.reply(agentproto.Reply{})
	default:
	}
	if s.Secrets == nil {
		return ss.reply(agentproto.Reply{})
	}
	if err := s.Secrets(ss.req.Files); err != nil {
		return err
	}
	s.mu.Lock()
	s.Boot.Env = append(slices.Clone(s.Boot.Env), ss.req.Env...)
	s.mu.Unlock()
	// The answer goes first: beside an image's own init nobody is left to give it.
	_ = ss.reply(agentproto.Reply{})
	close(s.told)
	return nil
}
