package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
)

// consoleBacklog is how many lines console begins with.
const consoleBacklog = 10

func newConsole(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "console VM",
		Aliases: []string{"attach"},
		Short:   "Watch a running VM's console",
		Long: fmt.Sprintf("Show the last %d lines of a running VM's console and what comes, until the VM\n"+
			"ends. Ctrl-C ends the watching, not the VM.", consoleBacklog),
		Args:              takes(1, 1, "one VM"),
		ValidArgsFunction: a.completeVMs(1),
		RunE:              a.console,
	}
}

func (a *app) console(cmd *cobra.Command, args []string) error {
	ctx := cmd.Context()
	h, m, err := a.one(ctx, args[0])
	if err != nil {
		return err
	}
	defer h.Close()
	state, err := m.State(ctx)
	if err != nil {
		return err
	}
	if !runs(state) {
		return &advised{
			&smartvm.StateError{ID: m.ID(), Op: "watch console of", State: state, Want: []smartvm.State{smartvm.Running, smartvm.Paused}},
			"smartvm logs " + label(m) + " shows what it wrote",
		}
	}
	return a.show(ctx, m, m.ConsoleLog(), consoleBacklog, true)
}
