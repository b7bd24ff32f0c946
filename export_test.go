package smartvm

import (
	"maps"
	"time"

	"push.rocks/smartvm/internal/plan"
	"push.rocks/smartvm/internal/vmrun"
	"push.rocks/smartvm/journal"
)

// What tests outside the package need of its inside.

// WithTrace makes a Host call trace at every step of its journals and between requests.
func WithTrace(o Options, trace func(step string)) Options {
	o.trace = func(s journal.Step) { trace(s.Op + " " + s.Kind) }
	return o
}

// WithoutCgroups makes a Host as on a machine where no control group can be made.
func WithoutCgroups(o Options) Options {
	o.noCgroup = true
	return o
}

// WithHealInterval makes a Host look so often whether its networks are whole.
func WithHealInterval(o Options, d time.Duration) Options {
	o.healInterval = d
	return o
}

// EffectKinds is the list of effects.go.
func EffectKinds() journal.Kinds { return maps.Clone(plan.Effects) }

// Allow is the one check of what may be done in which state, Operations what it knows of.
func Allow(id, op, call string, s State) error { return vmrun.Allow(id, op, call, s) }

// Operations: see Allow.
func Operations() []string { return vmrun.Operations() }

// UsesCgroups says whether a Host makes control groups where it can: see WithoutCgroups.
func UsesCgroups(o Options) bool { return !o.noCgroup }
