// Package filter holds the nftables tables of a bridge network and what each guest adds to them.
//
// A network has two tables of its name, one in the family inet and one in the family bridge. The
// rules in them are constant. A guest is elements of their sets and maps, so that the thousandth
// costs a packet no more than the first; one with a policy has chains of its own, reached through a
// map.
//
// The bridge table sees a frame as a tap gives it: what does not carry the guest's own MAC and
// addresses, router advertisements and DHCP servers' answers, what has a VLAN tag, and all that is
// neither ARP, IPv4 nor IPv6, ends there. So the inet table can tell a guest by its source address.
// There, what a guest sends leaves by the host's other interfaces, after its policy, and nothing
// reaches it but answers and published ports; the host's own addresses, link-local ones among which
// clouds keep their metadata, and the other guests of an isolated network are out of its reach.
//
// Other tables of the host are never changed. An accept here overrules no drop there: Blockers
// tells of those.
//
// Needs Linux ≥ 5.10 (nat in the family inet, concatenated keys, conntrack in the family inet) with
// nft_connlimit.
package filter
