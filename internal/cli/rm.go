package cli

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/supervise"
)

type removeCommand struct {
	*app
	force, discard bool
}

func newRemove(a *app) *cobra.Command {
	c := &removeCommand{app: a}
	cmd := &cobra.Command{
		Use:               "rm [flags] VM...",
		Short:             "Remove VMs and their copies of drives",
		Example:           "  smartvm rm web\n  smartvm rm -f $(smartvm ps -aq)",
		Args:              takes(1, -1, "the VMs to remove"),
		ValidArgsFunction: a.completeVMs(-1),
		RunE:              c.run,
	}
	cmd.Flags().BoolVarP(&c.force, "force", "f", false, "kill those that run")
	cmd.Flags().BoolVar(&c.discard, "discard", false, "do without what could not be copied back to the host's directories")
	return cmd
}

func (c *removeCommand) run(cmd *cobra.Command, args []string) error {
	return c.each(cmd.Context(), args, "removing",
		func(ctx context.Context, _ *smartvm.Host, m *smartvm.Machine) (any, error) {
			if c.force {
				if _, err := m.Stop(ctx, smartvm.StopOptions{}); err != nil && !errors.Is(err, smartvm.ErrNotFound) && !c.discard {
					return nil, err
				}
			}
			if c.discard {
				if err := m.Discard(); err != nil {
					return nil, err
				}
			}
			err := supervise.Remove(ctx, m)
			if errors.Is(err, smartvm.ErrState) && !c.force {
				err = &advised{err, "stop it first, or kill and remove it with smartvm rm -f " + label(m)}
			}
			return entryOf(m), err
		})
}
