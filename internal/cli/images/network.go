package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmflags"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/subnet"
	"push.rocks/smartvm/network/wireguard"
)

func (s *Shell) network() *cobra.Command {
	return s.Group("network", "Make and remove networks",
		"Manage the networks that run --net NAME joins. The network default is always there.\n"+
			"A network takes no room on the host while no VM runs on it.",
		s.listNetworks(), s.inspectNetworks(), s.createNetwork(), s.updateNetwork(), s.removeNetworks(), s.pruneNetworks(),
		s.warmNetwork(), s.networkLog())
}

// networkState is a network as the commands show it.
type networkState struct {
	network.Config
	Up    bool            `json:"up"`
	VMs   []string        `json:"vms"`
	Slots smartvm.Slots   `json:"slots"`           // warm ones
	Rules []inspect.Count `json:"rules,omitempty"` // what its policy has matched

	WireGuard *wireguard.State `json:"wireguardState,omitempty"`
}

// networks gives f the networks of the host.
func (s *Shell) networks(f func(*smartvm.Host, *catalog.Store) error) error {
	h, err := s.Host()
	if err != nil {
		return err
	}
	all, err := h.Networks()
	if err == nil {
		err = f(h, all)
	}
	return errors.Join(err, h.Close())
}

func stateOf(h *smartvm.Host, c network.Config) networkState {
	vms := []string{}
	for _, dir := range network.Users(filepath.Join(h.RuntimeDir(), store.NetworkDir), c.Name) {
		vms = append(vms, filepath.Base(dir))
	}
	slots, _ := h.Slots(c.Name) // that is there: none otherwise
	state := networkState{Config: c, Up: len(vms) > 0 || slots.All > 0, VMs: vms, Slots: slots}
	if _, via, err := network.Current(filepath.Join(h.RuntimeDir(), store.NetworkDir), c.Name); err == nil && via != "" {
		state.WireGuard, _ = wireguard.Status(via) // likewise
	}
	if state.Up {
		state.Rules, _ = inspect.Counts(c.Table(), "") // who may not look at tables sees the rest
	}
	return state
}

func (s *Shell) listNetworks() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List networks",
		Args:  s.Takes(0, 0, "no arguments"),
		RunE: func(*cobra.Command, []string) error {
			return s.networks(func(h *smartvm.Host, all *catalog.Store) error {
				list, unreadable := all.List() // the others are shown
				states := []networkState{}
				rows := []string{}
				for _, c := range list {
					state := stateOf(h, c)
					states = append(states, state)
					rows = append(rows,
						fmt.Sprintf("%s\t%s\t%s\t%s\t%d\t%d", c.Name, c.Bridge, shown(c.Subnet), shown(c.Subnet6), len(state.VMs),
							state.Slots.All))
				}
				if s.JSON() {
					return errors.Join(s.WriteJSON(states), unreadable)
				}
				return errors.Join(s.Table("NAME\tBRIDGE\tSUBNET\tIPV6\tVMS\tSLOTS", rows), unreadable)
			})
		},
	}
}

// shown is a subnet, if there is one.
func shown(p netip.Prefix) string {
	if !p.IsValid() {
		return "-"
	}
	return p.String()
}

func (s *Shell) inspectNetworks() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect NAME...",
		Short: "Show all there is to know about networks, as JSON",
		Args:  s.Takes(1, -1, "a network's name"),
		RunE: func(_ *cobra.Command, args []string) error {
			return s.networks(func(h *smartvm.Host, all *catalog.Store) error {
				var states []networkState
				for _, name := range args {
					c, err := all.Get(name)
					if err != nil {
						return err
					}
					states = append(states, stateOf(h, c))
				}
				return s.WriteJSON(states)
			})
		},
	}
}

func (s *Shell) createNetwork() *cobra.Command {
	var c network.Config
	var net4, net6 string
	var isolate bool
	var lan lanFlags
	var rules vmflags.Policy
	cmd := &cobra.Command{
		Use:   "create [flags] NAME",
		Short: "Make a network",
		Long: "Make a network. VMs on it reach each other, unless --isolate is given, and the\n" +
			"outside, unless --internal is.\n\n" +
			"With --on its VMs are on a bridge that is there, such as one to the LAN, with\n" +
			"addresses of that LAN's --subnet, or without one such as they ask its DHCP server\n" +
			"for. They can forge none. --net bridge:DEV is the same without a network.",
		Example: "  smartvm network create lab\n" +
			"  smartvm network create --subnet 10.77.0.0/16 --internal back\n" +
			"  smartvm network create --on br0 --subnet 192.168.1.0/24 \\\n" +
			"    --gateway 192.168.1.1 --range 192.168.1.200-192.168.1.220 lan",
		Args: s.Takes(1, 1, "a name"),
		RunE: func(_ *cobra.Command, args []string) error {
			c.Name, c.Mutual = args[0], !isolate
			for to, text := range map[*netip.Prefix]string{&c.Subnet: net4, &c.Subnet6: net6} {
				if text == "" {
					continue
				}
				var err error
				if *to, err = netip.ParsePrefix(text); err != nil {
					return s.Usage(&subnet.Error{Subnet: text, Reason: "must be like 172.30.5.0/24 or fd00:5::/64"}, "")
				}
			}
			if c.WireGuardConfig != "" {
				if err := absolute(&c.WireGuardConfig); err != nil {
					return s.Usage(err, "")
				}
			}
			var err error
			if c.Policy, err = rules.Of(nil); err != nil {
				return s.Usage(err, "")
			}
			if err := lan.of(&c); err != nil {
				return s.Usage(err, "")
			}
			return s.networks(func(_ *smartvm.Host, all *catalog.Store) error {
				made, err := all.Create(c)
				switch {
				case errors.Is(err, fs.ErrExist):
					return err
				case err != nil:
					return s.Usage(err, "")
				case s.JSON():
					return s.WriteJSON(made)
				}
				_, err = fmt.Fprintln(s.Stdout, made.Name)
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&net4, "subnet", "", "IPv4 `subnet`, /8 to /30; without it one that is free is chosen")
	f.StringVar(&net6, "subnet6", "", "IPv6 `subnet`, a /64; without it one is made up")
	f.StringVar(&c.Bridge, "interface", "", "`name` of its bridge on the host")
	f.IntVar(&c.MTU, "mtu", 0, "largest packet in `bytes` (1500)")
	f.BoolVar(&isolate, "isolate", false, "keep its VMs from each other")
	f.BoolVar(&c.Routed, "routed", false,
		"let its VMs reach each other by the host alone, as policies allow; without it policies say nothing of that")
	f.BoolVar(&c.Inside, "internal", false, "let nothing leave the network")
	f.StringVar(&c.WireGuard, "wireguard", "", "`interface` of WireGuard's by which alone its VMs reach the outside")
	f.StringVar(&c.WireGuardConfig, "wireguard-config", "", "the same, made of a `file` as wg-quick has it")
	lan.add(f)
	settingFlags(f, &c.Settings, &rules)
	return cmd
}

// lanFlags are those of a network whose bridge is not ours.
type lanFlags struct{ on, gateway, between string }

func (l *lanFlags) add(f *pflag.FlagSet) {
	f.StringVar(&l.on, "on", "", "`bridge` that is there, and stays as it is")
	f.StringVar(&l.gateway, "gateway", "", "with --on, the `address` of the LAN's router")
	f.StringVar(&l.between, "range", "",
		"with --on, the `addresses` FIRST-LAST for VMs without --ip, which nothing else has")
}

// of says what the flags say of a network.
func (l *lanFlags) of(c *network.Config) error {
	if l.on == "" {
		if l.gateway != "" || l.between != "" {
			return errors.New("--gateway and --range are for networks with --on")
		}
		return nil
	}
	if c.Bridge != "" {
		return errors.New("--interface names a bridge that is made, --on one that is there: want one of them")
	}
	c.Bridge, c.LAN = l.on, new(bridged.LAN)
	from, to, _ := strings.Cut(l.between, "-")
	var errs []error
	for _, a := range []struct {
		flag, text string
		to         *netip.Addr
		given      bool
	}{
		{"gateway", l.gateway, &c.LAN.Gateway, l.gateway != ""},
		{"range", from, &c.LAN.First, l.between != ""},
		{"range", to, &c.LAN.Last, l.between != ""},
	} {
		var err error
		if *a.to, err = netip.ParseAddr(a.text); err != nil && a.given {
			errs = append(errs, fmt.Errorf("--%s: %q is no IP address", a.flag, a.text))
		}
	}
	return errors.Join(errs...)
}

// absolute makes a configuration's path one that any process finds, and says what is wrong with it
// now rather than later.
func absolute(path *string) (err error) {
	f, err := os.Open(*path)
	if err != nil {
		return err
	}
	_, err = wireguard.Parse(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s: %w", *path, err)
	}
	*path, err = filepath.Abs(*path)
	return err
}

func (s *Shell) removeNetworks() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove networks",
		Args:  s.Takes(1, -1, "a network's name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return s.networks(func(h *smartvm.Host, all *catalog.Store) error {
				var errs []error
				for _, name := range args {
					errs = append(errs, removeNetwork(cmd.Context(), h, all, name))
				}
				return errors.Join(errs...)
			})
		},
	}
}

// removeNetwork leaves one alone that VMs are on.
func removeNetwork(ctx context.Context, h *smartvm.Host, all *catalog.Store, name string) error {
	if vms := stateOf(h, network.Config{Name: name}).VMs; len(vms) > 0 {
		return hint.Add(fmt.Errorf("remove network %s: %d VMs use it, one is %s", name, len(vms), vms[0]),
			"smartvm stop ends them")
	}
	made, err := usersOf(ctx, h)
	if err != nil {
		return err
	}
	if vm := made[name]; vm != "" {
		return hint.Add(fmt.Errorf("remove network %s: VM %s was made for it, and could not be started again", name, vm),
			"smartvm rm %s removes it", vm)
	}
	if slots, err := h.Slots(name); err == nil && slots.All > 0 {
		if slots, err = h.Warm(ctx, name, 0); err != nil {
			return err
		}
		if slots.All > 0 {
			return hint.Add(fmt.Errorf("remove network %s: VMs have %d of its slots", name, slots.All),
				"smartvm rm removes them")
		}
	}
	return all.Remove(name)
}

// usersOf returns by network one of the VMs that are on it when they run.
func usersOf(ctx context.Context, h *smartvm.Host) (map[string]string, error) {
	all, err := h.Machines(ctx)
	if err != nil {
		return nil, err
	}
	made := map[string]string{}
	for _, m := range all {
		spec := m.Spec()
		for _, i := range spec.NetworkInterfaces {
			made[i.Network] = m.ID()
		}
	}
	return made, nil
}

func (s *Shell) warmNetwork() *cobra.Command {
	return &cobra.Command{
		Use:   "warm NAME SLOTS",
		Short: "Keep namespaces ready for VMs with --net netns",
		Long: "Make namespaces for VMs with --net netns:NAME before they are wanted, or remove\n" +
			"those that no VM has, until there are SLOTS of them. A VM takes one that is free,\n" +
			"and gives it back when it is removed; with none free one is made for it alone.",
		Example: "  smartvm network warm default 20\n  smartvm network warm default 0",
		Args:    s.Takes(2, 2, "a network's name and a number"),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := strconv.Atoi(args[1])
			if err != nil || n < 0 || n > attach.MaxSlots {
				return s.Usage(fmt.Errorf("%q is no number of slots: want 0 to %d", args[1], attach.MaxSlots), "")
			}
			return s.networks(func(h *smartvm.Host, _ *catalog.Store) error {
				slots, err := h.Warm(cmd.Context(), args[0], n)
				switch {
				case err != nil:
					return err
				case s.JSON():
					return s.WriteJSON(slots)
				}
				_, err = fmt.Fprintf(s.Stdout, "%d slots, %d free\n", slots.All, slots.Free)
				return err
			})
		},
	}
}

func (s *Shell) pruneNetworks() *cobra.Command {
	return &cobra.Command{
		Use:   "prune",
		Short: "Remove the networks of no VM",
		Args:  s.Takes(0, 0, "no arguments"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.networks(func(h *smartvm.Host, all *catalog.Store) error {
				list, err := all.List()
				if err != nil {
					return err
				}
				made, err := usersOf(cmd.Context(), h)
				if err != nil {
					return err
				}
				removed := []string{}
				for _, c := range list {
					if c.Name == all.Default.Name || made[c.Name] != "" || stateOf(h, c).Up {
						continue
					}
					if err := all.Remove(c.Name); err != nil {
						return err
					}
					removed = append(removed, c.Name)
				}
				if s.JSON() {
					return s.WriteJSON(map[string][]string{"removed": removed})
				}
				for _, name := range removed {
					fmt.Fprintln(s.Stdout, name)
				}
				return nil
			})
		},
	}
}
