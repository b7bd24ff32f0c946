package vmflags

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/spf13/pflag"

	"push.rocks/smartvm/network/policy"
)

// ruleFlag adds rules of one action to a list, in the order of the command line.
type ruleFlag struct {
	rules  *[]policy.Rule
	action policy.Action
}

// String is nothing: there is no default.
func (*ruleFlag) String() string { return "" }

// Type is for the help.
func (*ruleFlag) Type() string { return "destination" }

// Set adds a rule.
func (r *ruleFlag) Set(text string) error {
	rule, err := policy.ParseRule(r.action, text)
	if err == nil {
		*r.rules = append(*r.rules, rule)
	}
	return err
}

// Policy are the flags that say what guests may reach.
type Policy struct {
	rules                  []policy.Rule
	fallback, file, egress string
	host                   bool
}

// Add adds the flags to f.
func (s *Policy) Add(f *pflag.FlagSet) {
	f.Var(&ruleFlag{&s.rules, policy.Allow}, "allow",
		"let the guest reach a `destination`: [PROTOCOL:]TO[:PORTS], PROTOCOL tcp, udp or icmp, TO an address, CIDR, name or *; may be repeated, and the first rule that matches decides")
	f.Var(&ruleFlag{&s.rules, policy.Deny}, "deny", "keep the guest from a `destination`, likewise")
	f.StringVar(&s.fallback, "default", "", "what is done where no rule matches: `action` allow (without this) or deny")
	f.StringVar(&s.egress, "egress", "",
		"`public`: of what no rule is about, let the guest reach the internet alone: no private network, no cloud's services for its machines")
	f.BoolVar(&s.host, "allow-host", false, "let the guest reach the host's own addresses")
	f.StringVar(&s.file, "policy", "", "JSON `file` with the rules; those of --allow and --deny go before them")
}

// Of returns what the flags say, with what was said before where they say nothing.
func (s *Policy) Of(before *policy.Policy) (*policy.Policy, error) {
	p := before
	if s.file != "" {
		var err error
		if p, err = policy.LoadFile(s.file); err != nil {
			return nil, fmt.Errorf("--policy %s: %w", s.file, err)
		}
	}
	if s.rules == nil && s.fallback == "" && s.egress == "" && !s.host {
		return p, nil
	}
	own := policy.Policy{}
	if p != nil {
		own = *p
	}
	own.Rules = slices.Concat(s.rules, own.Rules)
	if s.egress != "" && s.egress != policy.EgressPublic {
		return nil, fmt.Errorf("--egress %q: want %s", s.egress, policy.EgressPublic)
	}
	own.Egress, own.AllowHost = cmp.Or(s.egress, own.Egress), s.host || own.AllowHost
	switch action := policy.Action(s.fallback); action {
	case policy.Allow, policy.Deny:
		own.DefaultAction = action
	case "":
	default:
		return nil, fmt.Errorf("--default %q: want allow or deny", s.fallback)
	}
	return &own, nil
}
