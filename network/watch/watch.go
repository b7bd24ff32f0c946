// Package watch hears from the kernel when somebody changes what networks are made of.
package watch

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/rtnl"
)

// Watch calls event when somebody has removed rules of tables or of routes, bridges or their addresses, or has changed whether the host forwards, and waits until
// ctx ends: what comes after an event of tables or one of links is not heard any more, as a flush is thousands of messages to each who listens. It
// calls ready when it begins to hear, which may be more than once: what was before that is for who looks then. What it does not see (a guest's own part, a
// port) is for whoever looks now and then.
func Watch(ctx context.Context, tables, bridges []string, ready, event func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	errs := make([]error, 2)
	for i, watch := range []func() error{
		func() error { return watchTables(ctx, tables, ready, event) },
		func() error { return watchLinks(ctx, bridges, ready, event) },
	} {
		work.Go(func() {
			defer cancel()
			errs[i] = watch()
		})
	}
	work.Wait()
	return errors.Join(errs...)
}

// watchLinks sees what becomes of bridges, of forwarding, and of rules of routes.
func watchLinks(ctx context.Context, bridges []string, ready, event func()) error {
	// Each tap of others is told of too. All of these messages have an interface's index behind four bytes of their header; the one of forwarding
	// has an attribute there, whose value is negative where it is about no interface of its own.
	const index, value = 16 + 4, 16 + 4 + 4
	is := func(kind uint16, skip uint8) bpf.Instruction {
		return bpf.JumpIf{Cond: bpf.JumpEqual, Val: networkOrder16(kind), SkipTrue: skip}
	}
	// Rules of routes are few, and changed seldom: whoever has some looks at them.
	program := []bpf.Instruction{bpf.LoadAbsolute{Off: 4, Size: 2}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: networkOrder16(unix.RTM_DELRULE), SkipTrue: 1}, bpf.RetConstant{Val: 1 << 20}}
	for _, name := range bridges {
		bridge, err := rtnl.Index(name)
		if err != nil {
			return err
		}
		if bridge == 0 {
			continue // whoever looks will make it
		}
		for _, n := range []uint16{unix.RTM_DELLINK, unix.RTM_NEWLINK, unix.RTM_DELADDR} {
			program = append(program, bpf.LoadAbsolute{Off: 4, Size: 2}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: networkOrder16(n), SkipTrue: 3},
				bpf.LoadAbsolute{Off: index, Size: 4}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: networkOrder32(uint32(bridge)), SkipTrue: 1},
				bpf.RetConstant{Val: 1 << 20})
		}
	}
	const all, byDefault = ^uint32(0), ^uint32(1) // NETCONFA_IFINDEX_ALL and _DEFAULT
	program = append(program, bpf.LoadAbsolute{Off: 4, Size: 2}, is(unix.RTM_NEWNETCONF, 1), bpf.RetConstant{Val: 0},
		bpf.LoadAbsolute{Off: value, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: networkOrder32(all), SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: networkOrder32(byDefault), SkipTrue: 1},
		bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: 1 << 20})
	groups := []uint32{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF,
		unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
	}
	return listen(ctx, subject{unix.NETLINK_ROUTE, groups, program}, ready, func(m netlink.Message) bool {
		const flags = 8 // in a link's header
		if m.Header.Type == unix.RTM_NEWLINK && len(m.Data) > flags && m.Data[flags]&unix.IFF_UP != 0 {
			return false // it is as it was, as far as we mind
		}
		event()
		return true
	})
}

// watchTables sees tables and rules go that are those of a network, and none of its guests alone.
func watchTables(ctx context.Context, tables []string, ready, event func()) error {
	kinds := []uint16{unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE}
	// The kernel tells every socket of each element that any guest has. Those whose table's name does not begin as ours do are none of ours:
	// it is the first attribute, behind a header of 4 bytes.
	program := []bpf.Instruction{bpf.LoadAbsolute{Off: 4, Size: 2}}
	for i, k := range kinds {
		program = append(program, bpf.JumpIf{Cond: bpf.JumpEqual, Val: networkOrder16(nftMessage(k)), SkipTrue: uint8(len(kinds) - i)})
	}
	program = append(program, bpf.RetConstant{Val: 0},
		bpf.LoadAbsolute{Off: 24, Size: 4}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32([]byte(filter.TablePrefix)), SkipTrue: 3},
		bpf.LoadAbsolute{Off: 28, Size: 4}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32([]byte(filter.TablePrefix[4:])), SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 20}, bpf.RetConstant{Val: 0})
	return listen(ctx, subject{unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}, program}, ready, func(m netlink.Message) bool {
		if len(m.Data) > 0 && !concerns(m, tables) {
			return false
		}
		event()
		return true
	})
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
	}
	return slices.Contains(tables, text(unix.NFTA_TABLE_NAME)) && !filter.Changes(chain)
}

// subject is what the kernel is listened to about.
type subject struct {
	protocol int // of netlink
	groups   []uint32
	program  []bpf.Instruction // lets through what it is about
}

// listen calls ready, and then message with what the kernel tells until that returns true, and waits until ctx ends. What was lost comes as a message
// without data.
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
