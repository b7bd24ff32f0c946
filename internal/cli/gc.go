package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
)

func newGC(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "gc",
		Short: "Clear up after crashes",
		Long: "Undo what VMs left whose end nobody saw, remove what was half made, and give VMs\n" +
			"that run on a new supervisor if theirs died. Other commands clear up too, but do\n" +
			"not do the latter.\n\n" +
			"The fields of -o json: adopted, recovered, removed, each a list of ids.",
		Args: takes(0, 0, "no arguments"),
		RunE: a.gc,
	}
}

// collected is what gc -o json says.
type collected struct {
	Adopted   []string `json:"adopted"`   // run, and are supervised again
	Recovered []string `json:"recovered"` // had ended unseen
	Removed   []string `json:"removed"`   // half made, half removed, or of a smartvm run or pool that was killed
}

func (a *app) gc(cmd *cobra.Command, _ []string) error {
	ctx := cmd.Context()
	h, report, err := a.sweep(ctx)
	if err != nil {
		return err
	}
	defer h.Close()
	pooled, err := a.snapshots.SweepPools(ctx, h)
	c := collected{Adopted: []string{}, Recovered: report.Recovered, Removed: append(report.Removed, pooled...)}
	errs := []error{err}
	for _, id := range report.Unattended {
		if slices.Contains(pooled, id) {
			continue
		}
		adopted, err := a.takeUp(ctx, h, id)
		if adopted {
			c.Adopted = append(c.Adopted, id)
		}
		errs = append(errs, err)
	}
	if a.json {
		return errors.Join(append(errs, writeJSON(a.Stdout, c))...)
	}
	for _, part := range []struct {
		did string
		ids []string
	}{{"supervises", c.Adopted}, {"recovered", c.Recovered}, {"removed", c.Removed}} {
		for _, id := range part.ids {
			fmt.Fprintf(a.Stdout, "%s %s\n", part.did, id)
		}
	}
	if terminal(a.Stdout) && len(c.Adopted)+len(c.Recovered)+len(c.Removed) == 0 {
		fmt.Fprintln(a.Stdout, "nothing to do")
	}
	return errors.Join(errs...)
}

// takeUp gives a running VM a supervisor, unless it has ended or got one meanwhile.
func (a *app) takeUp(ctx context.Context, h *smartvm.Host, id string) (bool, error) {
	m, err := h.Machine(ctx, id)
	if err == nil {
		err = a.supervise(ctx, h, m, true)
	}
	if err == nil {
		return true, nil
	}
	if errors.Is(err, smartvm.ErrNotFound) {
		return false, nil
	}
	return false, err
}
