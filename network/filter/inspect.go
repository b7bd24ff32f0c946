package filter

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// TablePrefix is how the names of all our tables begin.
const TablePrefix = "smartvm-"

// Changes says whether what is in a chain changes while nobody does anything to the network: it is a guest's, or follows the host's interfaces.
func Changes(chain string) bool {
	return chain == narrow || strings.HasPrefix(chain, (&Guest{}).chain(Own)) || strings.HasPrefix(chain, (&Guest{}).chain(OfNetwork))
}

// TableName is that of a bridge's tables.
func TableName(bridge string) string { return TablePrefix + bridge }

// Blockers lists chains of others that drop what is forwarded, or what comes to the host itself, unless a rule of theirs accepts it, by their
// policy (Docker's, ufw's) or a last rule (firewalld's): "FAMILY TABLE CHAIN".
func Blockers(hook *nftables.ChainHook) ([]string, error) {
	conn, err := open()
	if err != nil {
		return nil, err
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	families := map[nftables.TableFamily]string{nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6"}
	var all []string
	for _, c := range chains {
		family := families[c.Table.Family]
		if family == "" || strings.HasPrefix(c.Table.Name, TablePrefix) || c.Hooknum == nil || *c.Hooknum != *hook {
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

// Count is what a rule of a policy has matched.
type Count struct {
	Rule    string `json:"rule"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Counts returns what the rules of a policy have matched, in their order: a guest's, by its tap, or with an empty one the
// network's own. It is empty where there is no policy.
func Counts(table, tap string) ([]Count, error) {
	conn, err := open()
	if err != nil {
		return nil, err
	}
	inet := newLayout(table).inet
	list, err := conn.ListChainsOfTableFamily(inet.Family)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	chains := map[string]*nftables.Chain{}
	for _, c := range list {
		if c.Table.Name == table {
			chains[c.Name] = c
		}
	}
	names := []string{egress}
	if tap != "" {
		names[0] = (&Guest{Tap: tap}).chain(Own)
	}
	for i := 0; tap == "" && chains[egressEnd(i)] != nil; i++ {
		names = append(names, egressEnd(i))
	}
	var rules []*nftables.Rule
	for _, name := range names {
		if chains[name] == nil {
			continue
		}
		of, err := conn.GetRules(inet, chains[name])
		if err != nil {
			return nil, fmt.Errorf("list rules of %s: %w", table, err)
		}
		rules = append(rules, of...)
	}
	var all []Count
	for _, r := range rules {
		text, ok := userdata.GetString(r.UserData, userdata.TypeComment)
		if !ok {
			continue
		}
		if len(all) == 0 || all[len(all)-1].Rule != text { // one of a policy's may be several of the kernel's
			all = append(all, Count{Rule: text})
		}
		for _, e := range r.Exprs {
			if c, ok := e.(*expr.Counter); ok {
				all[len(all)-1].Packets += c.Packets
				all[len(all)-1].Bytes += c.Bytes
			}
		}
	}
	return all, nil
}
