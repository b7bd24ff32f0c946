package network

import (
	"context"
	"errors"
	"sync"

	netlinkbase "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
)

// Watch calls event when somebody has removed what networks are made of, their rules, bridge or addresses, or has changed whether the host
// forwards, until ctx ends. What it does not see (a guest's own part, a port) is for whoever looks now and then.
func Watch(ctx context.Context, networks []Config, event func()) error {
	var tables []string
	bridges := map[int]bool{}
	for _, c := range networks {
		tables = append(tables, c.Table())
		if l, err := netlink.LinkByName(c.Bridge); err == nil {
			bridges[l.Attrs().Index] = true
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	errs := make([]error, 2)
	for i, watch := range []func() error{
		func() error { return filter.Watch(ctx, tables, event) },
		func() error { return watchLinks(ctx, bridges, event) },
	} {
		work.Go(func() {
			defer cancel()
			errs[i] = watch()
		})
	}
	work.Wait()
	return errors.Join(errs...)
}

// watchLinks sees what becomes of bridges, by their indices, and of forwarding.
func watchLinks(ctx context.Context, bridges map[int]bool, event func()) error {
	// Each tap of others is told of too. All of these messages have an interface's index behind four bytes of their header; the one of forwarding
	// has an attribute there, whose value is negative where it is about no interface of its own.
	const index, value = 16 + 4, 16 + 4 + 4
	is := func(kind uint16, skip uint8) bpf.Instruction {
		return bpf.JumpIf{Cond: bpf.JumpEqual, Val: filter.NetworkOrder16(kind), SkipTrue: skip}
	}
	var program []bpf.Instruction
	for _, n := range []uint16{unix.RTM_DELLINK, unix.RTM_NEWLINK, unix.RTM_DELADDR} {
		for b := range bridges {
			program = append(program, bpf.LoadAbsolute{Off: 4, Size: 2}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: filter.NetworkOrder16(n), SkipTrue: 3},
				bpf.LoadAbsolute{Off: index, Size: 4}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: filter.NetworkOrder32(uint32(b)), SkipTrue: 1},
				bpf.RetConstant{Val: 1 << 20})
		}
	}
	const all, byDefault = ^uint32(0), ^uint32(1) // NETCONFA_IFINDEX_ALL and _DEFAULT
	program = append(program, bpf.LoadAbsolute{Off: 4, Size: 2}, is(unix.RTM_NEWNETCONF, 1), bpf.RetConstant{Val: 0},
		bpf.LoadAbsolute{Off: value, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: filter.NetworkOrder32(all), SkipTrue: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: filter.NetworkOrder32(byDefault), SkipTrue: 1},
		bpf.RetConstant{Val: 0}, bpf.RetConstant{Val: 1 << 20})
	groups := []uint32{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF}
	return filter.Listen(ctx, unix.NETLINK_ROUTE, groups, program, func(m netlinkbase.Message) {
		const flags = 8 // in a link's header
		if m.Header.Type == unix.RTM_NEWLINK && len(m.Data) > flags && m.Data[flags]&unix.IFF_UP != 0 {
			return // it is as it was, as far as we mind
		}
		event()
	})
}
