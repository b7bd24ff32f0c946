package guest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/vmm"
)

const (
	sampling     = 500 * time.Millisecond // for which the use of CPUs is measured first
	refresh      = time.Second            // of a table that stays
	statsTimeout = 2 * time.Second        // for a guest to say how it is
	home         = "\x1b[H\x1b[J"         // clears a terminal
)

// vmStats is what stats says of a VM, in JSON: what its guest sees, where an agent is in it, and
// what the host does.
type vmStats struct {
	ID   string `json:"id"`
	Name string `json:"name,omitempty"`
	*smartvm.GuestStats
	CPUPercent    float64 `json:"cpuPercent"`    // of one CPU, in the guest; without an agent the VMM's
	VMMCPUPercent float64 `json:"vmmCpuPercent"` // of one CPU of the host's
	VMMMemory     uint64  `json:"vmmMemory"`     // of the host's, bytes
	Received      uint64  `json:"receivedBytes"`
	Sent          uint64  `json:"sentBytes"`

	at   time.Time
	host vmm.Usage
	size uint64 // of the VM's memory, bytes
}

func (s *Shell) stats() *cobra.Command {
	var once bool
	cmd := &cobra.Command{
		Use:   "stats [flags] [VM...]",
		Short: "Show what VMs use",
		Long: "Show what VMs use, all that run unless some are named: as their guests see it,\n" +
			"or, where no agent is in one, the VMM's part in CPU and memory. On a terminal\n" +
			"the table is renewed each second, until Ctrl-C; otherwise, and with -o json, it\n" +
			"is shown once.\n\n" +
			"The fields of -o json: id, name, cpuPercent (of one CPU), vmmCpuPercent and\n" +
			"vmmMemory (the host's), receivedBytes, sentBytes; from the guest uptime, cpu\n" +
			"(nanoseconds), cpus, memory, memoryUsed, disk, diskUsed, diskRead, diskWritten\n" +
			"(bytes), processes.",
		ValidArgsFunction: s.VMs(-1),
		RunE: func(cmd *cobra.Command, args []string) error {
			h, err := s.Open(cmd.Context())
			if err != nil {
				return err
			}
			defer h.Close()
			return s.watchStats(cmd.Context(), h, args, once || s.JSON() || !s.Terminal())
		},
	}
	cmd.Flags().BoolVar(&once, "no-stream", false, "show it once")
	return cmd
}

func (s *Shell) watchStats(ctx context.Context, h *smartvm.Host, refs []string, once bool) error {
	before, err := gather(ctx, h, refs, nil)
	if err != nil {
		return err
	}
	for pause := sampling; ; pause = refresh {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		now, err := gather(ctx, h, refs, before)
		switch {
		case s.JSON():
			return errors.Join(err, s.WriteJSON(now))
		case once:
			return errors.Join(err, statsTable(s.Stdout, now))
		case err != nil && len(refs) > 0:
			return err
		}
		var frame bytes.Buffer // at once, so that it does not flicker
		frame.WriteString(home)
		if err := statsTable(&frame, now); err != nil {
			return err
		}
		if _, err := s.Stdout.Write(frame.Bytes()); err != nil {
			return err
		}
		before = now
	}
}

// gather asks VMs, or all that run, at once. Before is what was gathered last.
func gather(ctx context.Context, h *smartvm.Host, refs []string, before []*vmStats) ([]*vmStats, error) {
	var all []*smartvm.Machine
	var errs []error
	for _, ref := range refs {
		m, err := h.Machine(ctx, ref)
		if errs = append(errs, err); err == nil {
			all = append(all, m)
		}
	}
	if len(refs) == 0 {
		var err error
		all, err = h.Machines(ctx)
		errs = append(errs, err)
	}
	got, failed := make([]*vmStats, len(all)), make([]error, len(all))
	var wg sync.WaitGroup
	for i, m := range all {
		wg.Go(func() { got[i], failed[i] = sample(ctx, m) })
	}
	wg.Wait()
	if len(refs) > 0 {
		errs = append(errs, failed...)
	}
	got = slices.DeleteFunc(got, func(st *vmStats) bool { return st == nil })
	for _, st := range got {
		if i := slices.IndexFunc(before, func(b *vmStats) bool { return b.ID == st.ID }); i >= 0 {
			st.since(before[i])
		}
	}
	if got == nil {
		got = []*vmStats{}
	}
	return got, errors.Join(errs...)
}

// sample asks one VM. One that does not run is an error.
func sample(ctx context.Context, m *smartvm.Machine) (*vmStats, error) {
	in, err := m.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	if in.State != smartvm.Running && in.State != smartvm.Paused {
		return nil, &smartvm.StateError{
			ID: m.ID(), Op: "measure", State: in.State,
			Want: []smartvm.State{smartvm.Running, smartvm.Paused},
		}
	}
	st := &vmStats{
		ID: m.ID(), Name: m.Name(), at: time.Now(), host: vmm.UsageOf(in.PIDs),
		size: uint64(in.Spec.MachineConfig.MemSizeMiB) << 20,
	}
	st.Received, st.Sent = in.Traffic()
	st.VMMMemory = st.host.Memory
	if in.State == smartvm.Running && in.Guest.Ready() {
		ctx, cancel := context.WithTimeout(ctx, statsTimeout)
		defer cancel()
		st.GuestStats, _ = m.GuestStats(ctx) // else there is the host's view
		st.at = time.Now()
	}
	return st, nil
}

// since says what was used from an earlier sample on.
func (st *vmStats) since(before *vmStats) {
	passed := float64(st.at.Sub(before.at))
	if passed <= 0 {
		return
	}
	st.VMMCPUPercent = 100 * float64(st.host.CPU-before.host.CPU) / passed
	st.CPUPercent = st.VMMCPUPercent
	if st.GuestStats != nil && before.GuestStats != nil {
		st.CPUPercent = 100 * float64(st.CPU-before.CPU) / passed
	}
}

func statsTable(to io.Writer, all []*vmStats) error {
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "VM\tCPU\tMEMORY\tDISK\tDISK R/W\tNET IN/OUT\tPROCS")
	for _, st := range all {
		memory, disk, moved, procs := human.Short(st.VMMMemory)+"/"+human.Short(st.size), "-", "-", "-"
		if g := st.GuestStats; g != nil {
			memory, disk = human.Short(g.MemoryUsed)+"/"+human.Short(g.Memory), human.Short(g.DiskUsed)+"/"+human.Short(g.Disk)
			moved, procs = human.Short(g.DiskRead)+"/"+human.Short(g.DiskWritten), fmt.Sprint(g.Processes)
		}
		fmt.Fprintf(w, "%.16s\t%.0f%%\t%s\t%s\t%s\t%s\t%s\n", cmp.Or(st.Name, st.ID), max(st.CPUPercent, 0),
			memory, disk, moved,
			human.Short(st.Received)+"/"+human.Short(st.Sent), procs)
	}
	return w.Flush()
}

// running is what top says of a process in a guest, in JSON.
type running struct {
	smartvm.GuestProcess
	CPUPercent float64 `json:"cpuPercent"` // of one CPU
}

func (s *Shell) top() *cobra.Command {
	return &cobra.Command{
		Use:   "top VM",
		Short: "List the processes in a VM",
		Long: "List the processes in a VM, those that use the CPU most first. The kernel's own\n" +
			"threads are left out. Nothing of the image's is needed for it.\n\n" +
			"The fields of -o json: pid, ppid, user, state, cpu (nanoseconds), memory\n" +
			"(bytes), command, cpuPercent (of one CPU).",
		Args:              s.Takes(1, 1, "one VM"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			h, m, err := s.One(ctx, args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			all, err := processes(ctx, m)
			if err != nil {
				return err
			}
			if s.JSON() {
				return s.WriteJSON(all)
			}
			var lines bytes.Buffer
			w := tabwriter.NewWriter(&lines, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "PID\tUSER\tCPU\tMEMORY\tTIME\tSTATE\tCOMMAND")
			for _, p := range all {
				fmt.Fprintf(w, "%d\t%.12s\t%.0f%%\t%s\t%s\t%s\t%s\n", p.PID, p.User, p.CPUPercent, human.Short(p.Memory),
					p.CPU.Round(10*time.Millisecond), p.State, p.Command)
			}
			if err := w.Flush(); err != nil {
				return err
			}
			width := int(s.size().Cols)
			for line := range strings.Lines(lines.String()) {
				line = strings.TrimSuffix(line, "\n")
				if runes := []rune(line); s.Terminal() && width > 0 && len(runes) > width {
					line = string(runes[:width])
				}
				if _, err := fmt.Fprintln(s.Stdout, line); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// processes asks twice, so that it is known what they use now.
func processes(ctx context.Context, m *smartvm.Machine) ([]running, error) {
	before, err := m.GuestProcesses(ctx)
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	select {
	case <-time.After(sampling):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	now, err := m.GuestProcesses(ctx)
	if err != nil {
		return nil, err
	}
	used := map[int]time.Duration{}
	for _, p := range before {
		used[p.PID] = p.CPU
	}
	all := []running{}
	for _, p := range now {
		all = append(all, running{p, 100 * float64(max(p.CPU-used[p.PID], 0)) / float64(time.Since(begun))})
	}
	slices.SortStableFunc(all, func(a, b running) int {
		return cmp.Or(cmp.Compare(b.CPUPercent, a.CPUPercent), cmp.Compare(a.PID, b.PID))
	})
	return all, nil
}
