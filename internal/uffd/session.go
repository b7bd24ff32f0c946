package uffd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options say for which VM a Session is. Socket and Memory are required.
type Options struct {
	// Socket is the path of the socket, made for the time until the VMM has connected. The directory
	// must be ours or its VMM's alone.
	Socket string
	// UID and GID are who the VMM runs as: nobody else may connect, and the socket is given to them.
	// Zero: root.
	UID, GID int
	// Memory is the path of the memory file, which does not change.
	Memory string
	// Prefetch are pages to bring before they are touched. A set of another file or page size is not
	// used. It may be nil.
	Prefetch *Set
	// Failed is told, at once and once, if the VM cannot be served any more: it is being killed. It
	// may be nil. It is not called when the VMM ends by itself or the session is closed.
	Failed func(error)
}

// Session serves one VM.
type Session struct {
	server *Server
	o      Options
	memory *memory

	listener *net.UnixListener
	ready    chan struct{} // closed when what is prefetched is there
	done     chan struct{} // closed at the very end

	mu      sync.Mutex
	closed  bool    // mu protects it: somebody wants the end, or the VMM is gone
	err     error   // mu protects it: why it failed
	wakers  []waker // mu protects it: what waits, and would not see that it is closed
	touched bitmap  // mu protects it; of the bitmaps this one alone is looked at by others
	pages   int64   // mu protects it
	size    int64   // mu protects it: of a page
	guarded bool    // mu protects it

	faults, copied, zeroed, prefetched, removed, again atomic.Int64
}

// Stats are what a session has done. All are numbers of pages but for Faults.
type Stats struct {
	Faults     int64 `json:"faults"`     // times that the VM waited for us
	Copied     int64 `json:"copied"`     // brought from the file, with those around the one that was touched
	Prefetched int64 `json:"prefetched"` // of those, brought before the VM touched them
	Zeroed     int64 `json:"zeroed"`     // touched again after the VM had given them back
	Removed    int64 `json:"removed"`    // given back
	Retries    int64 `json:"retries"`    // times that we waited for the VM to see that a removal was read
	PageSize   int64 `json:"pageSize"`   // bytes; 0 until the VMM has connected
	Guarded    bool  `json:"guarded"`    // the kernel kills the VM if this process dies
}

// Bytes is how much memory was brought from the file.
func (s Stats) Bytes() int64 { return s.Copied * s.PageSize }

// Listen makes a socket for the VMM to connect to, and serves it from then on.
func (s *Server) Listen(o Options) (*Session, error) {
	session := &Session{server: s, o: o, ready: make(chan struct{}), done: make(chan struct{})}
	var err error
	if session.memory, err = s.open(o.Memory); err != nil {
		return nil, fmt.Errorf("serve memory: %w", err)
	}
	err = s.add(session)
	if err == nil {
		session.listener, err = listen(o)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("serve memory: %w", err), s.drop(session))
	}
	go session.run()
	return session, nil
}

// listen binds the socket by way of its directory, since a path into a jail may be longer than an
// address.
func listen(o Options) (*net.UnixListener, error) {
	dir, err := unix.Open(filepath.Dir(o.Socket), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open directory of %s: %w", o.Socket, err)
	}
	defer unix.Close(dir)
	name := filepath.Base(o.Socket)
	// A socket's mode before it is bound is that of its file, whatever the umask allows.
	private := net.ListenConfig{Control: func(_, _ string, socket syscall.RawConn) error {
		var result error
		err := socket.Control(func(fd uintptr) { result = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, result)
	}}
	bound, err := private.Listen(context.Background(), "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir, name))
	if err != nil {
		return nil, err
	}
	l := bound.(*net.UnixListener)
	l.SetUnlinkOnClose(false) // its path is of no use when the directory is closed
	if err := unix.Fchownat(dir, name, o.UID, o.GID, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, errors.Join(fmt.Errorf("give socket to user %d: %w", o.UID, err), l.Close(), unix.Unlinkat(dir, name, 0))
	}
	return l, nil
}

// Ready is closed when what was to be prefetched is there.
func (s *Session) Ready() <-chan struct{} { return s.ready }

// Done is closed when the session has ended: its VMM is gone or being killed.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is why the VM could not be served; nil while it is, and when the session ended otherwise.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Stats tells what the session has done so far.
func (s *Session) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{
		Faults: s.faults.Load(), Copied: s.copied.Load(), Prefetched: s.prefetched.Load(), Zeroed: s.zeroed.Load(),
		Removed: s.removed.Load(), Retries: s.again.Load(),
		PageSize: s.size, Guarded: s.guarded,
	}
}

// Touched are the pages that the VM has had so far: those of its faults, with the ones around them,
// and those that were prefetched. Nil until the VMM has connected.
func (s *Session) Touched() *Set {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.touched == nil {
		return nil
	}
	return &Set{PageSize: s.size, Size: s.pages * s.size, Ranges: s.touched.ranges(s.pages)}
}

// Close ends the session, and kills the VMM if it still runs, as it would hang. It waits until
// nothing of the session is left but a call of Failed, and is idempotent.
func (s *Session) Close() error {
	s.interrupt()
	<-s.done
	return nil
}

// waker is something that a goroutine of the session waits for.
type waker interface{ SetDeadline(time.Time) error }

// interrupt makes the session end.
func (s *Session) interrupt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, w := range s.wakers {
		_ = w.SetDeadline(time.Unix(1, 0)) // it can only be closed already
	}
}

// waits says that a goroutine will wait for w, which interrupt is to end.
func (s *Session) waits(w waker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wakers = append(s.wakers, w)
	if s.closed {
		_ = w.SetDeadline(time.Unix(1, 0))
	}
}

// run is the session's life.
func (s *Session) run() {
	err := s.life()
	s.mu.Lock()
	if s.closed {
		err = nil // it is what was wanted, or the VMM's end
	}
	s.closed, s.err, s.wakers = true, err, nil
	s.mu.Unlock()
	if derr := s.server.drop(s); derr != nil {
		s.server.log.Warn("unmap memory", "err", derr)
	}
	close(s.done) // Failed may call Close
	if err != nil && s.o.Failed != nil {
		s.o.Failed(err)
	}
}

// life waits for the VMM and serves it until its end or ours, when it is killed.
func (s *Session) life() (err error) {
	conn, p, err := s.accept()
	_ = s.listener.Close()
	_ = os.Remove(s.o.Socket)
	if err != nil {
		return fmt.Errorf("await VMM: %w", err)
	}
	pidfd := os.NewFile(uintptr(p.pidfd), "pidfd")
	defer func() { err = errors.Join(err, p.kill(), conn.Close(), pidfd.Close()) }()
	if err := conn.SetReadDeadline(time.Now().Add(maxHandshake)); err != nil {
		return fmt.Errorf("await memory of VMM: %w", err)
	}
	s.waits(conn)
	h, err := receive(conn, int64(len(s.memory.data)))
	if err != nil {
		return fmt.Errorf("await memory of VMM: %w", err)
	}
	defer h.file.Close()
	guardErr := p.guard(conn)
	if guardErr != nil {
		s.server.log.Warn("VM would hang if this process died", "err", guardErr)
	}
	v := s.newServing(h, guardErr == nil)
	s.waits(h.file)
	s.waits(pidfd)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		if awaitReadable(pidfd) == nil {
			s.interrupt() // the VMM is gone
		}
	})
	defer func() {
		_ = pidfd.SetDeadline(time.Unix(1, 0))
		watcher.Wait()
	}()
	if err := v.serve(); err != nil {
		return fmt.Errorf("serve memory of VMM: %w", err)
	}
	return nil
}

// accept waits for the VMM's connection.
func (s *Session) accept() (*net.UnixConn, peer, error) {
	s.waits(s.listener)
	for range maxConnection {
		conn, err := s.listener.AcceptUnix()
		if err != nil {
			return nil, peer{}, err
		}
		p, uid, err := peerOf(conn)
		if err == nil && uid == s.o.UID {
			return conn, p, nil
		}
		if err == nil {
			_ = unix.Close(p.pidfd)
			s.server.log.Warn("refused a connection for memory", "uid", uid)
		}
		_ = conn.Close()
	}
	return nil, peer{}, fmt.Errorf("%w: too many others connected", ErrProtocol)
}

// awaitReadable waits until a descriptor can be read, and reads nothing.
func awaitReadable(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
}
