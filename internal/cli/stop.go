package cli

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/supervise"
	"push.rocks/smartvm/internal/vmflags"
)

type stopCommand struct {
	*app
	timeout vmflags.Seconds
}

// stopped is what stop's JSON says of a VM.
type stopped struct {
	entry
	How string `json:"how,omitempty"` // "agent", "ctrl-alt-del" or "kill"; absent: it had ended before
}

func newStop(a *app) *cobra.Command {
	c := &stopCommand{app: a}
	cmd := &cobra.Command{
		Use:   "stop [flags] VM...",
		Short: "Stop VMs",
		Long: "Ask the guests to shut down, and kill those that do not in time. An image's\n" +
			"command gets its stop signal (SIGTERM, if the image names none), an init shuts\n" +
			"down. A guest without agent gets Ctrl-Alt-Del (x86_64), which it must heed. A\n" +
			"stopped VM keeps its drives and can be started again.",
		Example:           "  smartvm stop web\n  smartvm stop -t 0 $(smartvm ps -q)",
		Args:              takes(1, -1, "the VMs to stop"),
		ValidArgsFunction: a.completeVMs(-1),
		RunE:              c.run,
	}
	c.timeout = vmflags.Seconds(smartvm.DefaultStopTimeout)
	cmd.Flags().VarP(&c.timeout, "time", "t", "`seconds` to wait before killing")
	return cmd
}

func (c *stopCommand) run(cmd *cobra.Command, args []string) error {
	return c.each(cmd.Context(), args, "stopping",
		func(ctx context.Context, _ *smartvm.Host, m *smartvm.Machine) (any, error) {
			// Who stops waiting does not mean the guest to be killed.
			result := make(chan stopped, 1)
			var err error
			go func() {
				down := context.WithoutCancel(ctx)
				how, stopErr := m.Stop(down, smartvm.StopOptions{Timeout: time.Duration(c.timeout)})
				err = errors.Join(stopErr, supervise.RemoveEnded(down, m))
				result <- stopped{entryOf(m), how}
			}()
			select {
			case r := <-result:
				return r, err
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		})
}
