package cli

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/supervise"
)

// waited is what wait's JSON says of a VM.
type waited struct {
	entry
	ExitCode int           `json:"exitCode"` // as printed
	Exit     *smartvm.Exit `json:"exit"`
}

func newWait(a *app) *cobra.Command {
	var until string
	cmd := &cobra.Command{
		Use:   "wait [flags] VM...",
		Short: "Wait until VMs have ended, and print their exit codes",
		Long: "Wait until VMs have ended, print the exit code of each, and exit with the first\n" +
			"that is not 0. It is that of the image's command, else 0 when the guest shut down\n" +
			"or rebooted, 137 when it was killed, and 125 when the VMM failed or nobody was\n" +
			"watching. Of a VM that does not run it is the last run's.\n\n" +
			"With --for, wait until the guests say that they are ready, that somebody listens\n" +
			"on a TCP port of theirs, or that a file is there.",
		Args:              takes(1, -1, "the VMs to wait for"),
		ValidArgsFunction: a.completeVMs(-1),
		RunE: func(cmd *cobra.Command, refs []string) error {
			if until != "exit" {
				return a.guest.WaitFor(cmd.Context(), refs, until)
			}
			return a.wait(cmd, refs)
		},
	}
	cmd.Flags().StringVar(&until, "for", "exit", "`what` to wait for: exit, ready, port:N or file:/PATH")
	return cmd
}

func (a *app) wait(cmd *cobra.Command, refs []string) error {
	h, err := a.open(cmd.Context())
	if err != nil {
		return err
	}
	defer h.Close()
	results, errs := make([]*waited, len(refs)), make([]error, len(refs))
	var wg sync.WaitGroup
	for i, ref := range refs {
		wg.Go(func() { results[i], errs[i] = a.waitFor(cmd.Context(), h, ref) })
	}
	wg.Wait()
	status := 0
	good := []*waited{}
	for _, w := range results {
		if w == nil {
			continue
		}
		good = append(good, w)
		if status == 0 {
			status = w.ExitCode
		}
		if !a.json {
			fmt.Fprintln(a.Stdout, w.ExitCode)
		}
	}
	if a.json {
		errs = append(errs, writeJSON(a.Stdout, good))
	}
	if err := errors.Join(errs...); err != nil || status == 0 {
		return err
	}
	return exitStatus(status)
}

func (a *app) waitFor(ctx context.Context, h *smartvm.Host, ref string) (*waited, error) {
	m, err := h.Machine(ctx, ref)
	if err != nil {
		return nil, err
	}
	// One that removes itself, or is removed, tells first how it ended.
	release, err := supervise.Hold(m)
	if err != nil {
		return nil, err
	}
	defer release()
	a.global.log.Debug("waiting", "vm", m.ID())
	exit, err := m.Wait(ctx)
	if errors.Is(err, smartvm.ErrState) {
		err = &advised{err, "smartvm start " + label(m) + " starts it"}
	}
	if err != nil {
		return nil, err
	}
	w := &waited{entry: entryOf(m), Exit: exit}
	if status, ok := statusOf(exit).(exitStatus); ok { //nolint:errorlint // it is ours
		w.ExitCode = int(status)
	}
	return w, nil
}
