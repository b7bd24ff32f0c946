package filter

import (
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
)

// tablePrefix is how the names of all our tables begin.
const tablePrefix = "smartvm-"

// TableName is that of a bridge's tables.
func TableName(bridge string) string { return tablePrefix + bridge }

// Blockers lists chains of others that drop what is forwarded unless a rule of theirs accepts it, as Docker's and many firewalls'
// do: "FAMILY TABLE CHAIN".
func Blockers() ([]string, error) {
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
		if family != "" && !strings.HasPrefix(c.Table.Name, tablePrefix) && c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookForward &&
			c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
			all = append(all, family+" "+c.Table.Name+" "+c.Name)
		}
	}
	slices.Sort(all)
	return all, nil
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
