package nft

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// Ruled is a chain with its rules. Hook nil: one that others jump to.
type Ruled struct {
	Chain nftables.Chain
	Rules []Rule
}

// Rule is one of its rules.
type Rule struct {
	Exprs Exprs
	Text  string    // its comment
	Set   *Elements // an anonymous set that Exprs look into
}

// Chain is a chain with rules.
func Chain(c nftables.Chain, rules []Rule) Ruled { return Ruled{Chain: c, Rules: rules} }

// Plain are rules that nothing more is said of.
func Plain(all ...Exprs) (rules []Rule) {
	for _, e := range all {
		rules = append(rules, Rule{Exprs: e})
	}
	return rules
}

// maxComment is what nft shows of one, in bytes.
const maxComment = 128

// AddChains adds chains that are not there.
func AddChains(conn *nftables.Conn, chains []Ruled) error {
	for i := range chains {
		conn.AddChain(&chains[i].Chain)
	}
	for i := range chains {
		if err := chains[i].AddRules(conn); err != nil {
			return err
		}
	}
	return nil
}

// AddRules adds the rules of a chain that is there. To add the chain twice would make the kernel
// wait for 10 ms.
func (c *Ruled) AddRules(conn *nftables.Conn) error {
	for _, rule := range c.Rules {
		if rule.Set != nil {
			if err := conn.AddSet(rule.Set.Set, rule.Set.Elements); err != nil {
				return err
			}
			for _, e := range rule.Exprs {
				if lookup, ok := e.(*expr.Lookup); ok && lookup.SetName == "" {
					lookup.SetName, lookup.SetID = rule.Set.Set.Name, rule.Set.Set.ID
				}
			}
		}
		var comment []byte
		if text := rule.comment(); text != "" {
			comment = userdata.AppendString(nil, userdata.TypeComment, text)
		}
		conn.AddRule(&nftables.Rule{Table: c.Chain.Table, Chain: &c.Chain, Exprs: rule.Exprs, UserData: comment})
	}
	return nil
}

func (r *Rule) comment() string { return r.Text[:min(len(r.Text), maxComment)] }

// Comments are those of its rules, as package-level Comments tells them.
func (c *Ruled) Comments() (all []string) {
	for i := range c.Rules {
		all = append(all, c.Rules[i].comment())
	}
	return all
}

// Base is a chain that packets go through.
func Base(t *nftables.Table, name string, hook *nftables.ChainHook, priority *nftables.ChainPriority) nftables.Chain {
	return nftables.Chain{Table: t, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: priority}
}

// NAT is a chain that a connection's first packet goes through.
func NAT(t *nftables.Table, name string, hook *nftables.ChainHook, priority *nftables.ChainPriority) nftables.Chain {
	return nftables.Chain{Table: t, Name: name, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: priority}
}
