// Package vmm runs Firecracker processes: it starts one in a control group of its own, directly or
// by way of the jailer, keeps the guest's console and the VMM's log apart, notices its end at once,
// and ends it.
package vmm
