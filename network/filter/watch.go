package filter

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Watch calls event when somebody has removed tables or rules that are those of a network, and none of its guests alone, until ctx ends.
func Watch(ctx context.Context, tables []string, event func()) error {
	kinds := []uint16{unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE}
	// The kernel tells every socket of each element that any guest has. Those whose table's name does not begin as ours do are none of ours:
	// it is the first attribute, behind a header of 4 bytes.
	filter := []bpf.Instruction{bpf.LoadAbsolute{Off: 4, Size: 2}}
	for i, k := range kinds {
		filter = append(filter, bpf.JumpIf{Cond: bpf.JumpEqual, Val: NetworkOrder16(nftMessage(k)), SkipTrue: uint8(len(kinds) - i)})
	}
	filter = append(filter, bpf.RetConstant{Val: 0},
		bpf.LoadAbsolute{Off: 24, Size: 4}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32([]byte(tablePrefix)), SkipTrue: 3},
		bpf.LoadAbsolute{Off: 28, Size: 4}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32([]byte(tablePrefix[4:])), SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 20}, bpf.RetConstant{Val: 0})
	return Listen(ctx, unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}, filter, func(m netlink.Message) {
		if concerns(m, tables) {
			event()
		}
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
	ownOfGuest := chain == narrow || strings.HasPrefix(chain, (&Guest{}).chain(Own)) || strings.HasPrefix(chain, (&Guest{}).chain(OfNetwork))
	return slices.Contains(tables, text(unix.NFTA_TABLE_NAME)) && !ownOfGuest
}

// Listen calls message with what the kernel tells groups of a netlink protocol, as far as filter lets it through, until ctx ends. What was lost
// comes as a message without data.
func Listen(ctx context.Context, protocol int, groups []uint32, filter []bpf.Instruction, message func(netlink.Message)) error {
	program, err := bpf.Assemble(filter)
	if err != nil {
		return fmt.Errorf("listen to the kernel: %w", err)
	}
	conn, err := netlink.Dial(protocol, nil)
	if err != nil {
		return fmt.Errorf("listen to the kernel: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if err := conn.SetBPF(program); err != nil {
		return fmt.Errorf("listen to the kernel: %w", err)
	}
	for _, g := range groups {
		if err := conn.JoinGroup(g); err != nil {
			return fmt.Errorf("listen to the kernel: %w", err)
		}
	}
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
		for _, m := range all {
			message(m)
		}
	}
}

// NetworkOrder16 and NetworkOrder32 are numbers of this machine's order as a filter loads them.
func NetworkOrder16(n uint16) uint32 {
	return uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, n)))
}

// NetworkOrder32 is NetworkOrder16 of four bytes.
func NetworkOrder32(n uint32) uint32 {
	return binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, n))
}
