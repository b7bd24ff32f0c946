// Package inspect tells what rules do to guests: the policies that are theirs, and the firewalls of
// others.
package inspect

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"push.rocks/smartvm/network/filter"
)

// Blockers lists chains of others that drop what is forwarded, or what comes to the host itself,
// unless a rule of theirs accepts it, by their policy (Docker's, ufw's) or a last rule
// (firewalld's): "FAMILY TABLE CHAIN". Those of iptables-legacy are in no table of nftables.
func Blockers(hook *nftables.ChainHook) ([]string, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	families := map[nftables.TableFamily]string{
		nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip",
		nftables.TableFamilyIPv6: "ip6",
	}
	var all []string
	for _, c := range chains {
		family := families[c.Table.Family]
		if family == "" || strings.HasPrefix(c.Table.Name, filter.TablePrefix) || c.Hooknum == nil || *c.Hooknum != *hook {
			continue
		}
		blocks := c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
		if !blocks {
			rules, err := conn.GetRules(c.Table, c)
			if err != nil {
				return nil, fmt.Errorf("list rules of %s: %w", c.Table.Name, err)
			}
			blocks = len(rules) > 0 && refusesAll(rules[len(rules)-1])
		}
		if blocks {
			all = append(all, family+" "+c.Table.Name+" "+c.Name)
		}
	}
	for _, l := range legacies {
		blocks, err := l.blocks(int(*hook))
		if err != nil {
			return nil, fmt.Errorf("look at rules of iptables-legacy: %w", err)
		}
		if blocks {
			all = append(all,
				l.family+" filter "+
					map[nftables.ChainHook]string{*nftables.ChainHookInput: "INPUT", *nftables.ChainHookForward: "FORWARD"}[*hook]+
					" (iptables-legacy)")
		}
	}
	slices.Sort(all)
	return all, nil
}

// refusesAll says whether a rule drops or rejects whatever comes to it.
func refusesAll(r *nftables.Rule) bool {
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return e.Kind == expr.VerdictDrop
		default:
			return false
		}
	}
	return false
}
