package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/upkeep"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/netns"
	"push.rocks/smartvm/network/policy"
)

// upstreamTakes is how long the upstream takes to answer in the measurement that has a bar: about
// as long as a resolver of the same LAN or cloud that has the name in its cache; others take
// longer. Two ends of a cable on one host answer each other in 20 us, beside which everything is
// slow: that is measured too, without a bar, as it shows best what a guest's way to the same
// upstream adds.
const upstreamTakes = time.Millisecond

// names measures the answers that a guest gets whose policy allows a name, at its network's
// gateway, beside those that the host gets of the same upstream: names that are asked for the first
// time, and again. The upstream is one that takes some time, and one that takes none.
func (s *networkSite) names(rounds int) (err error) {
	up := &upstream{}
	if err := up.serve(s.world); err != nil {
		return err
	}
	defer up.Close()
	if err := s.resolver(benchWorld); err != nil {
		return err
	}
	upkeep := new(upkeep.Upkeep)
	defer upkeep.Close()
	plain := s.cable
	s.cable.Policy = &policy.Policy{
		DefaultAction: policy.Deny,
		Rules:         []policy.Rule{{Action: policy.Allow, Domain: "*." + benchDomain}},
	}
	// One question follows another faster than is allowed.
	if err := network.Update(s.ctx, s.dir,
		network.Config{Name: s.config.Name, Settings: network.Settings{DNSQuestions: math.MaxInt32 / 4}}); err != nil {
		return err
	}
	vm := filepath.Join(filepath.Dir(s.dir), "vm")
	if err := os.MkdirAll(vm, 0o700); err != nil {
		return err
	}
	if err := upkeep.Add(vm, &s.cable, []attach.Interface{{Tap: s.cable.Tap, Network: s.config}},
		slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	if err := errors.Join(plain.Revert(s.ctx), s.cable.Apply(s.ctx)); err != nil {
		return err
	}
	for _, w := range []struct {
		suffix string
		takes  time.Duration
	}{{"", upstreamTakes}, {"-at-once", 0}} {
		up.takes.Store(int64(w.takes))
		if err := s.ask(w.suffix, rounds); err != nil {
			return err
		}
	}
	err = s.cable.Revert(s.ctx)
	s.cable = plain
	return errors.Join(err, s.cable.Apply(s.ctx))
}

const benchDomain = "bench.example"

// ask asks in each round for a name by the gateway for the first time and again, and directly.
func (s *networkSite) ask(suffix string, rounds int) error {
	gateway, _ := s.config.Gateway()
	name := func(prefix string, n int) string { return prefix + strconv.Itoa(n) + suffix + "." + benchDomain + "." }
	ways := []struct {
		name, server string
		from         *netns.Namespace // nil: the host
		question     func(round int) string
	}{
		{"dns-direct", benchWorld, nil, func(round int) string { return name("direct", round) }},
		{"dns-new", gateway.String(), s.guest, func(round int) string { return name("guest", round) }},
		{"dns-again", gateway.String(), s.guest, func(round int) string { return name("guest", round-1) }},
	}
	for round := range rounds + 1 { // in the first of them neighbours are asked for too
		took := make([]time.Duration, len(ways))
		for i := range ways {
			n := (i + round) % len(ways) // none is always the first
			w := ways[n]
			var err error
			if took[n], err = resolve(w.from, w.server, w.question(round)); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
		}
		if round == 0 {
			continue
		}
		for n, w := range ways {
			s.samples.time(w.name+suffix, took[n])
		}
		s.samples.time("dns-added"+suffix, (took[1]+took[2])/2-took[0])
	}
	return nil
}

// resolve asks a server for the IPv4 address of a name.
func resolve(from *netns.Namespace, server, name string) (took time.Duration, err error) {
	var c net.Conn
	dial := func() (err error) { c, err = net.Dial("udp", server+":53"); return err }
	if from == nil {
		err = dial()
	} else {
		err = from.Do(dial)
	}
	if err != nil {
		return 0, err
	}
	defer c.Close()
	m := dnsmessage.Message{
		Header: dnsmessage.Header{ID: 1, RecursionDesired: true},
		Questions: []dnsmessage.Question{
			{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
		},
	}
	packed, err := m.Pack()
	if err != nil {
		return 0, err
	}
	buf := make([]byte, 1500)
	_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
	begun := time.Now()
	if _, err := c.Write(packed); err != nil {
		return 0, err
	}
	n, err := c.Read(buf)
	took = time.Since(begun)
	if err == nil {
		err = m.Unpack(buf[:n])
	}
	if err == nil && len(m.Answers) != 1 {
		err = fmt.Errorf("%s by %s: %v, %d answers", name, server, m.RCode, len(m.Answers))
	}
	return took, err
}

// resolver makes an address the DNS server of this process, which has mounts of its own.
func (s *networkSite) resolver(address string) error {
	path := filepath.Join(filepath.Dir(s.dir), "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver "+address+"\n"), 0o644); err != nil {
		return err
	}
	return errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount(path, "/etc/resolv.conf", "", unix.MS_BIND, ""))
}

// upstream is a DNS server where every name has one address, its own. Each time that it is asked
// for a name the address holds for longer, so that a guest must be let through for longer too.
type upstream struct {
	takes atomic.Int64 // how long it takes to answer, in nanoseconds
	io.Closer
}

func (u *upstream) serve(in *netns.Namespace) error {
	var p net.PacketConn
	err := in.Do(func() (err error) { p, err = net.ListenPacket("udp", benchWorld+":53"); return err })
	if err != nil {
		return err
	}
	u.Closer = p
	go func() {
		runtime.LockOSThread() // it sleeps
		type known struct{ address, ttl uint32 }
		names := map[dnsmessage.Name]*known{}
		buf := make([]byte, 1500)
		for {
			n, peer, err := p.ReadFrom(buf)
			if err != nil {
				return
			}
			var m dnsmessage.Message
			if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			if names[q.Name] == nil {
				names[q.Name] = &known{address: 9<<24 + uint32(len(names))} // no private one: those are left out
			}
			k := names[q.Name]
			k.ttl += 300
			body := &dnsmessage.AResource{}
			binary.BigEndian.PutUint32(body.A[:], k.address)
			m.Response = true
			m.Answers = []dnsmessage.Resource{
				{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: k.ttl}, Body: body},
			}
			packed, err := m.Pack()
			if err != nil {
				continue
			}
			if takes := time.Duration(u.takes.Load()); takes > 0 {
				nap(takes)
			}
			_, _ = p.WriteTo(packed, peer)
		}
	}()
	return nil
}
