package images

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/network/dnsproxy"
)

// settingFlags are those of what may be changed while a network is up.
func settingFlags(f *pflag.FlagSet, c *network.Settings, rules *vmflags.Policy) {
	rules.Add(f)
	f.IntVar(&c.MaxConnections, "max-connections", 0,
		"most `connections` of one VM that the host keeps track of (an eighth of what it can)")
	f.IntVar(&c.NewConnections, "new-connections", 0,
		fmt.Sprintf("most `connections` that one VM may begin in a second (%d)", network.DefaultNewConnections))
	f.IntVar(&c.DNSQuestions, "dns-questions", 0,
		fmt.Sprintf("most DNS `questions` that a VM which starts from now on may ask in a second (%d)",
			dnsproxy.DefaultPerSecond))
}

func (s *Shell) updateNetwork() *cobra.Command {
	var now network.Settings
	var rules vmflags.Policy
	var none bool
	cmd := &cobra.Command{
		Use:   "update [flags] NAME",
		Short: "Change what the VMs of a network may reach",
		Long: "Change the policy and the bounds of a network. Its VMs go on, and what they have\n" +
			"open ends where it is not allowed any more. Flags of rules make a new policy, in\n" +
			"place of the one before; bounds of 0 are the usual ones.",
		Example: "  smartvm network update --deny 10.0.0.0/8 lan\n" +
			"  smartvm network update --no-policy --max-connections 5000 lan",
		Args: s.Takes(1, 1, "a network's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f := cmd.Flags()
			p, err := rules.Of(nil)
			if err != nil {
				return s.Usage(err, "")
			}
			if none && p != nil {
				return s.Usage(errors.New("--no-policy, and rules"), "leave one of them out")
			}
			if f.NFlag() == 0 {
				return s.Usage(errors.New("nothing to change"), "give rules, --no-policy or bounds")
			}
			return s.networks(func(h *smartvm.Host, all *catalog.Store) error {
				if _, err := all.Get(args[0]); err != nil {
					return err
				}
				made, err := all.Update(args[0], func(c *network.Settings) {
					if none || p != nil {
						c.Policy = p
					}
					if f.Changed("max-connections") {
						c.MaxConnections = now.MaxConnections
					}
					if f.Changed("new-connections") {
						c.NewConnections = now.NewConnections
					}
					if f.Changed("dns-questions") {
						c.DNSQuestions = now.DNSQuestions
					}
				})
				if err != nil {
					return s.Usage(err, "")
				}
				err = network.Update(cmd.Context(), filepath.Join(h.RuntimeDir(), store.NetworkDir), made)
				switch {
				case err != nil:
					return err
				case s.JSON():
					return s.WriteJSON(stateOf(h, made))
				}
				_, err = fmt.Fprintln(s.Stdout, made.Name)
				return err
			})
		},
	}
	settingFlags(cmd.Flags(), &now, &rules)
	cmd.Flags().BoolVar(&none, "no-policy", false, "take its policy away")
	return cmd
}
