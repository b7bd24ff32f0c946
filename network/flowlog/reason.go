package flowlog

import (
	"hash/fnv"
	"strings"
)

// Verdict is what became of what a guest tried.
type Verdict string

// The verdicts.
const (
	Allowed Verdict = "allowed"
	Denied  Verdict = "denied"
	Over    Verdict = "over" // it would have been one more than a guest may have
	Lost    Verdict = "lost" // Event.Count more events than are logged
	None    Verdict = "none" // nothing is known of what begins, as Reason.Rule has it
)

// Whose policy a rule is of.
const (
	OfNetwork = "network"
	OfVM      = "vm"
)

// Reason is why something came of what a guest tried.
type Reason struct {
	Verdict Verdict `json:"verdict"`
	Policy  string  `json:"policy,omitempty"` // OfNetwork or OfVM; "": it is a rule of all networks
	Rule    string  `json:"rule,omitempty"`   // as the policy has it, at most 100 bytes
}

// maxRule keeps a prefix below the 127 bytes that the kernel has for one.
const maxRule = 100

// Prefix is how the kernel's messages name a reason.
func (r Reason) Prefix() string {
	return strings.Join([]string{string(r.Verdict), r.Policy, r.Rule[:min(len(r.Rule), maxRule)]}, "|")
}

// parsePrefix returns the reason of a message; ok false: it is none of ours.
func parsePrefix(prefix string) (r Reason, ok bool) {
	parts := strings.SplitN(prefix, "|", 3)
	if len(parts) != 3 {
		return r, false
	}
	r = Reason{Verdict(parts[0]), parts[1], parts[2]}
	return r, r.Verdict == Allowed || r.Verdict == Denied || r.Verdict == Over
}

// Group is that of nfnetlink_log to which the rules of a network's table tell what begins. One
// process of a network namespace can listen to a group.
func Group(table string) uint16 {
	h := fnv.New32a()
	_, _ = h.Write([]byte(table)) // never fails
	return 1<<15 | uint16(h.Sum32()>>16)
}
