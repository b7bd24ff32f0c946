package nft

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TablesExist reports whether all of the tables exist.
func TablesExist(conn *nftables.Conn, tables ...*nftables.Table) (bool, error) {
	for _, t := range tables {
		_, err := conn.ListTableOfFamily(t.Name, t.Family)
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look at table %s: %w", t.Name, err)
		}
	}
	return true, nil
}

// RulesOf lists the rules of a chain, none if there is no such chain.
func RulesOf(conn *nftables.Conn, chain *nftables.Chain) ([]*nftables.Rule, error) {
	rules, err := conn.GetRules(chain.Table, chain)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("look at chain %s of table %s: %w", chain.Name, chain.Table.Name, err)
	}
	return rules, nil
}

// SetsIn lists the sets that rules look into, of those whose names begin with a prefix.
func SetsIn(rules []*nftables.Rule, prefix string) []string {
	return namesIn(rules, prefix, func(e expr.Any) string {
		if l, ok := e.(*expr.Lookup); ok {
			return l.SetName
		}
		return ""
	})
}

// ChainsIn lists the chains that rules jump or go to, of those whose names begin with a prefix.
func ChainsIn(rules []*nftables.Rule, prefix string) []string {
	return namesIn(rules, prefix, func(e expr.Any) string {
		if v, ok := e.(*expr.Verdict); ok {
			return v.Chain
		}
		return ""
	})
}

func namesIn(rules []*nftables.Rule, prefix string, of func(expr.Any) string) (names []string) {
	for _, r := range rules {
		for _, e := range r.Exprs {
			if n := of(e); n != "" && strings.HasPrefix(n, prefix) && !slices.Contains(names, n) {
				names = append(names, n)
			}
		}
	}
	return names
}

// RemoveChains removes chains that no rule leads to any more.
func RemoveChains(conn *nftables.Conn, table *nftables.Table, names []string) {
	for _, name := range names {
		c := &nftables.Chain{Table: table, Name: name}
		conn.FlushChain(c)
		conn.DelChain(c)
	}
}

// Refuse rejects what comes, at once, up to 1,000 packets a second; what is over is dropped, so
// that a flood is not answered.
func Refuse() []Exprs {
	limited := &expr.Limit{Type: expr.LimitTypePkts, Rate: 1000, Unit: expr.LimitTimeSecond, Burst: 1000}
	return []Exprs{
		Join(L4(unix.IPPROTO_TCP), Exprs{limited, &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}),
		{limited, &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}},
		Verdict(expr.VerdictDrop),
	}
}
