package smartvm

import "push.rocks/smartvm/internal/journal"

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

// EffectKinds is the list of effects.go.
func EffectKinds() journal.Kinds { return effects }
