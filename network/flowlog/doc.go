// Package flowlog tells what guests try to reach, and what becomes of it: what begins a connection,
// as the rules of a network log it (nfnetlink_log), and the names that policies refuse.
//
// The kernel lets one process of a network namespace listen to a network's rules. Of the processes
// that supervise the guests of a network the first does, and passes on what it hears to the others,
// by a socket each (Follow); when it ends, another takes its place. So each has all of its guest,
// and keeps it in a file that is bounded (Log), with the names that the guest was told its
// addresses have. Any number of processes may read that (Reader).
package flowlog
