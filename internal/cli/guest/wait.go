package guest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/agent"
)

// waitPoll is how often something in a guest is looked for.
const waitPoll = 100 * time.Millisecond

// WaitFor returns when VMs have come so far: "ready", "port:N" or "file:PATH".
func (s *Shell) WaitFor(ctx context.Context, refs []string, what string) error {
	kind, arg, _ := strings.Cut(what, ":")
	var await func(context.Context, *smartvm.Machine) error
	port, err := strconv.ParseUint(arg, 10, 16)
	switch {
	case what == "ready":
		await = func(ctx context.Context, m *smartvm.Machine) error { _, err := m.AwaitReady(ctx); return err }
	case kind == "port" && err == nil && port > 0:
		await = func(ctx context.Context, m *smartvm.Machine) error {
			return poll(ctx, m, func() (bool, error) {
				c, err := m.DialTCP(ctx, uint16(port))
				if _, refused := errors.AsType[*agent.GuestError](err); refused || errors.Is(err, agent.ErrLost) ||
					errors.Is(err, smartvm.ErrNoAgent) {
					return false, nil
				}
				if err != nil {
					return false, err
				}
				return true, c.Close()
			})
		}
	case kind == "file" && strings.HasPrefix(arg, "/"):
		await = func(ctx context.Context, m *smartvm.Machine) error {
			return poll(ctx, m, func() (bool, error) {
				exit, err := m.Exec(ctx, smartvm.Cmd{Args: []string{"test", "-e", arg}, User: "root"})
				if err == nil && exit.Reason != "" {
					err = fmt.Errorf("look for %s in VM %s: %s", arg, m.ID(), exit.Reason)
				}
				return err == nil && exit.Code == 0, err
			})
		}
	default:
		return s.Usage(fmt.Errorf("--for %q: want exit, ready, port:N or file:/PATH", what), "")
	}
	return s.each(ctx, refs, func(_ int, m *smartvm.Machine) error { return await(ctx, m) })
}

// poll asks a guest that is ready until it says yes.
func poll(ctx context.Context, m *smartvm.Machine, ask func() (bool, error)) error {
	if _, err := m.AwaitReady(ctx); err != nil {
		return err
	}
	for {
		if yes, err := ask(); yes || err != nil {
			return err
		}
		if state, err := m.State(ctx); err != nil || state != smartvm.Running {
			return errors.Join(err, fmt.Errorf("wait for VM %s: it is %s: %w", m.ID(), state, smartvm.ErrState))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(waitPoll):
		}
	}
}
