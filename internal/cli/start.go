package cli

import (
	"context"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/guest"
)

// started is what start's JSON says of a VM.
type started struct {
	entry
	Guest *smartvm.GuestState `json:"guest,omitempty"` // with --wait: how far it has come, and when
}

func newStart(a *app) *cobra.Command {
	var wait guest.Wait
	cmd := &cobra.Command{
		Use:   "start [flags] VM...",
		Short: "Start VMs that were created or have stopped",
		Long: "Start VMs that were created or have stopped. They run on by themselves.\n\n" +
			"A VM is named by its id, its name or the beginning of its id, as everywhere.",
		Args:              takes(1, -1, "the VMs to start"),
		ValidArgsFunction: a.completeVMs(-1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.each(cmd.Context(), args, "starting",
				func(ctx context.Context, h *smartvm.Host, m *smartvm.Machine) (any, error) {
					if err := a.supervise(ctx, h, m, false); err != nil {
						return nil, err
					}
					g, err := a.guest.Ready(ctx, m, wait)
					return started{entryOf(m), g}, err
				})
		},
	}
	wait.Flag(cmd, "")
	return cmd
}
