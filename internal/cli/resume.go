package cli

import (
	"context"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
)

func newResume(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "resume VM...",
		Aliases:           []string{"unpause"},
		Short:             "Let paused VMs go on",
		Args:              takes(1, -1, "the VMs to resume"),
		ValidArgsFunction: a.completeVMs(-1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.each(cmd.Context(), args, "resuming",
				func(ctx context.Context, _ *smartvm.Host, m *smartvm.Machine) (any, error) {
					return entryOf(m), m.Resume(ctx)
				})
		},
	}
}
