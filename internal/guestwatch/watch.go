// Package guestwatch follows what a VM's guest says of itself, in the process that supervises the
// VM, and writes it down for all others.
package guestwatch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/capture"
	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/status"
)

// How often an agent that does not answer is asked again: of a guest that boots, and of one that
// has, or takes too long.
const (
	BootingPause = 20 * time.Millisecond
	BootingTime  = time.Minute
	lostPause    = time.Second
	strangePause = 10 * time.Second // of a guest that may have no agent
)

// Watch follows what the guest of a VM's run says of itself. Its fields are set before Listen and
// not changed by others.
type Watch struct {
	Record    *plan.Record
	Agent     *agent.Client
	File      string // where the guest's state is written down
	Log       *slog.Logger
	Started   time.Time
	Booted    time.Time      // when the guest was made to run
	Secrets   *guest.Secrets // for the guest; nil: it has them, or there are none
	NoSecrets error          // why secrets could not be read for a guest that may wait for them
	// Event takes what becomes of the guest: status.EventReady, or status.EventDegraded and why.
	Event func(kind status.EventType, attributes ...string)

	state    guest.State
	reported bool        // since the last connection was made
	command  *guest.Exit // of the image's command; nil: it is not known
}

// Listen returns when the guest's command has ended, or ctx, or the VMM. It returns how the command
// ended, nil if it is not known.
func (w *Watch) Listen(ctx context.Context, ended <-chan struct{}) *guest.Exit {
	if w.Record.Spec.Vsock == nil {
		return nil
	}
	hasAgent := w.Record.HasAgent()
	w.state = guest.State{VMM: w.Booted.Sub(w.Started)}
	known, err := Read(w.File)
	if err != nil || known != nil && known.Command == 0 {
		known = nil
	}
	if hasAgent && known == nil {
		w.note()
	}
	if known != nil { // it was supervised before, by a process that died
		w.state = *known
	} else if w.Record.Restored != nil && hasAgent {
		w.identify(ctx)
		w.note()
	}
	for ctx.Err() == nil && w.state.Exit == nil {
		w.reported = false
		err := w.sendSecrets(ctx)
		if err == nil {
			err = w.Agent.Watch(ctx, w.report)
		}
		select {
		case <-ctx.Done():
		case <-ended:
			return w.command
		case <-time.After(w.pause(ctx, err)):
		}
	}
	return w.command
}

// maxState bounds what is written down of a guest, in bytes.
const maxState = 4 << 20

// Read reads what was written down of a guest, nil if nothing was.
func Read(file string) (*guest.State, error) {
	g, err := atomicfile.ReadJSON[guest.State](file, maxState, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return &g, err
}

// pause is how long to wait before the agent is asked again, after an error.
func (w *Watch) pause(ctx context.Context, err error) time.Duration {
	pause := BootingPause
	hasAgent := w.Record.HasAgent()
	switch booting := time.Since(w.Booted) < BootingTime; {
	case !hasAgent && !booting:
		pause = strangePause
	case !hasAgent || !booting:
		pause = lostPause
	}
	// A guest that was cut off may only have been written down: see Machine.Snapshot.
	_, refused := errors.AsType[*agent.GuestError](err)
	_, strange := errors.AsType[*agent.VersionError](err)
	if refused || strange || w.state.Agent > 0 && !w.reported {
		pause = lostPause
		if w.state.Exit == nil && ctx.Err() == nil && w.state.Degraded == "" {
			w.state.Degraded = fmt.Sprint(err)
			w.note()
			w.Event(status.EventDegraded, "error", w.state.Degraded)
		}
	}
	return pause
}

// note writes down what is known of the guest.
func (w *Watch) note() {
	if err := atomicfile.WriteJSON(w.File, w.state); err != nil {
		w.Log.Warn("record guest state", "vm", w.Record.ID, "err", err)
	}
}

// report takes what the guest reports.
func (w *Watch) report(e agentproto.Event) {
	w.reported = true
	g := &w.state
	wasReady := g.Ready()
	for phase, to := range map[agentproto.Phase]*time.Duration{
		agentproto.PhaseAgent:   &g.Agent,
		agentproto.PhaseCommand: &g.Command,
	} {
		if at := e.Phases[phase]; at > 0 && *to == 0 {
			*to = w.Booted.Sub(w.Started) + at
		}
	}
	if g.Degraded = ""; w.NoSecrets != nil && g.Command == 0 {
		g.Degraded = w.NoSecrets.Error()
	}
	if e.Skew != 0 {
		g.Skew = e.Skew
	}
	if e.Exit != nil {
		exit := agent.ExitOf(*e.Exit)
		g.Exit, w.command = &exit, &exit
	}
	w.note()
	if !wasReady && g.Ready() {
		w.Event(status.EventReady)
	}
}

// sendSecrets gives the guest the secrets that it waits for.
func (w *Watch) sendSecrets(ctx context.Context) error {
	if w.Secrets == nil {
		return nil
	}
	err := w.Agent.Tell(ctx, w.Secrets.Files, w.Secrets.Env)
	if err == nil {
		w.Secrets = nil
	}
	return err
}

// identifyTime bounds one try to tell a guest who it is.
const identifyTime = time.Minute

// identify tells a restored guest who it is, as soon as it listens, and notes when that was.
func (w *Watch) identify(ctx context.Context) {
	rec := w.Record
	b := rec.Boot.Guest
	who := &agentproto.Identity{
		Hostname: b.Hostname, MachineID: b.MachineID,
		Interfaces: attach.Rekey(rec.Restored.Was, rec.Interfaces), DNS: b.DNS, Hosts: b.Hosts,
	}
	var warnings []string
	err := capture.Retry(ctx, func() (err error) {
		short, cancel := context.WithTimeout(ctx, identifyTime)
		defer cancel()
		w.state.Skew, warnings, err = w.Agent.Identify(short, who)
		return err
	})
	if err != nil {
		return // the context has ended: so has the VM
	}
	if err := capture.RunHook(ctx, w.Agent, rec.Restored.Hook, capture.HookThaw); err != nil {
		warnings = append(warnings, err.Error())
	}
	for _, text := range warnings {
		w.Log.Warn("restored guest", "vm", rec.ID, "err", text)
	}
	w.state.Agent = time.Since(w.Started)
	w.state.Command = w.state.Agent
}
