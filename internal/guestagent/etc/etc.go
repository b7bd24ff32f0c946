// Package etc has the text of files in /etc that say what a guest's network is.
package etc

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"push.rocks/smartvm/guest"
)

// ResolvConf is the text of resolv.conf.
func ResolvConf(b *guest.Boot) string {
	var text strings.Builder
	if len(b.Search) > 0 {
		fmt.Fprintf(&text, "search %s\n", strings.Join(b.Search, " "))
	}
	for _, a := range b.DNS {
		fmt.Fprintf(&text, "nameserver %s\n", a)
	}
	return text.String()
}

// Hosts is the text of hosts: the guest's own name, and what else it is told of names.
func Hosts(b *guest.Boot) string {
	text := "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"
	own := "127.0.1.1"
	for _, i := range b.Interfaces {
		if n := slices.IndexFunc(i.Addresses, func(p netip.Prefix) bool { return p.Addr().Is4() }); n >= 0 {
			own = i.Addresses[n].Addr().String()
			break
		}
	}
	if b.Hostname != "" {
		text += own + " " + b.Hostname + "\n"
	}
	for _, h := range b.Hosts {
		text += h.Address.String() + " " + h.Name + "\n"
	}
	return text
}
