package smartvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
)

// What goes on in a guest is asked of its agent, which VMs of images have (and others that run it as a service).
type (
	Cmd         = agent.Cmd         // a program to be run in a guest
	CmdExit     = agent.Exit        // how it ended
	TermSize    = agent.Size        // of a terminal
	CopyOptions = agent.CopyOptions // how files are copied
	GuestStats  = agentproto.Stats  // how a guest is

	GuestProcess = agentproto.Process // what runs in a guest
)

// ErrNoAgent means that nobody in the guest answers: it is still booting, has no agent, or is about to end.
var ErrNoAgent = agent.ErrNoAgent

// ErrDetached means that the caller has left a program of a guest to itself: see Cmd.
var ErrDetached = agent.ErrDetached

// GuestState is how far a guest has come, as its agent says. Times are since the VM's start.
type GuestState struct {
	VMM     time.Duration `json:"vmm"`               // until the VMM ran the guest; nanoseconds, as all
	Agent   time.Duration `json:"agent,omitempty"`   // until the kernel had booted and the agent ran; 0: not yet
	Command time.Duration `json:"command,omitempty"` // until the image's command or init ran; 0: not yet
	Skew    time.Duration `json:"skew,omitempty"`    // by which the guest's clock was wrong, and was set right
	// Degraded says why an agent that answered no longer does. "": it does, or never has.
	Degraded string   `json:"degraded,omitempty"`
	Exit     *CmdExit `json:"exit,omitempty"` // of the image's command
}

// Ready says whether the guest has come so far that its command runs.
func (g *GuestState) Ready() bool { return g != nil && g.Command > 0 && g.Degraded == "" }

// lacks says what a guest has not come to, or lost.
func (g *GuestState) lacks() string {
	switch {
	case g == nil || g.VMM == 0:
		return "its VMM is not known to run it"
	case g.Degraded != "":
		return "its agent is degraded: " + g.Degraded
	case g.Agent == 0:
		return "its kernel has not come to the agent"
	}
	return fmt.Sprintf("its command does not run (the agent does, since %s)", g.Agent.Round(time.Millisecond))
}

// guest asks the VM's agent, from any process.
func (m *Machine) guest() *agent.Client {
	return &agent.Client{Dial: func(ctx context.Context) (net.Conn, error) { return vmm.DialSocket(ctx, m.root(), store.VsockFile) }}
}

// hasAgent says whether an agent of ours is in the guest.
func (m *Machine) hasAgent() bool { return m.rec().Boot != nil && m.rec().Boot.Guest != nil }

// exitPatience is how long it may take until a VM that has cut off its connections is known to have ended.
const exitPatience = 2 * time.Second

// ended says that op was lost because the VM has ended, nil if that is not known soon.
func (m *Machine) ended(ctx context.Context, op string, lost error) error {
	for deadline := time.Now().Add(exitPatience); ctx.Err() == nil && time.Now().Before(deadline); time.Sleep(waitPoll) {
		if exit, _ := m.Exit(); exit != nil {
			return m.fail(op, lost, exit)
		}
		if errors.Is(m.exists(), ErrNotFound) {
			return fmt.Errorf("%s VM %s, which has ended and is removed: %w", op, m.rec().ID, lost)
		}
	}
	return nil
}

// inGuest has op done by the agent of a VM that runs. A guest that still boots is waited for.
func (m *Machine) inGuest(ctx context.Context, op string, do func(*agent.Client) error) error {
	state, sure, err := m.look(ctx)
	if err != nil {
		return err
	}
	if sure && state != Running {
		return hint.Add(&StateError{ID: m.rec().ID, Op: op, State: state, Want: []State{Running}}, "smartvm %s %s", map[bool]string{false: "start", true: "resume"}[state == Paused], m.rec().ID)
	}
	if m.rec().Spec.Vsock == nil {
		return hint.Add(fmt.Errorf("%s VM %s: %w: it has no vsock device", op, m.rec().ID, ErrNoAgent), "VMs of images have one; others get it by --vsock, and an agent by smartvm agent")
	}
	// Programs have the secrets too, and in a VM that is restored they know who it is.
	if m.hasAgent() && (m.rec().Boot.Guest.Secrets || m.rec().Restored != nil) {
		if g, err := m.Guest(); err == nil && (g == nil || g.Command == 0) {
			soon, cancel := context.WithTimeout(ctx, bootingTime) // who tells it may have died
			defer cancel()
			if _, err := m.AwaitReady(soon); err != nil {
				return err
			}
		}
	}
	err = do(m.guest())
	if errors.Is(err, ErrNoAgent) && m.hasAgent() {
		if g, stateErr := m.Guest(); stateErr == nil && (g == nil || g.Command == 0) {
			if _, err := m.AwaitReady(ctx); err != nil {
				return err
			}
			err = do(m.guest())
		}
		// When the driver in a guest learns that it was restored, maybe late, it resets all connections.
		for end := time.Now().Add(resetTime); m.rec().Restored != nil && errors.Is(err, unix.ECONNRESET) && time.Now().Before(end); err = do(m.guest()) {
			time.Sleep(bootingPause)
		}
	}
	switch {
	case errors.Is(err, agent.ErrLost):
		if ended := m.ended(ctx, op, err); ended != nil {
			return ended
		}
	case errors.As(err, new(*agent.VersionError)):
		err = hint.Add(err, "a VM keeps the agent that it was made with: make it anew, or use the smartvm that made it; an agent that is a service is to be replaced by what smartvm agent writes")
	case errors.Is(err, ErrNoAgent) && !m.hasAgent():
		err = hint.Add(err, "a guest that boots by itself needs it as a service: smartvm agent --help")
	case errors.Is(err, ErrNoAgent):
		err = hint.Add(err, "smartvm logs %s shows its console", m.rec().ID)
	}
	if err != nil {
		return fmt.Errorf("%s VM %s: %w", op, m.rec().ID, err)
	}
	return nil
}

// Exec runs a program in the guest, once that has booted, and returns when it has ended. When ctx ends before, the program gets SIGHUP. When
// the VM is paused, or a snapshot of it is made, it goes on afterwards; in a VM that is restored from that the program gets SIGHUP. Returns
// ErrNoAgent, *StateError, agent errors, *MachineError where the VM ended meanwhile; that the program ended with another code than 0 is no error.
func (m *Machine) Exec(ctx context.Context, cmd Cmd) (exit CmdExit, err error) {
	err = m.inGuest(ctx, "exec in", func(c *agent.Client) error {
		exit, err = c.Exec(ctx, cmd)
		return err
	})
	return exit, err
}

// CopyTo copies a file or a tree of the host into the guest. A directory at to takes it under its name, "/." at the end of from
// means what is in it; otherwise it is called to. From "-" is a tar archive that in reads, to be unpacked in the directory to; where the copy
// fails, in may be read once more.
func (m *Machine) CopyTo(ctx context.Context, from, to string, in io.Reader, o CopyOptions) error {
	return m.inGuest(ctx, "copy to", func(c *agent.Client) error { return c.CopyTo(ctx, from, to, in, o) })
}

// CopyFrom copies a file or a tree of the guest to the host, by the same rules. To "-" writes a tar archive to out. Nothing is
// written outside to, whatever the guest sends.
func (m *Machine) CopyFrom(ctx context.Context, from, to string, out io.Writer, o CopyOptions) error {
	return m.inGuest(ctx, "copy from", func(c *agent.Client) error { return c.CopyFrom(ctx, from, to, out, o) })
}

// DialTCP connects to a TCP port on the guest's localhost, without any network.
func (m *Machine) DialTCP(ctx context.Context, port uint16) (conn net.Conn, err error) {
	err = m.inGuest(ctx, "dial", func(c *agent.Client) error { conn, err = c.DialTCP(ctx, port); return err })
	return conn, err
}

// DialVsock connects to a vsock port on which a program in the guest listens.
func (m *Machine) DialVsock(ctx context.Context, port uint32) (conn net.Conn, err error) {
	err = m.inGuest(ctx, "dial", func(c *agent.Client) error { conn, err = c.Connect(ctx, port); return err })
	return conn, err
}

// Forward leads the connections that l accepts to a TCP port on the guest's localhost, until ctx ends, which is its error. It closes l.
// Failed, if not nil, is told why a connection could not be led there.
func (m *Machine) Forward(ctx context.Context, l net.Listener, port uint16, failed func(error)) error {
	return agent.Forward(ctx, l, func(ctx context.Context) (net.Conn, error) { return m.DialTCP(ctx, port) }, failed)
}

// GuestStats asks how the guest is.
func (m *Machine) GuestStats(ctx context.Context) (st *GuestStats, err error) {
	err = m.inGuest(ctx, "ask", func(c *agent.Client) error { st, err = c.Stats(ctx); return err })
	return st, err
}

// GuestProcesses asks what runs in the guest.
func (m *Machine) GuestProcesses(ctx context.Context) (all []GuestProcess, err error) {
	err = m.inGuest(ctx, "ask", func(c *agent.Client) error { all, err = c.Processes(ctx); return err })
	return all, err
}

// Guest tells how far the guest of the VM's last run has come, nil where nobody knows.
func (m *Machine) Guest() (*GuestState, error) {
	g, err := readJSON[GuestState](m.path(store.GuestStateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return &g, err
}

// readyPoll is how often AwaitReady looks.
const readyPoll = 10 * time.Millisecond

// AwaitReady returns when the guest says that its command runs, or that it serves, where its agent is a service. A VM that
// ends before is a *MachineError with the last of its console; so is the context's end.
func (m *Machine) AwaitReady(ctx context.Context) (*GuestState, error) {
	if m.rec().Spec.Vsock == nil {
		return nil, fmt.Errorf("wait for VM %s: %w", m.rec().ID, ErrNoAgent)
	}
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		g, err := m.Guest()
		if g.Ready() || err != nil {
			return g, err
		}
		if _, err := os.Stat(m.path(store.RunJournal)); err != nil {
			if g, err = m.Guest(); g.Ready() {
				return g, err // and has ended since
			}
			exit, _ := m.Exit()
			return g, m.fail("boot", errors.New("it does not run"), exit)
		}
		select {
		case <-ctx.Done():
			return g, m.fail("boot", fmt.Errorf("the guest is not ready, %s: %w", g.lacks(), context.Cause(ctx)), nil)
		case <-tick.C:
		}
	}
}

// How often an agent that does not answer is asked again: of a guest that boots, and of one that has, or takes too long.
const (
	bootingPause = 20 * time.Millisecond
	lostPause    = time.Second
	bootingTime  = time.Minute
	resetTime    = 5 * time.Second  // of a guest that was restored
	strangePause = 10 * time.Second // of one that may have no agent
)

// attend hears what the guest says of itself, writes it down for all processes, and returns when its command has ended, or ctx.
func (m *Machine) attend(ctx context.Context, r *run) {
	defer close(r.attended)
	if m.rec().Spec.Vsock == nil {
		return
	}
	before := r.booted.Sub(r.started)
	g := GuestState{VMM: before}
	note := func() {
		if err := atomicfile.WriteJSON(m.path(store.GuestStateFile), g); err != nil {
			m.host.log.Warn("note what the guest says", "vm", m.rec().ID, "err", err)
		}
	}
	known, err := m.Guest()
	if err != nil || known != nil && known.Command == 0 {
		known = nil
	}
	if m.hasAgent() && known == nil {
		note()
	}
	if known != nil { // it was looked after before, by a process that died
		g = *known
	} else if m.rec().Restored != nil && m.hasAgent() {
		m.identify(ctx, r, &g)
		note()
	}
	heard := false
	hear := func(e agentproto.Event) {
		heard = true
		for phase, to := range map[agentproto.Phase]*time.Duration{agentproto.PhaseAgent: &g.Agent, agentproto.PhaseCommand: &g.Command} {
			if at := e.Phases[phase]; at > 0 && *to == 0 {
				*to = before + at
			}
		}
		if g.Degraded = ""; r.untold != nil && g.Command == 0 {
			g.Degraded = r.untold.Error()
		}
		if e.Skew != 0 {
			g.Skew = e.Skew
		}
		if e.Exit != nil {
			exit := agent.ExitOf(*e.Exit)
			g.Exit, r.command = &exit, &exit
		}
		note()
	}
	for ctx.Err() == nil && g.Exit == nil {
		heard = false
		err := m.tell(ctx, r)
		if err == nil {
			err = m.guest().Watch(ctx, hear)
		}
		pause := bootingPause
		switch booting := time.Since(r.booted) < bootingTime; {
		case !m.hasAgent() && !booting:
			pause = strangePause
		case !m.hasAgent() || !booting:
			pause = lostPause
		}
		// One that was cut off may only have been written down: see Snapshot.
		_, refused := errors.AsType[*agent.GuestError](err)
		_, strange := errors.AsType[*agent.VersionError](err)
		if refused || strange || g.Agent > 0 && !heard {
			pause = lostPause
			if g.Exit == nil && ctx.Err() == nil && g.Degraded == "" {
				g.Degraded = fmt.Sprint(err)
				note()
			}
		}
		select {
		case <-ctx.Done():
		case <-r.proc.Done():
			return
		case <-time.After(pause):
		}
	}
}

// tell gives the guest the secrets that it waits for.
func (m *Machine) tell(ctx context.Context, r *run) error {
	if r.secrets == nil {
		return nil
	}
	err := m.guest().Tell(ctx, r.secrets.Files, r.secrets.Env)
	if err == nil {
		r.secrets = nil
	}
	return err
}

// command runs the image's command, which waits for that, as soon as the guest has come so far.
func (m *Machine) command(ctx context.Context, r *run, cmd Cmd) (exit CmdExit, err error) {
	err = m.onceUp(ctx, r, func(c *agent.Client) error {
		exit, err = c.Main(ctx, cmd)
		return err
	})
	return exit, err
}

// onceUp has do done by the agent of a guest that boots.
func (m *Machine) onceUp(ctx context.Context, r *run, do func(*agent.Client) error) error {
	for {
		err := do(m.guest())
		if !errors.Is(err, ErrNoAgent) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) {
			return err
		}
		select {
		case <-r.done:
			return errors.New("the guest ended before it was asked for the command")
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(bootingPause):
		}
	}
}
