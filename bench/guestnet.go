package main

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// How often a real guest sends to the host, and how much. What comes first after the rules have gone or come finds everything cold.
const (
	guestSends = 12
	coldBytes  = "4M"
	guestBytes = "64M"
)

// iperfDir is where iperf3 is in the guest, with the libraries that it is linked with.
const iperfDir = "/iperf"

// network measures one TCP connection of iperf3's from a guest to the host, with our rules and without, in turns.
func (s *guestSite) network() error {
	spec := guestSpec()
	spec.NetworkInterfaces = []smartvm.NetworkInterface{{IfaceID: "eth0", Network: network.DefaultName}}
	spec.Policy = &policy.Policy{AllowHost: true}
	if err := s.started(spec); err != nil {
		return err
	}
	if err := s.copyIperf(); err != nil {
		return err
	}
	config, err := network.NewDefault("", "")
	if err != nil {
		return err
	}
	host, _ := config.Gateway()
	for range guestSends {
		tables, err := s.ruled(config)
		if err != nil {
			return err
		}
		rate, err := s.send(host.String())
		if err != nil {
			return err
		}
		s.report("guest-throughput", "MB/s", rate)
		if err := tables.Revert(s.ctx); err != nil {
			return err
		}
		if rate, err = s.send(host.String()); err != nil {
			return err
		}
		there, err := tables.There(s.ctx)
		if err != nil {
			return err
		}
		if !there { // or they were restored meanwhile
			s.report("guest-throughput-no-rules", "MB/s", rate)
		}
	}
	return nil
}

// ruled waits until our rules are there, which whoever looks after a VM sees to.
func (s *guestSite) ruled(c network.Config) (*filter.Tables, error) {
	for deadline := time.Now().Add(guestPatience); ; time.Sleep(50 * time.Millisecond) {
		t, err := tablesOf(filepath.Join(s.host.RuntimeDir(), store.NetworkDir), c)
		if err != nil {
			return nil, err
		}
		if there, err := t.There(s.ctx); err != nil || there {
			return t, err
		}
		if time.Now().After(deadline) {
			return nil, errors.New("nobody restores the rules")
		}
	}
}

// send is one connection's rate, after another one.
func (s *guestSite) send(host string) (float64, error) {
	if _, err := s.sendBytes(host, coldBytes); err != nil {
		return 0, err
	}
	return s.sendBytes(host, guestBytes)
}

func (s *guestSite) sendBytes(host, amount string) (float64, error) {
	return received(s.ctx, s.iperf3, host, (*exec.Cmd).Start, func() ([]byte, error) {
		var out bytes.Buffer
		exit, err := s.client.Exec(s.ctx, agent.Cmd{
			Args: []string{iperfDir + "/ld", "--library-path", iperfDir, iperfDir + "/iperf3", "--client", host, "--bytes", amount, "--json"}, Stdout: &out, Stderr: &out,
		})
		if err == nil && exit.Code != 0 {
			err = fmt.Errorf("iperf3 in the guest: %+v", exit)
		}
		return out.Bytes(), err
	})
}

// library is a line of ldd's: what a library is called, and where it is.
var library = regexp.MustCompile(`(?m)^\s+(?:(\S+) => )?(/\S+) \(0x`)

// copyIperf brings iperf3 into a guest that knows nothing of its libraries.
func (s *guestSite) copyIperf() error {
	out, err := exec.CommandContext(s.ctx, "ldd", s.iperf3).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", s.iperf3, err)
	}
	if exit, err := s.client.Exec(s.ctx, agent.Cmd{Args: []string{"mkdir", iperfDir}}); err != nil || exit.Code != 0 {
		return fmt.Errorf("make %s in the guest: %+v, %v", iperfDir, exit, err)
	}
	files := map[string]string{"iperf3": s.iperf3}
	for _, m := range library.FindAllStringSubmatch(string(out), -1) {
		name := m[1]
		if name == "" || path.IsAbs(name) {
			name = "ld"
		}
		files[name] = m[2]
	}
	for name, from := range files {
		if from, err = filepath.EvalSymlinks(from); err != nil {
			return err
		}
		if err := s.m.CopyTo(s.ctx, from, path.Join(iperfDir, name), nil, smartvm.CopyOptions{}); err != nil {
			return err
		}
	}
	return nil
}
