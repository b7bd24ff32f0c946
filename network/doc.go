// Package network connects guests: bridges, taps, addresses, and what a network as a whole does to
// its host.
//
// A network is a bridge with a subnet and tables of its own (see filter). It comes up with the
// first VM that uses it and goes with the last: Use is a VM's part in it, as an effect on the host.
// What a network does to the host stands in a journal of its own, which whoever finds it unfinished
// or unused undoes.
//
// Needs Linux ≥ 5.10 and CAP_NET_ADMIN.
package network
