// Package nettest gives tests networks of their own: a namespace for the test, and others for
// guests and for what stands for the world outside.
package nettest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/network/netns"
)

// variable is set in a process that is alone in its namespaces.
const variable = "SMARTVM_TEST_NETNS"

// Alone says whether this process has a network of its own. If not it runs the calling test, which
// must be no subtest, in one that has, reports how that went, and returns false: the test is done.
//
// Mounts are its own too, and /sys shows the network.
func Alone(t *testing.T) bool {
	t.Helper()
	testenv.Require(t, testenv.Root)
	if os.Getenv(variable) == "" {
		run(t, "1")
		return false
	}
	link, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(netlink.LinkSetUp(link), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("sysfs", "/sys", "sysfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	return true
}

// Rough is Alone on hosts that do least for us: they look at no sources (rp_filter 0), and their
// rules for IP packets see those that are only bridged (br_netfilter), or do not. The test runs on
// both.
func Rough(t *testing.T) bool {
	t.Helper()
	testenv.Require(t, testenv.Root)
	seen := os.Getenv(variable)
	if seen == "" {
		run(t, bridged)
		run(t, unbridged)
		return false
	}
	if !Alone(t) {
		return false
	}
	for _, of := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+of+"/rp_filter", []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
	}
	BridgeNetfilter(t, seen == bridged)
	return true
}

// What the variable says of the bridges, for Rough.
const (
	bridged   = "bridged"
	unbridged = "unbridged"
)

// BridgeNetfilter says whether the rules for IP packets see those that are only bridged, as on a
// host that has had Docker. A kernel that has no such rules sees none.
func BridgeNetfilter(t *testing.T, on bool) {
	t.Helper()
	for _, v := range []string{"iptables", "ip6tables", "arptables"} {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+v, []byte(map[bool]string{true: "1", false: "0"}[on]), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// run runs the test in namespaces of its own.
func run(t *testing.T, value string) {
	t.Helper()
	own := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(arg string) bool { return strings.HasPrefix(arg, "-test.") })
	args := append([]string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.count=1"}, own...)
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), variable+"="+value)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	// Pdeathsig means the thread that starts the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		t.Errorf("in a network of its own (%s): %v", value, err)
	}
}

// Namespace is a network beside the test's. It is gone when the test is.
type Namespace struct {
	*netns.Namespace
	t *testing.T
}

// New makes a network with nothing but its loopback.
func New(t *testing.T) *Namespace {
	t.Helper()
	n, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return &Namespace{n, t}
}

// Must is Do that ends the test on an error.
func (n *Namespace) Must(f func() error) {
	n.t.Helper()
	if err := n.Do(f); err != nil {
		n.t.Fatal(err)
	}
}

// Link is one end of a cable.
type Link struct {
	Name      string
	MAC       net.HardwareAddr
	Addresses []netip.Prefix
	Gateways  []netip.Addr
}

// Connect lays a cable: near stays in the test's network, far is in n. Both are up.
func (n *Namespace) Connect(near, far Link) {
	n.t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = near.Name, near.MAC
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: far.Name, PeerHardwareAddr: far.MAC,
		PeerNamespace: netlink.NsFd(n.Fd()),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		n.t.Fatal(err)
	}
	if err := near.Configure(); err != nil {
		n.t.Fatal(err)
	}
	n.Must(far.Configure)
}

// Configure gives the link, in the network of the thread, its addresses and routes.
func (l Link) Configure() error {
	link, err := netlink.LinkByName(l.Name)
	if err != nil {
		return err
	}
	for _, p := range l.Addresses {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("address %s: %w", p, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	for _, g := range l.Gateways {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: g.AsSlice()}); err != nil {
			return fmt.Errorf("route by %s: %w", g, err)
		}
	}
	return nil
}

// patience is for what must arrive, impatience for what must not.
const (
	patience   = 5 * time.Second
	impatience = 300 * time.Millisecond
)

// Serve answers on an address, "ip:port" or "[ip]:port", by TCP and UDP with "WORD from PEER\n",
// PEER being the address that asks.
func (n *Namespace) Serve(address, word string) {
	n.t.Helper()
	n.Must(func() error { return Serve(n.t, address, word) })
}

// Serve is Namespace.Serve in the thread's network.
func Serve(t *testing.T, address, word string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	p, err := net.ListenPacket("udp", address)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	t.Cleanup(func() { l.Close(); p.Close() })
	answer := func(peer net.Addr) []byte {
		host, _, _ := net.SplitHostPort(peer.String())
		return []byte(word + " from " + host + "\n")
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write(answer(c.RemoteAddr()))
			_ = c.Close()
		}
	}()
	go func() {
		buf := make([]byte, 64)
		for {
			_, peer, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = p.WriteTo(answer(peer), peer)
		}
	}()
	return nil
}

// Ask returns what a server says by "tcp" or "udp", "" if nothing comes.
func (n *Namespace) Ask(network, address string) (answer string) {
	n.t.Helper()
	n.Must(func() error { answer = Ask(network, address, patience); return nil })
	return answer
}

// Silent says whether nothing comes from a server.
func (n *Namespace) Silent(network, address string) (silent bool) {
	n.t.Helper()
	n.Must(func() error { silent = Ask(network, address, impatience) == ""; return nil })
	return silent
}

// Ask is Namespace.Ask in the thread's network, for at most wait.
func Ask(network, address string, wait time.Duration) string {
	c, err := net.DialTimeout(network, address, wait)
	if err != nil {
		return ""
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(wait))
	if network == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return ""
		}
		buf := make([]byte, 256)
		k, _ := c.Read(buf)
		return string(buf[:k])
	}
	data, _ := io.ReadAll(c)
	return string(data)
}

// Echo sends back what comes by TCP, in the namespace.
func (n *Namespace) Echo(address string) {
	n.t.Helper()
	var l net.Listener
	n.Must(func() (err error) { l, err = net.Listen("tcp", address); return err })
	n.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.t.Cleanup(func() { c.Close() })
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
}
