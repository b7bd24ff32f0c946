package attach

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"

	"push.rocks/smartvm/spec"
)

// Changed returns what change makes of a spec of a VM that is there, with interfaces of ours: its
// policy, ports and limits alone may differ. Returns what change does, and *spec.FieldErrors,
// joined.
func Changed(s spec.Spec, ours []Interface, change func(*spec.Spec) error) (spec.Spec, error) {
	now, err := clone(s)
	if err != nil {
		return s, err
	}
	if err := change(&now); err != nil {
		return s, err
	}
	fixed, err := clone(now)
	if err != nil {
		return s, err
	}
	fixed.Policy, fixed.Ports = s.Policy, s.Ports
	if len(fixed.NetworkInterfaces) == len(s.NetworkInterfaces) {
		for i := range fixed.NetworkInterfaces {
			before := s.NetworkInterfaces[i]
			fixed.NetworkInterfaces[i].RxRateLimiter, fixed.NetworkInterfaces[i].TxRateLimiter = before.RxRateLimiter,
				before.TxRateLimiter
		}
	}
	before, err := clone(s)
	if err != nil {
		return s, err
	}
	if !reflect.DeepEqual(fixed, before) {
		return s, errors.New("only the policy, the ports and the limits of interfaces of a VM that is there can be changed")
	}
	check, err := clone(now)
	if err != nil {
		return s, err
	}
	Anew(&check, ours)
	return now, errors.Join(changed(check.Validate()), onLAN(&check, ours))
}

// clone makes a copy that shares nothing.
func clone(s spec.Spec) (c spec.Spec, err error) {
	data, err := json.Marshal(s)
	if err == nil {
		err = json.Unmarshal(data, &c)
	}
	if err != nil {
		return c, fmt.Errorf("copy configuration: %w", err)
	}
	return c, nil
}

// changed are the errors about what may be changed: the rest of a VM that was made is more than a
// person may write down.
func changed(err error) error {
	all := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		all = joined.Unwrap()
	}
	var errs []error
	for _, e := range all {
		var field *spec.FieldError
		if errors.As(e, &field) &&
			(strings.HasPrefix(field.Path, "ports") || strings.HasPrefix(field.Path, "policy") ||
				strings.Contains(field.Path, "RateLimiter")) {
			errs = append(errs, e)
		}
	}
	return errors.Join(errs...)
}

// Limit is what the VMM is told to have one limit in place of another: nil where nothing changes, a
// limit of nothing where it is taken away.
func Limit(was, now *spec.RateLimiter) *spec.RateLimiter {
	if reflect.DeepEqual(was, now) {
		return nil
	}
	if now == nil {
		return &spec.RateLimiter{Bandwidth: new(spec.TokenBucket), Ops: new(spec.TokenBucket)}
	}
	return now
}
