package guestagent

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/process"
	"push.rocks/smartvm/internal/guestagent/server"
	"push.rocks/smartvm/internal/guestagent/tune"
)

// uptime is how long the kernel has run.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// fromHost accepts the host's connections, and nobody else's.
type fromHost struct{ net.Listener }

func (l fromHost) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		conn, ok := c.(*vsock.Conn)
		if a, isAddr := c.RemoteAddr().(*vsock.Addr); ok && isAddr && a.ContextID == vsock.Host {
			return hostConn{conn}, nil
		}
		_ = c.Close()
	}
}

// hostConn is a connection that says who has ended it. When the VMM does, as it does to all when it
// makes a snapshot, the kernel leaves an error with the socket, though reading only gives io.EOF.
type hostConn struct{ *vsock.Conn }

func (c hostConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, io.EOF) && c.failed() || errors.Is(err, unix.ECONNRESET) {
		return n, server.ErrCutOff
	}
	return n, err
}

func (c hostConn) failed() bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	state := 0
	return raw.Control(func(fd uintptr) {
		state, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	}) == nil && err == nil && state != 0
}

func listenHost() (net.Listener, error) {
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, agentproto.Port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen to the host: %w", err)
	}
	return fromHost{l}, nil
}

// listen answers the host from now on.
func listen(s *server.Server) error {
	l, err := listenHost()
	if err != nil {
		return err
	}
	go func() {
		if err := s.Serve(l); err != nil {
			say("%v", err)
		}
	}()
	return nil
}

// Verbs of the agent where it is not process 1. As a service of a system that boots by itself it
// only serves. Beside the init of an image that we have booted one process serves, with the boot
// configuration, and the other starts it again when it has died.
const (
	ServeVerb = "serve"
	KeepVerb  = "keep"
	keptVerb  = "serve-kept"
)

// bootFD is the descriptor by which they get the boot configuration.
const bootFD = 3

// self is this program. Its file is gone with the initramfs.
const self = "/proc/self/exe"

// keepServer starts what answers the host when this process has become the image's init.
func keepServer(b *guest.Boot) error {
	known := *b
	known.Env = nil // stands behind it
	data, err := known.Encode()
	if err != nil {
		return err
	}
	fd, err := unix.MemfdCreate("smartvm-boot", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("keep the agent: %w", err)
	}
	f := os.NewFile(uintptr(fd), "boot")
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("keep the agent: %w", err)
	}
	if err := writeEnv(f, b.Env); err != nil {
		return fmt.Errorf("keep the agent: %w", err)
	}
	if _, err := spawn(KeepVerb, f); err != nil {
		return fmt.Errorf("keep the agent: %w", err)
	}
	return nil
}

func spawn(verb string, boot *os.File) (pid int, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	process.Usual()
	return syscall.ForkExec(self, []string{"smartvm-agent", verb}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=" + process.DefaultPath}, Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), boot.Fd()},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
}

// restartPause keeps a server that dies at once from taking all the CPU.
const restartPause = time.Second

// Keep runs the server, again and again.
func Keep() error {
	boot := os.NewFile(bootFD, "boot")
	for {
		pid, err := spawn(keptVerb, boot)
		if err != nil {
			return fmt.Errorf("start the server: %w", err)
		}
		for {
			var status unix.WaitStatus
			got, err := unix.Wait4(-1, &status, 0, nil)
			if got == pid || err != nil && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		time.Sleep(restartPause)
	}
}

// Run does what a verb says. It returns ErrVerb for another.
func Run(verb string, child <-chan os.Signal) error {
	switch verb {
	case KeepVerb:
		return Keep()
	case ServeVerb:
		return Serve(nil, child)
	case keptVerb:
		boot := os.NewFile(bootFD, "boot")
		b, err := guest.Decode(io.NewSectionReader(boot, 0, guest.MaxSize))
		if err != nil {
			return err
		}
		if b.Env, err = readEnv(boot); err != nil {
			return fmt.Errorf("read the environment: %w", err)
		}
		return Serve(b, child)
	}
	return ErrVerb
}

// ErrVerb means that the agent was asked for what it does not know.
var ErrVerb = errors.New("run it as a service of a VM's guest: smartvm-agent serve")

// Serve answers the host. Without a boot configuration, programs run as in an image that says
// nothing. Child is SIGCHLD.
func Serve(b *guest.Boot, child <-chan os.Signal) error {
	begun := uptime()
	if b == nil {
		b = new(guest.Boot)
	}
	tune.Frugal()
	without(tune.Slacken(tune.UsualSlack))
	var reaper process.Reaper
	go reaper.Run(child)
	s := server.New(&reaper, b)
	s.Identify = func(id *agentproto.Identity) []error { return identify(b, id) }
	s.Reached(agentproto.PhaseAgent, begun)
	s.Reached(agentproto.PhaseCommand, begun)
	l, err := listenHost()
	if err != nil {
		return err
	}
	return s.Serve(l)
}
