package cli

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/logfile"
)

type logsCommand struct {
	*app
	follow, vmm bool
	tail        int
}

func newLogs(a *app) *cobra.Command {
	c := &logsCommand{app: a}
	cmd := &cobra.Command{
		Use:   "logs [flags] VM",
		Short: "Show what a VM's guest wrote to its console",
		Long: "Show what a VM's guest wrote to its console in its last run. The newest one or two\n" +
			"MiB of that are kept.",
		Args:              takes(1, 1, "one VM"),
		ValidArgsFunction: a.completeVMs(1),
		RunE:              c.run,
	}
	f := cmd.Flags()
	f.BoolVarP(&c.follow, "follow", "f", false, "go on until the VM ends, or Ctrl-C")
	f.IntVarP(&c.tail, "tail", "n", -1, "begin with the last `lines` only (default: all)")
	f.BoolVar(&c.vmm, "vmm", false, "show what the VMM logged instead")
	return cmd
}

func (c *logsCommand) run(cmd *cobra.Command, args []string) error {
	h, m, err := c.one(cmd.Context(), args[0])
	if err != nil {
		return err
	}
	defer h.Close()
	path := m.ConsoleLog()
	if c.vmm {
		path = m.VMMLog()
	}
	return c.show(cmd.Context(), m, path, c.tail, c.follow)
}

// maxBacklog is more than is kept of any log: what a guest adds while it is read is not waited for.
const maxBacklog = 8 << 20

// show copies the log at path, from the last so many lines on if these are not negative, and goes on until the VM
// has ended if it is to follow.
func (a *app) show(ctx context.Context, m *smartvm.Machine, path string, lines int, follow bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan struct{})
	var waitErr error
	if follow {
		go func() {
			defer close(ended)
			if _, waitErr = m.Wait(ctx); errors.Is(waitErr, smartvm.ErrNotFound) {
				waitErr = nil // removed: so it has ended
			}
		}()
	}
	r := logfile.Open(path)
	defer r.Close()
	backlog, err := io.ReadAll(io.LimitReader(r, maxBacklog))
	if err != nil {
		return err
	}
	if _, err := a.Stdout.Write(logfile.LastLines(backlog, lines)); err != nil {
		return fmt.Errorf("show log: %w", err)
	}
	if !follow {
		return nil
	}
	if err := r.Follow(ctx, a.Stdout, ended); err != nil {
		return fmt.Errorf("show log: %w", err)
	}
	return waitErr
}
