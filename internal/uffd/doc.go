// Package uffd gives restored VMs their memory, page by page as they touch it, by userfaultfd:
// firecracker.md 4.1, and Linux's Documentation/admin-guide/mm/userfaultfd.rst.
//
// A Server serves any number of VMs of this process. Each has a socket, over which its VMM sends
// the userfaultfd; its memory's file is mapped once, however many VMs it serves. The runtime's
// poller watches all of them, so that a VM that touches nothing new costs no thread.
//
// A fault brings a chunk of pages around the one that was touched. What a VM has touched can be
// recorded (Session.Touched) and be there before the next VM of the same snapshot touches it
// (Options.Prefetch).
//
// A VM that nobody serves any more would hang for ever at the next page that it has not. So it is
// killed: by us where a Session ends before its VMM, and by the kernel where this process ends, see
// guard.
package uffd
