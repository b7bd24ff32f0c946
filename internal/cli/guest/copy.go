package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/human"
)

func (s *Shell) copy() *cobra.Command {
	var o smartvm.CopyOptions
	cmd := &cobra.Command{
		Use:   "cp [flags] SOURCE... DESTINATION",
		Short: "Copy files to and from VMs",
		Long: "Copy files and trees between this host and a running VM. One side is VM:PATH. A\n" +
			"directory that is there takes what is copied under its name; \"/.\" at the end of\n" +
			"a source means what is in it, \"/\" what a link leads to. - is a tar archive on\n" +
			"standard input or output. Modes, times, links and holes are kept; with -a owners\n" +
			"too. Several sources go into a directory, which must be there. What cannot be\n" +
			"copied (devices, FIFOs, sockets, what may not be read) is named, and all else is\n" +
			"copied. Devices and the like are never replaced.",
		Example: "  smartvm cp app.conf web:/etc/\n" +
			"  smartvm cp web:/var/log ./logs\n" +
			"  tar c src | smartvm cp - web:/srv",
		Args: s.Takes(2, -1, "what to copy and where to"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.copyAll(cmd.Context(), args[:len(args)-1], args[len(args)-1], o)
		},
	}
	cmd.Flags().BoolVarP(&o.Owners, "archive", "a", false, "keep the numbers of owners, and set-user-id bits")
	cmd.Flags().BoolVarP(&o.FollowLink, "follow-link", "L", false, "copy what a source that is a link leads to")
	return cmd
}

// copyAll copies sources, all in VMs or all on this host, to the other side. Of several each goes
// into a directory.
func (s *Shell) copyAll(ctx context.Context, sources []string, to string, o smartvm.CopyOptions) error {
	vm, target, intoVM := agent.Split(to)
	for _, from := range sources {
		switch _, _, fromVM := agent.Split(from); {
		case fromVM && intoVM:
			return s.Usage(fmt.Errorf("%s and %s: one of them must be here", from, to),
				"smartvm cp VM:PATH - | smartvm cp - VM:PATH copies from one VM to another")
		case !fromVM && !intoVM:
			return s.Usage(fmt.Errorf("%s and %s: one of them must be in a VM", from, to), "write it as VM:PATH")
		}
	}
	if target == "-" && s.Terminal() {
		return s.Usage(errors.New("an archive is not for a terminal"), "smartvm cp "+sources[0]+" - | tar t")
	}
	if len(sources) > 1 {
		if target == "-" {
			return s.Usage(errors.New("- takes one source"), "")
		}
		target = strings.TrimRight(target, "/") + "/"
	}
	h, err := s.Open(ctx)
	if err != nil {
		return err
	}
	defer h.Close()
	var errs []error
	for _, from := range sources {
		source, file, fromVM := agent.Split(from)
		if fromVM {
			vm = source
		}
		m, err := h.Machine(ctx, vm)
		if err == nil {
			err = s.copyOne(ctx, m, transfer{from: file, to: target, out: fromVM, said: from}, o)
		}
		if errs = append(errs, err); ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// transfer is one copy, out of a VM or into it.
type transfer struct {
	from, to string
	out      bool
	said     string // from, as given
}

func (s *Shell) copyOne(ctx context.Context, m *smartvm.Machine, t transfer, o smartvm.CopyOptions) error {
	var progress human.Transfer
	var total atomic.Int64
	step := path.Base(t.said)
	o.Progress = func(done int64) { progress.Set(step, done, total.Load()) }
	done := s.Status(progress.Text)
	defer done()
	if t.out {
		return m.CopyFrom(ctx, t.from, t.to, s.Stdout, o)
	}
	counting, stop := context.WithCancel(ctx)
	defer stop()
	go func() { total.Store(sizeOf(counting, t.from)) }() // the copy does not wait for that
	return m.CopyTo(ctx, t.from, t.to, s.Stdin, o)
}

// sizeOf is how many bytes the files of a tree have, 0 if nobody knows.
func sizeOf(ctx context.Context, from string) (total int64) {
	err := filepath.WalkDir(from, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if fi, err := d.Info(); err == nil && fi.Mode().IsRegular() {
			total += fi.Size()
		}
		return ctx.Err()
	})
	if err != nil {
		return 0
	}
	return total
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
			return m.Forward(cmd.Context(), l, uint16(guest), func(err error) { fmt.Fprintf(s.Stderr, "smartvm: %v\n", err) })
		},
	}
}
