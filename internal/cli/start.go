package cli

import (
	"context"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
)

func newStart(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "start VM...",
		Short: "Start VMs that were created or have stopped",
		Long: "Start VMs that were created or have stopped. They run on by themselves.\n\n" +
			"A VM is named by its id, its name or the beginning of its id, as everywhere.",
		Args:              takes(1, -1, "the VMs to start"),
		ValidArgsFunction: a.completeVMs(-1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.each(cmd.Context(), args, "starting", func(ctx context.Context, h *smartvm.Host, m *smartvm.Machine) (any, error) {
				return entryOf(m), a.supervise(ctx, h, m, false)
			})
		},
	}
}
