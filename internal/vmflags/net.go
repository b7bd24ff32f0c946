package vmflags

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"push.rocks/smartvm/spec"
)

// networks sets the interfaces. A guest of an image gets one unless it is told otherwise, where one
// can be made.
func (s *Flags) networks(vm *spec.Spec) error {
	nets := s.nets
	if nets == nil && vm.Image != "" && vm.NetworkInterfaces == nil && os.Geteuid() == 0 {
		nets = []string{"bridge"}
	}
	var errs []error
	for _, text := range nets {
		errs = append(errs, addNet(vm, text))
	}
	for _, text := range s.publish {
		ports, err := ParsePorts(text)
		errs = append(errs, err)
		vm.Ports = append(vm.Ports, ports...)
	}
	vm.PublishAll = vm.PublishAll || s.publishAll
	errs = append(errs, s.address(vm))
	for _, text := range s.dns {
		a, err := netip.ParseAddr(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("--dns %q: want an IP address", text))
		}
		vm.DNS = append(vm.DNS, a)
	}
	vm.DNSSearch = append(vm.DNSSearch, s.search...)
	for _, text := range s.hosts {
		h, err := parseHost(text)
		errs = append(errs, err)
		vm.ExtraHosts = append(vm.ExtraHosts, h)
	}
	return errors.Join(errs...)
}

// address sets that of the only interface.
func (s *Flags) address(vm *spec.Spec) error {
	if s.ip == "" {
		return nil
	}
	a, err := netip.ParseAddr(s.ip)
	ours := slices.DeleteFunc(slices.Clone(vm.NetworkInterfaces), func(n spec.NetworkInterface) bool {
		return n.HostDevName != ""
	})
	switch {
	case err != nil:
		return fmt.Errorf("--ip %q: want an IPv4 address", s.ip)
	case len(ours) != 1:
		return fmt.Errorf("--ip %s: the VM is on %d networks, and it says not on which: want --net NAME,ip=%s", s.ip,
			len(ours), s.ip)
	}
	for i := range vm.NetworkInterfaces {
		if n := &vm.NetworkInterfaces[i]; n.HostDevName == "" {
			n.IP = a
		}
	}
	return nil
}

// addNet adds an interface, in place of one of its id.
func addNet(vm *spec.Spec, text string) error {
	what, options, _ := strings.Cut(text, ",")
	index := func(id string) int {
		return slices.IndexFunc(vm.NetworkInterfaces, func(n spec.NetworkInterface) bool { return n.IfaceID == id })
	}
	n := spec.NetworkInterface{IfaceID: free("eth", index)}
	tap, isTap := strings.CutPrefix(what, "tap:")
	switch {
	case text == "none":
		vm.NetworkInterfaces = nil
		return nil
	case what == "", what == "bridge:", isTap && tap == "":
		return fmt.Errorf("--net %q: want bridge, bridge:DEV, the name of a network, netns[:NAME], tap:DEV or none", text)
	case isTap:
		n.HostDevName = tap
	case what == "netns", strings.HasPrefix(what, "netns:"):
		n.Namespace, n.Network = true, cmp.Or(strings.TrimPrefix(strings.TrimPrefix(what, "netns"), ":"), spec.DefaultNetwork)
	case what == "bridge":
		n.Network = spec.DefaultNetwork
	default:
		n.Network = what
	}
	err := eachOption(options, "--net "+text, map[string]func(string) error{
		"id":  func(v string) error { n.IfaceID = v; return nil },
		"ip":  func(v string) (err error) { n.IP, err = netip.ParseAddr(v); return err },
		"mac": func(v string) error { n.GuestMAC = v; return nil },
		"rx":  func(v string) (err error) { n.RxRateLimiter, err = ParseRate(v); return err },
		"tx":  func(v string) (err error) { n.TxRateLimiter, err = ParseRate(v); return err },
	})
	if i := index(n.IfaceID); i >= 0 {
		vm.NetworkInterfaces[i] = n
	} else {
		vm.NetworkInterfaces = append(vm.NetworkInterfaces, n)
	}
	return err
}

// PublishForms are those that ParsePorts takes.
const PublishForms = "[[IP:][HOST]:]GUEST[/udp]"

// ParsePorts takes [[IP:][HOST]:]GUEST[/udp], with an IPv6 address in brackets. Without HOST it is
// a free one of the host. HOST and GUEST may be ranges of as many ports, FIRST-LAST.
func ParsePorts(text string) (all []spec.Port, err error) {
	rest, protocol, _ := strings.Cut(text, "/")
	protocol = strings.ToLower(protocol)
	host, guest, given := cutLast(rest, ":")
	if !given {
		guest = rest
	}
	var at netip.Addr
	if ip, port, has := cutLast(host, ":"); has {
		host, given = port, port != ""
		if at, err = netip.ParseAddr(strings.Trim(ip, "[]")); err != nil {
			return nil, fmt.Errorf("-p %s: %q is no IP address", text, ip)
		}
	}
	guestFirst, guestLast, ok := portRange(guest)
	first, last := guestFirst, guestLast
	if ok && given {
		first, last, ok = portRange(host)
	}
	if !ok {
		return nil, fmt.Errorf("-p %s: want %s, ports from 1 to 65535, or ranges of them such as 8000-8009",
			text, PublishForms)
	}
	if last-first != guestLast-guestFirst {
		return nil, fmt.Errorf("-p %s: %d ports of the host lead to %d of the guest", text, last-first+1,
			guestLast-guestFirst+1)
	}
	for n := 0; first+n <= last; n++ {
		p := spec.Port{HostIP: at, GuestPort: uint16(guestFirst + n), Protocol: protocol}
		if given {
			p.HostPort = uint16(first + n)
		}
		all = append(all, p)
	}
	return all, nil
}

// parseHost takes NAME:IP or NAME=IP, with or without brackets, as docker does.
func parseHost(text string) (h spec.ExtraHost, err error) {
	ip := text
	if i := strings.IndexAny(text, ":="); i > 0 {
		h.Name, ip = text[:i], text[i+1:]
	}
	if h.HostGateway = ip == "host-gateway"; !h.HostGateway {
		h.IP, err = netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(ip, "["), "]"))
	}
	if err != nil || h.Name == "" {
		return h, fmt.Errorf(
			"--add-host %q: want NAME:IP, such as db.example:192.0.2.7 or db.example:[2001:db8::7], or NAME:host-gateway", text)
	}
	return h, nil
}

// portRange takes a port, or FIRST-LAST.
func portRange(text string) (first, last int, ok bool) {
	from, to, ranged := strings.Cut(text, "-")
	if !ranged {
		to = from
	}
	a, errA := strconv.ParseUint(from, 10, 16)
	b, errB := strconv.ParseUint(to, 10, 16)
	return int(a), int(b), errA == nil && errB == nil && a > 0 && a <= b
}

func cutLast(s, sep string) (before, after string, found bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
