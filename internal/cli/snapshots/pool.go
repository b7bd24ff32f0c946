package snapshots

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/guest"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/supervise"
	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/internal/warm"
)

func (s *Shell) pool() *cobra.Command {
	return s.group("pool", "Keep VMs ready that have booted already",
		"Keep VMs ready: restored from a snapshot and paused, so that one that is wanted\ngoes on at once. See smartvm run --pool.",
		s.createPool(), s.listPools(), s.fillPool(), s.removePools())
}

// pools gives f the pools of the host.
func (s *Shell) pools(ctx context.Context, f func(*smartvm.Host, *warm.Store) error) error {
	h, err := s.Open(ctx)
	if err != nil {
		return err
	}
	all, err := warm.Open(h, s.Supervise)
	if err == nil {
		err = f(h, all)
	}
	return errors.Join(err, h.Close())
}

func (s *Shell) createPool() *cobra.Command {
	var vm vmflags.Flags
	var name string
	size := 1
	cmd := &cobra.Command{
		Use:   "create [flags] --pool NAME [IMAGE [COMMAND...]]",
		Short: "Make a pool of VMs that are ready",
		Long: "Boot a VM as smartvm run -d would, wait until its guest is ready, make a snapshot\n" +
			"of it, remove it, and keep --size VMs that are restored from that and paused.",
		Example: "  smartvm pool create --pool py --size 10 python:3 -- python -i\n  smartvm run --pool py -- python -c 'print(1)'",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if name == "" || size < 1 || size > warm.MaxSize {
				return s.Usage(
					fmt.Errorf("--pool %q --size %d: a name is needed, and a size from 1 to %d", name, size, warm.MaxSize), "")
			}
			ctx := cmd.Context()
			spec, err := s.Build(ctx, &vm, args)
			if err != nil {
				return err
			}
			asked := slices.ContainsFunc(spec.NetworkInterfaces, func(n smartvm.NetworkInterface) bool { return n.IP.IsValid() })
			if asked || spec.PublishAll || len(spec.Ports) > 0 {
				return s.Usage(
					errors.New("pool create: ports (-p, -P) and an address (--ip) are one VM's, and a pool has many that are alike"),
					"")
			}
			return s.pools(ctx, func(h *smartvm.Host, all *warm.Store) error {
				done := s.Status(human.Doing("booting the first"))
				err := s.makePool(ctx, h, all, warm.Pool{Name: name, Size: size}, spec)
				done()
				if err != nil {
					return err
				}
				if s.JSON() {
					return s.WriteJSON(map[string]any{"name": name, "size": size})
				}
				_, err = fmt.Fprintln(s.Stdout, name)
				return err
			})
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	vm.Add(f)
	f.StringVar(&name, "pool", "", "`name` of the pool")
	f.IntVar(&size, "size", size, "how many are kept ready")
	return cmd
}

// makePool boots the VM that all of a pool go on from. It is gone afterwards, whatever happens.
func (s *Shell) makePool(ctx context.Context, h *smartvm.Host, all *warm.Store, p warm.Pool,
	spec smartvm.Spec,
) (err error) {
	if err := all.Free(p.Name); err != nil {
		return err
	}
	b, err := all.Enlist(p.Name) // until it is gone
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Leave()) }()
	spec.ID = b.ID
	m, err := h.Create(ctx, spec)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, warm.End(context.WithoutCancel(ctx), m)) }()
	if err := errors.Join(supervise.RemoveAtEnd(m), m.Start(ctx)); err != nil {
		return err
	}
	if _, err := m.AwaitReady(ctx); err != nil && !errors.Is(err, smartvm.ErrNoAgent) {
		return err
	}
	sn, err := m.Snapshot(ctx, smartvm.SnapshotOptions{})
	if err != nil {
		return err
	}
	s.warn(sn.Warnings)
	p.Snapshot = sn.ID
	return all.Create(ctx, p)
}

func (s *Shell) listPools() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List pools, and how often one was ready",
		Long: "List pools.\n\nThe fields of -o json: name, size, snapshot, ready, hits, misses.",
		Args: s.Takes(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.pools(cmd.Context(), func(_ *smartvm.Host, all *warm.Store) error {
				list, unreadable := all.List(cmd.Context()) // the others are shown
				if s.JSON() {
					return errors.Join(s.WriteJSON(list), unreadable)
				}
				w := tabwriter.NewWriter(s.Stdout, 0, 0, 2, ' ', 0)
				fmt.Fprintln(w, "NAME\tSIZE\tREADY\tHITS\tMISSES\tSNAPSHOT")
				for _, p := range list {
					fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%s\n", p.Name, p.Size, p.Ready, p.Hits, p.Misses, p.Snapshot)
				}
				return errors.Join(w.Flush(), unreadable)
			})
		},
	}
}

func (s *Shell) fillPool() *cobra.Command {
	return &cobra.Command{
		Use: "fill NAME...", Short: "Make pools full again",
		Long: "Make pools full again. smartvm run --pool has this done in the background.",
		Args: s.Takes(1, -1, "a pool"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.pools(cmd.Context(), func(_ *smartvm.Host, all *warm.Store) error {
				var errs []error
				for _, name := range args {
					errs = append(errs, all.Fill(cmd.Context(), name))
				}
				return errors.Join(errs...)
			})
		},
	}
}

func (s *Shell) removePools() *cobra.Command {
	return &cobra.Command{
		Use: "rm NAME...", Short: "Remove pools, and the VMs in them that nobody has taken",
		Args: s.Takes(1, -1, "a pool"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.pools(cmd.Context(), func(_ *smartvm.Host, all *warm.Store) error {
				var errs []error
				for _, name := range args {
					err := all.Remove(cmd.Context(), name)
					if err == nil && !s.JSON() {
						fmt.Fprintln(s.Stdout, name)
					}
					errs = append(errs, err)
				}
				return errors.Join(errs...)
			})
		},
	}
}

// Pooled is what smartvm run is told about a pool.
type Pooled struct {
	Pool    string
	Command []string // in the VM; empty: what the pool's VMs run is all, and the VM runs on
	Detach  bool
	Streams guest.Streams
}

// RunPooled takes a VM of a pool, and has the pool filled again in the background.
func (s *Shell) RunPooled(ctx context.Context, o Pooled) error {
	return s.pools(ctx, func(_ *smartvm.Host, all *warm.Store) error {
		t, err := all.Take(ctx, o.Pool)
		if err != nil {
			return err
		}
		s.refill(o.Pool)
		if len(o.Command) == 0 || o.Detach {
			return errors.Join(t.Keep(), s.print([]*smartvm.Machine{t.Machine}))
		}
		left := false
		o.Streams.Left = func() { left = true }
		if err = s.Run(ctx, t.ID(), o.Streams, func(c *smartvm.Cmd) { c.Args = o.Command }); left {
			return errors.Join(err, t.Keep())
		}
		if endErr := t.End(context.WithoutCancel(ctx)); endErr != nil {
			return errors.Join(err, endErr)
		}
		return err // as it is: it may be the command's exit code
	})
}

// SweepPools ends what processes have left of pools that died, and returns the ids of those VMs.
func (s *Shell) SweepPools(ctx context.Context, h *smartvm.Host) ([]string, error) {
	all, err := warm.Open(h, s.Supervise)
	if err != nil {
		return nil, err
	}
	return all.Sweep(ctx)
}

// refill starts a process that fills a pool and that nobody waits for. If it fails, a later one
// does not.
func (s *Shell) refill(pool string) {
	args := s.Self("pool", "fill", pool)
	cmd := &exec.Cmd{
		Path: args[0], Args: args, Dir: "/", Env: os.Environ(),
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if cmd.Start() == nil {
		_ = cmd.Process.Release()
	}
}
