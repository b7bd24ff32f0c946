package vmrun

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/guestwatch"
	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/store"
)

// Guest tells how far the guest of the VM's last run has come, nil if that is unknown.
func (v *VM) Guest() (*guest.State, error) {
	return guestwatch.Read(v.Path(store.GuestStateFile))
}

// Command runs the image's command, which waits for that, as soon as the guest has come so far, and
// logs its output.
func (r *Run) Command(ctx context.Context, cmd guest.Cmd) (exit guest.Exit, err error) {
	log, err := logfile.CreateTimed(r.vm.Path(store.CommandLog), consoleLimit)
	if err != nil {
		return exit, err
	}
	cmd = agent.Tee(cmd, log)
	err = r.onceUp(ctx, func(c *agent.Client) error {
		exit, err = c.Main(ctx, cmd)
		return err
	})
	return exit, errors.Join(err, log.Close())
}

// onceUp has do done by the agent of a guest that boots.
func (r *Run) onceUp(ctx context.Context, do func(*agent.Client) error) error {
	for {
		err := do(r.vm.Agent())
		if !errors.Is(err, agent.ErrNoAgent) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) {
			return err
		}
		select {
		case <-r.done:
			return errors.New("the guest ended before it was asked for the command")
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(guestwatch.BootingPause):
		}
	}
}
