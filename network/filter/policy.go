package filter

import (
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

	"push.rocks/smartvm/network/flowlog"
	"push.rocks/smartvm/network/internal/nft"
	"push.rocks/smartvm/network/policy"
)

// Names tells whose rules about names are meant: those of a network, for a guest's address, or a
// guest's own.
type Layer int

// The layers, in the order in which a packet must pass them.
const (
	OfNetwork Layer = iota
	Own
)

// nameSets returns the names of the sets that hold, by guest, the addresses of a domain: of those
// of a guest's own policy, or with no tap of the network's.
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
	return &nftables.Set{
		Table: l.inet, Name: name, KeyType: nftables.MustConcatSetType(kind, kind),
		HasTimeout: true, Size: size,
	}
}

// Names is a guest that reaches addresses of names, by a connection of its own, which the caller
// closes.
type Names struct {
	Guest
	conn nft.Lasting
}

// Close closes the connection.
func (g *Names) Close() { g.conn.Close() }

// Allow lets the guest reach addresses, because of a domain of a policy's, for a time.
func (g *Names) Allow(of Layer, domain string, addresses []netip.Addr, ttl time.Duration) error {
	return g.conn.Do(func(conn *nftables.Conn) error {
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
			for _, do := range []func(*nftables.Set, []nftables.SetElement) error{
				conn.SetAddElements, conn.SetDeleteElements,
				conn.SetAddElements,
			} {
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
	*layout
	chain   string
	tap     string           // whose it is; "": the network's
	allowed bool             // what no rule is about
	allow   expr.VerdictKind // what "allow" means
	// where others of a routed network are: what is about the internet is not about them; "": none are
	near string
}

// decision is what the i-th rule does, or what is done when none matches.
func (p policyRules) decision(compiled []policy.Compiled, i int) (reason flowlog.Reason, end nft.Exprs) {
	yes, text := p.allowed, "default deny"
	if p.allowed {
		text = "default allow"
	}
	if i < len(compiled) {
		yes, text = compiled[i].Allow, compiled[i].Text
	}
	reason = flowlog.Reason{Verdict: flowlog.Denied, Policy: flowlog.OfVM, Rule: text}
	if p.tap == "" {
		reason.Policy = flowlog.OfNetwork
	}
	if !yes {
		return reason, nft.Goto(refused)
	}
	reason.Verdict = flowlog.Allowed
	return reason, nft.Verdict(p.allow)
}

// end is the end of the i-th rule.
func (p policyRules) end(compiled []policy.Compiled, i int) nft.Rule {
	reason, end := p.decision(compiled, i)
	if p.logs {
		end = nft.Goto(p.ending(i))
	}
	return nft.Rule{Exprs: nft.Join(nft.Exprs{&expr.Counter{}}, end), Text: reason.Rule}
}

func (p policyRules) ending(i int) string { return fmt.Sprintf("%s.%d", p.chain, i) }

// chains are the one that has the rules, and those in which these end.
func (p policyRules) chains(compiled []policy.Compiled) []nft.Ruled {
	all := []nft.Ruled{nft.Chain(nftables.Chain{Table: p.inet, Name: p.chain}, p.of(compiled))}
	for i := 0; i <= len(compiled) && p.logs; i++ {
		reason, end := p.decision(compiled, i)
		all = append(all, p.logged(p.ending(i), reason, end))
	}
	return all
}

func (p policyRules) of(compiled []policy.Compiled) (all []nft.Rule) {
	for i, c := range compiled {
		where := []nft.Exprs{nil}
		switch {
		case c.Prefixes != nil:
			for _, set := range nft.PrefixSets(p.inet, c.Prefixes) {
				end := p.end(compiled, i)
				to, fam := nft.Dest4, byte(unix.NFPROTO_IPV4)
				if set.Set.KeyType == nftables.TypeIP6Addr {
					to, fam = nft.Dest6, unix.NFPROTO_IPV6
				}
				var beyond nft.Exprs
				if p.near != "" {
					beyond = nft.OifNot(p.near)
				}
				all = append(all,
					nft.Rule{Exprs: nft.Join(beyond, nft.Nfproto(fam), nft.Exprs{nft.Load(to, nft.Reg), nft.InSet(set.Set)},
						end.Exprs), Text: end.Text, Set: set})
			}
			continue
		case c.Domain != "":
			ip4, ip6 := nameSets(p.tap, c.Domain)
			where = []nft.Exprs{
				nft.Join(nft.Nfproto(unix.NFPROTO_IPV4),
					nft.Exprs{
						nft.Load(nft.Source4, nft.Reg), nft.Load(nft.Dest4, nft.Reg+1),
						&expr.Lookup{SourceRegister: nft.Reg, SetName: ip4},
					}),
				nft.Join(nft.Nfproto(unix.NFPROTO_IPV6),
					nft.Exprs{
						nft.Load(nft.Source6, nft.Reg), nft.Load(nft.Dest6, nft.Reg+4),
						&expr.Lookup{SourceRegister: nft.Reg, SetName: ip6},
					}),
			}
		case c.Prefix.IsValid():
			where = []nft.Exprs{nft.ToPrefix(c.Prefix)}
			if !c.Allow {
				for _, p := range policy.Embedding(c.Prefix) {
					where = append(where, nft.ToPrefix(p))
				}
			}
		}
		what := []nft.Rule{{}}
		if len(c.Protocols) > 0 {
			what = nil
		}
		for _, proto := range c.Protocols {
			r := nft.Rule{Exprs: nft.L4(proto)}
			switch {
			case len(c.Ports) == 1: // a set of its own takes the kernel twice as long
				r.Exprs = nft.Join(r.Exprs, nft.InRange(nft.DestPort, nft.Port(c.Ports[0].First), nft.Port(c.Ports[0].Last)))
			case len(c.Ports) > 1:
				r.Set = nft.PortSet(p.inet, c.Ports)
				r.Exprs = nft.Join(r.Exprs, nft.Exprs{nft.Load(nft.DestPort, nft.Reg), nft.InSet(r.Set.Set)})
			}
			what = append(what, r)
		}
		for _, w := range where {
			for _, r := range what {
				end := p.end(compiled, i)
				all = append(all, nft.Rule{Exprs: nft.Join(w, r.Exprs, end.Exprs), Text: end.Text, Set: r.Set})
			}
		}
	}
	return append(all, p.end(compiled, len(compiled)))
}
