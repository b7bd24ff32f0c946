package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/logfile"
)

func (s *Shell) logs() *cobra.Command {
	var follow, vmm, console bool
	var tail int
	var sinceText string
	cmd := &cobra.Command{
		Use:   "logs [flags] VM",
		Short: "Show what a VM's guest wrote to its console",
		Long: "Show what a VM's guest wrote to its console in its last run, or, while a smartvm\n" +
			"run of an image is attached to it, what its command put out. The newest one or\n" +
			"two MiB of that are kept.\n\n" +
			"With --since, begin with the line that was being written at a time, or so long\n" +
			"ago: 10m, 2026-01-31T15:04:05Z, or seconds since 1970.",
		Example: "  smartvm logs -f --since 5m web\n" +
			"  smartvm logs -n 20 web",
		Args:              s.Takes(1, 1, "one VM"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			since, err := human.Since(sinceText, time.Now())
			if err != nil {
				return s.Usage(err, "")
			}
			h, m, err := s.One(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			path := m.ConsoleLog()
			if _, err := os.Stat(m.CommandLog()); err == nil && !console {
				path = m.CommandLog()
			}
			if vmm {
				path = m.VMMLog()
			}
			return s.show(cmd.Context(), m, view{path: path, since: since, lines: tail, follow: follow})
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&follow, "follow", "f", false, "go on until the VM ends, or Ctrl-C")
	f.IntVarP(&tail, "tail", "n", -1, "begin with the last `lines` only (default: all)")
	f.StringVar(&sinceText, "since", "", "begin with what was written since a `time`, or so long ago")
	f.BoolVar(&console, "console", false, "show the console, also where there is a command's output")
	f.BoolVar(&vmm, "vmm", false, "show what the VMM logged instead")
	return cmd
}

// maxBacklog is more than is kept of any log: what a guest adds while it is read is not waited for.
const maxBacklog = 8 << 20

// view is of a log: from a time on, if there is one, and from the last so many lines on if these
// are not negative, and on until the VM has ended.
type view struct {
	path   string
	since  time.Time
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
			if _, waitErr = m.Wait(ctx); errors.Is(waitErr, smartvm.ErrNotFound) || errors.Is(waitErr, smartvm.ErrState) {
				waitErr = nil // it is removed, so it has ended; or it never ran
			}
		}()
	}
	r := logfile.Open(v.path)
	if !v.since.IsZero() {
		var err error
		if err = r.Close(); err == nil {
			r, err = logfile.OpenSince(v.path, v.since)
		}
		if err != nil {
			return err
		}
	}
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
