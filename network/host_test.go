package network_test

import (
	"bytes"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
)

// Other firewalls: what they drop stays dropped, and is told; what they let through works; ours
// changes nothing of theirs, and their reload nothing of ours.
func TestNetwork_OtherFirewalls(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	if err := nettest.Serve(t, ":22", "host"); err != nil {
		t.Fatal(err)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	drop := nftables.ChainPolicyDrop
	// As iptables-nft leaves Docker's and ufw's: a policy of drop, and a chain for the user's own
	// rules.
	load := func() {
		t.Helper()
		filter := conn.AddTable(&nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4})
		conn.FlushTable(filter)
		forward := conn.AddChain(&nftables.Chain{
			Table: filter, Name: "FORWARD", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward,
			Priority: nftables.ChainPriorityFilter, Policy: &drop,
		})
		conn.AddChain(&nftables.Chain{Table: filter, Name: "DOCKER-USER"})
		conn.AddRule(
			&nftables.Rule{
				Table: filter, Chain: forward,
				Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: "DOCKER-USER"}},
			})
		// As firewalld's: what is not known is rejected late.
		firewalld := conn.AddTable(&nftables.Table{Name: "firewalld", Family: nftables.TableFamilyINet})
		conn.FlushTable(firewalld)
		input := conn.AddChain(&nftables.Chain{
			Table: firewalld, Name: "filter_INPUT", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput,
			Priority: nftables.ChainPriorityRef(10),
		})
		reject := &expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}
		for _, name := range []string{"lo\x00", "svbr0\x00"} { // in a zone that is trusted
			conn.AddRule(&nftables.Rule{Table: firewalld, Chain: input, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(name)},
				&expr.Verdict{Kind: expr.VerdictAccept},
			}})
		}
		conn.AddRule(&nftables.Rule{Table: firewalld, Chain: input, Exprs: []expr.Any{reject}})
		// For what is forwarded by an interface that is here none of ours.
		filtered := conn.AddChain(&nftables.Chain{
			Table: firewalld, Name: "filter_FORWARD", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward,
			Priority: nftables.ChainPriorityRef(10),
		})
		trusted := func(key expr.MetaKey) *nftables.Rule {
			return &nftables.Rule{Table: firewalld, Chain: filtered, Exprs: []expr.Any{
				&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte("svbr0\x00")},
				&expr.Verdict{Kind: expr.VerdictAccept},
			}}
		}
		conn.AddRule(trusted(expr.MetaKeyIIFNAME))
		conn.AddRule(trusted(expr.MetaKeyOIFNAME))
		conn.AddRule(&nftables.Rule{Table: firewalld, Chain: filtered, Exprs: []expr.Any{&expr.Counter{}, reject}})
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	load()
	before := hosts(t)
	var log bytes.Buffer
	u := s.use("early")
	if err := u.Apply(
		network.NewContext(t.Context(), &network.Shared{Log: slog.New(slog.NewTextHandler(&log, nil))})); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), `"[inet firewalld filter_FORWARD ip filter FORWARD]"`) {
		t.Errorf("the log says %q", &log)
	}
	g := s.guest(0, nil)
	g.misses(t, "tcp", world4+":80")
	allow := func() {
		t.Helper()
		filter := &nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4}
		for _, key := range []expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME} {
			conn.AddRule(
				&nftables.Rule{Table: filter, Chain: &nftables.Chain{Table: filter, Name: "DOCKER-USER"}, Exprs: []expr.Any{
					&expr.Meta{Key: key, Register: 1},
					&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte(s.config.Bridge), 0)},
					&expr.Verdict{Kind: expr.VerdictAccept},
				}})
		}
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	allow()
	g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	g.misses(t, "tcp", "172.30.0.1:22")
	friend := s.guest(1, func(g *filter.Guest) { g.Policy = allowHost })
	friend.reaches(t, "tcp", "172.30.0.1:22", "host from 172.30.0.3\n")
	load() // a reload
	allow()
	g.reaches(t, "udp", world4+":80", "world from "+uplink4+"\n")
	s.remove(g)
	s.remove(friend)
	if err := u.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}

// Where IPv6 is switched off, IPv4 works.
func TestNetwork_NoIPv6(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	s.outside.Serve(":80", "world")
	for _, scope := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+scope+"/disable_ipv6", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	// As in a kernel without it.
	if err := unix.Mount("none", "/proc/sys/net/ipv6", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	g := s.guest(0, nil)
	g.reaches(t, "tcp", world4+":80", "world from "+uplink4+"\n")
	s.remove(g)
}

// Without the right the error says what to do, and nothing is left.
func TestUse_NotAllowed(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	s := newSite(t, nil)
	before := hosts(t)
	u := s.use("a")
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends, and what it lacks with it
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		if err := unix.Capget(&header, &data[0]); err != nil {
			done <- err
			return
		}
		data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&header, &data[0]); err != nil {
			done <- err
			return
		}
		done <- u.Apply(t.Context())
	}()
	err := <-done
	var advised interface{ Hint() string }
	if !errors.Is(err, fs.ErrPermission) || !errors.As(err, &advised) || !strings.Contains(advised.Hint(), "--net none") {
		t.Errorf("got %v, hint %v", err, advised)
	}
	if err := u.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	if after := hosts(t); !slices.Equal(before, after) {
		t.Errorf("before %q, after %q", before, after)
	}
}
