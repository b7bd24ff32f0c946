package network_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/forward"
	"push.rocks/smartvm/network/guard"
	"push.rocks/smartvm/network/rtnl"
	"push.rocks/smartvm/network/wireguard"
)

// The conformance suite of the network's effects: what package journal expects of one, asked of
// every kind.

// kinds are those of VMs' journals, and of networks'.
func kinds() journal.Kinds {
	all := network.Kinds()
	all["use"] = func() journal.Effect { return new(network.Use) }
	all["tap"] = func() journal.Effect { return new(network.Tap) }
	all["slot"] = func() journal.Effect { return new(network.Slot) }
	all["guest"] = func() journal.Effect { return new(network.Guest) }
	all["bridged"] = func() journal.Effect { return new(bridged.Guest) }
	return all
}

func addBridge(t *testing.T, name string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		t.Fatal(err)
	}
}

func addTable(t *testing.T, name string) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.AddTable(&nftables.Table{Name: name, Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}

// effectCase is one kind of effect.
type effectCase struct {
	describe func(dir string) journal.Effect
	prepare  func(t *testing.T) // what it stands on
	foreign  func(t *testing.T) // puts in its place what is not its own; nil: there can be no such thing
	twice    bool               // applied twice it is as if once
}

func tables() *filter.Tables {
	c, _ := network.NewDefault("", "")
	return &filter.Tables{Name: c.Table(), Owner: "me", Bridge: c.Bridge, Taps: "sv", Subnet: c.Subnet, Subnet6: c.Subnet6}
}

var effectCases = map[string]effectCase{
	"sysctl": {describe: func(string) journal.Effect {
		return &forward.Sysctl{Name: "ipv4/ip_forward", Value: "1", Old: "0"}
	}, twice: true},
	"bridge": {
		describe: func(string) journal.Effect {
			return &network.Bridge{Name: "svbr0", MAC: "02:00:00:00:00:01", Addresses: prefixes("172.30.0.1/24", "fd00::1/64")}
		},
		foreign: func(t *testing.T) { addBridge(t, "svbr0") },
	},
	"tables": {
		describe: func(string) journal.Effect { return tables() },
		foreign:  func(t *testing.T) { addTable(t, tables().Name) },
	},
	"guard": {
		describe: func(string) journal.Effect { return &guard.Guard{Bridge: "br", Owner: "me"} },
		foreign:  func(t *testing.T) { addTable(t, "smartvm-guard/br") },
	},
	"tap": {
		describe: func(string) journal.Effect { return &network.Tap{Name: "svtap", Bridge: "br", UID: 7, MTU: 1400} },
		prepare:  func(t *testing.T) { addBridge(t, "br") },
		foreign:  func(t *testing.T) { addBridge(t, "svtap") },
	},
	"slot": {
		describe: func(dir string) journal.Effect {
			return &network.Slot{
				Name: "svslot", File: filepath.Join(dir, "netns"), Bridge: "br", MAC: "02:00:00:00:00:02", MTU: 1400,
				IP4: netip.MustParsePrefix("172.30.0.2/24"), IP6: netip.MustParsePrefix("fd00::2/64"),
				Gateway: []netip.Addr{netip.MustParseAddr("172.30.0.1"), netip.MustParseAddr("fd00::1")},
			}
		},
		prepare: func(t *testing.T) { addBridge(t, "br") },
		foreign: func(t *testing.T) { addBridge(t, "svslot") },
	},
	"guest": {
		describe: func(string) journal.Effect {
			c, _ := network.NewDefault("", "")
			ip4, ip6 := c.Guest(0)
			return &network.Guest{Guest: filter.Guest{
				Table: c.Table(), Tap: "svtap", MAC: "02:00:00:00:00:01", IP4: ip4, IP6: ip6,
				Ports: []filter.Port{{Host: 80, Guest: 8080, Protocol: "tcp"}},
			}}
		},
		prepare: func(t *testing.T) {
			addBridge(t, tables().Bridge)
			tap := &network.Tap{Name: "svtap", Bridge: tables().Bridge}
			if err := errors.Join(tables().Apply(t.Context()), tap.Apply(t.Context())); err != nil {
				t.Fatal(err)
			}
		},
		twice: true,
	},
	"bridged": {
		describe: func(string) journal.Effect {
			return &bridged.Guest{Tap: "svtap", Bridge: "br", MAC: "02:00:00:00:00:01", IP4: netip.MustParseAddr("192.168.1.50")}
		},
		prepare: func(t *testing.T) {
			addBridge(t, "br")
			if err := (&network.Tap{Name: "svtap", Bridge: "br", LAN: true}).Apply(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
	},
	"wireguard": {}, // has a test in the lab
	"egress": {
		describe: func(string) journal.Effect {
			return &wireguard.Egress{
				Bridge: "br", Interface: "tunnel", Table: 1<<30 | 7,
				Local: prefixes("172.30.0.0/24", "fd00::/64"),
			}
		},
		prepare: func(t *testing.T) {
			addBridge(t, "tunnel")
			link, err := netlink.LinkByName("tunnel")
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.LinkSetUp(link); err != nil {
				t.Fatal(err)
			}
		},
		twice: true,
	},
	"use": {
		describe: func(dir string) journal.Effect {
			c, _ := network.NewDefault("", "")
			return &network.Use{Dir: filepath.Join(dir, "networks"), Network: c, VM: "a", VMDir: dir}
		},
		foreign: func(t *testing.T) { addBridge(t, "svbr0") },
		twice:   true,
	},
}

// world is all that effects change.
func world(t *testing.T) string {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	all := slices.Concat(hosts(t), routing(t), cables(t), entries(t))
	families, err := conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range families {
		sets, err := conn.GetSets(table)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range sets {
			elements, err := conn.GetSetElements(s)
			if err != nil {
				t.Fatal(err)
			}
			if len(elements) > 0 {
				all = append(all, "elements of "+s.Name)
			}
		}
	}
	slices.Sort(all)
	text, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// entries are what bridges and the host know of neighbours for good.
func entries(t *testing.T) (all []string) {
	t.Helper()
	for _, family := range []int{unix.AF_BRIDGE, unix.AF_INET, unix.AF_INET6} {
		list, err := netlink.NeighList(0, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range list {
			if n.State == netlink.NUD_NOARP && family == unix.AF_BRIDGE || n.State == netlink.NUD_PERMANENT &&
				family != unix.AF_BRIDGE {
				all = append(all, fmt.Sprint("entry ", family, " ", n.LinkIndex, " ", n.HardwareAddr, " ", n.IP))
			}
		}
	}
	return all
}

// cables are the ends of cables, and the files of namespaces.
func cables(t *testing.T) (all []string) {
	t.Helper()
	links := allLinks(t)
	for _, l := range links {
		if l.Type() == "veth" {
			all = append(all, "cable "+l.Attrs().Name)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.Contains(line, " - nsfs ") {
			all = append(all, "namespace "+f[4])
		}
	}
	return all
}

func reread(t *testing.T, kind string, e journal.Effect) journal.Effect {
	t.Helper()
	text, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	again := kinds()[kind]()
	if err := json.Unmarshal(text, again); err != nil {
		t.Fatal(err)
	}
	if back, err := json.Marshal(again); err != nil || !bytes.Equal(back, text) {
		t.Errorf("%s, %v, want %s", back, err, text)
	}
	return again
}

func TestEffects(t *testing.T) {
	if got, want := slices.Sorted(maps.Keys(effectCases)), slices.Sorted(maps.Keys(kinds())); !slices.Equal(got, want) {
		t.Fatalf("cases for %q, want %q", got, want)
	}
	if !nettest.Alone(t) {
		return
	}
	nettest.New(t).Connect(nettest.Link{Name: "uplink"}, nettest.Link{Name: "eth0"})
	for _, kind := range slices.Sorted(maps.Keys(effectCases)) {
		t.Run(kind, func(t *testing.T) {
			tt, dir := effectCases[kind], t.TempDir()
			if tt.describe == nil {
				t.Skip("this kernel may have none: see TestLinuxWireGuard")
			}
			if tt.prepare != nil {
				tt.prepare(t)
				t.Cleanup(func() { clearNetwork(t) })
			}
			before := world(t)
			e := tt.describe(dir)
			if err := reread(t, kind, e).Revert(t.Context()); err != nil {
				t.Errorf("revert of what was never applied: %v", err)
			}
			for range 2 {
				if err := e.Apply(t.Context()); err != nil {
					t.Fatal(err)
				}
				applied := world(t)
				if applied == before {
					t.Fatal("applied, nothing is there")
				}
				if err := tt.describe(dir).Apply(t.Context()); tt.twice && err != nil || !tt.twice && !errors.Is(err, fs.ErrExist) {
					t.Errorf("applied twice: %v", err)
				}
				if now := world(t); now != applied {
					t.Errorf("applied twice: %s, want %s", now, applied)
				}
				for range 2 {
					if err := reread(t, kind, e).Revert(t.Context()); err != nil {
						t.Errorf("revert: %v", err)
					}
					if now := world(t); now != before {
						t.Errorf("reverted: %s, want %s", now, before)
					}
				}
			}
			if tt.foreign == nil {
				return
			}
			tt.foreign(t)
			t.Cleanup(func() { clearNetwork(t) })
			foreign := world(t)
			if err := e.Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
				t.Errorf("applied over what is not its own: %v", err)
			}
			if err := e.Revert(t.Context()); err != nil {
				t.Error(err)
			}
			if now := world(t); now != foreign {
				t.Errorf("what is not its own: %s, want %s", now, foreign)
			}
		})
	}
}

// allLinks lists the interfaces, once none goes meanwhile: namespaces end by themselves.
func allLinks(t *testing.T) []netlink.Link {
	t.Helper()
	all, err := rtnl.Whole(netlink.LinkList)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// clearNetwork is for the test's own network.
func clearNetwork(t *testing.T) {
	links := allLinks(t)
	for _, l := range links {
		if l.Type() == "bridge" || l.Type() == "tuntap" {
			if err := netlink.LinkDel(l); err != nil {
				t.Error(err)
			}
		}
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		t.Error(err)
	}
}

// A hundred taps that are removed at once are all removed, and nothing else is.
func TestReaper(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	addBridge(t, "br")
	before := interfaces(t)
	ctx := network.NewContext(t.Context(), &network.Shared{Reaper: new(network.Reaper)})
	var taps []*network.Tap
	for i := range 100 {
		tap := &network.Tap{Name: network.TapName("br", string(rune('a'+i)), "", ""), Bridge: "br"}
		if err := tap.Apply(ctx); err != nil {
			t.Fatal(err)
		}
		taps = append(taps, tap)
	}
	errs := make(chan error)
	for _, tap := range taps {
		go func() { errs <- tap.Revert(ctx) }()
	}
	for range taps {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if after := interfaces(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

func interfaces(t *testing.T) (names []string) {
	t.Helper()
	entries, err := os.ReadDir("/sys/class/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
