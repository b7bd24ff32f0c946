package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/guard"
	"push.rocks/smartvm/network/netns"
	"push.rocks/smartvm/network/policy"
)

// throughputRounds is how often each way of throughput is measured.
const throughputRounds = 30

// throughput is that of one TCP connection of iperf3's, from the guest to the host, where its
// policy allows that, and to the world, with our rules and without, in turns. Beside those stands
// what the kernel alone takes: rules that do nothing but know connections, and NAT.
func (s *networkSite) throughput() error {
	plain := s.cable
	s.cable.Policy = &policy.Policy{AllowHost: true}
	r, err := s.rules()
	if err != nil {
		return err
	}
	if err := errors.Join(plain.Revert(s.ctx), s.cable.Apply(s.ctx), r.hold()); err != nil {
		return err
	}
	gateway, _ := s.config.Gateway()
	ways := []struct {
		name, address string
		server        *netns.Namespace // nil: the host
		least         least            // the kernel's part
	}{
		{"throughput", gateway.String(), nil, conntrackOnly},
		{"throughput-out", benchWorld, s.world, natOnly},
	}
	for round := range throughputRounds {
		for _, w := range ways {
			rate := func() (float64, error) { return s.rate(w.server, w.address) }
			states := []func() (float64, error){
				rate,
				func() (float64, error) { return r.without(rate) },
				func() (float64, error) {
					return r.without(func() (float64, error) { return w.least.beside(rate) })
				},
			}
			rates := make([]float64, len(states))
			for i := range states {
				n := (i + round) % len(states) // none is always the first
				var err error
				if rates[n], err = states[n](); err != nil {
					return err
				}
			}
			s.samples.add(w.name, "MB/s", rates[0])
			s.samples.add(w.name+"-no-rules", "MB/s", rates[1])
			s.samples.add(w.name+"-"+string(w.least), "MB/s", rates[2])
		}
	}
	r.release()
	return s.use.Revert(s.ctx)
}

// rules are what a network's guests are bound by: its tables, and the guard that a process holds
// which supervises VMs.
type rules struct {
	*networkSite
	tables filter.Tables
	guard  guard.Guard
	keeper guard.Keeper
}

func (s *networkSite) rules() (*rules, error) {
	data, err := os.ReadFile(filepath.Join(s.dir, s.config.Name, "up.json"))
	if err != nil {
		return nil, err
	}
	var up struct{ Owner string }
	err = json.Unmarshal(data, &up)
	return &rules{
		networkSite: s, tables: filter.Tables{Name: s.config.Table(), Owner: up.Owner},
		guard: guard.Guard{Bridge: s.config.Bridge, Owner: up.Owner},
	}, err
}

func (r *rules) hold() error {
	_, err := r.keeper.Hold(r.guard, "")
	return err
}

func (r *rules) release() { r.keeper.Release(r.guard, "") }

// without does something while they are not there.
func (r *rules) without(f func() (float64, error)) (float64, error) {
	r.release()
	if err := errors.Join(r.guard.Revert(r.ctx), r.tables.Revert(r.ctx)); err != nil {
		return 0, err
	}
	result, err := f()
	_, _, restoreErr := r.use.Check(r.ctx)
	return result, errors.Join(err, restoreErr, r.cable.Apply(r.ctx), r.hold())
}

// least is a table with one rule, for which the kernel does a part of what it does for ours.
type least string

const (
	conntrackOnly least = "conntrack-only"
	natOnly       least = "nat-only"
)

// beside does something while that table is there.
func (l least) beside(f func() (float64, error)) (float64, error) {
	conn, err := nftables.New()
	if err != nil {
		return 0, err
	}
	chain, rule := &nftables.Chain{
		Name: "input", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookInput,
		Priority: nftables.ChainPriorityFilter,
	}, []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}}
	if l == natOnly {
		chain, rule = &nftables.Chain{
			Name: "postrouting", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting,
			Priority: nftables.ChainPriorityNATSource,
		}, []expr.Any{&expr.Masq{}}
	}
	chain.Table = conn.AddTable(&nftables.Table{Name: "least", Family: nftables.TableFamilyINet})
	conn.AddRule(&nftables.Rule{Table: chain.Table, Chain: conn.AddChain(chain), Exprs: rule})
	if err := conn.Flush(); err != nil {
		return 0, err
	}
	result, err := f()
	conn.DelTable(chain.Table)
	return result, errors.Join(err, conn.Flush())
}

// rate is what arrives of one connection of iperf3's from the guest to an address, in MB/s.
func (s *networkSite) rate(server *netns.Namespace, address string) (float64, error) {
	start := (*exec.Cmd).Start
	if server != nil {
		start = func(listen *exec.Cmd) error { return server.Do(listen.Start) }
	}
	listen := exec.CommandContext(s.ctx, s.iperf3, "--server", "--one-off", "--forceflush", "--bind", address)
	out, err := listen.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := start(listen); err != nil {
		return 0, err
	}
	listening, said := bufio.NewReader(out), ""
	for !strings.Contains(said, "listening") {
		if said, err = listening.ReadString('\n'); err != nil {
			return 0, fmt.Errorf("iperf3 does not listen: %w", errors.Join(err, listen.Wait()))
		}
	}
	var told []byte
	err = s.guest.Do(func() (err error) {
		told, err = exec.CommandContext(s.ctx, s.iperf3, "--client", address, "--bytes", "400M", "--json").Output()
		return err
	})
	if err != nil {
		return 0, errors.Join(fmt.Errorf("iperf3: %w: %s", err, told), listen.Process.Signal(unix.SIGKILL), listen.Wait())
	}
	_, _ = io.Copy(io.Discard, listening)
	var result struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := errors.Join(json.Unmarshal(told, &result), listen.Wait()); err != nil {
		return 0, err
	}
	return result.End.Received.BitsPerSecond / 8e6, nil
}
