package cli

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/psview"
)

type psCommand struct {
	*app
	all, quiet bool
}

func newPS(a *app) *cobra.Command {
	c := &psCommand{app: a}
	cmd := &cobra.Command{
		Use:     "ps [flags]",
		Aliases: []string{"ls", "list"},
		Short:   "List VMs",
		Long: "List the VMs that run.\n\n" +
			"The fields of -o json: id, name, state, supervised (a process supervises it),\n" +
			"vcpuCount, memSizeMib, labels, created, started, addresses, ports (published:\n" +
			"address, host, guest, protocol, shadows), receivedBytes and sentBytes (by the\n" +
			"guest), guest (how far it has come), exit (outcome, code, signal, started, ended,\n" +
			"error), unsynced (what the guest changes, or has, is to be copied back).",
		Args: takes(0, 0, "flags only"),
		RunE: c.run,
	}
	cmd.Flags().BoolVarP(&c.all, "all", "a", false, "list those that do not run, too")
	cmd.Flags().BoolVarP(&c.quiet, "quiet", "q", false, "print ids only")
	return cmd
}

func (c *psCommand) run(cmd *cobra.Command, _ []string) error {
	h, err := c.open(cmd.Context())
	if err != nil {
		return err
	}
	defer h.Close()
	list, unread := look(cmd.Context(), h) // VMs that cannot be read do not hide the others
	if !c.all {
		list = slices.DeleteFunc(list, func(l *psview.VM) bool { return !psview.Runs(l.State) })
	}
	switch {
	case c.quiet:
		for _, l := range list {
			fmt.Fprintln(c.Stdout, l.ID)
		}
		return unread
	case c.json:
		return errors.Join(writeJSON(c.Stdout, list), unread)
	}
	return errors.Join(psview.Table(c.Stdout, c.Stderr, list), unread)
}

// look asks every VM how it is, newest first. VMs that are removed meanwhile are left out; an error
// is about those that could not be read.
func look(ctx context.Context, h *smartvm.Host) ([]*psview.VM, error) {
	all, err := h.Machines(ctx)
	list, errs := make([]*psview.VM, len(all)), make([]error, len(all))
	slots := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	for i, m := range all {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			in, err := m.Inspect(ctx)
			if err != nil {
				errs[i] = err
				return
			}
			l := &psview.VM{
				ID: m.ID(), Name: m.Name(), State: in.State, VCPUs: in.Spec.MachineConfig.VCPUCount,
				MemoryMiB: in.Spec.MachineConfig.MemSizeMiB, Labels: in.Spec.Labels, Created: in.Created, Started: in.Started,
				Exit: in.Exit, Guest: in.Guest, Unsynced: in.Unsynced,
			}
			for _, i := range in.Interfaces {
				if i.IP4.IsValid() {
					l.Addresses = append(l.Addresses, i.IP4)
				}
			}
			l.Ports = in.Ports()
			l.Received, l.Sent = in.Traffic()
			l.Supervised, errs[i] = m.Supervised()
			list[i] = l
		})
	}
	wg.Wait()
	list = slices.DeleteFunc(list, func(l *psview.VM) bool { return l == nil })
	slices.SortStableFunc(list, func(a, b *psview.VM) int { return b.Created.Compare(a.Created) })
	errs = slices.DeleteFunc(errs, func(err error) bool { return errors.Is(err, smartvm.ErrNotFound) })
	return list, errors.Join(append(errs, err)...)
}
