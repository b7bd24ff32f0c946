package guest

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/logfile"
)

func (s *Shell) logs() *cobra.Command {
	var follow, vmm bool
	var tail int
	cmd := &cobra.Command{
		Use:   "logs [flags] VM",
		Short: "Show what a VM's guest wrote to its console",
		Long: "Show what a VM's guest wrote to its console in its last run. The newest one or two\n" +
			"MiB of that are kept.",
		Args:              s.Takes(1, 1, "one VM"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, m, err := s.One(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			path := m.ConsoleLog()
			if vmm {
				path = m.VMMLog()
			}
			return s.show(cmd.Context(), m, view{path, tail, follow})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on until the VM ends, or Ctrl-C")
	f.IntVarP(&tail, "tail", "n", -1, "begin with the last `lines` only (default: all)")
	f.BoolVar(&vmm, "vmm", false, "show what the VMM logged instead")
	return cmd
}

// maxBacklog is more than is kept of any log: what a guest adds while it is read is not waited for.
const maxBacklog = 8 << 20

// view is of a log: from the last so many lines on if these are not negative, and on until the VM has ended.
type view struct {
	path   string
	lines  int
	follow bool
}

// show copies a log.
func (s *Shell) show(ctx context.Context, m *smartvm.Machine, v view) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan struct{})
	var waitErr error
	if v.follow {
		go func() {
			defer close(ended)
			if _, waitErr = m.Wait(ctx); errors.Is(waitErr, smartvm.ErrNotFound) {
				waitErr = nil // removed: so it has ended
			}
		}()
	}
	r := logfile.Open(v.path)
	defer r.Close()
	backlog, err := io.ReadAll(io.LimitReader(r, maxBacklog))
	if err != nil {
		return err
	}
	if _, err := s.Stdout.Write(logfile.LastLines(backlog, v.lines)); err != nil {
		return fmt.Errorf("show log: %w", err)
	}
	if !v.follow {
		return nil
	}
	if err := r.Follow(ctx, s.Stdout, ended); err != nil {
		return fmt.Errorf("show log: %w", err)
	}
	return waitErr
}
