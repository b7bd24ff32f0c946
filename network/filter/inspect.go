package filter

import "strings"

// TablePrefix is how the names of all our tables begin.
const TablePrefix = "smartvm-"

// Group is the interface group that the bridges of all networks are in, of this host and others of
// ours beside it: by it rules tell them from the host's other interfaces.
const Group = 0x5356

// Changes says whether what is in a chain changes while nobody does anything to the network: it is
// a guest's, or follows the host's interfaces.
func Changes(chain string) bool {
	return chain == Narrow || strings.HasPrefix(chain, (&Guest{}).chain())
}

// TableName is that of a bridge's tables.
func TableName(bridge string) string { return TablePrefix + bridge }

// Counted are the chains whose rules count what they match: a guest's policy, by its tap, or with
// an empty one the network's, and its bounds.
func Counted(tap string) []string {
	if tap != "" {
		return []string{(&Guest{Tap: tap}).chain()}
	}
	return []string{egress, bounds}
}
