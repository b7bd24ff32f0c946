package snapshots

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/supervise"
	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/snapshot"
)

// forked is a VM in the output of restore and fork.
type forked struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
}

func (s *Shell) print(all []*smartvm.Machine) error {
	list := []forked{}
	for _, m := range all {
		list = append(list, forked{m.ID(), m.Name()})
		if !s.JSON() {
			fmt.Fprintln(s.Stdout, m.ID())
		}
	}
	if s.JSON() {
		return s.WriteJSON(list)
	}
	return nil
}

// start starts a VM that runs on by itself.
func (s *Shell) start(h *smartvm.Host, remove bool) func(context.Context, *smartvm.Machine) error {
	return func(ctx context.Context, m *smartvm.Machine) error {
		if remove {
			if err := supervise.RemoveAtEnd(m); err != nil {
				return err
			}
		}
		return s.Supervise(ctx, h, m)
	}
}

func (s *Shell) restore() *cobra.Command {
	var d differs
	cmd := &cobra.Command{
		Use:   "restore [flags] SNAPSHOT",
		Short: "Start a VM from a snapshot",
		Long: "Start a VM that goes on where a snapshot was made, and print its id. It has the\n" +
			"memory and the disks of that moment, each time that it is started, and another id,\n" +
			"host name and machine id. It has the addresses of the snapshot's VM if they are\n" +
			"free, so that connections go on.",
		Example: "  smartvm restore warm\n" +
			"  smartvm restore --name web2 -p 8081:80 warm",
		Args: s.Takes(1, 1, "a snapshot"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := d.finish(); err != nil {
				return s.Usage(err, "")
			}
			ctx := cmd.Context()
			h, err := s.Open(ctx)
			if err != nil {
				return err
			}
			defer h.Close()
			m, err := h.Restore(ctx, args[0], d.RestoreOptions)
			if err != nil {
				return err
			}
			if err := s.start(h, d.remove)(ctx, m); err != nil {
				return errors.Join(err, supervise.Remove(context.WithoutCancel(ctx), m))
			}
			return s.print([]*smartvm.Machine{m})
		},
	}
	d.flags(cmd, "")
	cmd.Flags().StringArrayVarP(&d.publish, "publish", "p", nil,
		"port of the host that leads to the guest's: `"+vmflags.PublishForms+"`; may be repeated")
	return cmd
}

func (s *Shell) fork() *cobra.Command {
	var d differs
	n, concurrency := 1, smartvm.DefaultConcurrency
	cmd := &cobra.Command{
		Use:   "fork [flags] VM|SNAPSHOT",
		Short: "Start copies of a VM, or from a snapshot",
		Long: "Start VMs that go on where a VM is now, or where a snapshot was made, and print\n" +
			"their ids. They share its memory until they write to it. Each has an identity of\n" +
			"its own: id, host name, machine id, addresses, random numbers. The VM goes on.",
		Example: "  smartvm fork -n 50 warm\n" +
			"  smartvm fork -n 3 --name worker web",
		Args:              s.Takes(1, 1, "a VM or a snapshot"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := d.finish(); err != nil {
				return s.Usage(err, "")
			}
			if n < 1 || concurrency < 1 {
				return s.Usage(fmt.Errorf("-n %d --concurrency %d: both must be 1 or more", n, concurrency), "")
			}
			ctx := cmd.Context()
			h, err := s.Open(ctx)
			if err != nil {
				return err
			}
			defer h.Close()
			defer s.Status(human.Doing("forking"))()
			o := smartvm.ForkOptions{RestoreOptions: d.RestoreOptions, Concurrency: concurrency, Start: s.start(h, d.remove)}
			sn, err := h.Snapshot(args[0])
			var all []*smartvm.Machine
			switch {
			case err == nil:
				all, err = sn.Fork(ctx, n, o)
			case errors.Is(err, snapshot.ErrNotFound):
				var m *smartvm.Machine
				if m, err = h.Machine(ctx, args[0]); err == nil {
					all, err = m.Fork(ctx, n, o)
				}
			}
			if err != nil {
				return err
			}
			return s.print(all)
		},
	}
	d.flags(cmd, "; of several, -1 and so on are added")
	cmd.Flags().IntVarP(&n, "number", "n", n, "how many")
	cmd.Flags().IntVar(&concurrency, "concurrency", concurrency, "how many are started at once")
	return cmd
}
