package vmflags

import (
	"cmp"
	"fmt"
	"slices"

	"push.rocks/smartvm/network/policy"
	"push.rocks/smartvm/spec"
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

// policy sets what the guest may reach.
func (s *Flags) policy(vm *spec.Spec) error {
	if s.policyFile != "" {
		var err error
		if vm.Policy, err = policy.LoadFile(s.policyFile); err != nil {
			return fmt.Errorf("--policy %s: %w", s.policyFile, err)
		}
	}
	if s.rules == nil && s.fallback == "" && s.egress == "" {
		return nil
	}
	own := policy.Policy{}
	if vm.Policy != nil {
		own = *vm.Policy
	}
	own.Rules = slices.Concat(s.rules, own.Rules)
	if s.egress != "" && s.egress != policy.EgressPublic {
		return fmt.Errorf("--egress %q: want %s", s.egress, policy.EgressPublic)
	}
	own.Egress = cmp.Or(s.egress, own.Egress)
	switch action := policy.Action(s.fallback); action {
	case policy.Allow, policy.Deny:
		own.DefaultAction = action
	case "":
	default:
		return fmt.Errorf("--default %q: want allow or deny", s.fallback)
	}
	vm.Policy = &own
	return nil
}
