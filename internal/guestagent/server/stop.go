package server

import (
	"bytes"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agentproto"
)

// stopPatience is how long a command may take to end when the host does not say.
const stopPatience = 10 * time.Second

// Patience is how long the image's command may take to end when it is asked to. Then it is killed.
func (s *Server) Patience() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.patience
}

// stop shuts the guest down. It answers first: a guest may end at once.
func (s *Server) stop(ss *session) error {
	if ss.req.Patience > 0 {
		s.update(func() { s.patience = ss.req.Patience })
	}
	if err := ss.reply(agentproto.Reply{}); err != nil {
		return nil // the host will ask in another way
	}
	s.finish(ss)
	if err := s.ShutDown(); err != nil {
		fmt.Fprintf(os.Stderr, "smartvm-agent: shut down: %v\n", err)
	}
	return nil
}

// shutDown does what the kernel does on Ctrl-Alt-Del: it sends SIGINT to process 1, or if that has
// not asked for it, as none does by default, restarts the machine. Other than the kernel it syncs
// before.
func shutDown() error {
	atOnce, err := os.ReadFile("/proc/sys/kernel/ctrl-alt-del")
	if err == nil && bytes.Equal(bytes.TrimSpace(atOnce), []byte("1")) {
		unix.Sync()
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	return unix.Kill(1, unix.SIGINT)
}
