package policy

import (
	"net/netip"
	"slices"
)

// Target is where a connection leads.
type Target struct {
	Address  netip.Addr
	Protocol uint8  // of IP
	Port     uint16 // of TCP and UDP
}

// Allows says what rules say of a target, or byDefault where none does. Named says whether a domain
// is known to have the target's address.
func Allows(rules []Compiled, byDefault Action, to Target, named func(domain string) bool) bool {
	for i := range rules {
		if rules[i].matches(to, named) {
			return rules[i].Allow
		}
	}
	return byDefault != Deny
}

func (c *Compiled) matches(to Target, named func(domain string) bool) bool {
	if len(c.Protocols) > 0 && !slices.Contains(c.Protocols, to.Protocol) {
		return false
	}
	if len(c.Ports) > 0 && !slices.ContainsFunc(c.Ports, func(r PortRange) bool {
		return r.First <= to.Port && to.Port <= r.Last
	}) {
		return false
	}
	within := func(p netip.Prefix) bool {
		return p.Contains(to.Address) || !c.Allow && slices.ContainsFunc(Embedding(p), func(e netip.Prefix) bool {
			return e.Contains(to.Address)
		})
	}
	switch {
	case c.Prefixes != nil:
		return slices.ContainsFunc(c.Prefixes, within)
	case c.Domain != "":
		return named(c.Domain)
	}
	return !c.Prefix.IsValid() || within(c.Prefix)
}
