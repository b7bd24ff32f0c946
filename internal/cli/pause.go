package cli

import (
	"context"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
)

func newPause(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "pause VM...",
		Short:             "Pause VMs",
		Long:              "Stop the CPUs and devices of VMs. They keep their memory; resume lets them go on.",
		Args:              takes(1, -1, "the VMs to pause"),
		ValidArgsFunction: a.completeVMs(-1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.each(cmd.Context(), args, "pausing",
				func(ctx context.Context, _ *smartvm.Host, m *smartvm.Machine) (any, error) {
					return entryOf(m), m.Pause(ctx)
				})
		},
	}
}
