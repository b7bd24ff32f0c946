package network_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/rtnl"
)

// beside is software that has a part of the host's network too. What it does was taken from the
// real programs: testdata/beside has their rules, and says of which version.
type beside struct {
	rules []string // of testdata/beside
	told  []string // rules when it was told what README.md says; empty: the commands themselves
	// program loads rules of iptables. The other is iptables-legacy.
	program string
	// A bridge of its own, with something that it publishes: 8081 for all, and on the host's loopback
	// 5432.
	bridge, address, container string
	hides                      bool              // nobody reaches more of it than it publishes
	variables                  map[string]string // that it sets
	drops                      bool              // what it does not know is not forwarded
	dropsOff                   bool              // likewise, but only where the host did not forward before
	lan                        bool              // when told, it lets guests out by all of the host's interfaces
	heading                    string            // of README.md, before its commands
	both                       bool              // they are for ip6tables as well
	like                       bool              // it is much as another: that is tried on more hosts
}

var (
	forwarding = map[string]string{"ipv4/ip_forward": "1"}
	docker20   = beside{
		rules: []string{"docker-20.10.ip4"}, program: "iptables-nft", bridge: "docker0", address: "172.17.0.1/16",
		container: "172.17.0.2/16",
		variables: forwarding, dropsOff: true, heading: "Docker",
	}
	docker28 = beside{
		rules: []string{"docker-28.5.ip4", "docker-28.5.ip6"}, program: "iptables-nft", bridge: "docker0",
		address: "172.17.0.1/16", container: "172.17.0.2/16",
		hides: true, variables: forwarding, dropsOff: true, heading: "Docker",
	}
	libvirt9 = beside{
		rules: []string{"libvirt-9.0.ip4"}, program: "iptables-nft", bridge: "virbr0", address: "192.168.122.1/24",
		container: "192.168.122.2/24",
		hides:     true, variables: forwarding, like: true,
	}
	libvirt12 = beside{
		rules: []string{"libvirt-12.8.nft"}, bridge: "virbr0", address: "192.168.122.1/24", container: "192.168.122.2/24",
		hides: true, variables: forwarding,
	}
	firewalld1 = beside{
		rules: []string{"firewalld-1.3.nft"}, told: []string{"firewalld-1.3-told.nft"}, drops: true,
		like: true, lan: true, heading: "firewalld, for all that the network's own rules let out",
	}
	firewalld2 = beside{
		rules: []string{"firewalld-2.5.nft"}, told: []string{"firewalld-2.5-told.nft"}, drops: true,
		lan: true, heading: "firewalld, for all that the network's own rules let out",
	}
	firewalldZ = beside{rules: []string{"firewalld-2.5-zones.nft"}, like: true}
	ufw        = beside{
		rules: []string{"ufw-0.36.ip4", "ufw-0.36.ip6"}, program: "iptables-nft", drops: true,
		heading: "ufw, whose last line is for names",
		variables: map[string]string{
			"ipv4/conf/all/accept_redirects": "0", "ipv4/conf/default/accept_redirects": "0",
			"ipv6/conf/all/accept_redirects": "0", "ipv6/conf/default/accept_redirects": "0",
		},
	}
)

// ipv6 is Docker 28 whose networks have IPv6.
func (b beside) ipv6() beside {
	b.rules = []string{b.rules[0], "docker-28.5-ipv6.ip6"}
	b.variables = map[string]string{"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}
	b.both, b.like = true, true
	return b
}

// legacy is the same by the kernel's older rules.
func (b beside) legacy() beside {
	b.program, b.like = "iptables-legacy", true
	return b
}

// The host's names and addresses in this test, beside those of site.
const (
	lanHost, lanPeer = "192.0.2.1", "192.0.2.2"
	dnsPeer          = "192.0.2.53" // a DNS server on the LAN
)

// neighbourhood is a site with something beside it.
type neighbourhood struct {
	*site
	beside
	lan, inner *nettest.Namespace // inner is behind the neighbour's bridge, nil if there is none
	blocked    bool               // the neighbour does not forward what it does not know
	reached    map[string]bool    // what others reached before
}

func newNeighbourhood(t *testing.T, b beside, forwards bool, rpFilter string) *neighbourhood {
	t.Helper()
	setVariable(t, "ipv6/conf/default/accept_dad", "0") // addresses are there at once
	h := &neighbourhood{site: newSite(t, nil), beside: b, lan: nettest.New(t), blocked: b.drops || b.dropsOff && !forwards}
	for _, v := range []string{"all", "default", "uplink"} {
		setVariable(t, "ipv4/conf/"+v+"/rp_filter", rpFilter)
	}
	h.lan.Connect(
		nettest.Link{Name: "lan", Addresses: prefixes(lanHost + "/24")},
		nettest.Link{Name: "eth0", Addresses: prefixes(lanPeer+"/24", dnsPeer+"/24"), Gateways: addresses(lanHost)})
	h.outside.Must(nettest.Link{Name: "eth0", Gateways: addresses(uplink4, uplink6)}.Configure)
	for _, v := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		setVariable(t, v, map[bool]string{true: "1", false: "0"}[forwards])
	}
	h.outside.Serve(":80", "world")
	h.lan.Serve(":80", "lan")
	if err := nettest.Serve(t, ":22", "host"); err != nil {
		t.Fatal(err)
	}
	sendLoopback(h.outside, uplink4)
	if b.bridge != "" {
		h.addInner(t)
	}
	h.start(t)
	settled(t)
	return h
}

// settled waits until the kernel has seen that cables have two ends, and has begun to listen at
// each address of them: before, some routes are not there.
func settled(t *testing.T) {
	t.Helper()
	links, routes, done := make(chan netlink.LinkUpdate, 1000), make(chan netlink.RouteUpdate, 1000), make(chan struct{})
	defer close(done)
	if err := errors.Join(netlink.LinkSubscribe(links, done), netlink.RouteSubscribe(routes, done)); err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for {
		waits := unsettled(t)
		if len(waits) == 0 {
			return
		}
		select {
		case <-links:
		case <-routes:
		case <-deadline:
			t.Fatalf("not settled: %q", waits)
		}
	}
}

// unsettled are links that are not up yet, and IPv6 addresses without a route.
func unsettled(t *testing.T) (waits []string) {
	t.Helper()
	for _, l := range allLinks(t) {
		if a := l.Attrs(); a.Name != "lo" && a.OperState != netlink.OperUp {
			waits = append(waits, a.Name)
		}
	}
	addresses, err := rtnl.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V6) })
	if err != nil {
		t.Fatal(err)
	}
	local, err := rtnl.Whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_LOCAL},
			netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		if !slices.ContainsFunc(local, func(r netlink.Route) bool {
			return r.LinkIndex == a.LinkIndex && r.Dst != nil && r.Dst.IP.Equal(a.IP)
		}) {
			waits = append(waits, a.IP.String())
		}
	}
	return waits
}

// sendLoopback has who is in n send a host what is for its loopback.
func sendLoopback(n *nettest.Namespace, host string) {
	n.Must(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		own, err := netlink.AddrList(lo, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		for _, a := range own {
			if err := netlink.AddrDel(lo, &a); err != nil {
				return err
			}
		}
		_, loopback, err := net.ParseCIDR("127.0.0.1/32")
		return errors.Join(err, os.WriteFile("/proc/sys/net/ipv4/conf/eth0/route_localnet", []byte("1"), 0),
			netlink.RouteAdd(&netlink.Route{Dst: loopback, Gw: net.ParseIP(host)}))
	})
}

// addInner makes the neighbour's bridge with something behind it.
func (h *neighbourhood) addInner(t *testing.T) {
	t.Helper()
	addBridge(t, h.bridge)
	if err := (nettest.Link{Name: h.bridge, Addresses: prefixes(h.address)}).Configure(); err != nil {
		t.Fatal(err)
	}
	h.inner = nettest.New(t)
	h.inner.Connect(nettest.Link{Name: "inner"},
		nettest.Link{Name: "eth0", Addresses: prefixes(h.container), Gateways: []netip.Addr{prefixes(h.address)[0].Addr()}})
	port, err := netlink.LinkByName("inner")
	if err != nil {
		t.Fatal(err)
	}
	bridge, err := netlink.LinkByName(h.bridge)
	if err == nil {
		err = netlink.LinkSetMaster(port, bridge)
	}
	if err != nil {
		t.Fatal(err)
	}
	h.inner.Serve(":80", "inner")
	h.inner.Serve(":5432", "private")
	h.inner.Serve(":9", "not published")
}

func (h *neighbourhood) innerAddress() string { return prefixes(h.container)[0].Addr().String() }

// start does what the neighbour does when it starts, or starts again.
func (h *neighbourhood) start(t *testing.T) {
	t.Helper()
	for name, value := range h.variables {
		setVariable(t, name, value)
	}
	h.load(t, h.rules)
}

func (h *neighbourhood) load(t *testing.T, files []string) {
	t.Helper()
	for _, name := range files {
		text, err := os.ReadFile(filepath.Join("testdata", "beside", name))
		if err != nil {
			t.Fatal(err)
		}
		if !h.blocked { // as dockerd leaves it where the host forwarded before it started
			text = bytes.ReplaceAll(text, []byte(":FORWARD DROP"), []byte(":FORWARD ACCEPT"))
		}
		switch filepath.Ext(name) {
		case ".ip4":
			run(t, text, h.program+"-restore")
		case ".ip6":
			run(t, text, strings.Replace(h.program, "ip", "ip6", 1)+"-restore")
		case ".nft":
			for line := range strings.Lines(string(text)) { // in place of what is there
				if table, _, ok := strings.Cut(line, " {"); ok && strings.HasPrefix(line, "table ") {
					text = append([]byte(table+"\ndelete "+table+"\n"), text...)
				}
			}
			run(t, text, "nft", "-f", "-")
		}
	}
}

func run(t *testing.T, stdin []byte, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", args, err, out)
	}
	return string(out)
}

// ufwRules are what ufw makes of commands.
var ufwRules = map[string][]string{
	"ufw route allow in on svbr0 out on uplink": {"-A ufw%s-user-forward -i svbr0 -o uplink -j ACCEPT"},
	"ufw route allow out on svbr0":              {"-A ufw%s-user-forward -o svbr0 -j ACCEPT"},
	"ufw allow in on svbr0":                     {"-A ufw%s-user-input -i svbr0 -j ACCEPT"},
}

// firewalldCommands are those after which the rules in testdata were taken.
var firewalldCommands = []string{
	"firewall-cmd --permanent --new-zone=smartvm",
	"firewall-cmd --permanent --zone=smartvm --add-interface=svbr0",
	"firewall-cmd --permanent --new-policy=smartvm-out",
	"firewall-cmd --permanent --policy=smartvm-out --add-ingress-zone=smartvm",
	"firewall-cmd --permanent --policy=smartvm-out --add-egress-zone=ANY",
	"firewall-cmd --permanent --policy=smartvm-out --set-target=ACCEPT",
	"firewall-cmd --reload",
}

// tell does what README.md says.
func (h *neighbourhood) tell(t *testing.T) {
	t.Helper()
	commands := advice(t, h.heading)
	switch h.heading {
	case firewalld1.heading:
		if !slices.Equal(commands, firewalldCommands) {
			t.Errorf("README.md says %q, the rules are of %q", commands, firewalldCommands)
		}
		h.load(t, h.told)
	case ufw.heading:
		for i, version := range []string{"", "6"} {
			text := "*filter\n"
			for _, c := range commands {
				rules, ok := ufwRules[c]
				if !ok {
					t.Errorf("README.md says %q, of which it is not known what ufw makes", c)
				}
				for _, r := range rules {
					text += fmt.Sprintf(r, version) + "\n"
				}
			}
			run(t, []byte(text+"COMMIT\n"), []string{h.program, strings.Replace(h.program, "ip", "ip6", 1)}[i]+"-restore",
				"--noflush")
		}
	case docker20.heading:
		for _, c := range commands {
			_, args, _ := strings.Cut(c, " ")
			run(t, nil, append([]string{h.program}, strings.Fields(args)...)...)
			if h.both {
				run(t, nil, append([]string{strings.Replace(h.program, "ip", "ip6", 1)}, strings.Fields(args)...)...)
			}
		}
	}
}

// advice are the commands of README.md for a neighbour, on this host.
func advice(t *testing.T, heading string) (commands []string) {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := bytes.Cut(text, []byte("\n"+heading+":\n\n"))
	if !ok {
		t.Fatalf("README.md says nothing to %s", heading)
	}
	for line := range strings.Lines(string(text)) {
		command, ok := strings.CutPrefix(line, "    ")
		if !ok {
			break
		}
		commands = append(commands, strings.ReplaceAll(strings.TrimSpace(command), "eth0", "uplink"))
	}
	return commands
}

// others are what somebody else may reach of the host, or through it.
func (h *neighbourhood) others() map[string]func(wait time.Duration) bool {
	all := map[string]func(time.Duration) bool{}
	asks := func(from string, n *nettest.Namespace, network, address string) {
		all[from+" "+network+" "+address] = func(wait time.Duration) (yes bool) {
			n.Must(func() error { yes = nettest.Ask(network, address, wait) != ""; return nil })
			return yes
		}
	}
	here := func(address string) {
		all["host tcp "+address] = func(wait time.Duration) bool { return nettest.Ask("tcp", address, wait) != "" }
	}
	for _, network := range []string{"tcp", "udp"} {
		asks("world", h.outside, network, lanPeer+":80")
		asks("lan", h.lan, network, world4+":80")
		asks("world", h.outside, network, uplink4+":22")
		asks("lan", h.lan, network, lanHost+":22")
	}
	asks("world", h.outside, "tcp", "["+uplink6+"]:22")
	here(world4 + ":80")
	here("127.0.0.1:22")
	if h.inner == nil {
		return all
	}
	inner, gateway := h.innerAddress(), prefixes(h.address)[0].Addr().String()
	for _, address := range []string{
		inner + ":80", inner + ":5432", inner + ":9", gateway + ":22", uplink4 + ":8081",
		uplink4 + ":5432",
	} {
		asks("world", h.outside, "tcp", address)
	}
	asks("world", h.outside, "tcp", "127.0.0.1:5432") // which Docker before 28 lets in
	asks("lan", h.lan, "tcp", lanHost+":8081")
	asks("lan", h.lan, "tcp", inner+":80")
	asks("inner", h.inner, "tcp", world4+":80")
	asks("inner", h.inner, "udp", world4+":80")
	asks("inner", h.inner, "tcp", lanPeer+":80")
	asks("inner", h.inner, "tcp", gateway+":22")
	here(inner + ":80")
	here(inner + ":5432")
	here(inner + ":9")
	here(uplink4 + ":8081")
	return all
}

// look says what others reach. What they reached before is waited for.
func (h *neighbourhood) look() map[string]bool {
	var mu sync.Mutex
	var work sync.WaitGroup
	is := map[string]bool{}
	for name, reaches := range h.others() {
		wait := time.Second
		if h.reached != nil {
			wait = map[bool]time.Duration{true: 10 * time.Second, false: 300 * time.Millisecond}[h.reached[name]]
		}
		work.Go(func() {
			yes := reaches(wait)
			mu.Lock()
			defer mu.Unlock()
			is[name] = yes
		})
	}
	work.Wait()
	return is
}

// unchanged says that others reach what they did.
func (h *neighbourhood) unchanged(t *testing.T, when string) {
	t.Helper()
	if diff := cmp.Diff(h.reached, h.look()); diff != "" {
		t.Errorf("%s: others reach something else:\n%s", when, diff)
	}
}

// everything is all that there is of the host's network.
func (h *neighbourhood) everything(t *testing.T) (all []string) {
	t.Helper()
	add := func(kind string, what ...any) { all = append(all, kind+" "+fmt.Sprint(what...)) }
	for _, l := range allLinks(t) {
		a := l.Attrs()
		add("link", a.Name, l.Type(), a.HardwareAddr, a.MTU, a.MasterIndex, a.Group, a.Promisc, a.Flags.String(), a.Alias)
	}
	addresses, err := rtnl.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses {
		add("address", a.LinkIndex, a.IPNet)
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := rtnl.Whole(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			add("route", r)
		}
		rules, err := netlink.RuleList(family)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rules {
			add("rule", r)
		}
	}
	for line := range strings.Lines(run(t, nil, "nft", "-s", "list", "ruleset")) {
		add("nft", strings.TrimRight(line, "\n"))
	}
	if h.program == "iptables-legacy" {
		for _, p := range []string{"iptables-legacy-save", "ip6tables-legacy-save"} {
			for line := range strings.Lines(run(t, nil, p)) {
				if line[0] != '#' {
					line, _, _ = strings.Cut(line, " [") // of counters
					add(p, strings.TrimRight(line, "\n"))
				}
			}
		}
	}
	return append(all, everyVariable(t)...)
}

// everyVariable is all of the kernel's network that does not change by itself.
func everyVariable(t *testing.T) (all []string) {
	t.Helper()
	const root = "/proc/sys/net"
	byItself := []string{"nf_conntrack_count", "tcp_fastopen_key", "stable_secret"}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || slices.Contains(byItself, d.Name()) {
			return err
		}
		if value, err := os.ReadFile(path); err == nil { // some can only be written
			all = append(all, path[len(root)+1:]+" "+strings.TrimSpace(string(value)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// round is a guest's whole life. Whether the neighbour was told what to let through decides what it
// reaches.
func (h *neighbourhood) round(t *testing.T, told bool) {
	t.Helper()
	before := h.everything(t)
	h.warned(t)
	if h.reached == nil {
		h.reached = h.look()
	}
	g, upkeep := h.publishedGuest()
	g.Serve(":80", "guest")
	sendLoopback(g.Namespace, "172.30.0.1")
	open := told || !h.blocked
	if open {
		h.outward(t, g)
		h.names(t, g)
		h.published(t)
	}
	h.bounded(t, g, open, "with a guest")
	h.start(t)
	if told {
		h.tell(t)
	}
	if open {
		g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
		h.unchanged(t, "after the neighbour's restart")
	}
	upkeep.Close()
	h.remove(g)
	removeLink(t, g.filter.Tap)
	h.unchanged(t, "after the guest")
	if diff := cmp.Diff(before, h.everything(t)); diff != "" {
		t.Errorf("the host is another than before:\n%s", diff)
	}
}

// bounded is what neither guests reach nor others by them.
func (h *neighbourhood) bounded(t *testing.T, g *guest, open bool, when string) {
	t.Helper()
	var work sync.WaitGroup
	work.Go(func() { h.closed(t, g, open) })
	work.Go(func() { h.unchanged(t, when) })
	work.Wait()
}

// warned says whether the host's owner is told of who drops what is forwarded, and of nobody else.
func (h *neighbourhood) warned(t *testing.T) {
	t.Helper()
	got, err := inspect.Blockers(nftables.ChainHookForward)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	switch {
	case !h.blocked:
		// With zones that let each other's through firewalld has a last rule all the same.
		got = slices.DeleteFunc(got, func(s string) bool { return s == "inet firewalld filter_FORWARD" })
	case h.heading == firewalld1.heading:
		want = []string{"inet firewalld filter_FORWARD"}
	default:
		want = []string{"ip filter FORWARD"}
		if h.both || h.heading == ufw.heading {
			want = append(want, "ip6 filter FORWARD")
		}
	}
	if h.program == "iptables-legacy" {
		for i := range want {
			want[i] += " (iptables-legacy)"
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("that drop what is forwarded: got %q, want %q", got, want)
	}
}

// outward is what guests are to reach.
func (h *neighbourhood) outward(t *testing.T, g *guest) {
	t.Helper()
	for _, network := range []string{"tcp", "udp"} {
		g.reaches(t, network, world4+":80", "world from "+uplink4+"\n")
		if variable(t, "ipv6/conf/uplink/disable_ipv6") == "0" {
			g.reaches(t, network, "["+world6+"]:80", "world from "+uplink6+"\n")
		}
	}
	if h.heading == "" || !h.blocked || h.beside.lan {
		g.reaches(t, "tcp", lanPeer+":80", "lan from "+lanHost+"\n")
	} else {
		g.misses(t, "tcp", lanPeer+":80")
	}
}

// names are answered whatever server the host asks.
func (h *neighbourhood) names(t *testing.T, g *guest) {
	t.Helper()
	for server, answer := range resolvers {
		nettest.Resolver(t, server)
		if got := g.resolve(t, "172.30.0.1:53", "who.example."); got != answer {
			t.Errorf("with %s as the host's server: got %s, want %s", server, got, answer)
		}
	}
}

var resolvers = map[string]string{
	"127.0.0.1": "203.0.113.1", "127.0.0.53": "203.0.113.53",
	"169.254.169.254": "203.0.113.169", dnsPeer: "203.0.113.2",
}

// serveNames has something answer at all of resolvers.
func (h *neighbourhood) serveNames(t *testing.T) {
	t.Helper()
	h.outside.Must(nettest.Link{Name: "eth0", Addresses: prefixes("169.254.169.254/32")}.Configure)
	route(t, "169.254.169.254/32", world4)
	for server, answer := range resolvers {
		names := map[string]string{"who.example.": answer}
		switch server {
		case "169.254.169.254":
			h.outside.ServeNames(server, names)
		case dnsPeer:
			h.lan.ServeNames(server, names)
		default:
			if err := nettest.ServeNames(t, server, names); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// published is who reaches the guest's port.
func (h *neighbourhood) published(t *testing.T) {
	t.Helper()
	for from, ask := range map[string]string{
		"world": h.outside.Ask("tcp", uplink4+":8000"), "lan": h.lan.Ask("tcp", lanHost+":8000"),
		"host":                         nettest.Ask("tcp", uplink4+":8000", 5*time.Second),
		"host's loopback":              nettest.Ask("tcp", "127.0.0.1:8000", 5*time.Second),
		"host, by the guest's address": nettest.Ask("tcp", "172.30.0.2:80", 5*time.Second),
	} {
		if !strings.HasPrefix(ask, "guest from ") {
			t.Errorf("the %s does not reach what is published: %q", from, ask)
		}
	}
	if variable(t, "ipv6/conf/uplink/disable_ipv6") == "0" {
		if got := h.outside.Ask("tcp", "["+uplink6+"]:8000"); !strings.HasPrefix(got, "guest from ") {
			t.Errorf("by IPv6 what is published is not reached: %q", got)
		}
	}
	if h.inner != nil {
		if got := h.inner.Ask("tcp", uplink4+":8000"); !strings.HasPrefix(got, "guest from ") {
			t.Errorf("behind %s what is published is not reached: %q", h.bridge, got)
		}
	}
}

// closed is what guests are not to reach, beside others who do, and who is not to reach them. Where
// the neighbour is not told (open), that is the world, too.
func (h *neighbourhood) closed(t *testing.T, g *guest, open bool) {
	t.Helper()
	type way struct {
		from             *nettest.Namespace
		network, address string
	}
	ways := map[string]way{
		"the world to a guest": {h.outside, "tcp", "172.30.0.2:80"},
		"the LAN to a guest":   {h.lan, "tcp", "172.30.0.2:80"},
	}
	for _, network := range []string{"tcp", "udp"} {
		if !open {
			ways["a guest to the world by "+network] = way{g.Namespace, network, world4 + ":80"}
		}
		if !open && h.both {
			ways["a guest to the world by IPv6 and "+network] = way{g.Namespace, network, "[" + world6 + "]:80"}
		}
	}
	for _, address := range []string{"172.30.0.1", uplink4, lanHost} {
		ways["a guest to the host at "+address] = way{g.Namespace, "tcp", address + ":22"}
	}
	if h.inner != nil {
		gateway, inner := prefixes(h.address)[0].Addr().String(), h.innerAddress()
		ways["from behind "+h.bridge+" to a guest"] = way{h.inner, "tcp", "172.30.0.2:80"}
		ways["a guest to the host at "+gateway] = way{g.Namespace, "tcp", gateway + ":22"}
		if opens := slices.Equal(h.rules, docker20.rules); h.reached["world tcp 127.0.0.1:5432"] != opens {
			t.Errorf("others reach what Docker publishes on the loopback: %v, want %v", !opens, opens)
		}
		// Docker before 28 lets others reach ports of containers by the containers' addresses, and where
		// the host forwarded before it, any port.
		hidden := []string{uplink4 + ":5432", "127.0.0.1:5432", "127.0.0.1:22", "127.0.0.1:8000"}
		if h.hides {
			hidden = append(hidden, inner+":80", inner+":5432", inner+":9")
		} else if h.blocked {
			hidden = append(hidden, inner+":9")
		}
		for _, address := range append(hidden, inner+":80", inner+":5432", inner+":9", uplink4+":8081") {
			if slices.Contains(hidden, address) || !h.reached["world tcp "+address] {
				ways["a guest to "+address] = way{g.Namespace, "tcp", address}
			}
		}
	}
	var work sync.WaitGroup
	for name, w := range ways {
		work.Go(func() {
			if !w.from.Silent(w.network, w.address) {
				t.Errorf("%s: got an answer", name)
			}
		})
	}
	work.Wait()
}

// publishedGuest has names, and a port that is published.
func (h *neighbourhood) publishedGuest() (*guest, *upkeep.Upkeep) {
	upkeep := new(upkeep.Upkeep)
	h.t.Cleanup(upkeep.Close)
	publish := func(g *filter.Guest) { g.Ports = []filter.Port{{Host: 8000, Guest: 80, Protocol: "tcp"}} }
	return h.guestWith(0, publish, func(g *guest) error {
		return upkeep.Add(filepath.Dir(h.dir), &g.filter, []attach.Interface{{Tap: g.filter.Tap, Network: h.config}},
			slog.New(slog.DiscardHandler))
	}), upkeep
}

// needsRules begins a test that loads rules of others.
func needsRules(t *testing.T) {
	t.Helper()
	t.Parallel() // each is in a network of its own, and waits most of the time
	for _, name := range []fixtures.Name{fixtures.NFT, fixtures.IPTables} {
		testenv.Fixture(t, name)
	}
}

// testBeside is a guest's life on hosts of all kinds: what it reaches is what it is to reach, names
// are answered, what is published is reached; others reach what they did, and no more; and in the
// end the host is as it was. First the neighbour has not been told of the guests, then it has.
func testBeside(t *testing.T, b beside) {
	t.Helper()
	needsRules(t)
	if !nettest.Alone(t) {
		return
	}
	for _, forwards := range []bool{false, true} {
		for _, rpFilter := range []string{"0", "1", "2"} {
			if b.like && forwards || (b.rules != nil || forwards) &&
				rpFilter != map[bool]string{true: "1", false: "2"}[forwards] {
				continue
			}
			t.Run(fmt.Sprintf("forwards %v, rp_filter %s", forwards, rpFilter), func(t *testing.T) {
				h := newNeighbourhood(t, b, forwards, rpFilter)
				t.Cleanup(func() { clearNetwork(t); cutCables(t) })
				h.serveNames(t)
				h.round(t, false)
				if h.blocked {
					h.tell(t)
					h.round(t, true)
				}
			})
		}
	}
}

func TestBeside_Nobody(t *testing.T)         { testBeside(t, beside{}) }
func TestBeside_Docker20(t *testing.T)       { testBeside(t, docker20) }
func TestBeside_Docker28(t *testing.T)       { testBeside(t, docker28) }
func TestBeside_Docker28v6(t *testing.T)     { testBeside(t, docker28.ipv6()) }
func TestBeside_Docker20Old(t *testing.T)    { testBeside(t, docker20.legacy()) }
func TestBeside_Libvirt9(t *testing.T)       { testBeside(t, libvirt9) }
func TestBeside_Libvirt12(t *testing.T)      { testBeside(t, libvirt12) }
func TestBeside_Firewalld1(t *testing.T)     { testBeside(t, firewalld1) }
func TestBeside_Firewalld2(t *testing.T)     { testBeside(t, firewalld2) }
func TestBeside_FirewalldZones(t *testing.T) { testBeside(t, firewalldZ) }
func TestBeside_UFW(t *testing.T)            { testBeside(t, ufw) }
func TestBeside_UFWOld(t *testing.T)         { testBeside(t, ufw.legacy()) }
