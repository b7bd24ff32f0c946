package smartvm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/network"
)

func init() {
	children["crash-net"] = func(args []string) int { return crashChild(args, crashNet) }
	children["crash-netns"] = func(args []string) int { return crashChild(args, crashNamespace) }
	children["many-addresses"] = manyAddresses
	children["without-net-admin"] = withoutNetAdmin
}

func netSpec(s smartvm.Spec, n int) smartvm.Spec {
	s.NetworkInterfaces = nil
	for i := range n {
		s.NetworkInterfaces = append(s.NetworkInterfaces, smartvm.NetworkInterface{IfaceID: fmt.Sprint("eth", i)})
	}
	return s
}

// crashNet is the life of a VM on the default network.
func crashNet(ctx context.Context, site *crashSite) error {
	site.spec = netSpec(site.spec, 1)
	site.spec.Ports = []smartvm.Port{{HostPort: 8080, GuestPort: 80}}
	return crashLife(ctx, site)
}

// crashNamespace is the life of a VM in a namespace, and of the pool that it has it from.
func crashNamespace(ctx context.Context, site *crashSite) error {
	warm := func(n int) error {
		h, err := smartvm.Open(site.options)
		if err != nil {
			return err
		}
		_, err = h.Warm(ctx, network.DefaultName, n)
		return errors.Join(err, h.Close())
	}
	site.spec = netSpec(site.spec, 1)
	site.spec.NetworkInterfaces[0].Namespace = true
	if err := warm(1); err != nil {
		return err
	}
	return errors.Join(crashLife(ctx, site), warm(0))
}

// The crash matrix of VMs on a network, in one of the test's own.
func TestCrashMatrix_Network(t *testing.T)   { crashNetwork(t, "crash-net") }
func TestCrashMatrix_Namespace(t *testing.T) { crashNetwork(t, "crash-netns") }

func crashNetwork(t *testing.T, life string) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	x := newCrashMatrix(t, testenv.PlainBinary(t), smartvm.LaunchJailed, life, tinyguest.Idle)
	x.again()
	t.Logf("%d steps of a life, %d recoveries", x.steps, x.recoveries)
}

// A VM in a namespace takes a warm slot, or gets one of its own, and has the same address in it.
func TestNetwork_Namespace(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			h := s.open()
			if slots, err := h.Warm(t.Context(), "default", 1); err != nil || slots != (smartvm.Slots{All: 1, Free: 1}) {
				t.Fatalf("%+v, %v", slots, err)
			}
			var all []*smartvm.Machine
			for i, want := range []string{"172.30.0.2", "172.30.0.3"} {
				spec := netSpec(s.spec("idle"), 1)
				spec.NetworkInterfaces[0].Namespace = true
				m, err := h.Create(t.Context(), spec)
				if err != nil {
					t.Fatal(err)
				}
				all = append(all, m)
				if err := m.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				in, err := m.Inspect(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if n := in.Interfaces[0]; n.IP4.String() != want || n.Warm != (i == 0) {
					t.Errorf("VM %d has %+v, want %s", i, n, want)
				}
				if !strings.Contains(in.Spec.BootSource.BootArgs, " ip=10.255.255.2::10.255.255.1:255.255.255.252:") {
					t.Errorf("boot arguments %q", in.Spec.BootSource.BootArgs)
				}
				own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", in.PIDs[0]))
				if err != nil {
					t.Fatal(err)
				}
				if ours, err := os.Readlink("/proc/self/ns/net"); err != nil || own == ours {
					t.Errorf("the VMM is in the network %s, as this test: %v", own, err)
				}
			}
			if slots, err := h.Warm(t.Context(), "default", 0); err != nil || slots != (smartvm.Slots{All: 1}) {
				t.Errorf("one is in use: %+v, %v", slots, err)
			}
			if err := h.StopAll(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
				t.Error(err)
			}
			if err := errors.Join(all[0].Remove(t.Context()), all[1].Remove(t.Context())); err != nil {
				t.Error(err)
			}
			if slots, err := h.Slots("default"); err != nil || slots != (smartvm.Slots{All: 1, Free: 1}) {
				t.Errorf("after the VM: %+v, %v", slots, err)
			}
			if slots, err := h.Warm(t.Context(), "default", 0); err != nil || slots != (smartvm.Slots{}) {
				t.Errorf("%+v, %v", slots, err)
			}
			wantNoNetwork(t)
		})
	}
}

// A warm slot of a network that is another now is left alone, and can be removed while there are
// VMs.
func TestNetwork_SlotOfAnother(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	networks, err := h.Networks()
	if err != nil {
		t.Fatal(err)
	}
	lan := network.Config{Name: "lan"}
	if lan, err = networks.Create(lan); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Warm(t.Context(), "lan", 1); err != nil {
		t.Fatal(err)
	}
	lan.MTU = 1400
	if _, err := networks.Create(lan); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("got %v", err)
	}
	if err := networks.Remove("lan"); err != nil {
		t.Fatal(err)
	}
	if _, err := networks.Create(lan); err != nil {
		t.Fatal(err)
	}
	spec := netSpec(s.spec("idle"), 1)
	spec.NetworkInterfaces[0].Network, spec.NetworkInterfaces[0].Namespace = "lan", true
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if in, err := m.Inspect(t.Context()); err != nil || in.Interfaces[0].Warm {
		t.Errorf("the VM has %+v, %v", in.Interfaces, err)
	}
	if slots, err := h.Slots("lan"); err != nil || slots != (smartvm.Slots{All: 1, Free: 1}) {
		t.Errorf("%+v, %v", slots, err)
	}
	if slots, err := h.Warm(t.Context(), "lan", 0); err != nil || slots != (smartvm.Slots{}) {
		t.Errorf("%+v, %v", slots, err)
	}
	if err := errors.Join(m.Remove(t.Context()), networks.Remove("lan"), os.Remove(networks.Dir)); err != nil {
		t.Error(err)
	}
	wantNoNetwork(t)
}

// VMs that come and go in any order leave nothing.
func TestNetwork_RandomLives(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchJailed)
	h := s.open()
	if _, err := h.Warm(t.Context(), "default", 2); err != nil {
		t.Fatal(err)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var all []*smartvm.Machine
	forget := func(i int) {
		if err := all[i].Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		all = slices.Delete(all, i, i+1)
	}
	for range 200 {
		if len(all) < 2 || random.IntN(3) == 0 && len(all) < 12 {
			spec := netSpec(s.spec("idle"), 1)
			spec.NetworkInterfaces[0].Namespace = random.IntN(2) == 0
			m, err := h.Create(t.Context(), spec)
			if err == nil {
				err = m.Start(t.Context())
			}
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, m)
			continue
		}
		i := random.IntN(len(all))
		in, err := all[i].Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case in.State != smartvm.Running:
			forget(i)
		case random.IntN(2) == 0:
			if err := unix.Kill(in.PIDs[0], unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if _, err := all[i].Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
		default:
			if _, err := all[i].Stop(t.Context(), smartvm.StopOptions{}); err != nil {
				t.Fatal(err)
			}
			forget(i)
		}
	}
	if err := h.StopAll(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	for len(all) > 0 {
		forget(0)
	}
	if slots, err := h.Warm(t.Context(), "default", 0); err != nil || slots.All > 0 {
		t.Errorf("%+v, %v", slots, err)
	}
	wantNoNetwork(t)
	if left, err := os.ReadDir(filepath.Join(h.RuntimeDir(), store.LeaseDir)); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// A VM's interface comes with its start and goes with its end; its address stays the VM's.
func TestNetwork(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			h := s.open()
			m, err := h.Create(t.Context(), netSpec(s.spec("idle"), 2))
			if err != nil {
				t.Fatal(err)
			}
			first := m.Spec().NetworkInterfaces[0]
			for range 2 {
				if err := m.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				tap, err := netlink.LinkByName(first.HostDevName)
				if err != nil {
					t.Fatal(err)
				}
				in, err := m.Inspect(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if owner := tap.(*netlink.Tuntap).Owner; int(owner) != in.UID {
					t.Errorf("the tap belongs to %d, want %d", owner, in.UID)
				}
				if bridge, err := netlink.LinkByIndex(tap.Attrs().MasterIndex); err != nil ||
					bridge.Attrs().Name != network.DefaultBridge {
					t.Errorf("the tap's bridge: %v, %v", bridge, err)
				}
				if in.Interfaces[1].Rules != nil || in.Interfaces[0].SentBytes > 0 {
					t.Errorf("an idle guest without a policy has %+v", in.Interfaces)
				}
				if got, want := in.Interfaces[0].IP4, netip.MustParseAddr("172.30.0.2"); got != want {
					t.Errorf("got address %s, want %s", got, want)
				}
				if !strings.Contains(in.Spec.BootSource.BootArgs, " ip=172.30.0.2::172.30.0.1:255.255.255.0:") {
					t.Errorf("boot arguments %q", in.Spec.BootSource.BootArgs)
				}
				if _, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
					t.Fatal(err)
				}
				wantNoNetwork(t)
			}
			second, err := h.Create(t.Context(), netSpec(s.spec("idle"), 1))
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			third, err := h.Create(t.Context(), netSpec(s.spec("idle"), 1))
			if err != nil {
				t.Fatal(err)
			}
			for m, want := range map[*smartvm.Machine]string{second: "172.30.0.4", third: "172.30.0.2"} {
				if in, err := m.Inspect(t.Context()); err != nil || in.Interfaces[0].IP4.String() != want {
					t.Errorf("got %+v, %v, want %s", in.Interfaces, err, want)
				}
				if err := m.Remove(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// A port of the host is one VM's, whatever it leads to.
func TestNetwork_PortTaken(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	start := func(ports ...smartvm.Port) (*smartvm.Machine, error) {
		t.Helper()
		spec := netSpec(s.spec("idle"), 1)
		spec.Ports = ports
		m, err := h.Create(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		return m, m.Start(t.Context())
	}
	first, err := start(smartvm.Port{HostPort: 8080, GuestPort: 80},
		smartvm.Port{HostPort: 8080, GuestPort: 53, Protocol: "udp"})
	if err != nil {
		t.Fatal(err)
	}
	second, err := start(smartvm.Port{HostPort: 8080, GuestPort: 81})
	if err == nil || !strings.Contains(err.Error(), "is taken by VM "+first.ID()) {
		t.Errorf("got %v", err)
	}
	for _, all := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		m, err := start(smartvm.Port{HostIP: all, HostPort: 8080, GuestPort: 81})
		if err == nil || !strings.Contains(err.Error(), "is taken by VM "+first.ID()) {
			t.Errorf("%s: got %v", all, err)
		}
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:7070")
	if err != nil {
		t.Fatal(err)
	}
	third, err := start(smartvm.Port{HostPort: 7070, GuestPort: 80})
	if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "7070:80") {
		t.Errorf("got %v", err)
	}
	if err := errors.Join(l.Close(), third.Start(t.Context())); err != nil {
		t.Error(err)
	}
	fourth, err := start(smartvm.Port{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 7070, GuestPort: 80})
	if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), "is taken by VM "+third.ID()) {
		t.Errorf("got %v", err)
	}
	if err := fourth.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if l, err := net.Listen("tcp", "127.0.0.1:7070"); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a service that comes later has %v, %v", l, err)
	}
	if err := h.StopAll(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(first.Remove(t.Context()), second.Remove(t.Context()), third.Remove(t.Context())); err != nil {
		t.Error(err)
	}
	wantNoNetwork(t)
}

// A port is somebody else's to have when its lease has ended: no socket of the VM that had it is in
// the way then.
func TestNetwork_PortPassedOn(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	undone := 0
	s.options = smartvm.WithTrace(s.options, func(step string) {
		if !strings.HasPrefix(step, "unlink") {
			return
		}
		undone++
		l, err := net.Listen("tcp4", "0.0.0.0:8080")
		if err != nil {
			t.Error(err)
		} else if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	h := s.open()
	spec := netSpec(s.spec("idle"), 1)
	spec.Ports = []smartvm.Port{{HostPort: 8080, GuestPort: 80}}
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if l, err := net.Listen("tcp4", "0.0.0.0:8080"); err == nil {
		t.Errorf("the port of a VM is free: %v", l.Close())
	}
	s.stopAndRemove(m)
	if undone == 0 {
		t.Error("no journal was undone")
	}
	wantNoNetwork(t)
}

// A port that is free is chosen at each start, is shown while the VM runs, and stays when another
// process takes up the VM.
func TestNetwork_PortFree(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	ports := func(m *smartvm.Machine) []smartvm.PublishedPort {
		t.Helper()
		in, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return in.Interfaces[0].Ports
	}
	spec := netSpec(s.spec("idle"), 1)
	spec.Ports = []smartvm.Port{{GuestPort: 80}, {HostPort: 8080, GuestPort: 81}}
	var all []*smartvm.Machine
	for range 2 {
		m, err := h.Create(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		if p := ports(m); p != nil {
			t.Errorf("before it runs it has %v", p)
		}
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		all, spec.Ports = append(all, m), spec.Ports[:1]
	}
	a, b := ports(all[0]), ports(all[1])
	if len(a) != 2 || len(b) != 1 || a[0].Host == 0 || a[0].Guest != 80 || a[1].Host != 8080 || b[0].Host == 0 ||
		a[0].Host == b[0].Host {
		t.Fatalf("got %v and %v", a, b)
	}
	if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", a[0].Host)); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a service that comes later has %v, %v", l, err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	h = s.open()
	if _, err := h.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	m, err := h.Machine(t.Context(), all[0].ID())
	if err != nil {
		t.Fatal(err)
	}
	if p := ports(m); !slices.Equal(p, a) {
		t.Errorf("taken up it has %v, had %v", p, a)
	}
	if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", a[0].Host)); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("a service that comes after the VM was taken up has %v, %v", l, err)
	}
	if err := h.StopAll(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
		t.Error(err)
	}
	if p := ports(m); p != nil {
		t.Errorf("stopped it has %v", p)
	}
	if l, err := net.Listen("tcp", fmt.Sprint(":", a[0].Host)); err != nil {
		t.Error(err)
	} else if err := l.Close(); err != nil {
		t.Error(err)
	}
	for _, m := range all {
		if m, err = h.Machine(t.Context(), m.ID()); err == nil {
			err = m.Remove(t.Context())
		}
		if err != nil {
			t.Error(err)
		}
	}
	wantNoNetwork(t)
}

// An address that is asked for is the VM's from its making to its removal, or is refused with who
// has it or what it is; others get other addresses.
func TestNetwork_FixedAddress(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	create := func(address string, namespace bool) (*smartvm.Machine, error) {
		t.Helper()
		spec := netSpec(s.spec("idle"), 1)
		spec.NetworkInterfaces[0].Namespace = namespace
		if address != "" {
			spec.NetworkInterfaces[0].IP = netip.MustParseAddr(address)
		}
		return h.Create(t.Context(), spec)
	}
	for address, want := range map[string]string{
		"172.30.0.0": "the address of network default itself", "172.30.0.1": "the gateway of network default",
		"172.30.0.255": "the broadcast address",
		"172.30.1.2":   "must be of network default: of 172.30.0.0/24",
	} {
		var field *smartvm.FieldError
		if _, err := create(address, false); !errors.As(err, &field) || field.Path != "networkInterfaces[0].ip" ||
			!strings.Contains(field.Reason, want) {
			t.Errorf("%s: got %v", address, err)
		}
	}
	if slots, err := h.Warm(t.Context(), "default", 1); err != nil || slots.Free != 1 {
		t.Fatalf("%+v, %v", slots, err)
	}
	if _, err := create("172.30.0.2", false); err == nil || !strings.Contains(err.Error(), "is that of a warm slot") {
		t.Errorf("got %v", err)
	}
	var all []*smartvm.Machine
	for i, address := range []string{"172.30.0.3", "172.30.0.254", "", "172.30.0.77"} {
		m, err := create(address, i == 3)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
		for range 2 {
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			want := address
			if want == "" {
				want = "172.30.0.4"
			}
			in, err := m.Inspect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if n := in.Interfaces[0]; n.IP4.String() != want || n.Warm || n.IP6.As16()[15] != n.IP4.As4()[3] {
				t.Errorf("got %s and %s, want %s", n.IP4, n.IP6, want)
			}
			if _, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
				t.Fatal(err)
			}
		}
	}
	_, err := create("172.30.0.3", false)
	if !errors.Is(err, smartvm.ErrExists) || !strings.Contains(err.Error(), "is taken by VM "+all[0].ID()) {
		t.Errorf("got %v", err)
	}
	if err := all[0].Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if all[0], err = create("172.30.0.3", false); err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := h.Warm(t.Context(), "default", 0); err != nil {
		t.Error(err)
	}
	wantNoNetwork(t)
}

// An address that was asked for is that VM's alone: its forks have others, and a VM of its snapshot
// has it where it is free, as any.
func TestNetwork_FixedAddressForked(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := netSpec(s.spec("count"), 1)
	spec.NetworkInterfaces[0].Namespace, spec.NetworkInterfaces[0].IP = true, netip.MustParseAddr("172.30.0.50")
	m := s.started(h, spec)
	s.snapshot(m, smartvm.SnapshotOptions{Name: "warm"})
	wantAddress := func(m *smartvm.Machine, want string) {
		t.Helper()
		in, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := in.Interfaces[0].IP4.String(); got != want {
			t.Errorf("VM %s has address %s, want %s", m.ID(), got, want)
		}
		if asked := in.Spec.NetworkInterfaces[0].IP; asked.IsValid() {
			t.Errorf("VM %s asks for %s", m.ID(), asked)
		}
	}
	forks, err := m.Fork(t.Context(), 2, smartvm.ForkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	restored := s.restored(h, "warm", smartvm.RestoreOptions{})
	for i, m := range append(forks, restored) {
		wantAddress(m, fmt.Sprint("172.30.0.", 2+i))
		s.stopAndRemove(m)
	}
	s.stopAndRemove(m)
	restored = s.restored(h, "warm", smartvm.RestoreOptions{})
	wantAddress(restored, "172.30.0.50")
	s.stopAndRemove(restored)
	if err := h.RemoveSnapshot(t.Context(), "warm", false); err != nil {
		t.Error(err)
	}
	if _, err := h.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	wantNoNetwork(t)
}

func wantNoNetwork(t *testing.T) {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if l.Attrs().Name != "lo" {
			t.Errorf("left behind: interface %s", l.Attrs().Name)
		}
	}
	if forward, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err != nil || string(forward) != "0\n" {
		t.Errorf("the host forwards: %q, %v", forward, err)
	}
}

// manyAddresses makes VMs and prints their addresses: the directory, the kernel, the VMM.
func manyAddresses(args []string) int {
	h, err := smartvm.Open(
		smartvm.Options{
			RuntimeDir: filepath.Join(args[0], "runtime"), DataDir: filepath.Join(args[0], "data"),
			FirecrackerBinary: args[2], Launcher: smartvm.LaunchDirect,
		})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	addresses := []string{}
	for range 10 {
		wg.Go(func() {
			for range 10 {
				m, err := h.Create(context.Background(), netSpec(smartvm.Spec{
					BootSource:    smartvm.BootSource{KernelImagePath: args[1]},
					MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
				}, 1))
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					return
				}
				in, err := m.Inspect(context.Background())
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					return
				}
				mu.Lock()
				addresses = append(addresses, in.Interfaces[0].IP4.String())
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(addresses); err != nil {
		return 1
	}
	return 0
}

// Two processes that make a hundred VMs each give no address twice; then there is room for 53 more.
func TestNetwork_ManyProcesses(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	s := newSite(t, smartvm.LaunchDirect)
	seen := map[string]int{}
	outputs := make([][]byte, 2)
	var wg sync.WaitGroup
	for i := range outputs {
		wg.Go(func() {
			cmd := exec.CommandContext(t.Context(), os.Args[0], s.dir, s.spec("idle").BootSource.KernelImagePath,
				s.options.FirecrackerBinary)
			cmd.Env = append(os.Environ(), "SMARTVM_TEST_CHILD=many-addresses")
			cmd.Stderr = t.Output()
			outputs[i], _ = cmd.Output()
		})
	}
	wg.Wait()
	for _, out := range outputs {
		var addresses []string
		if err := json.Unmarshal(out, &addresses); err != nil || len(addresses) != 100 {
			t.Fatalf("%d addresses, %v", len(addresses), err)
		}
		for _, a := range addresses {
			seen[a]++
		}
	}
	for a, n := range seen {
		if n > 1 {
			t.Errorf("%s was given %d times", a, n)
		}
	}
	h := s.open()
	made := 0
	for ; made < 300; made++ {
		if _, err := h.Create(t.Context(),
			netSpec(smartvm.Spec{BootSource: s.spec("idle").BootSource, MachineConfig: s.spec("idle").MachineConfig},
				1)); err != nil {
			if !errors.Is(err, network.ErrExhausted) {
				t.Fatal(err)
			}
			break
		}
	}
	if made != 53 {
		t.Errorf("%d more, want 53", made)
	}
	all, err := h.Machines(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if err := m.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// Somebody flushes all rules, or removes the bridge: that is restored, with the VM's part, as soon
// as the kernel tells of it.
func TestNetwork_Flushed(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	s.options = smartvm.WithHealInterval(s.options, time.Hour)
	log := new(syncBuffer)
	s.options.Log = slog.New(slog.NewTextHandler(log, nil))
	m, err := s.open().Create(t.Context(), netSpec(s.spec("idle"), 1))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := ruleset(t)
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(testenv.Patience(20 * time.Second))
	for !slices.Equal(ruleset(t), before) {
		if time.Now().After(deadline) {
			t.Fatal("the rules are not restored")
		}
	}
	bridge, err := netlink.LinkByName(network.DefaultBridge)
	if err == nil {
		err = netlink.LinkDel(bridge)
	}
	if err != nil {
		t.Fatal(err)
	}
	joined := func() bool {
		again, err := netlink.LinkByName(network.DefaultBridge)
		if err != nil || again.Attrs().Index == bridge.Attrs().Index {
			return false
		}
		ports, err := netlink.LinkList()
		return err == nil && slices.ContainsFunc(ports, func(l netlink.Link) bool {
			return l.Attrs().MasterIndex == again.Attrs().Index && l.Type() == "tuntap"
		})
	}
	for !joined() {
		if time.Now().After(deadline) {
			t.Fatal("the bridge is not restored")
		}
	}
	if want := "restored what somebody had removed"; !strings.Contains(log.String(), want) {
		t.Errorf("the log says %q, want %q", log, want)
	}
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := ruleset(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// syncBuffer keeps what several goroutines write.
type syncBuffer struct {
	mu  sync.Mutex
	all strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.String()
}

// withoutNetAdmin starts a VM without a network, and one with: the directory, the kernel, the VMM.
func withoutNetAdmin(args []string) int {
	h, err := smartvm.Open(
		smartvm.Options{
			RuntimeDir: filepath.Join(args[0], "runtime"), DataDir: filepath.Join(args[0], "data"),
			FirecrackerBinary: args[2], Launcher: smartvm.LaunchDirect,
		})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	for _, n := range []int{0, 1} {
		m, err := h.Create(context.Background(), netSpec(smartvm.Spec{
			BootSource:    smartvm.BootSource{KernelImagePath: args[1]},
			MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128},
		}, n))
		if err != nil {
			fmt.Println(err)
			return 1
		}
		err = m.Start(context.Background())
		fmt.Printf("%d interfaces: %v\n", n, err)
		var advised interface{ Hint() string }
		if errors.As(err, &advised) {
			fmt.Println("hint:", advised.Hint())
		}
		if err == nil {
			_, err = m.Stop(context.Background(), smartvm.StopOptions{})
			if err != nil {
				fmt.Println(err)
			}
		}
		if err := m.Remove(context.Background()); err != nil {
			fmt.Println(err)
		}
	}
	if err := h.Close(); err != nil {
		fmt.Println(err)
	}
	return 0
}

// Without CAP_NET_ADMIN a VM without a network runs, and for one with a network the error says what
// to do.
func TestNetwork_NotAllowed(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, smartvm.LaunchDirect)
	cmd := exec.CommandContext(t.Context(), os.Args[0], s.dir, s.spec("idle").BootSource.KernelImagePath,
		s.options.FirecrackerBinary)
	cmd.Env = append(os.Environ(), "SMARTVM_TEST_CHILD=without-net-admin")
	var out []byte
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends, and what it lacks with it
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_NET_ADMIN, 0, 0, 0); err != nil {
			done <- err
			return
		}
		var err error
		out, err = cmd.CombinedOutput()
		done <- err
	}()
	if err := <-done; err != nil {
		t.Errorf("%v: %s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 3 || lines[0] != "0 interfaces: <nil>" || !strings.Contains(lines[1], "operation not permitted") ||
		lines[2] != "hint: run smartvm as root (CAP_NET_ADMIN), or the VM with --net none" {
		t.Errorf("got %q", lines)
	}
	wantNoNetwork(t)
}

// ruleset is what tables there are and what is in them.
func ruleset(t *testing.T) (all []string) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		chains, err := conn.ListChainsOfTableFamily(table.Family)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range chains {
			rules, err := conn.GetRules(table, c)
			if err != nil {
				return nil // it is being changed
			}
			all = append(all, fmt.Sprint(table.Name, table.Family, c.Name, len(rules)))
		}
		sets, err := conn.GetSets(table)
		if err != nil {
			return nil
		}
		for _, s := range sets {
			elements, err := conn.GetSetElements(s)
			if err != nil {
				return nil
			}
			all = append(all, fmt.Sprint(table.Name, table.Family, s.Name, len(elements)))
		}
	}
	slices.Sort(all)
	return all
}
