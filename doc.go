// Package smartvm manages Firecracker microVMs on one Linux host.
//
// A [Host] is a runtime directory. [Host.Create] makes a [Machine] out of a [Spec]; Start boots it,
// Stop ends it, Remove deletes it. [Host.Run] does all of that in one call whose end is the VM's
// end. Machines of one runtime directory can be used from any number of processes at once.
//
// Every side effect on the host is recorded before it happens (see docs/effects.md), and the way a
// VM is ended in good order is the way in which [Host.Recover] cleans up after a crash: nothing is
// left behind, whatever was killed and when.
//
// The packages form rings. Mechanisms (firecracker, spec, internal/...) do not know this package;
// this package is the only one that knows both what a VM shall be and how that is done; programs
// (internal/cli, internal/supervise) stand on it.
package smartvm
