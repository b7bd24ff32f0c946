package smartvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/guestwatch"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/store"
)

// Exec runs a program in the guest, once that has booted, and returns when it has ended. When ctx
// ends before, the program gets SIGHUP. When the VM is paused, or a snapshot of it is made, it goes
// on afterwards; in a VM that is restored from that the program gets SIGHUP. Returns ErrNoAgent,
// *StateError, agent errors, *MachineError where the VM ended meanwhile; that the program ended
// with another code than 0 is no error.
func (m *Machine) Exec(ctx context.Context, cmd Cmd) (exit CmdExit, err error) {
	err = m.inGuest(ctx, "exec in", func(c *agent.Client) error {
		exit, err = c.Exec(ctx, cmd)
		return err
	})
	return exit, err
}

// CopyTo copies a file or a tree of the host into the guest. A directory at to takes it under its
// name, "/." at the end of from means what is in it; otherwise it is called to. From "-" is a tar
// archive that in reads, to be unpacked in the directory to; where the copy fails, in may be read
// once more.
func (m *Machine) CopyTo(ctx context.Context, from, to string, in io.Reader, o CopyOptions) error {
	return m.inGuest(ctx, "copy to", func(c *agent.Client) error { return c.CopyTo(ctx, from, to, in, o) })
}

// CopyFrom copies a file or a tree of the guest to the host, by the same rules. To "-" writes a tar
// archive to out. Nothing is written outside to, whatever the guest sends.
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

// Forward leads the connections that l accepts to a TCP port on the guest's localhost, until ctx
// ends, which is its error. It closes l. Failed, if not nil, receives why a connection could not be
// led there.
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

// Guest tells how far the guest of the VM's last run has come. If that is unknown, it is zero.
func (m *Machine) Guest() (GuestState, error) {
	g, err := m.vm.Guest()
	if g == nil {
		g = &GuestState{}
	}
	return *g, err
}

// readyPoll is how often a guest is looked at that is awaited.
const readyPoll = 10 * time.Millisecond

// lacks says what a guest has not come to, or lost.
func lacks(g *GuestState) string {
	switch {
	case g == nil || g.VMM == 0:
		return "its VMM is not known to run it"
	case g.Degraded != "":
		return "its agent is degraded: " + g.Degraded
	case g.Agent == 0:
		return "its kernel has not started the agent yet"
	}
	return fmt.Sprintf("its command does not run (the agent does, since %s)", g.Agent.Round(time.Millisecond))
}

// AwaitReady returns when the guest says that its command runs, or that it serves, where its agent
// is a service. A VM that ends before is a *MachineError with the last of its console; so is the
// context's end.
func (m *Machine) AwaitReady(ctx context.Context) (*GuestState, error) {
	if m.rec().Spec.Vsock == nil {
		return nil, fmt.Errorf("wait for VM %s: %w", m.rec().ID, ErrNoAgent)
	}
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		g, err := m.vm.Guest()
		if g.Ready() || err != nil {
			return g, err
		}
		if _, err := os.Stat(m.vm.Path(store.RunJournal)); err != nil {
			if g, err = m.vm.Guest(); g.Ready() {
				return g, err // and has ended since
			}
			exit, _ := m.vm.Exit()
			return g, m.vm.Fail("boot", errors.New("it does not run"), exit)
		}
		select {
		case <-ctx.Done():
			return g, m.vm.Fail("boot", fmt.Errorf("the guest is not ready, %s: %w", lacks(g), context.Cause(ctx)), nil)
		case <-tick.C:
		}
	}
}

// resetTime is for how long after a restore a guest's driver may reset connections.
const resetTime = 5 * time.Second

// inGuest has op done by the agent of a VM that runs. A guest that still boots is waited for.
func (m *Machine) inGuest(ctx context.Context, op string, do func(*agent.Client) error) error {
	rec := m.rec()
	if err := m.canAsk(ctx, op); err != nil {
		return err
	}
	// Programs have the secrets too, and in a VM that is restored they know who it is.
	if rec.HasAgent() && (rec.Boot.Guest.Secrets || rec.Restored != nil) {
		if g, err := m.vm.Guest(); err == nil && (g == nil || g.Command == 0) {
			soon, cancel := context.WithTimeout(ctx, guestwatch.BootingTime) // the process that sends them may have died
			defer cancel()
			if _, err := m.AwaitReady(soon); err != nil {
				return err
			}
		}
	}
	err := do(m.vm.Agent())
	if errors.Is(err, ErrNoAgent) && rec.HasAgent() {
		if g, stateErr := m.vm.Guest(); stateErr == nil && (g == nil || g.Command == 0) {
			if _, err := m.AwaitReady(ctx); err != nil {
				return err
			}
			err = do(m.vm.Agent())
		}
		// When the driver in a guest learns that it was restored, maybe late, it resets all connections.
		for end := time.Now().Add(resetTime); rec.Restored != nil && errors.Is(err, unix.ECONNRESET) &&
			time.Now().Before(end); err = do(m.vm.Agent()) {
			time.Sleep(guestwatch.BootingPause)
		}
	}
	switch {
	case errors.Is(err, agent.ErrLost):
		if ended := m.ended(ctx, op, err); ended != nil {
			return ended
		}
	case errors.As(err, new(*agent.VersionError)):
		err = hint.Add(err,
			"a VM keeps the agent that it was made with: make it anew, or use the smartvm that made it; an agent that is a service is to be replaced by what smartvm agent writes")
	case errors.Is(err, ErrNoAgent) && !rec.HasAgent():
		err = hint.Add(err, "a guest that boots by itself needs it as a service: smartvm agent --help")
	case errors.Is(err, ErrNoAgent):
		err = hint.Add(err, "smartvm logs %s shows its console", rec.ID)
	}
	if err != nil {
		return fmt.Errorf("%s VM %s: %w", op, rec.ID, err)
	}
	return nil
}

// canAsk says why an agent in the guest cannot be asked.
func (m *Machine) canAsk(ctx context.Context, op string) error {
	id := m.rec().ID
	state, sure, err := m.vm.Look(ctx)
	if err != nil {
		return err
	}
	if sure && state != Running {
		verb := "start"
		if state == Paused {
			verb = "resume"
		}
		return hint.Add(&StateError{ID: id, Op: op, State: state, Want: []State{Running}}, "smartvm %s %s", verb, id)
	}
	if m.rec().Spec.Vsock == nil {
		return hint.Add(fmt.Errorf("%s VM %s: %w: it has no vsock device", op, id, ErrNoAgent),
			"VMs of images have one; others get it by --vsock, and an agent by smartvm agent")
	}
	return nil
}

// exitPatience is how long it may take until a VM that has cut off its connections is known to have
// ended.
const exitPatience = 2 * time.Second

// ended says that op was lost because the VM has ended, nil if that is not known soon.
func (m *Machine) ended(ctx context.Context, op string, lost error) error {
	for deadline := time.Now().Add(exitPatience); ctx.Err() == nil && time.Now().Before(deadline); time.Sleep(readyPoll) {
		if exit, _ := m.vm.Exit(); exit != nil {
			return m.vm.Fail(op, lost, exit)
		}
		if errors.Is(m.vm.Exists(), ErrNotFound) {
			return fmt.Errorf("%s VM %s, which has ended and is removed: %w", op, m.rec().ID, lost)
		}
	}
	return nil
}
