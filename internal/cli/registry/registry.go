// Package registry is the part of the command line that says how registries are asked, and which images are allowed.
package registry

import (
	"cmp"
	"log/slog"
	"strings"

	"github.com/spf13/pflag"

	"push.rocks/smartvm/image/login"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/registries"
	"push.rocks/smartvm/image/trust"
)

// Flags are settings of registries.
type Flags struct {
	mirrors []string
	policy  string
	lookup  func(string) (string, bool)
}

// Global adds those that every command has, given how to look up environment variables.
func (r *Flags) Global(f *pflag.FlagSet, lookup func(string) (string, bool)) {
	r.lookup = lookup
	f.StringSliceVar(&r.mirrors, "registry-mirror", nil, "registry `host` to ask first; may be repeated [$SMARTVM_REGISTRY_MIRROR]")
	f.StringVar(&r.policy, "signature-policy", "", "policy.json of which images are allowed, a `file`; /etc/containers's or the user's without it [$SMARTVM_SIGNATURE_POLICY]")
}

// Finish asks the environment about those that were not given.
func (r *Flags) Finish() {
	if mirrors, _ := r.lookup("SMARTVM_REGISTRY_MIRROR"); len(r.mirrors) == 0 && mirrors != "" {
		r.mirrors = strings.Split(mirrors, ",")
	}
	policy, _ := r.lookup("SMARTVM_SIGNATURE_POLICY")
	r.policy = cmp.Or(r.policy, policy)
}

// Options are what the flags say, and this machine and its user.
func (r *Flags) Options(log *slog.Logger) oci.Options {
	o := oci.Options{
		Keychain: &login.Keychain{Files: login.Files(r.lookup), Log: log}, Registries: registries.Default(r.lookup),
		Trust: trust.Default(r.lookup), Mirrors: r.mirrors,
	}
	if r.policy != "" {
		o.Trust = func() (*trust.Policy, error) { return trust.Load(r.policy) }
	}
	return o
}
