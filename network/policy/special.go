package policy

import (
	"net/netip"
	"slices"
)

// Prefixes under which IPv6 addresses carry IPv4 ones: the translators' (NAT64, RFC 6052) and those
// of 6to4 (RFC 3056).
var (
	nat64   = netip.MustParsePrefix("64:ff9b::/96")
	sixToIV = netip.MustParsePrefix("2002::/16")
)

// Embedding returns the IPv6 prefixes whose addresses are a way to IPv4 ones of p.
func Embedding(p netip.Prefix) (all []netip.Prefix) {
	if !p.Addr().Is4() {
		return nil
	}
	v4 := p.Addr().As4()
	for _, of := range []netip.Prefix{nat64, sixToIV} {
		a := of.Addr().As16()
		copy(a[of.Bits()/8:], v4[:])
		all = append(all, netip.PrefixFrom(netip.AddrFrom16(a), of.Bits()+p.Bits()))
	}
	return all
}

// special are the addresses that are not hosts of the internet (IANA's registries of
// special-purpose addresses, RFC 6890), but for those that documents use: they are nobody's.
var special = parse(
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
	"192.88.99.0/24",
	"192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
	"::/96", "::ffff:0:0/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "5f00::/16", "fc00::/7", "fe80::/10",
	"fec0::/10", "ff00::/8",
)

// Metadata are where clouds tell VMs of themselves, credentials among it: link-local IPv4 of most,
// Azure's host, Alibaba's, Oracle's; of IPv6 AWS's, for containers too, and Google's.
var Metadata = parse("169.254.0.0/16", "168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32", "fd00:ec2::254/128",
	"fd00:ec2::23/128", "fd20:ce::254/128")

func parse(all ...string) (p []netip.Prefix) {
	for _, text := range all {
		p = append(p, netip.MustParsePrefix(text))
	}
	return p
}

// Public says whether an address can be a host of the internet's, and no cloud's own service.
func Public(a netip.Addr) bool {
	within := func(p netip.Prefix) bool { return p.Contains(a) }
	if slices.ContainsFunc(special, within) || slices.ContainsFunc(Metadata, within) {
		return false
	}
	b := a.As16()
	switch {
	case nat64.Contains(a):
		return Public(netip.AddrFrom4([4]byte(b[12:])))
	case sixToIV.Contains(a):
		return Public(netip.AddrFrom4([4]byte(b[2:6])))
	}
	return true
}
