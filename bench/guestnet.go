package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// A real guest sends to the host with our rules and without in turns: so many intervals of iperf3's with them, and then as many as it takes
// until who looks after the VM has restored them, as he does every five seconds. All is one connection: of two the emulator may make one
// twice as fast as the other.
const (
	sendTurns     = 24
	sendIntervals = 4
	sendInterval  = "0.5" // s
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
	tables, err := tablesOf(filepath.Join(s.host.RuntimeDir(), store.NetworkDir), config)
	if err != nil {
		return err
	}
	host, _ := config.Gateway()
	ctx, cancel := context.WithCancel(s.ctx)
	server := exec.CommandContext(ctx, s.bench.IPerf3, "--server", "--one-off", "--forceflush", "--bind", host.String(), "--interval", sendInterval, "--format", "k")
	out, err := server.StdoutPipe()
	if err == nil {
		err = server.Start()
	}
	if err != nil {
		cancel()
		return err
	}
	ended := make(chan error, 1)
	defer func() {
		cancel()
		<-ended
		_ = server.Wait()
	}()
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.Contains(lines.Text(), "listening") {
	}
	go func() {
		var told bytes.Buffer
		exit, err := s.client.Exec(ctx, agent.Cmd{
			Args: []string{iperfDir + "/ld", "--library-path", iperfDir, iperfDir + "/iperf3", "--client", host.String(), "--time", "3600"}, Stdout: &told, Stderr: &told,
		})
		ended <- fmt.Errorf("iperf3 in the guest: %+v, %w: %s", exit, err, &told)
	}()
	next := func() (float64, error) {
		defer time.AfterFunc(s.patience(), cancel).Stop() // the emulator loses guests
		for lines.Scan() {
			if m := received.FindStringSubmatch(lines.Text()); m != nil {
				kbits, err := strconv.ParseFloat(m[1], 64)
				return kbits / 8e3, err
			}
		}
		err := <-ended
		ended <- err
		return 0, errors.Join(err, lines.Err())
	}
	for i := range sendTurns {
		if err := s.turn(tables, i%2 == 1, next); err != nil {
			return err
		}
	}
	return nil
}

// received is what iperf3's server says of an interval, in kbit/s.
var received = regexp.MustCompile(`sec .* ([0-9.]+) Kbits/sec`)

// turn measures with our rules, and without them, or with nothing in their place but what knows connections.
func (s *guestSite) turn(tables *filter.Tables, known bool, next func() (float64, error)) error {
	if _, err := next(); err != nil { // it begins with the state before
		return err
	}
	var with float64
	for range sendIntervals {
		rate, err := next()
		if err != nil {
			return err
		}
		s.samples.add("guest-throughput", "MB/s", rate)
		with += rate / sendIntervals
	}
	if err := tables.Revert(s.ctx); err != nil {
		return err
	}
	name := "no-rules"
	if known {
		name = string(conntrackOnly)
	}
	measure := func() (mean float64, err error) { return s.unruled(tables, "guest-throughput-"+name, next) }
	var without float64
	var err error
	if known {
		without, err = conntrackOnly.beside(measure)
	} else {
		without, err = measure()
	}
	if err == nil && without > 0 { // or they were restored at once
		s.samples.add("guest-throughput/"+name, "", with/without)
	}
	return err
}

// unruled measures until our rules are restored.
func (s *guestSite) unruled(tables *filter.Tables, name string, next func() (float64, error)) (mean float64, err error) {
	if _, err := next(); err != nil {
		return 0, err
	}
	for n := 0.0; ; n++ {
		rate, err := next()
		if err != nil {
			return 0, err
		}
		if there, err := tables.There(s.ctx); err != nil || there {
			return mean / n, err
		}
		s.samples.add(name, "MB/s", rate)
		mean += rate
	}
}

// library is a line of ldd's: what a library is called, and where it is.
var library = regexp.MustCompile(`(?m)^\s+(?:(\S+) => )?(/\S+) \(0x`)

// copyIperf brings iperf3 into a guest that knows nothing of its libraries.
func (s *guestSite) copyIperf() error {
	out, err := exec.CommandContext(s.ctx, "ldd", s.bench.IPerf3).Output()
	if err != nil {
		return fmt.Errorf("ldd %s: %w", s.bench.IPerf3, err)
	}
	if exit, err := s.client.Exec(s.ctx, agent.Cmd{Args: []string{"mkdir", iperfDir}}); err != nil || exit.Code != 0 {
		return fmt.Errorf("make %s in the guest: %+v, %v", iperfDir, exit, err)
	}
	files := map[string]string{"iperf3": s.bench.IPerf3}
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
