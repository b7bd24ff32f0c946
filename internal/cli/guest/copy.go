package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/human"
)

func (s *Shell) copy() *cobra.Command {
	var o smartvm.CopyOptions
	cmd := &cobra.Command{
		Use:   "cp [flags] SOURCE... DESTINATION",
		Short: "Copy files to and from VMs",
		Long: "Copy files and trees between this host and a running VM. One side is VM:PATH. A\n" +
			"directory that is there takes what is copied under its name; \"/.\" at the end of\n" +
			"a source means what is in it. - is a tar archive on standard input or output.\n" +
			"Modes, times, links and holes are kept; with -a owners too.",
		Example: "  smartvm cp app.conf web:/etc/\n" +
			"  smartvm cp web:/var/log ./logs\n" +
			"  tar c src | smartvm cp - web:/srv",
		Args: s.Takes(2, -1, "what to copy and where to"),
		RunE: func(cmd *cobra.Command, args []string) error {
			last := len(args) - 1
			var errs []error
			for _, from := range args[:last] {
				errs = append(errs, s.copyOne(cmd.Context(), from, args[last], o))
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().BoolVarP(&o.Owners, "archive", "a", false, "keep the numbers of owners, and set-user-id bits")
	return cmd
}

func (s *Shell) copyOne(ctx context.Context, from, to string, o smartvm.CopyOptions) error {
	source, file, fromVM := agent.Split(from)
	vm, target, intoVM := agent.Split(to)
	if fromVM == intoVM {
		return s.Usage(fmt.Errorf("%s and %s: one of them must be in a VM", from, to), "write it as VM:PATH")
	}
	if fromVM {
		vm = source
	}
	h, m, err := s.One(ctx, vm)
	if err != nil {
		return err
	}
	defer h.Close()
	var copied atomic.Int64
	o.Progress = copied.Store
	done := s.Status(func(elapsed time.Duration) string {
		rate := float64(copied.Load()) / max(elapsed.Seconds(), 0.001)
		return fmt.Sprintf("copying %s: %s, %s/s", from, human.Size(copied.Load()), human.Size(int64(rate)))
	})
	defer done()
	if fromVM {
		return m.CopyFrom(ctx, file, to, s.Stdout, o)
	}
	return m.CopyTo(ctx, from, target, s.Stdin, o)
}

// sampling is how long the use of CPUs is measured for.
const sampling = 500 * time.Millisecond

// vmStats is what stats says of a VM, in JSON.
type vmStats struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
	smartvm.GuestStats
	CPUPercent float64 `json:"cpuPercent"` // of one CPU
	Received   uint64  `json:"receivedBytes"`
	Sent       uint64  `json:"sentBytes"`
}

func (s *Shell) stats() *cobra.Command {
	return &cobra.Command{
		Use:               "stats VM...",
		Short:             "Show what VMs use, as their guests see it",
		Args:              s.Takes(1, -1, "the VMs"),
		ValidArgsFunction: s.VMs(-1),
		RunE: func(cmd *cobra.Command, args []string) error {
			all := make([]*vmStats, len(args))
			err := s.each(cmd.Context(), args, func(i int, m *smartvm.Machine) (err error) {
				all[i], err = measure(cmd.Context(), m)
				return err
			})
			good := []*vmStats{}
			for _, st := range all {
				if st != nil {
					good = append(good, st)
				}
			}
			if s.JSON() {
				return errors.Join(err, s.WriteJSON(good))
			}
			w := tabwriter.NewWriter(s.Stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "VM\tCPU\tMEMORY\tDISK\tNET IN/OUT\tPROCESSES")
			for _, st := range good {
				name := st.Name
				if name == "" {
					name = st.ID
				}
				fmt.Fprintf(w, "%s\t%.0f%%\t%s/%s\t%s/%s\t%s/%s\t%d\n", name, st.CPUPercent, human.Size(int64(st.MemoryUsed)), human.Size(int64(st.Memory)),
					human.Size(int64(st.DiskUsed)), human.Size(int64(st.Disk)), human.Size(int64(st.Received)), human.Size(int64(st.Sent)), st.Processes)
			}
			return errors.Join(err, w.Flush())
		},
	}
}

func measure(ctx context.Context, m *smartvm.Machine) (*vmStats, error) {
	first, err := m.GuestStats(ctx)
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	select {
	case <-time.After(sampling):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	now, err := m.GuestStats(ctx)
	if err != nil {
		return nil, err
	}
	st := &vmStats{ID: m.ID(), Name: m.Name(), GuestStats: *now, CPUPercent: 100 * float64(now.CPU-first.CPU) / float64(time.Since(begun))}
	in, err := m.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	st.Received, st.Sent = in.Traffic()
	return st, nil
}

func (s *Shell) forward() *cobra.Command {
	return &cobra.Command{
		Use:   "forward VM [IP:]HOST:GUEST",
		Short: "Lead a port of this host to one of a VM, until Ctrl-C",
		Long: "Listen on a TCP port of this host, on 127.0.0.1 unless an IP is given, and lead\n" +
			"connections to a port of the VM's localhost. It needs no network in the VM.",
		Args:              s.Takes(2, 2, "a VM and the ports"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			i := strings.LastIndex(args[1], ":")
			guest, err := strconv.ParseUint(args[1][i+1:], 10, 16)
			if err != nil || i < 0 || guest == 0 {
				return s.Usage(fmt.Errorf("%q: want [IP:]HOST:GUEST", args[1]), "")
			}
			at := args[1][:i]
			if !strings.Contains(at, ":") {
				at = "127.0.0.1:" + at
			}
			h, m, err := s.One(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			var config net.ListenConfig
			l, err := config.Listen(cmd.Context(), "tcp", at)
			if err != nil {
				return err
			}
			fmt.Fprintf(s.Stderr, "smartvm: %s leads to port %d of %s\n", l.Addr(), guest, args[0])
			defer context.AfterFunc(cmd.Context(), func() { _ = l.Close() })()
			return s.serve(cmd.Context(), l, m, uint16(guest))
		},
	}
}

// maxForwards bounds connections at a time.
const maxForwards = 256

func (s *Shell) serve(ctx context.Context, l net.Listener, m *smartvm.Machine, port uint16) error {
	slots := make(chan struct{}, maxForwards)
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		slots <- struct{}{}
		go func() {
			defer func() { <-slots }()
			defer c.Close()
			to, err := m.DialTCP(ctx, port)
			if err != nil {
				fmt.Fprintf(s.Stderr, "smartvm: %v\n", err)
				return
			}
			defer to.Close()
			agentproto.Relay(to, c)
		}()
	}
}
