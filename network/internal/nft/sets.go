package nft

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/google/nftables"

	"push.rocks/smartvm/network/policy"
)

// Elements are those of one set.
type Elements struct {
	Set      *nftables.Set
	Elements []nftables.SetElement
}

// MaxElements is how many elements go into one call of nftables.Conn at most: it makes one message
// of them, of which the kernel takes the first 64 KiB, without a word.
const MaxElements = 500

// PortSet is a set that holds ranges of ports.
func PortSet(table *nftables.Table, ranges []policy.PortRange) *Elements {
	m := &Elements{
		Set: &nftables.Set{Table: table, Anonymous: true, Constant: true, Interval: true, KeyType: nftables.TypeInetService},
	}
	for _, r := range ranges {
		m.Elements = append(m.Elements, nftables.SetElement{Key: Port(r.First)})
		if r.Last < 65535 { // the last interval may be open
			m.Elements = append(m.Elements, nftables.SetElement{Key: Port(r.Last + 1), IntervalEnd: true})
		}
	}
	return m
}

// PrefixSets are two sets, of IPv4 and of IPv6, that hold the addresses of prefixes, and those that
// embed them.
func PrefixSets(table *nftables.Table, prefixes []netip.Prefix) []*Elements {
	byKind := map[bool][]netip.Prefix{}
	for _, p := range prefixes {
		for _, p := range append(policy.Embedding(p), p) {
			byKind[p.Addr().Is4()] = append(byKind[p.Addr().Is4()], p)
		}
	}
	var all []*Elements
	for _, is4 := range []bool{true, false} {
		kind := map[bool]nftables.SetDatatype{true: nftables.TypeIPAddr, false: nftables.TypeIP6Addr}[is4]
		m := &Elements{Set: &nftables.Set{Table: table, Anonymous: true, Constant: true, Interval: true, KeyType: kind}}
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
				m.Elements = append(m.Elements, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
			}
			if i == 0 || p.Addr() != next {
				m.Elements = append(m.Elements, nftables.SetElement{Key: p.Addr().AsSlice()})
			}
			next = lastOf(p).Next()
		}
		if next.IsValid() {
			m.Elements = append(m.Elements, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
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
