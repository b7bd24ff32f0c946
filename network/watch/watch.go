// Package watch hears from the kernel when somebody changes what networks are made of.
package watch

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/rtnl"
)

// Of is what is watched.
type Of struct {
	Tables, Bridges []string
	Ports           []Port
}

// Port is a guest's on a bridge.
type Port struct {
	Name, Bridge string
	Addresses    []netip.Addr // of the guest
}

// Watch calls event when somebody has removed rules of tables or of routes, bridges or their
// addresses, or has changed whether the host forwards, and waits until ctx ends: what comes after
// an event of tables or one of links is not heard any more, as a flush is thousands of messages to
// each who listens. It calls ready when it begins to hear, which may be more than once: what was
// before that is for who looks then.
//
// It calls part each time that a port of a guest, or an entry of its bridge or its host for it, has
// changed, by whomever; and that another program has changed any rules: elements that are a guest's
// are not told apart, as the kernel tells of them in one message with others.
func Watch(ctx context.Context, of Of, ready, event, part func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	errs := make([]error, 2)
	for i, watch := range []func() error{
		func() error { return watchTables(ctx, of.Tables, ready, event, part) },
		func() error { return watchLinks(ctx, of, ready, event, part) },
	} {
		work.Go(func() {
			defer cancel()
			errs[i] = watch()
		})
	}
	work.Wait()
	return errors.Join(errs...)
}

// All messages about an interface have its index behind four bytes of their own header. A
// neighbour's has its address behind that header and an attribute's; the one of forwarding has an
// attribute there, whose value is negative where it is about no interface of its own.
const index, value, neighbour = 16 + 4, 16 + 4 + 4, 16 + 12 + 4

func load(offset, size int) bpf.Instruction {
	return bpf.LoadAbsolute{Off: uint32(offset), Size: size}
}

// unless skips so many instructions where the value is not this.
func unless(value uint32, skip int) bpf.Instruction {
	return bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: value, SkipTrue: uint8(skip)}
}

var pass, ignore = bpf.RetConstant{Val: 1 << 20}, bpf.RetConstant{}

// ofPort passes what is about a port, or about where its guest is.
func ofPort(port, bridge int, addresses []netip.Addr) (program []bpf.Instruction) {
	for _, kind := range []uint16{unix.RTM_NEWLINK, unix.RTM_DELLINK, unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH} {
		program = append(program, load(4, 2), unless(networkOrder16(kind), 3), load(index, 4),
			unless(networkOrder32(uint32(port)), 1), pass)
		if kind != unix.RTM_NEWNEIGH && kind != unix.RTM_DELNEIGH {
			continue
		}
		for _, a := range addresses {
			var is []bpf.Instruction
			words := len(a.AsSlice()) / 4
			for i := range words {
				is = append(is, load(neighbour+4*i, 4), unless(binary.BigEndian.Uint32(a.AsSlice()[4*i:]), 2*(words-i)-1))
			}
			program = append(program, load(4, 2), unless(networkOrder16(kind), 2*words+3), load(index, 4),
				unless(networkOrder32(uint32(bridge)), 2*words+1))
			program = append(append(program, is...), pass)
		}
	}
	return program
}

// watchLinks sees what becomes of bridges, of ports, of forwarding, and of rules of routes.
func watchLinks(ctx context.Context, of Of, ready, event, part func()) error {
	// Each tap of others is told of too. Rules of routes are few, and changed seldom: whoever has some
	// looks at them.
	program := []bpf.Instruction{load(4, 2), unless(networkOrder16(unix.RTM_DELRULE), 1), pass}
	ports := map[uint32]bool{}
	for _, p := range of.Ports {
		port, err := rtnl.Index(p.Name)
		if err != nil {
			return err
		}
		bridge, err := rtnl.Index(p.Bridge)
		if err != nil {
			return err
		}
		if port != 0 {
			ports[uint32(port)] = true
			program = append(program, ofPort(port, bridge, p.Addresses)...)
		}
	}
	for _, name := range of.Bridges {
		bridge, err := rtnl.Index(name)
		if err != nil {
			return err
		}
		if bridge == 0 {
			continue // whoever looks will make it
		}
		for _, n := range []uint16{unix.RTM_DELLINK, unix.RTM_NEWLINK, unix.RTM_DELADDR} {
			program = append(program, load(4, 2), unless(networkOrder16(n), 3), load(index, 4),
				unless(networkOrder32(uint32(bridge)), 1), pass)
		}
	}
	const all, byDefault = ^uint32(0), ^uint32(1) // NETCONFA_IFINDEX_ALL and _DEFAULT
	program = append(program, load(4, 2), unless(networkOrder16(unix.RTM_NEWNETCONF), 4), load(value, 4),
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: networkOrder32(all), SkipTrue: 1},
		unless(networkOrder32(byDefault), 1), pass, ignore)
	groups := []uint32{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_NETCONF,
		unix.RTNLGRP_IPV6_NETCONF,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_NEIGH,
	}
	return listen(ctx, subject{unix.NETLINK_ROUTE, groups, program}, ready, func(m netlink.Message) bool {
		const at, flags = 4, 8 // in a link's header
		if len(m.Data) > flags && m.Header.Type <= unix.RTM_DELLINK && ports[binary.NativeEndian.Uint32(m.Data[at:])] ||
			m.Header.Type == unix.RTM_NEWNEIGH || m.Header.Type == unix.RTM_DELNEIGH {
			part()
			return false
		}
		if m.Header.Type == unix.RTM_NEWLINK && len(m.Data) > flags && m.Data[flags]&unix.IFF_UP != 0 {
			return false // it is as it was, as far as we mind
		}
		event()
		return true
	})
}

// watchTables sees tables and rules go that are those of a network, and none of its guests alone;
// and that another program has changed something.
func watchTables(ctx context.Context, tables []string, ready, event, part func()) error {
	kinds := []uint16{unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE}
	others, err := byOthers()
	if err != nil {
		return err
	}
	// The kernel tells every socket of each element that any guest has. Those whose table's name does
	// not begin as ours do are none of ours: it is the first attribute, behind a header of 4 bytes.
	program := append([]bpf.Instruction{load(4, 2), unless(networkOrder16(nftMessage(unix.NFT_MSG_NEWGEN)), len(others))},
		others...)
	program = append(program, load(4, 2))
	for i, k := range kinds {
		program = append(program,
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: networkOrder16(nftMessage(k)), SkipTrue: uint8(len(kinds) - i)})
	}
	program = append(program, ignore,
		load(24, 4), unless(binary.BigEndian.Uint32([]byte(filter.TablePrefix)), 3),
		load(28, 4), unless(binary.BigEndian.Uint32([]byte(filter.TablePrefix[4:])), 1), pass, ignore)
	return listen(ctx, subject{unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}, program}, ready,
		func(m netlink.Message) bool {
			if uint16(m.Header.Type) == nftMessage(unix.NFT_MSG_NEWGEN) {
				part()
				return false
			}
			if len(m.Data) > 0 && !concerns(m, tables) {
				return false
			}
			event()
			return true
		})
}

// byOthers passes the message with which each change of rules ends, unless the program is called as
// this one is: what our processes do to the parts of their own guests is none of another's. Behind
// two numbers it has the program's name, as ps shows it.
func byOthers() (program []bpf.Instruction, err error) {
	const name = 16 + 4 + 8 + 8 + 4
	own, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		return nil, fmt.Errorf("listen to the kernel: %w", err)
	}
	own = append(bytes.TrimSuffix(own, []byte("\n")), 0)
	for i, c := range own {
		program = append(program, load(name+i, 1), unless(uint32(c), 2*(len(own)-i)-1))
	}
	return append(program, ignore, pass), nil
}

func nftMessage(kind uint16) uint16 { return unix.NFNL_SUBSYS_NFTABLES<<8 | kind }

// concerns says whether a message is of tables, and of what is no guest's own.
func concerns(m netlink.Message, tables []string) bool {
	if len(m.Data) < 4 {
		return false
	}
	attributes, err := netlink.UnmarshalAttributes(m.Data[4:])
	if err != nil {
		return false
	}
	text := func(kind uint16) string {
		for _, a := range attributes {
			if a.Type == kind {
				return strings.TrimRight(string(a.Data), "\x00")
			}
		}
		return ""
	}
	chain := ""
	switch uint16(m.Header.Type) {
	case nftMessage(unix.NFT_MSG_DELRULE):
		chain = text(unix.NFTA_RULE_CHAIN)
	case nftMessage(unix.NFT_MSG_DELCHAIN):
		chain = text(unix.NFTA_CHAIN_NAME)
	case nftMessage(unix.NFT_MSG_DELTABLE):
	default:
		return false // it came in one datagram with such
	}
	return slices.Contains(tables, text(unix.NFTA_TABLE_NAME)) && !filter.Changes(chain)
}

// subject is what the kernel is listened to about.
type subject struct {
	protocol int // of netlink
	groups   []uint32
	program  []bpf.Instruction // lets through what it is about
}

// listen calls ready, and then message with what the kernel tells until that returns true, and
// waits until ctx ends. What was lost comes as a message without data.
func listen(ctx context.Context, to subject, ready func(), message func(netlink.Message) bool) error {
	assembled, err := bpf.Assemble(to.program)
	if err != nil {
		return fmt.Errorf("listen to the kernel: %w", err)
	}
	conn, err := netlink.Dial(to.protocol, nil)
	if err != nil {
		return fmt.Errorf("listen to the kernel: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if err := conn.SetBPF(assembled); err != nil {
		return fmt.Errorf("listen to the kernel: %w", err)
	}
	for _, g := range to.groups {
		if err := conn.JoinGroup(g); err != nil {
			return fmt.Errorf("listen to the kernel: %w", err)
		}
	}
	ready()
	for {
		all, err := conn.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			all, err = []netlink.Message{{}}, nil
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("listen to the kernel: %w", err)
		}
		if slices.ContainsFunc(all, message) {
			<-ctx.Done()
			return nil
		}
	}
}

// networkOrder16 and networkOrder32 are numbers of this machine's order as a filter loads them.
func networkOrder16(n uint16) uint32 {
	return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, n)))
}

// networkOrder32 is networkOrder16 of four bytes.
func networkOrder32(n uint32) uint32 {
	return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, n))
}
