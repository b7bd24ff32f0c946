package server

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/process"
)

// stdio are a program's standard streams: its own ends, and ours.
type stdio struct {
	child  [3]*os.File
	stdin  *os.File // nil: nothing
	output map[agentproto.Kind]*os.File
	tty    bool
}

func openStdio(req agentproto.Request) (*stdio, error) {
	if req.TTY {
		return openTerminal(req)
	}
	io := &stdio{output: map[agentproto.Kind]*os.File{}}
	var err error
	if req.NoStdin {
		io.child[0], err = os.Open(os.DevNull)
	} else {
		io.child[0], io.stdin, err = os.Pipe()
	}
	for i, k := range []agentproto.Kind{agentproto.KindStdout, agentproto.KindStderr} {
		if err == nil {
			io.output[k], io.child[i+1], err = os.Pipe()
		}
	}
	if err != nil {
		io.close()
		return nil, err
	}
	return io, nil
}

// openTerminal opens a new pseudo-terminal.
func openTerminal(req agentproto.Request) (*stdio, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open a terminal: %w", err)
	}
	var slave int
	err = control(master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
		if err != nil {
			return err
		}
		slave, err = unix.Open(fmt.Sprintf("/dev/pts/%d", n), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open a terminal: %w", err), master.Close())
	}
	f := os.NewFile(uintptr(slave), "terminal")
	io := &stdio{
		child: [3]*os.File{f, f, f}, stdin: master,
		output: map[agentproto.Kind]*os.File{agentproto.KindStdout: master}, tty: true,
	}
	io.resize(req.Rows, req.Cols)
	return io, nil
}

// control runs f with a file's descriptor, and leaves it nonblocking.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	return errors.Join(raw.Control(func(fd uintptr) { result = f(int(fd)) }), result)
}

func (s *stdio) resize(rows, cols uint16) {
	if s.tty && rows > 0 && cols > 0 {
		_ = control(s.stdin, func(fd int) error {
			return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
		})
	}
}

func (s *stdio) closeChild() {
	for _, f := range s.child {
		if f != nil {
			_ = f.Close() // the three may be one
		}
	}
}

func (s *stdio) close() {
	s.closeChild()
	for _, f := range s.output {
		if f != nil {
			_ = f.Close()
		}
	}
	if s.stdin != nil {
		_ = s.stdin.Close()
	}
}

// run runs a program with the host's streams, and returns when it has ended and its output is sent.
// When the host goes away it gets SIGHUP.
func (s *Server) run(ss *session, p program, started func(pid int)) agentproto.Exit {
	streams, err := openStdio(ss.req)
	if err != nil {
		return process.Failed(err)
	}
	defer streams.close()
	pid, done, err := s.startFor(ss, p, streams)
	streams.closeChild()
	if err != nil {
		return process.Failed(err)
	}
	if started != nil {
		started(pid)
	}
	ss.listen(func(k agentproto.Kind, payload []byte) {
		switch {
		case k == agentproto.KindSignal && len(payload) == 1 && payload[0] == agentproto.Detach:
			ss.detached.Store(true)
		case k == agentproto.KindSignal && len(payload) == 1:
			s.Reaper.Signal(-pid, unix.Signal(payload[0]))
		case k == agentproto.KindResize && len(payload) == 4:
			streams.resize(binary.BigEndian.Uint16(payload), binary.BigEndian.Uint16(payload[2:]))
		}
	})
	if streams.stdin != nil {
		go feed(streams, ss.stdin)
	}
	ended := make(chan struct{})
	var output sync.WaitGroup
	for k, from := range streams.output {
		output.Go(func() { forward(ss.conn.Writer(k), from, ended) })
	}
	var status unix.WaitStatus
	select {
	case status = <-done:
	case <-ss.gone:
		if !ss.detached.Load() {
			s.Reaper.Signal(-pid, unix.SIGHUP)
			s.Reaper.Signal(-pid, unix.SIGCONT)
		}
		status = <-done
	}
	close(ended)
	output.Wait()
	return process.Ended(status)
}

// startFor starts a program once others may run. Its host may have gone with another VM meanwhile:
// then nobody wants it here.
func (s *Server) startFor(ss *session, p program, streams *stdio) (int, <-chan unix.WaitStatus, error) {
	s.frozen.programs.RLock()
	defer s.frozen.programs.RUnlock()
	select {
	case <-ss.orphaned:
		return 0, nil, notRun(errors.New("it was asked for in the VM that this was restored from"))
	default:
		return s.start(p, ss.req, streams)
	}
}

func (s *Server) start(p program, req agentproto.Request, streams *stdio) (int, <-chan unix.WaitStatus, error) {
	u, err := process.Find(p.user)
	if err != nil {
		return 0, nil, notRun(err)
	}
	env := process.Environment(p.env, u.Home)
	if req.TTY {
		env = process.Environment(append([]string{"TERM=" + cmp.Or(req.Term, "xterm")}, p.env...), u.Home)
	}
	if fi, err := os.Stat(p.dir); err != nil || !fi.IsDir() {
		return 0, nil, notRun(fmt.Errorf("working directory %s is not there", p.dir))
	}
	path, err := process.LookPath(p.args[0], p.dir, env)
	if err != nil {
		return 0, nil, fmt.Errorf("run %q: %w", p.args[0], err)
	}
	attr := &syscall.ProcAttr{
		Dir: p.dir, Env: env,
		Sys: &syscall.SysProcAttr{
			Setsid: true, Setctty: req.TTY,
			Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups},
		},
	}
	for _, f := range streams.child {
		if req.TTY {
			// What opens /dev/tty or /dev/stdout anew is asked for permission again.
			_ = f.Chown(int(u.UID), -1)
		}
		attr.Files = append(attr.Files, f.Fd())
	}
	pid, done, err := s.Reaper.Start(func() (int, error) { return syscall.ForkExec(path, p.args, attr) })
	if err != nil {
		return 0, nil, fmt.Errorf("run %q: %w", p.args[0], err)
	}
	return pid, done, nil
}

// notRun keeps an error from being taken for that of a program that is not there.
func notRun(err error) error { return errors.New(err.Error()) }

// endOfText is what a terminal takes for the end of what is typed.
const endOfText = 4

// feed gives a program what the host sends it.
func feed(streams *stdio, from *agentproto.Inbox) {
	if _, err := io.Copy(struct{ io.Writer }{streams.stdin}, struct{ io.Reader }{from}); err != nil {
		from.Discard() // nobody reads it any more
		return
	}
	if streams.tty {
		_, _ = streams.stdin.Write([]byte{endOfText})
		return
	}
	_ = streams.stdin.Close()
}

// maxLeft bounds what a pipe or a terminal can hold.
const maxLeft = 1 << 20

// forward sends what a program puts out. When it has ended, what it has left is sent, but what its
// children still write is not waited for. The program's exit, which follows, is the stream's end
// too. With the host gone, it goes nowhere: a program that tidies up is not to fail for a closed
// pipe.
func forward(to io.Writer, from *os.File, ended <-chan struct{}) {
	read := make(chan struct{})
	go func() {
		select {
		case <-ended:
			_ = from.SetReadDeadline(time.Unix(1, 0))
		case <-read:
		}
	}()
	_, err := io.Copy(struct{ io.Writer }{to}, struct{ io.Reader }{from})
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		_, err = io.Copy(io.Discard, struct{ io.Reader }{from})
	}
	close(read)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return
	}
	buf := make([]byte, 32<<10)
	for left := maxLeft; left > 0; {
		n := 0
		err := control(from, func(fd int) (err error) { n, err = unix.Read(fd, buf); return err })
		if err != nil || n <= 0 {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
		left -= n
	}
}
