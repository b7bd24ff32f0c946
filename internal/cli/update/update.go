// Package update has the command that changes a VM that is there.
package update

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cli/guest"
	"push.rocks/smartvm/internal/vmflags"
)

// Shell is the command line that the command is part of.
type Shell struct{ *guest.Shell }

// Commands is the command alone.
func (s *Shell) Commands() []*cobra.Command { return []*cobra.Command{s.update()} }

// updates are the flags of update.
type updates struct {
	policy             vmflags.Policy
	noPolicy           bool
	publish, unpublish []string
	rx, tx, id         string
	live               live
}

func (s *Shell) update() *cobra.Command {
	u := &updates{}
	cmd := &cobra.Command{
		Use:   "update [flags] VM",
		Short: "Change what a VM may reach, its ports, limits and memory",
		Long: "Change what a VM may reach, which ports of the host lead to it, and how much it may\n" +
			"receive and send. One that runs has it at once, and what it has open ends where it\n" +
			"is not allowed any more; another has it from its next start on. Flags of rules make\n" +
			"a new policy, in place of the one before.\n\n" +
			"What is said of its memory and devices is for a VM that runs, and ends with its run:\n" +
			"inspect shows how far the guest has come.",
		Example: "  smartvm update --allow tcp:*.debian.org:443 --default deny web\n" +
			"  smartvm update -p 8443:443 --unpublish 80 web\n" +
			"  smartvm update --rx 10M --tx 80mbit web; smartvm update --rx 0 web\n" +
			"  smartvm update --hotplug-memory 1G web",
		Args:              s.Takes(1, 1, "a VM"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			changes, steps := 0, u.live.steps(cmd.Flags())
			cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
				if f.Changed && !slices.Contains(liveFlags, f.Name) {
					changes++
				}
			})
			change, err := u.change()
			if changes+len(steps) == 0 {
				err = errors.Join(err, errors.New("nothing to change: give rules, ports, rates or memory"))
			}
			if err != nil {
				return s.Usage(err, "")
			}
			h, m, err := s.One(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			if changes > 0 {
				err = m.Update(cmd.Context(), change)
			}
			for _, step := range steps {
				if err == nil {
					err = step(cmd.Context(), m)
				}
			}
			if err != nil {
				return err
			}
			if s.JSON() {
				in, err := m.Inspect(cmd.Context())
				if err != nil {
					return err
				}
				return s.WriteJSON(in)
			}
			_, err = fmt.Fprintln(s.Stdout, args[0])
			return err
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	u.policy.Add(f)
	f.BoolVar(&u.noPolicy, "no-policy", false, "take its policy away: its network's alone holds")
	f.StringArrayVarP(&u.publish, "publish", "p", nil, "one more `port` of the host that leads to it: "+
		vmflags.PublishForms+"; may be repeated")
	f.StringArrayVar(&u.unpublish, "unpublish", nil,
		"`PORT[/udp]` of the VM to which nobody is led any more; may be repeated")
	f.StringVar(&u.rx, "rx", "",
		"what it may receive: `rate` in bytes a second, such as 10M, or bits, such as 80mbit; 0: all")
	f.StringVar(&u.tx, "tx", "", "what it may send: `rate`, likewise")
	f.StringVar(&u.id, "interface", "eth0", "`id` of the interface with these limits")
	u.live.add(f)
	return cmd
}

// change is what the flags say about the VM's configuration.
func (u *updates) change() (func(*smartvm.Spec) error, error) {
	var errs []error
	p, err := u.policy.Of(nil)
	errs = append(errs, err)
	if u.noPolicy && p != nil {
		errs = append(errs, errors.New("--no-policy, and rules: leave one of them out"))
	}
	var add []smartvm.Port
	for _, text := range u.publish {
		ports, err := vmflags.ParsePorts(text)
		add, errs = append(add, ports...), append(errs, err)
	}
	var gone []smartvm.Port
	for _, text := range u.unpublish {
		number, protocol, _ := strings.Cut(text, "/")
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil || n == 0 || !slices.Contains([]string{"", "tcp", "udp"}, protocol) {
			errs = append(errs, fmt.Errorf("--unpublish %q: want PORT[/tcp|/udp]", text))
		}
		gone = append(gone, smartvm.Port{GuestPort: uint16(n), Protocol: protocol})
	}
	limits := map[string]*smartvm.RateLimiter{}
	for name, text := range map[string]string{"rx": u.rx, "tx": u.tx} {
		if text == "" {
			continue
		}
		limit, err := vmflags.ParseRate(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s %q is no rate: %w", name, text, err))
		} else if limit.Bandwidth.Size == 0 {
			limit = nil
		}
		limits[name] = limit
	}
	return func(vm *smartvm.Spec) error {
		if u.noPolicy || p != nil {
			vm.Policy = p
		}
		for _, g := range gone {
			before := len(vm.Ports)
			vm.Ports = slices.DeleteFunc(vm.Ports, func(p smartvm.Port) bool {
				return p.GuestPort == g.GuestPort && (p.Protocol == "udp") == (g.Protocol == "udp")
			})
			if len(vm.Ports) == before {
				return fmt.Errorf("nothing leads to port %d of it", g.GuestPort)
			}
		}
		vm.Ports = append(vm.Ports, add...)
		if len(limits) == 0 {
			return nil
		}
		i := slices.IndexFunc(vm.NetworkInterfaces, func(n smartvm.NetworkInterface) bool { return n.IfaceID == u.id })
		if i < 0 {
			return fmt.Errorf("it has no interface %s", u.id)
		}
		for name, limit := range limits {
			n := &vm.NetworkInterfaces[i]
			*map[string]**smartvm.RateLimiter{"rx": &n.RxRateLimiter, "tx": &n.TxRateLimiter}[name] = limit
		}
		return nil
	}, errors.Join(errs...)
}
