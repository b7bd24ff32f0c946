package inspect

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/internal/nft"
)

// Count is what a rule of a policy has matched.
type Count struct {
	Rule    string `json:"rule"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Counts returns what the rules of a policy have matched, in their order: a guest's, by its tap, or
// with an empty one the network's own, and what was over its bounds. It is empty where there is no
// policy.
func Counts(table, tap string) ([]Count, error) {
	conn, err := nft.Open()
	if err != nil {
		return nil, err
	}
	inet := &nftables.Table{Name: table, Family: nftables.TableFamilyINet}
	var rules []*nftables.Rule
	for _, name := range filter.Counted(tap) {
		of, err := conn.GetRules(inet, &nftables.Chain{Table: inet, Name: name})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("look at chain %s of table %s: %w", name, table, err)
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
	// Bounds are of interest where something was over them.
	return slices.DeleteFunc(all, func(c Count) bool {
		return c.Packets == 0 && strings.HasPrefix(c.Rule, filter.OverPrefix)
	}), nil
}
