// Package psview shows VMs as smartvm ps does: a table, and the fields of its JSON.
package psview

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
)

// VM is what ps -o json says of a VM.
type VM struct {
	ID         string                  `json:"id"`
	Name       string                  `json:"name,omitempty"`
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

// Runs says whether a VMM is there, or may be.
func Runs(s smartvm.State) bool {
	return slices.Contains([]smartvm.State{smartvm.Starting, smartvm.Running, smartvm.Paused, smartvm.Stopping}, s)
}

// Table writes a table of VMs to stdout, and what is amiss with them to stderr.
func Table(stdout, stderr io.Writer, list []*VM) error {
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
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
				fmt.Fprintf(stderr, "smartvm: something else listens at a port of %s (%s): what is sent there goes to the VM\n",
					l.ID, p)
			}
		}
		if l.Guest != nil && l.Guest.Degraded != "" && Runs(l.State) {
			fmt.Fprintf(stderr, "smartvm: %s is degraded: %s\n", l.ID, l.Guest.Degraded)
		}
	}
	if alone > 0 {
		fmt.Fprintf(stderr, "hint: VMs that run unsupervised lose what their guests write; smartvm gc takes them up again\n")
	}
	return nil
}

// health is what a guest says of itself, where it can.
func (l *VM) health() string {
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
func (l *VM) status() string {
	s := string(l.State)
	switch {
	case l.State == smartvm.Running && !l.Supervised:
		return s + " " + human.Ago(time.Since(l.Started)) + ", unsupervised"
	case !l.Started.IsZero():
		return s + " " + human.Ago(time.Since(l.Started)) + l.health()
	case Runs(l.State):
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
