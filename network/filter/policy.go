package filter

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/policy"
)

// Layer tells the policies that a guest's packets must pass, in order.
type Layer int

// The layers.
const (
	OfNetwork Layer = iota
	Own
)

// part is one policy in a guest's chains.
type part struct {
	guest    *Guest
	layer    Layer
	policy   *policy.Policy
	compiled []policy.Compiled
}

// parts are the policies that are in chains of the guest's own.
func (g *Guest) parts() (all []part, err error) {
	for layer, p := range []*policy.Policy{OfNetwork: g.Network, Own: g.Policy} {
		if p == nil {
			continue
		}
		compiled, err := p.Compile()
		if err != nil {
			return nil, err
		}
		all = append(all, part{g, Layer(layer), p, compiled})
	}
	return all, nil
}

func (g *Guest) chain(l Layer) string {
	return map[Layer]string{OfNetwork: "network-", Own: "guest-"}[l] + g.Tap
}

// chains are those of the guest, none where no policy is its own: the first is that which packets come to.
func (g *Guest) chains(l *layout, parts []part) []ruled {
	if len(parts) == 0 {
		return nil
	}
	entry := ruled{chain: nftables.Chain{Table: l.inet, Name: g.chain(Own)}}
	var all []ruled
	for i, p := range parts {
		rules := policyRules{l.inet, p.policy.DefaultAction != policy.Deny, expr.VerdictAccept, &parts[i]}.of(p.compiled)
		if p.layer == Own {
			entry.rules = append(entry.rules, rules...)
			continue
		}
		entry.rules = plain(jump(g.chain(p.layer)))
		all = append(all, ruled{nftables.Chain{Table: l.inet, Name: g.chain(p.layer)}, rules})
	}
	if g.Policy == nil {
		entry.rules = append(entry.rules, rule{exprs: accept()})
	}
	return append([]ruled{entry}, all...)
}

// names returns the names of the sets that hold the addresses of the i-th rule's domain.
func (p *part) names(i int) (ip4, ip6 string) {
	return p.guest.names(p.layer, i)
}

func (g *Guest) names(l Layer, i int) (ip4, ip6 string) {
	name := map[Layer]string{OfNetwork: "network-names-", Own: "names-"}[l] + g.Tap + "-" + strconv.Itoa(i)
	return name + "-4", name + "-6"
}

func (p *part) sets(l *layout) (all []*nftables.Set) {
	for i, c := range p.compiled {
		if c.Domain == "" {
			continue
		}
		ip4, ip6 := p.names(i)
		all = append(all, l.names(ip4, nftables.TypeIPAddr), l.names(ip6, nftables.TypeIP6Addr))
	}
	return all
}

// maxNames bounds the addresses of one domain rule.
const maxNames = 1024

func (l *layout) names(name string, kind nftables.SetDatatype) *nftables.Set {
	return &nftables.Set{Table: l.inet, Name: name, KeyType: kind, HasTimeout: true, Size: maxNames}
}

// Name lets the guest reach addresses, because of the i-th rule of a policy, a domain's, for a time.
func (g *Guest) Name(of Layer, i int, addresses []netip.Addr, ttl time.Duration) error {
	conn, err := open()
	if err != nil {
		return err
	}
	l := newLayout(g.Table)
	ip4, ip6 := g.names(of, i)
	for _, a := range addresses {
		set := l.names(ip4, nftables.TypeIPAddr)
		if a = a.Unmap(); a.Is6() {
			set = l.names(ip6, nftables.TypeIP6Addr)
		}
		element := []nftables.SetElement{{Key: a.AsSlice(), Timeout: ttl}}
		// An element that is there keeps its old end unless it is made anew.
		for _, do := range []func(*nftables.Set, []nftables.SetElement) error{conn.SetAddElements, conn.SetDeleteElements, conn.SetAddElements} {
			if err := do(set, element); err != nil {
				return fmt.Errorf("allow %s: %w", a, err)
			}
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("allow addresses of a name: %w", err)
	}
	return nil
}

// policyRules make rules of a policy: the first that matches decides.
type policyRules struct {
	table   *nftables.Table
	allowed bool             // what no rule is about
	allow   expr.VerdictKind // what "allow" means
	part    *part            // whose names' addresses are meant
}

// end is what the i-th rule does, or what is done when none matches.
func (p policyRules) end(compiled []policy.Compiled, i int) rule {
	yes, text := p.allowed, "default deny"
	if p.allowed {
		text = "default allow"
	}
	if i < len(compiled) {
		yes, text = compiled[i].Allow, compiled[i].Text
	}
	switch {
	case p.part != nil && p.part.layer == OfNetwork:
		return rule{exprs: goTo(egressEnd(i))}
	case yes:
		return rule{exprs: exprs{&expr.Counter{}, &expr.Verdict{Kind: p.allow}}, text: text}
	}
	return rule{exprs: refuse(), text: text}
}

func (p policyRules) of(compiled []policy.Compiled) (all []rule) {
	for i, c := range compiled {
		where := []exprs{nil}
		switch {
		case c.Prefixes != nil:
			for _, set := range prefixSets(p.table, c.Prefixes) {
				end := p.end(compiled, i)
				to, fam := dest4, byte(unix.NFPROTO_IPV4)
				if set.set.KeyType == nftables.TypeIP6Addr {
					to, fam = dest6, unix.NFPROTO_IPV6
				}
				all = append(all, rule{exprs: join(nfproto(fam), exprs{load(to, reg), inSet(set.set)}, end.exprs), text: end.text, set: set})
			}
			continue
		case c.Domain != "":
			ip4, ip6 := p.part.names(i)
			where = []exprs{
				join(nfproto(unix.NFPROTO_IPV4), exprs{load(dest4, reg), &expr.Lookup{SourceRegister: reg, SetName: ip4}}),
				join(nfproto(unix.NFPROTO_IPV6), exprs{load(dest6, reg), &expr.Lookup{SourceRegister: reg, SetName: ip6}}),
			}
		case c.Prefix.IsValid():
			where = []exprs{toPrefix(c.Prefix)}
			if !c.Allow {
				for _, p := range policy.Embedding(c.Prefix) {
					where = append(where, toPrefix(p))
				}
			}
		}
		what := []rule{{}}
		if len(c.Protocols) > 0 {
			what = nil
		}
		for _, proto := range c.Protocols {
			r := rule{exprs: l4(proto)}
			if len(c.Ports) > 0 {
				r.set = portSet(p.table, c.Ports)
				r.exprs = join(r.exprs, exprs{load(destPort, reg)}, exprs{inSet(r.set.set)})
			}
			what = append(what, r)
		}
		for _, w := range where {
			for _, r := range what {
				end := p.end(compiled, i)
				all = append(all, rule{exprs: join(w, r.exprs, end.exprs), text: end.text, set: r.set})
			}
		}
	}
	return append(all, p.end(compiled, len(compiled)))
}

func portSet(table *nftables.Table, ranges []policy.PortRange) *member {
	m := &member{set: &nftables.Set{Table: table, Anonymous: true, Constant: true, Interval: true, KeyType: nftables.TypeInetService}}
	for _, r := range ranges {
		m.elements = append(m.elements, nftables.SetElement{Key: port(r.First)})
		if r.Last < 65535 { // the last interval may be open
			m.elements = append(m.elements, nftables.SetElement{Key: port(r.Last + 1), IntervalEnd: true})
		}
	}
	return m
}

// prefixSets are two sets, of IPv4 and of IPv6, that hold the addresses of prefixes, and those that embed them.
func prefixSets(table *nftables.Table, prefixes []netip.Prefix) []*member {
	byKind := map[bool][]netip.Prefix{}
	for _, p := range prefixes {
		for _, p := range append(policy.Embedding(p), p) {
			byKind[p.Addr().Is4()] = append(byKind[p.Addr().Is4()], p)
		}
	}
	var all []*member
	for _, is4 := range []bool{true, false} {
		kind := map[bool]nftables.SetDatatype{true: nftables.TypeIPAddr, false: nftables.TypeIP6Addr}[is4]
		m := &member{set: &nftables.Set{Table: table, Anonymous: true, Constant: true, Interval: true, KeyType: kind}}
		sorted := slices.SortedFunc(slices.Values(byKind[is4]), func(a, b netip.Prefix) int {
			return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
		})
		var next netip.Addr // the first behind the last range, which is open while that is valid
		for i, p := range sorted {
			if i > 0 && !next.IsValid() {
				break // it goes to the end
			}
			if i > 0 && p.Addr().Less(next) {
				continue // within the one before
			}
			if i > 0 && p.Addr() != next {
				m.elements = append(m.elements, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
			}
			if i == 0 || p.Addr() != next {
				m.elements = append(m.elements, nftables.SetElement{Key: p.Addr().AsSlice()})
			}
			next = lastOf(p).Next()
		}
		if next.IsValid() {
			m.elements = append(m.elements, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
		}
		all = append(all, m)
	}
	return all
}

// lastOf is the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	a := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(a)*8; bit++ {
		a[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(a)
	return last
}
