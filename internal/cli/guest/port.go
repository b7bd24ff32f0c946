package guest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
)

func (s *Shell) port() *cobra.Command {
	return &cobra.Command{
		Use:   "port VM [PORT[/udp]]",
		Short: "List the ports of the host that lead to a VM",
		Long: "List the ports of the host that lead to a VM which runs, those that were chosen\n" +
			"for it too, or those that lead to one PORT of it.",
		Example: "  smartvm port web\n" +
			"  smartvm port web 80",
		Args:              s.Takes(1, 2, "a VM and a port of it"),
		ValidArgsFunction: s.VMs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var guest uint64
			protocol := ""
			if len(args) == 2 {
				number, of, _ := strings.Cut(strings.ToLower(args[1]), "/")
				var err error
				if guest, err = strconv.ParseUint(number, 10, 16); err != nil || guest == 0 ||
					!slices.Contains([]string{"", "tcp", "udp"}, of) {
					return s.Usage(fmt.Errorf("%q: want PORT[/tcp|/udp]", args[1]), "")
				}
				if protocol = "tcp"; of == "udp" {
					protocol = of
				}
			}
			h, m, err := s.One(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			defer h.Close()
			in, err := m.Inspect(cmd.Context())
			if err != nil {
				return err
			}
			all := slices.DeleteFunc(in.Ports(), func(p smartvm.PublishedPort) bool {
				return guest != 0 && (uint64(p.Guest) != guest || p.Protocol != protocol)
			})
			if guest != 0 && len(all) == 0 {
				return fmt.Errorf("VM %s: no port of the host leads to %d/%s", args[0], guest, protocol)
			}
			return s.showPorts(all, guest == 0)
		},
	}
}

// showPorts lists ports as docker does, with what they lead to or without.
func (s *Shell) showPorts(all []smartvm.PublishedPort, whole bool) error {
	if s.JSON() {
		return s.WriteJSON(append([]smartvm.PublishedPort{}, all...))
	}
	for _, p := range all {
		for _, a := range p.Addresses() {
			if whole {
				fmt.Fprintf(s.Stdout, "%d/%s -> ", p.Guest, p.Protocol)
			}
			fmt.Fprintln(s.Stdout, a)
		}
	}
	return nil
}
