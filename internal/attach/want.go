package attach

import (
	"slices"

	"push.rocks/smartvm/spec"
)

// Anew has what is behind interfaces of s chosen anew that an earlier VM had on networks of ours.
// It returns the taps that they had, by the ids of the interfaces.
func Anew(s *spec.Spec, was []Interface) (taps map[string]string) {
	s.NetworkInterfaces = slices.Clone(s.NetworkInterfaces)
	taps = map[string]string{}
	for i := range s.NetworkInterfaces {
		n := &s.NetworkInterfaces[i]
		if slices.ContainsFunc(was, func(w Interface) bool { return w.ID == n.IfaceID }) {
			taps[n.IfaceID] = n.HostDevName
			n.HostDevName, n.GuestMAC = "", ""
		}
	}
	return taps
}

// Wish has interfaces get what they had in an earlier VM, where it is free.
func Wish(all, was []Interface) {
	for i := range all {
		if n := slices.IndexFunc(was, func(w Interface) bool { return w.ID == all[i].ID }); n >= 0 {
			all[i].Wish = &was[n]
		}
	}
}
