package guest

import (
	"cmp"
	"fmt"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/hint"
)

// consoleBacklog is how many lines console begins with.
const consoleBacklog = 10

func (s *Shell) console() *cobra.Command {
	return &cobra.Command{
		Use:     "console VM",
		Aliases: []string{"attach"},
		Short:   "Watch a running VM's console",
		Long: fmt.Sprintf("Show the last %d lines of a running VM's console and what comes, until the VM\n"+
			"ends. Ctrl-C ends the watching, not the VM.", consoleBacklog),
		Args:              s.Takes(1, 1, "one VM"),
		ValidArgsFunction: s.VMs(1),
		RunE:              s.watch,
	}
}

func (s *Shell) watch(cmd *cobra.Command, args []string) error {
	ctx := cmd.Context()
	h, m, err := s.One(ctx, args[0])
	if err != nil {
		return err
	}
	defer h.Close()
	state, err := m.State(ctx)
	if err != nil {
		return err
	}
	if state != smartvm.Running && state != smartvm.Paused {
		return hint.Add(&smartvm.StateError{ID: m.ID(), Op: "watch console of", State: state, Want: []smartvm.State{smartvm.Running, smartvm.Paused}},
			"smartvm logs %s shows what it wrote", cmp.Or(m.Name(), m.ID()))
	}
	return s.show(ctx, m, view{path: m.ConsoleLog(), lines: consoleBacklog, follow: true})
}
