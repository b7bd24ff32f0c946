package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Held says how a set has an element.
type Held int

// It has none of its key; one of its key, but with other data; or it.
const (
	Missing Held = iota
	Differs
	Same
)

// Look says how sets have elements, of each by itself. What else the sets have is not read. A set
// that is not there has none.
func Look(all []Elements) (held [][]Held, err error) {
	s, err := open()
	if err != nil {
		return nil, err
	}
	defer func() { go s.close() }() // see OpenOnce
	for _, of := range all {
		var some []Held
		for _, e := range of.Elements {
			h, err := s.look(of.Set, e)
			if err != nil {
				return nil, fmt.Errorf("look at set %s of table %s: %w", of.Set.Name, of.Set.Table.Name, err)
			}
			some = append(some, h)
		}
		held = append(held, some)
	}
	return held, nil
}

func (s *socket) look(set *nftables.Set, e nftables.SetElement) (Held, error) {
	request := attributes{}
	request.add(unix.NFTA_SET_ELEM_LIST_TABLE, []byte(set.Table.Name+"\x00"))
	request.add(unix.NFTA_SET_ELEM_LIST_SET, []byte(set.Name+"\x00"))
	key := attributes{}
	key.add(unix.NFTA_DATA_VALUE, e.Key)
	request.add(unix.NFTA_SET_ELEM_LIST_ELEMENTS, key.within(unix.NFTA_SET_ELEM_KEY).within(unix.NFTA_LIST_ELEM).data)
	s.sequence++
	answer, err := s.ask(netlink.Message{
		Header: netlink.Header{
			Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETSETELEM, Flags: netlink.Request,
			Sequence: s.sequence,
		},
		Data: append([]byte{byte(set.Table.Family), unix.NFNETLINK_V0, 0, 0}, request.data...),
	})
	if errors.Is(err, unix.ENOENT) {
		return Missing, nil
	}
	if err != nil || len(answer) != 1 {
		return Missing, err
	}
	data := part(answer[0].Data[min(4, len(answer[0].Data)):], unix.NFTA_SET_ELEM_LIST_ELEMENTS, unix.NFTA_LIST_ELEM,
		unix.NFTA_SET_ELEM_DATA)
	same := bytes.Equal(part(data, unix.NFTA_DATA_VALUE), e.Val)
	if v := e.VerdictData; v != nil {
		kind, chain := part(data, unix.NFTA_DATA_VERDICT, unix.NFTA_VERDICT_CODE),
			part(data, unix.NFTA_DATA_VERDICT, unix.NFTA_VERDICT_CHAIN)
		same = len(kind) == 4 && expr.VerdictKind(int32(binary.BigEndian.Uint32(kind))) == v.Kind &&
			strings.TrimRight(string(chain), "\x00") == v.Chain
	}
	if !same {
		return Differs, nil
	}
	return Same, nil
}

// attributes are those of a message, one after the other.
type attributes struct{ data []byte }

func (a *attributes) add(kind uint16, data []byte) {
	a.data = binary.NativeEndian.AppendUint16(a.data, uint16(unix.NLA_HDRLEN+len(data)))
	a.data = append(binary.NativeEndian.AppendUint16(a.data, kind), data...)
	a.data = append(a.data, make([]byte, -len(a.data)&3)...)
}

// within are they as those of another.
func (a attributes) within(kind uint16) (outer attributes) {
	outer.add(kind|unix.NLA_F_NESTED, a.data)
	return outer
}

// part is the attribute at the end of a way into others, nil where there is none.
func part(data []byte, way ...uint16) []byte {
	for _, kind := range way {
		all, err := netlink.UnmarshalAttributes(data)
		if err != nil {
			return nil
		}
		data = nil
		for _, a := range all {
			if a.Type == kind {
				data = a.Data
			}
		}
	}
	return data
}
