package filter

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/internal/nft"
	"push.rocks/smartvm/network/policy"
)

// Names tells whose rules about names are meant: those of a network, for a guest's address, or a guest's own.
type Layer int

// The layers, in the order in which a packet must pass them.
const (
	OfNetwork Layer = iota
	Own
)

// nameSets returns the names of the sets that hold, by guest, the addresses of a domain: of those of a guest's own policy, or with no tap of the
// network's.
func nameSets(tap, domain string) (ip4, ip6 string) {
	sum := sha256.Sum256([]byte(domain))
	name := networkNames
	if tap != "" {
		name = "names-" + tap + "-"
	}
	name += strings.ToLower(base32.StdEncoding.EncodeToString(sum[:10]))
	return name + "-4", name + "-6"
}

const (
	networkNames = "network-names-"
	// maxNames bounds the addresses of one domain and guest, maxNetworkNames those of all a network's.
	maxNames        = 1024
	maxNetworkNames = 1 << 20
)

// namesOf are the sets of a policy's domains.
func (l *layout) namesOf(tap string, compiled []policy.Compiled) (all []*nftables.Set) {
	for _, c := range compiled {
		if c.Domain == "" {
			continue
		}
		ip4, ip6 := nameSets(tap, c.Domain)
		for _, s := range []*nftables.Set{l.names(tap, ip4, nftables.TypeIPAddr), l.names(tap, ip6, nftables.TypeIP6Addr)} {
			if !slices.ContainsFunc(all, func(o *nftables.Set) bool { return o.Name == s.Name }) {
				all = append(all, s)
			}
		}
	}
	return all
}

// names is a set whose keys are a guest's address and one that it may reach.
func (l *layout) names(tap, name string, kind nftables.SetDatatype) *nftables.Set {
	size := uint32(maxNames)
	if tap == "" {
		size = maxNetworkNames
	}
	return &nftables.Set{Table: l.inet, Name: name, KeyType: nftables.MustConcatSetType(kind, kind), HasTimeout: true, Size: size}
}

// Names is a guest that reaches addresses of names, by a connection of its own, which the caller closes.
type Names struct {
	Guest
	nft.Lasting
}

// Allow lets the guest reach addresses, because of a domain of a policy's, for a time.
func (g *Names) Allow(of Layer, domain string, addresses []netip.Addr, ttl time.Duration) error {
	return g.Do(func(conn *nftables.Conn) error {
		l := newLayout(g.Table)
		tap := g.Tap
		if of == OfNetwork {
			tap = ""
		}
		ip4, ip6 := nameSets(tap, domain)
		for _, a := range addresses {
			set, from := l.names(tap, ip4, nftables.TypeIPAddr), g.IP4
			if a = a.Unmap(); a.Is6() {
				set, from = l.names(tap, ip6, nftables.TypeIP6Addr), g.IP6
			}
			if !from.IsValid() {
				continue // it has no way there
			}
			element := []nftables.SetElement{{Key: append(from.AsSlice(), a.AsSlice()...), Timeout: ttl}}
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
	})
}

// policyRules make rules of a policy: the first that matches decides.
type policyRules struct {
	table   *nftables.Table
	tap     string           // whose it is; "": the network's
	allowed bool             // what no rule is about
	allow   expr.VerdictKind // what "allow" means
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
	if yes {
		return rule{exprs: nft.Exprs{&expr.Counter{}, &expr.Verdict{Kind: p.allow}}, text: text}
	}
	return rule{exprs: refuse(), text: text}
}

func (p policyRules) of(compiled []policy.Compiled) (all []rule) {
	for i, c := range compiled {
		where := []nft.Exprs{nil}
		switch {
		case c.Prefixes != nil:
			for _, set := range prefixSets(p.table, c.Prefixes) {
				end := p.end(compiled, i)
				to, fam := nft.Dest4, byte(unix.NFPROTO_IPV4)
				if set.set.KeyType == nftables.TypeIP6Addr {
					to, fam = nft.Dest6, unix.NFPROTO_IPV6
				}
				all = append(all, rule{exprs: nft.Join(nft.Nfproto(fam), nft.Exprs{nft.Load(to, nft.Reg), nft.InSet(set.set)}, end.exprs), text: end.text, set: set})
			}
			continue
		case c.Domain != "":
			ip4, ip6 := nameSets(p.tap, c.Domain)
			where = []nft.Exprs{
				nft.Join(nft.Nfproto(unix.NFPROTO_IPV4), nft.Exprs{nft.Load(nft.Source4, nft.Reg), nft.Load(nft.Dest4, nft.Reg+1), &expr.Lookup{SourceRegister: nft.Reg, SetName: ip4}}),
				nft.Join(nft.Nfproto(unix.NFPROTO_IPV6), nft.Exprs{nft.Load(nft.Source6, nft.Reg), nft.Load(nft.Dest6, nft.Reg+4), &expr.Lookup{SourceRegister: nft.Reg, SetName: ip6}}),
			}
		case c.Prefix.IsValid():
			where = []nft.Exprs{nft.ToPrefix(c.Prefix)}
			if !c.Allow {
				for _, p := range policy.Embedding(c.Prefix) {
					where = append(where, nft.ToPrefix(p))
				}
			}
		}
		what := []rule{{}}
		if len(c.Protocols) > 0 {
			what = nil
		}
		for _, proto := range c.Protocols {
			r := rule{exprs: nft.L4(proto)}
			switch {
			case len(c.Ports) == 1: // a set of its own takes the kernel twice as long
				r.exprs = nft.Join(r.exprs, nft.InRange(nft.DestPort, nft.Port(c.Ports[0].First), nft.Port(c.Ports[0].Last)))
			case len(c.Ports) > 1:
				r.set = portSet(p.table, c.Ports)
				r.exprs = nft.Join(r.exprs, nft.Exprs{nft.Load(nft.DestPort, nft.Reg), nft.InSet(r.set.set)})
			}
			what = append(what, r)
		}
		for _, w := range where {
			for _, r := range what {
				end := p.end(compiled, i)
				all = append(all, rule{exprs: nft.Join(w, r.exprs, end.exprs), text: end.text, set: r.set})
			}
		}
	}
	return append(all, p.end(compiled, len(compiled)))
}

func portSet(table *nftables.Table, ranges []policy.PortRange) *member {
	m := &member{set: &nftables.Set{Table: table, Anonymous: true, Constant: true, Interval: true, KeyType: nftables.TypeInetService}}
	for _, r := range ranges {
		m.elements = append(m.elements, nftables.SetElement{Key: nft.Port(r.First)})
		if r.Last < 65535 { // the last interval may be open
			m.elements = append(m.elements, nftables.SetElement{Key: nft.Port(r.Last + 1), IntervalEnd: true})
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
