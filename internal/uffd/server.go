package uffd

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Server serves the memory of VMs. It is safe for concurrent use.
type Server struct {
	log *slog.Logger

	mu       sync.Mutex
	closed   bool               // mu protects it
	sessions map[*Session]bool  // mu protects it
	memories map[fileID]*memory // mu protects it
}

type fileID struct{ dev, ino uint64 }

// memory is a memory file, mapped to be read.
type memory struct {
	id    fileID
	data  []byte
	users int // Server.mu protects it
}

// NewServer makes a server. A nil log says nothing.
func NewServer(log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{log: log, sessions: map[*Session]bool{}, memories: map[fileID]*memory{}}
}

// ErrClosed says that a server or session has been closed.
var ErrClosed = errors.New("userfaultfd server closed")

// Close ends all sessions, and with them their VMs. It is idempotent.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	all := make([]*Session, 0, len(s.sessions))
	for session := range s.sessions {
		all = append(all, session)
	}
	s.mu.Unlock()
	var errs []error
	for _, session := range all {
		errs = append(errs, session.Close())
	}
	return errors.Join(errs...)
}

// add takes a session in.
func (s *Server) add(session *Session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	s.sessions[session] = true
	return nil
}

// drop is for a session that has ended, and lets go of its memory.
func (s *Server) drop(session *Session) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, session)
	return s.release(session.memory)
}

// open maps a memory file, or finds that it is. The caller gives it back, by drop.
func (s *Server) open(path string) (*memory, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() == 0 {
		return nil, fmt.Errorf("%s: %w: no memory of a VM", path, fs.ErrInvalid)
	}
	st := fi.Sys().(*syscall.Stat_t)
	s.mu.Lock()
	defer s.mu.Unlock()
	id := fileID{st.Dev, st.Ino}
	m := s.memories[id]
	if m == nil || int64(len(m.data)) != fi.Size() {
		data, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", path, err)
		}
		m = &memory{id: id, data: data}
		s.memories[id] = m
	}
	m.users++
	return m, nil
}

// release is called with mu held.
func (s *Server) release(m *memory) error {
	if m.users--; m.users > 0 {
		return nil
	}
	if s.memories[m.id] == m {
		delete(s.memories, m.id)
	}
	return unix.Munmap(m.data)
}

// Sessions returns those that have not ended, for what is told of them.
func (s *Server) Sessions() []*Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Session, 0, len(s.sessions))
	for session := range s.sessions {
		all = append(all, session)
	}
	return slices.Clip(all)
}
