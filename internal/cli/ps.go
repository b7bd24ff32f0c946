package cli

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
)

type psCommand struct {
	*app
	all, quiet bool
}

// listed is what ps -o json says of a VM.
type listed struct {
	entry
	State      smartvm.State           `json:"state"`
	Supervised bool                    `json:"supervised"` // a process supervises it
	VCPUs      int                     `json:"vcpuCount"`
	MemoryMiB  int                     `json:"memSizeMib"`
	Labels     map[string]string       `json:"labels,omitempty"`
	Created    time.Time               `json:"created"`
	Started    time.Time               `json:"started,omitzero"` // while it runs
	Addresses  []netip.Addr            `json:"addresses,omitempty"`
	Ports      []smartvm.PublishedPort `json:"ports,omitempty"` // published, while it runs
	Received   uint64                  `json:"receivedBytes"`   // by the guest, since its start
	Sent       uint64                  `json:"sentBytes"`
	Exit       *smartvm.Exit           `json:"exit,omitempty"`     // of its last run
	Guest      *smartvm.GuestState     `json:"guest,omitempty"`    // as its agent says
	Unsynced   bool                    `json:"unsynced,omitempty"` // what the guest changes, or has, is to be copied back
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
		list = slices.DeleteFunc(list, func(l *listed) bool { return !runs(l.State) })
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
	return errors.Join(c.table(list), unread)
}

// runs says whether a VMM is there, or may be.
func runs(s smartvm.State) bool {
	return slices.Contains([]smartvm.State{smartvm.Starting, smartvm.Running, smartvm.Paused, smartvm.Stopping}, s)
}

// look asks every VM how it is, newest first. VMs that are removed meanwhile are left out; an error is about those that could not be read.
func look(ctx context.Context, h *smartvm.Host) ([]*listed, error) {
	all, err := h.Machines(ctx)
	list, errs := make([]*listed, len(all)), make([]error, len(all))
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
			l := &listed{
				entry: entryOf(m), State: in.State, VCPUs: in.Spec.MachineConfig.VCPUCount,
				MemoryMiB: in.Spec.MachineConfig.MemSizeMiB, Labels: in.Spec.Labels, Created: in.Created, Started: in.Started, Exit: in.Exit, Guest: in.Guest, Unsynced: in.Unsynced,
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
	list = slices.DeleteFunc(list, func(l *listed) bool { return l == nil })
	slices.SortStableFunc(list, func(a, b *listed) int { return b.Created.Compare(a.Created) })
	errs = slices.DeleteFunc(errs, func(err error) bool { return errors.Is(err, smartvm.ErrNotFound) })
	return list, errors.Join(append(errs, err)...)
}

func (c *psCommand) table(list []*listed) error {
	w := tabwriter.NewWriter(c.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tNAME\tCPUS\tMEMORY\tADDRESS\tPORTS\tNET IN/OUT\tSTATUS")
	alone := 0
	for _, l := range list {
		if l.State == smartvm.Running && !l.Supervised {
			alone++
		}
		address, traffic := "", ""
		if len(l.Addresses) > 0 {
			address = l.Addresses[0].String()
			traffic = human.Size(int64(l.Received)) + "/" + human.Size(int64(l.Sent))
		}
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n",
			l.ID, l.Name, l.VCPUs, human.Size(int64(l.MemoryMiB)<<20), address, shortPorts(l.Ports), traffic, l.status())
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, l := range list {
		for _, p := range l.Ports {
			if p.Shadows {
				fmt.Fprintf(c.Stderr, "smartvm: something else listens at a port of %s (%s): what is sent there goes to the VM\n", l.ID, p)
			}
		}
		if l.Guest != nil && l.Guest.Degraded != "" && runs(l.State) {
			fmt.Fprintf(c.Stderr, "smartvm: %s is degraded: %s\n", l.ID, l.Guest.Degraded)
		}
	}
	if alone > 0 {
		fmt.Fprintf(c.Stderr, "hint: VMs that run unsupervised lose what their guests write; smartvm gc takes them up again\n")
	}
	return nil
}

// health is what a guest says of itself, where it can.
func (l *listed) health() string {
	switch {
	case l.Guest == nil:
		return ""
	case l.Guest.Degraded != "":
		return " (degraded)"
	case !l.Guest.Ready():
		return " (booting)"
	}
	return " (ready)"
}

// status is a VM's state for people.
func (l *listed) status() string {
	s := string(l.State)
	switch {
	case l.State == smartvm.Running && !l.Supervised:
		return s + " " + human.Ago(time.Since(l.Started)) + ", unsupervised"
	case !l.Started.IsZero():
		return s + " " + human.Ago(time.Since(l.Started)) + l.health()
	case runs(l.State):
		return s
	case l.Exit == nil:
		return "created"
	case l.Exit.Outcome == smartvm.OutcomeKilled, l.Exit.Outcome == smartvm.OutcomeCrashed:
		s = string(l.Exit.Outcome)
	}
	s += " " + human.Ago(time.Since(l.Exit.Ended)) + " ago"
	if l.Unsynced {
		s += ", unsynced"
	}
	return s
}

// shortPorts is the first of some ports, as text.
func shortPorts(ports []smartvm.PublishedPort) string {
	const shown = 3
	var all []string
	for _, p := range ports[:min(len(ports), shown)] {
		all = append(all, p.String())
	}
	if more := len(ports) - shown; more > 0 {
		all = append(all, fmt.Sprintf("%d more", more))
	}
	return strings.Join(all, ", ")
}
