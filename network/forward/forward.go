// Package forward has a host forward for our guests and, if it did not before, for nobody else.
//
// Linux decides by the interface at which a packet comes in: where forwarding is off for all, it is
// switched on for each interface by which answers to guests may come, and rules drop what comes in
// there for others than guests (Narrow). The variable for all stays as it is, so that whoever sets
// it is seen: then nothing is dropped, and nothing is switched off in the end.
//
// IPv6 has that since Linux 6.17. Before, forwarding is on for all or none. Whoever switches it on
// for all also has it on for new interfaces (default/forwarding); we set that back at once, so that
// it tells whether somebody else wants it.
package forward

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/rtnl"
)

const (
	all4   = "ipv4/ip_forward"
	all6   = "ipv6/conf/all/forwarding"
	new6   = "ipv6/conf/default/forwarding"
	force6 = "ipv6/conf/all/force_forwarding"
)

func of4(name string) string   { return "ipv4/conf/" + name + "/forwarding" }
func only6(name string) string { return "ipv6/conf/" + name + "/force_forwarding" }

// On says whether the host forwards by itself, or does not have the protocols that it is asked for.
func On(ipv6 bool) bool {
	return readSysctl(all4) != "0" && (!ipv6 || readSysctl(all6) != "0")
}

// State is another when somebody has switched forwarding on or off for all since.
func State() string {
	return strings.Join([]string{readSysctl(all4), readSysctl(all6), readSysctl(new6)}, " ")
}

// Ensure has the host forward what comes from networks and what goes to them. The journal, of
// Sysctls alone, says what was done for that already. It returns where the host forwards for them
// alone, and whether something had to be done.
func Ensure(ctx context.Context, j *journal.Journal, networks []*filter.Tables) (narrow Narrow,
	changed bool, err error,
) {
	ipv6 := false
	for _, t := range networks { // who switches it off for all does so here too
		ipv6 = ipv6 || t.Subnet6.IsValid()
		if err := from(t.Bridge); err != nil {
			return narrow, false, err
		}
	}
	needed, err := needed(ipv6)
	if err != nil {
		return narrow, false, err
	}
	had := map[string]bool{}
	for _, e := range j.Effects() {
		had[e.(*Sysctl).Name] = true
	}
	// The rules first: at no time does the host forward for others.
	narrow = narrowed(append(j.Effects(), needed...))
	for _, t := range networks {
		if err := narrow.set(t.Name); err != nil && !errors.Is(err, fs.ErrNotExist) { // they come back by themselves
			return narrow, false, err
		}
	}
	for _, e := range needed {
		do := j.Do
		if had[e.(*Sysctl).Name] { // somebody has switched it off
			do = func(ctx context.Context, e journal.Effect) error { return e.Apply(ctx) }
		}
		if err := do(ctx, e); err != nil && !errors.Is(err, fs.ErrNotExist) { // an interface may be gone again
			return narrow, false, err
		}
	}
	if slices.ContainsFunc(needed, func(e journal.Effect) bool { return e.(*Sysctl).Name == all6 }) {
		if err := unspread(ctx, j.Effects()); err != nil {
			return narrow, false, err
		}
	}
	return narrow, len(needed) > 0, nil
}

// needed lists what must change for the host to forward.
func needed(ipv6 bool) (all []journal.Effect, err error) {
	off4, off6 := readSysctl(all4) == "0", ipv6 && readSysctl(all6) == "0"
	if !off4 && !off6 {
		return nil, nil
	}
	alone6 := readSysctl(force6) != ""
	interfaces, err := others()
	if err != nil {
		return nil, err
	}
	for _, name := range interfaces {
		if off4 && readSysctl(of4(name)) == "0" {
			all = append(all, &Sysctl{Name: of4(name), Value: "1", Old: "0", Others: all4})
		}
		if off6 && alone6 && readSysctl(only6(name)) == "0" {
			all = append(all, &Sysctl{Name: only6(name), Value: "1", Old: "0"})
		}
	}
	if !off6 || alone6 {
		return all, nil
	}
	// A host that forwards drops what routers have advertised, its own way out, unless it is told to
	// take that all the same. And it makes all interfaces alike.
	for _, name := range interfaces {
		conf := "ipv6/conf/" + name
		if readSysctl(conf+"/accept_ra") == "1" {
			all = append(all, &Sysctl{Name: conf + "/accept_ra", Value: "2", Old: "1"})
		}
		if now := readSysctl(conf + "/forwarding"); now != "" {
			all = append(all, &Sysctl{Name: conf + "/forwarding", Value: now, Old: now})
		}
	}
	return append(all, &Sysctl{Name: all6, Value: "1", Old: "0", Others: new6}), nil
}

// from has the host forward what comes from a bridge of ours.
func from(bridge string) error {
	for _, name := range []string{of4(bridge), "ipv6/conf/" + bridge + "/forwarding", only6(bridge)} {
		if readSysctl(name) != "0" {
			continue
		}
		if err := (&Sysctl{Name: name, Value: "1"}).Apply(context.Background()); err != nil &&
			!errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// unspread gives interfaces back what forwarding for all has set there. They stay what they were,
// hosts or routers.
func unspread(ctx context.Context, effects []journal.Effect) error {
	for _, e := range append(effects, &Sysctl{Name: new6, Value: "0"}) {
		if s := e.(*Sysctl); s.Value == s.Old || s.Name == new6 {
			if err := s.Apply(ctx); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// others lists the host's interfaces by which packets from elsewhere come in: neither its loopback
// nor our bridges, nor the ports of any.
func others() (names []string, err error) {
	links, err := rtnl.Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	bridges := map[int]bool{}
	for _, l := range links {
		if l.Type() == "bridge" {
			bridges[l.Attrs().Index] = true
		}
	}
	for _, l := range links {
		if a := l.Attrs(); a.Name != "lo" && a.Group != filter.Group && !bridges[a.MasterIndex] {
			names = append(names, a.Name)
		}
	}
	return names, nil
}

// narrowed says for what the host forwards only because we want it to.
func narrowed(effects []journal.Effect) (n Narrow) {
	for _, e := range effects {
		s := e.(*Sysctl)
		name := filepath.Base(filepath.Dir(s.Name))
		switch {
		case s.Others == all4 && readSysctl(all4) == "0":
			n.IP4 = append(n.IP4, name)
		case strings.HasSuffix(s.Name, "/force_forwarding") && readSysctl(all6) == "0":
			n.IP6 = append(n.IP6, name)
		case s.Name == all6 && s.Others != "" && readSysctl(new6) != "1":
			n.AllIP6 = true
		}
	}
	slices.Sort(n.IP4)
	slices.Sort(n.IP6)
	n.IP4, n.IP6 = slices.Compact(n.IP4), slices.Compact(n.IP6)
	return n
}
