package upkeep

import (
	"context"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"push.rocks/smartvm/network/dnsproxy"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// names are what the policies of a guest and of its network say of names, as they are at the time,
// and what the guest may reach because of that.
type names struct {
	guest filter.Names

	mu       sync.Mutex
	policies [2]*policy.Policy // by layer
	now      []dnsproxy.Names
	reached  map[domain]map[netip.Addr]reach
}

// domain is one of a policy's.
type domain struct {
	layer filter.Layer
	name  string
}

// reach is when an address was let through, and until when.
type reach struct{ since, until time.Time }

const (
	// maxReached is how many addresses of a domain a guest reaches at a time.
	maxReached = 1024
	// knownTime is how long what was let through need not be let through again, whoever may have
	// removed it meanwhile.
	knownTime = 10 * time.Second
)

func (n *names) current() []dnsproxy.Names {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now
}

// own says whether the guest has a policy of its own.
func (n *names) own() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.policies[filter.Own] != nil
}

// follow takes over policies, which may be nil.
func (n *names) follow(network, own *policy.Policy) error {
	policies := [2]*policy.Policy{filter.OfNetwork: network, filter.Own: own}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.reached != nil && reflect.DeepEqual(policies, n.policies) {
		return nil
	}
	var now []dnsproxy.Names
	if network.Names() || own.Names() {
		for layer, p := range policies {
			of, err := n.of(filter.Layer(layer), p)
			if err != nil {
				return err
			}
			now = append(now, of)
		}
	}
	n.policies, n.now, n.reached = policies, now, map[domain]map[netip.Addr]reach{}
	return nil
}

// followOwn takes over the guest's own policy.
func (n *names) followOwn(own *policy.Policy) error {
	n.mu.Lock()
	network := n.policies[filter.OfNetwork]
	n.mu.Unlock()
	return n.follow(network, own)
}

// forget lets all addresses through again when they are asked for: the tables do not have them any
// more.
func (n *names) forget() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.reached = map[domain]map[netip.Addr]reach{}
}

// of is what one policy says, which may be nothing.
func (n *names) of(layer filter.Layer, p *policy.Policy) (of dnsproxy.Names, err error) {
	if p == nil {
		return of, nil
	}
	rules, err := p.Compile()
	if err != nil {
		return of, err
	}
	for _, r := range rules {
		if r.Domain != "" && !slices.Contains(of.Domains, r.Domain) {
			of.Domains = append(of.Domains, r.Domain)
		}
	}
	// One that allows addresses alone says nothing of names; one that allows nothing at all does.
	of.Closed = p.DefaultAction == policy.Deny &&
		(of.Domains != nil || !slices.ContainsFunc(rules, func(r policy.Compiled) bool {
			return r.Allow
		}))
	// Addresses that the policy names itself are no surprise.
	of.Local = func(a netip.Addr) bool {
		return slices.ContainsFunc(rules, func(r policy.Compiled) bool {
			return r.Allow && r.Prefix.Bits() > 0 && r.Prefix.Contains(a)
		})
	}
	of.Allow = func(_ context.Context, domains []int, addresses []netip.Addr, ttl time.Duration) error {
		for _, d := range domains {
			if err := n.allow(domain{layer, of.Domains[d]}, addresses, ttl); err != nil {
				return err
			}
		}
		return nil
	}
	return of, nil
}

// allow lets addresses through for a time.
func (n *names) allow(d domain, addresses []netip.Addr, ttl time.Duration) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	all := n.reached[d]
	if all == nil {
		all = map[netip.Addr]reach{}
		n.reached[d] = all
	}
	until := now.Add(ttl)
	fresh := func(a netip.Addr) bool {
		r, ok := all[a]
		return ok && now.Sub(r.since).Abs() < knownTime && until.Sub(r.until) < knownTime
	}
	if !slices.ContainsFunc(addresses, func(a netip.Addr) bool { return !fresh(a) }) {
		return nil
	}
	for a, r := range all {
		if r.until.Before(now) {
			delete(all, a)
		}
	}
	if len(all)+len(addresses) > maxReached {
		return fmt.Errorf("allow %s: its names have led to %d addresses already", d.name, len(all))
	}
	if err := n.guest.Allow(d.layer, d.name, addresses, ttl); err != nil {
		return err
	}
	for _, a := range addresses {
		all[a] = reach{now, until}
	}
	return nil
}
