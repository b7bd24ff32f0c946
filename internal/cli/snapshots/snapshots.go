// Package snapshots has the commands about snapshots of VMs, and VMs that start from them.
package snapshots

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/guest"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/stream"
	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/snapshot"
)

// Shell is what the commands need of the command line around them.
type Shell struct {
	*guest.Shell
	// Host opens the host as it is. The caller closes it.
	Host func() (*smartvm.Host, error)
	// Build makes a VM's configuration of flags and arguments, with its image here.
	Build func(ctx context.Context, flags *vmflags.Flags, args []string) (smartvm.Spec, error)
	// Supervise starts a VM in a process of its own.
	Supervise func(ctx context.Context, h *smartvm.Host, m *smartvm.Machine) error
	// Self is the command line of this program with the same host, for args.
	Self func(args ...string) []string
}

// Commands are those of this package.
func (s *Shell) Commands() []*cobra.Command {
	return []*cobra.Command{
		s.group("snapshot", "Make and manage snapshots of VMs",
			"Make and manage snapshots: VMs at one moment, with memory and disks, from which\nany number of VMs can go on. See smartvm restore and smartvm fork.",
			s.create(), s.list(), s.inspect(), s.remove(), s.prune(), s.verify(), s.export(), s.load()),
		s.restore(), s.fork(), s.pool(),
	}
}

// group is a command that only has others below it.
func (s *Shell) group(use, short, long string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return s.Usage(fmt.Errorf("%s has no command %q", cmd.CommandPath(), args[0]),
					cmd.CommandPath()+" --help lists them")
			}
			return cmd.Help()
		},
	}
	c.AddCommand(commands...)
	return c
}

// with gives f the snapshots of the host.
func (s *Shell) with(f func(*smartvm.Host, *snapshot.Store) error) error {
	h, err := s.Host()
	if err != nil {
		return err
	}
	all, err := h.Snapshots()
	if err == nil {
		err = f(h, all)
	}
	return errors.Join(err, h.Close())
}

func (s *Shell) create() *cobra.Command {
	var o smartvm.SnapshotOptions
	var labels []string
	cmd := &cobra.Command{
		Use:   "create [flags] VM",
		Short: "Make a snapshot of a VM",
		Long: "Make a snapshot of a VM that runs or is paused, and print its id. The VM stands\n" +
			"still while its memory and its disks are written, and goes on afterwards.\n" +
			"Programs in the guest are stopped meanwhile and see nothing of it, be they run by\n" +
			"smartvm exec or not; smartvm cp and forward are cut off.\n\n" +
			"Without --hook a guest that cannot be asked is taken as it is, with a warning.",
		Example: "  smartvm snapshot create --name warm web\n" +
			"  smartvm snapshot create --hook /usr/local/bin/quiesce db",
		Args:              s.Takes(1, 1, "a VM"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if o.Labels, err = parseLabels(labels); err != nil {
				return s.Usage(err, "")
			}
			h, m, err := s.One(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			done := s.Status(human.Doing("writing the snapshot"))
			sn, err := m.Snapshot(cmd.Context(), o)
			done()
			if err != nil {
				return err
			}
			s.warn(sn.Warnings)
			if s.JSON() {
				return s.WriteJSON(entryOf(sn))
			}
			_, err = fmt.Fprintln(s.Stdout, sn.ID)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Name, "name", "", "second `name` of the snapshot")
	f.StringArrayVarP(&labels, "label", "l", nil, "`key=value` to keep with it; may be repeated")
	f.BoolVar(&o.Diff, "diff", false, "have the VMM write only the memory that has changed since the last one")
	f.StringVar(&o.Hook, "hook", "", "`program` in the guest, run with freeze before and thaw after")
	f.BoolVar(&o.Stop, "stop", false, "end the VM then: restored, it goes on with its connections")
	f.BoolVar(&o.DropCaches, "drop-caches", false,
		"have the guest forget what it can read again, and its balloon take what it does not use")
	return cmd
}

func (s *Shell) warn(warnings []string) {
	for _, w := range warnings {
		fmt.Fprintf(s.Stderr, "smartvm: warning: %s\n", w)
	}
}

func parseLabels(all []string) (map[string]string, error) {
	var labels map[string]string
	for _, text := range all {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("--label %s: want KEY=VALUE", text)
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[key] = value
	}
	return labels, nil
}

// entry is a snapshot in lists.
type entry struct {
	ID          string            `json:"id"`
	Name        string            `json:"name,omitempty"`
	VM          string            `json:"vm"`
	Created     time.Time         `json:"created"`
	Labels      map[string]string `json:"labels,omitempty"`
	Firecracker string            `json:"firecracker"`
	MemoryMiB   int               `json:"memoryMib"`
	Size        int64             `json:"size"` // on disk, bytes
	Paused      time.Duration     `json:"pausedNs"`
	Parent      string            `json:"parent,omitempty"`
	Ephemeral   bool              `json:"ephemeral,omitempty"`
	UsedBy      []string          `json:"usedBy"` // ids of VMs
	Path        string            `json:"path"`
}

func entryOf(sn *smartvm.Snapshot) entry {
	e := entry{
		ID: sn.ID, Name: sn.Name, VM: sn.VM(), Created: sn.Created, Labels: sn.Labels, Firecracker: sn.Firecracker,
		MemoryMiB: sn.MemSizeMiB, Paused: sn.Paused, Parent: sn.Parent, Ephemeral: sn.Ephemeral, UsedBy: []string{},
		Path: sn.Dir(),
	}
	e.Size, _ = sn.Usage() // of what is going
	dirs, _ := sn.Users()
	for _, dir := range dirs {
		e.UsedBy = append(e.UsedBy, filepath.Base(dir))
	}
	return e
}

func (s *Shell) list() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List snapshots",
		Long: "List snapshots, the oldest first.\n\nThe fields of -o json: id, name, vm, created, labels, firecracker, memoryMib, size,\npausedNs, parent, ephemeral, usedBy, path.",
		Args: s.Takes(0, 0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			return s.with(func(h *smartvm.Host, all *snapshot.Store) error {
				list, unreadable := all.List() // the others are shown
				entries := []entry{}
				for _, sn := range list {
					entries = append(entries, entryOf(h.AsSnapshot(sn)))
				}
				return errors.Join(s.show(entries, quiet), unreadable)
			})
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print ids alone")
	return cmd
}

func (s *Shell) show(entries []entry, quiet bool) error {
	switch {
	case quiet:
		for _, e := range entries {
			fmt.Fprintln(s.Stdout, e.ID)
		}
		return nil
	case s.JSON():
		return s.WriteJSON(entries)
	}
	w := tabwriter.NewWriter(s.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tNAME\tVM\tCREATED\tMEMORY\tSIZE\tVMS")
	for _, e := range entries {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d MiB\t%s\t%d\n", e.ID, e.Name, e.VM, human.Ago(time.Since(e.Created)), e.MemoryMiB,
			human.Size(e.Size), len(e.UsedBy))
	}
	return w.Flush()
}

func (s *Shell) inspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect SNAPSHOT...", Short: "Show all there is to know about snapshots, as JSON",
		Args: s.Takes(1, -1, "a snapshot"),
		RunE: func(_ *cobra.Command, args []string) error {
			return s.with(func(h *smartvm.Host, _ *snapshot.Store) error {
				type inspection struct {
					entry
					Manifest snapshot.Manifest `json:"manifest"`
				}
				list := []inspection{}
				var errs []error
				for _, ref := range args {
					sn, err := h.Snapshot(ref)
					if err == nil {
						list = append(list, inspection{entryOf(sn), sn.Manifest})
					}
					errs = append(errs, err)
				}
				return errors.Join(append(errs, s.WriteJSON(list))...)
			})
		},
	}
}

// each does something to each of some snapshots, and prints those with which it went well.
func (s *Shell) each(refs []string, do func(h *smartvm.Host, ref string) error) error {
	return s.with(func(h *smartvm.Host, _ *snapshot.Store) error {
		good := []string{}
		var errs []error
		for _, ref := range refs {
			if err := do(h, ref); err != nil {
				errs = append(errs, err)
				continue
			}
			good = append(good, ref)
			if !s.JSON() {
				fmt.Fprintln(s.Stdout, ref)
			}
		}
		if s.JSON() {
			errs = append(errs, s.WriteJSON(good))
		}
		return errors.Join(errs...)
	})
}

func (s *Shell) remove() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm [-f] SNAPSHOT...", Short: "Remove snapshots",
		Long: "Remove snapshots that no VM has started from and that are not being exported. With\n-f others too: VMs that run go on, but cannot be started again.",
		Args: s.Takes(1, -1, "a snapshot"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.each(args, func(h *smartvm.Host, ref string) error {
				if force {
					s.warnUsers(h, ref)
				}
				return h.RemoveSnapshot(cmd.Context(), ref, force)
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also those that VMs have started from")
	return cmd
}

// warnUsers says which VMs cannot be started again.
func (s *Shell) warnUsers(h *smartvm.Host, ref string) {
	sn, err := h.Snapshot(ref)
	if err != nil {
		return
	}
	dirs, _ := sn.Users()
	for _, dir := range dirs {
		fmt.Fprintf(s.Stderr, "smartvm: warning: VM %s cannot be started again\n", filepath.Base(dir))
	}
}

func (s *Shell) prune() *cobra.Command {
	return &cobra.Command{
		Use: "prune", Short: "Remove the snapshots that no VM has started from",
		Args: s.Takes(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.with(func(h *smartvm.Host, _ *snapshot.Store) error {
				removed, err := h.PruneSnapshots(cmd.Context())
				if s.JSON() {
					return errors.Join(err, s.WriteJSON(append([]string{}, removed...)))
				}
				for _, id := range removed {
					fmt.Fprintln(s.Stdout, id)
				}
				return err
			})
		},
	}
}

func (s *Shell) verify() *cobra.Command {
	return &cobra.Command{
		Use: "verify [SNAPSHOT...]", Short: "Read snapshots and compare them with what was stored",
		Args: s.Takes(0, -1, "snapshots"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var transfer human.Transfer
			defer s.Status(transfer.Text)()
			if len(args) == 0 {
				if err := s.with(func(_ *smartvm.Host, all *snapshot.Store) error {
					list, err := all.List()
					for _, sn := range list {
						args = append(args, sn.ID)
					}
					return err
				}); err != nil {
					return err
				}
			}
			return s.each(args, func(h *smartvm.Host, ref string) error {
				sn, err := h.Snapshot(ref)
				if err != nil {
					return err
				}
				return sn.Verify(cmd.Context(), func(done, total int64) { transfer.Set("verify "+ref, done, total) })
			})
		},
	}
}

func (s *Shell) export() *cobra.Command {
	return &cobra.Command{
		Use: "export SNAPSHOT FILE", Short: "Write a snapshot to a file, or to standard output as -",
		Long: "Write a snapshot to a file, or to standard output as -: a compressed tar for\nsmartvm snapshot import. What the VM only read is not in it: an image must be pulled\nwhere the snapshot is to be restored. The snapshot cannot be removed meanwhile.",
		Args: s.Takes(2, 2, "a snapshot and a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.with(func(h *smartvm.Host, all *snapshot.Store) error {
				sn, err := all.Get(args[0])
				if err != nil {
					return err
				}
				var transfer human.Transfer
				defer s.Status(transfer.Text)()
				progress := func(done, total int64) { transfer.Set("export", done, total) }
				ctx := cmd.Context()
				if args[1] == "-" {
					err = stream.OrLeave(ctx, func() error { return sn.Export(ctx, s.Stdout, progress) })
				} else {
					err = exportFile(ctx, sn, args[1], progress)
				}
				if image := h.AsSnapshot(sn).Image(); err == nil && image != "" {
					fmt.Fprintf(s.Stderr, "smartvm: image %s is not in it: pull it where the snapshot is to be restored\n", image)
				}
				return err
			})
		},
	}
}

func exportFile(ctx context.Context, sn *snapshot.Snapshot, path string, progress func(done, total int64)) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err = errors.Join(sn.Export(ctx, f, progress), f.Close()); err != nil {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

func (s *Shell) load() *cobra.Command {
	var o snapshot.ImportOptions
	cmd := &cobra.Command{
		Use: "import [flags] FILE", Short: "Take in a snapshot that export has written, - for standard input",
		Long: "Take in a snapshot that export has written, from a file or, as -, standard input,\nand print its id. The image of its VM is not in it: it must be pulled too.",
		Args: s.Takes(1, 1, "a file"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.with(func(h *smartvm.Host, all *snapshot.Store) error {
				in := s.Stdin
				if args[0] != "-" {
					f, err := os.Open(args[0])
					if err != nil {
						return err
					}
					defer f.Close()
					in = f
				}
				defer s.Status(human.Doing("importing"))()
				var sn *snapshot.Snapshot
				err := stream.OrLeave(cmd.Context(), func() (err error) {
					sn, err = all.Import(cmd.Context(), in, o)
					return err
				})
				if err != nil {
					return err
				}
				whole := h.AsSnapshot(sn)
				if err := whole.Lacks(); err != nil {
					s.warn([]string{fmt.Sprintf("%v (%s)", err, smartvm.Hint(err))})
				}
				if s.JSON() {
					return s.WriteJSON(entryOf(whole))
				}
				_, err = fmt.Fprintln(s.Stdout, sn.ID)
				return err
			})
		},
	}
	cmd.Flags().StringVar(&o.Name, "name", "", "second `name` of the snapshot, in place of its own")
	return cmd
}

// differs are the flags that say how a VM differs from the snapshot's.
type differs struct {
	smartvm.RestoreOptions
	publish, labels []string
	remove          bool
}

func (d *differs) flags(cmd *cobra.Command, plural string) {
	f := cmd.Flags()
	f.StringVar(&d.Name, "name", "", "second `name` of the VM"+plural)
	f.StringVar(&d.Hostname, "hostname", "", "`name` that the guest gives itself"+plural)
	f.StringArrayVarP(&d.labels, "label", "l", nil, "`key=value` to keep with the VM; may be repeated")
	f.StringVar((*string)(&d.Memory), "memory", "", "`how` it gets its memory: file, or uffd, served by its own process")
	f.StringVar(&d.HugePages, "huge-pages", "", "`kind` of its memory's pages: None, Transparent or 2M; Firecracker 1.17")
	f.BoolVar(&d.Trust, "trust", false, "take an imported snapshot for one of this host's own")
	f.BoolVar(&d.Paused, "paused", false, "leave it paused: smartvm resume lets it go on at once")
	f.BoolVar(&d.remove, "rm", false, "remove the VM when it ends")
}

func (d *differs) finish() (err error) {
	if d.Memory != "" && d.Memory != smartvm.MemoryFile && d.Memory != smartvm.MemoryUFFD {
		return fmt.Errorf("--memory %s: want file or uffd", d.Memory)
	}
	for _, text := range d.publish {
		ports, err := vmflags.ParsePorts(text)
		if err != nil {
			return err
		}
		d.Ports = append(d.Ports, ports...)
	}
	d.Labels, err = parseLabels(d.labels)
	return err
}
