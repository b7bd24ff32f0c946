package network_test

import (
	"errors"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// Behind link-local addresses clouds keep credentials, and VMMs metadata: what is not answered by the VMM itself goes nowhere,
// whatever rules allow, unless the policy says allowMetadata.
func TestNetwork_Metadata(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	cloud := []string{"169.254.169.254", "169.254.170.2", "fd00:ec2::254"}
	s.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes(cloud[0]+"/32", cloud[1]+"/32", cloud[2]+"/128")}.Configure)
	route(t, "169.254.0.0/16", world4)
	route(t, cloud[2]+"/128", world6)
	s.outside.Serve(":80", "cloud")
	any := &policy.Policy{Rules: []policy.Rule{{Action: policy.Allow, Destination: "169.254.0.0/16"}, {Action: policy.Allow, Destination: "fd00:ec2::/32"}}}
	some := &policy.Policy{AllowMetadata: true, Rules: []policy.Rule{{Action: policy.Deny, Destination: cloud[1]}}}
	plain := s.guest(0, nil)
	bold := s.guest(1, func(g *filter.Guest) { g.Policy = any })
	trusted := s.guest(2, func(g *filter.Guest) { g.Policy = some })
	for _, a := range cloud {
		for _, g := range []*guest{plain, bold} {
			g.misses(t, "tcp", net.JoinHostPort(a, "80"))
		}
	}
	trusted.reaches(t, "tcp", cloud[0]+":80", "cloud from "+uplink4+"\n")
	trusted.reaches(t, "tcp", "["+cloud[2]+"]:80", "cloud from "+uplink6+"\n")
	trusted.misses(t, "tcp", cloud[1]+":80")
}

// A subnet that leads elsewhere is refused with advice, and nothing is left.
func TestUse_Overlap(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	for _, to := range []string{"172.30.0.128/25", "172.16.0.0/12"} {
		s := newSite(t, nil)
		route(t, to, world4)
		before := hosts(t)
		u := s.use("a")
		err := u.Apply(t.Context())
		var overlap *network.OverlapError
		var advised interface{ Hint() string }
		if !errors.As(err, &overlap) || overlap.Code() != "INVALID_SUBNET" || overlap.Interface != "uplink" || !errors.As(err, &advised) || !strings.Contains(advised.Hint(), "--subnet") {
			t.Errorf("got %v, hint %v", err, advised)
		}
		if err := u.Revert(t.Context()); err != nil {
			t.Error(err)
		}
		if after := hosts(t); !slices.Equal(before, after) {
			t.Errorf("before %q, after %q", before, after)
		}
		link, err := netlink.LinkByName("uplink")
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkDel(link); err != nil {
			t.Fatal(err)
		}
	}
}

// withoutNetfilter runs f on a thread whose kernel has no netfilter: it refuses the socket as one that is built without it.
func withoutNetfilter(t *testing.T, f func() error) error {
	t.Helper()
	// On the systems that we know, socket(2) has the family and protocol as its first and third argument.
	load := func(k uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: k}
	}
	unless := func(k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jf: skip}
	}
	answer := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	program := []unix.SockFilter{
		load(0), unless(unix.SYS_SOCKET, 5), load(16), unless(unix.AF_NETLINK, 3), load(32), unless(unix.NETLINK_NETFILTER, 1),
		answer(unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)), answer(unix.SECCOMP_RET_ALLOW),
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends, and its filter with it
		filter := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
		if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&filter))); errno != 0 {
			done <- errno
			return
		}
		done <- f()
	}()
	return <-done
}

// A kernel whose nftables cannot do is named, with advice, and nothing is left.
func TestUse_TooOld(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	before := hosts(t)
	u := s.use("a")
	err := withoutNetfilter(t, func() error { return u.Apply(t.Context()) })
	var advised interface{ Hint() string }
	if !errors.Is(err, filter.ErrTooOld) || !errors.As(err, &advised) || !strings.Contains(advised.Hint(), "--net none") {
		t.Errorf("got %v, hint %v", err, advised)
	}
	if err := u.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}
