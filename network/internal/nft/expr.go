// Package nft has the parts that rules of nftables are made of, under the names that nft gives
// them.
package nft

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Reg is the first of sixteen registers of four bytes, in which concatenated keys are laid out.
const Reg = 8

// Exprs are what a rule is made of.
type Exprs = []expr.Any

// Join makes one rule of parts.
func Join(parts ...Exprs) (all Exprs) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// Ifname is the name of an interface as rules compare it.
func Ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// Meta loads what is known of a packet.
func Meta(key expr.MetaKey, at uint32) expr.Any { return &expr.Meta{Key: key, Register: at} }

// Equal compares what begins at Reg.
func Equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: Reg, Data: data} }

// MetaIs and MetaIsNot compare what is known of a packet.
func MetaIs(key expr.MetaKey, data []byte) Exprs { return Exprs{Meta(key, Reg), Equal(data)} }

func MetaIsNot(key expr.MetaKey, data []byte) Exprs {
	return Exprs{Meta(key, Reg), &expr.Cmp{Op: expr.CmpOpNeq, Register: Reg, Data: data}}
}

// Iif, Oif and OifNot match the interface by which a packet comes or goes.
func Iif(name string) Exprs    { return MetaIs(expr.MetaKeyIIFNAME, Ifname(name)) }
func Oif(name string) Exprs    { return MetaIs(expr.MetaKeyOIFNAME, Ifname(name)) }
func OifNot(name string) Exprs { return MetaIsNot(expr.MetaKeyOIFNAME, Ifname(name)) }

// IifPrefix matches the interfaces whose names begin so.
func IifPrefix(prefix string) Exprs {
	return Exprs{Meta(expr.MetaKeyIIFNAME, Reg), Equal([]byte(prefix))}
}

// L4 matches the protocol that a packet carries, Nfproto its family.
func L4(proto byte) Exprs    { return MetaIs(expr.MetaKeyL4PROTO, []byte{proto}) }
func Nfproto(fam byte) Exprs { return MetaIs(expr.MetaKeyNFPROTO, []byte{fam}) }

// Ether matches what a frame says that it carries. With a VLAN tag that is the tag: the kernel's
// own word for the protocol looks behind it.
func Ether(proto uint16) Exprs { return Is(EtherType, binary.BigEndian.AppendUint16(nil, proto)) }

// Field is a part of a packet.
type Field struct {
	base        expr.PayloadBase
	offset, len uint32
}

// Parts of packets that rules look at.
var (
	EtherDest   = Field{expr.PayloadBaseLLHeader, 0, 6}
	EtherSource = Field{expr.PayloadBaseLLHeader, 6, 6}
	EtherType   = Field{expr.PayloadBaseLLHeader, 12, 2}
	ArpFormat   = Field{expr.PayloadBaseNetworkHeader, 0, 6}
	ArpMAC      = Field{expr.PayloadBaseNetworkHeader, 8, 6}
	ArpIP       = Field{expr.PayloadBaseNetworkHeader, 14, 4}
	ArpTarget   = Field{expr.PayloadBaseNetworkHeader, 24, 4}
	Source4     = Field{expr.PayloadBaseNetworkHeader, 12, 4}
	Dest4       = Field{expr.PayloadBaseNetworkHeader, 16, 4}
	Source6     = Field{expr.PayloadBaseNetworkHeader, 8, 16}
	Dest6       = Field{expr.PayloadBaseNetworkHeader, 24, 16}
	SourcePort  = Field{expr.PayloadBaseTransportHeader, 0, 2}
	DestPort    = Field{expr.PayloadBaseTransportHeader, 2, 2}
	ICMPType    = Field{expr.PayloadBaseTransportHeader, 0, 1}
	NDTarget    = Field{expr.PayloadBaseTransportHeader, 8, 16}
	ICMPAbout4  = Field{expr.PayloadBaseTransportHeader, 24, 4} // where the packet went that an error is about
	ICMPAbout6  = Field{expr.PayloadBaseTransportHeader, 32, 16}
	// The lower halves of IPv6 addresses, and the MAC for which a DHCP client asks.
	SourceID6    = Field{expr.PayloadBaseNetworkHeader, 16, 8}
	ICMPAboutID6 = Field{expr.PayloadBaseTransportHeader, 40, 8}
	NDTargetID   = Field{expr.PayloadBaseTransportHeader, 16, 8}
	DHCPClient   = Field{expr.PayloadBaseTransportHeader, 8 + 28, 6}
)

// Load loads a part of a packet.
func Load(f Field, at uint32) expr.Any {
	return &expr.Payload{DestRegister: at, Base: f.base, Offset: f.offset, Len: f.len}
}

// Is compares a part of a packet.
func Is(f Field, data []byte) Exprs { return Exprs{Load(f, Reg), Equal(data)} }

// IsNot is the opposite of Is.
func IsNot(f Field, data []byte) Exprs {
	return Exprs{Load(f, Reg), &expr.Cmp{Op: expr.CmpOpNeq, Register: Reg, Data: data}}
}

// Masked compares the bits of a part of a packet that are set in a mask.
func Masked(f Field, mask, data []byte) Exprs {
	return Exprs{
		Load(f, Reg),
		&expr.Bitwise{SourceRegister: Reg, DestRegister: Reg, Len: f.len, Mask: mask, Xor: make([]byte, f.len)}, Equal(data),
	}
}

// InRange matches values from one to another.
func InRange(f Field, first, last []byte) Exprs {
	return Exprs{
		Load(f, Reg), &expr.Cmp{Op: expr.CmpOpGte, Register: Reg, Data: first},
		&expr.Cmp{Op: expr.CmpOpLte, Register: Reg, Data: last},
	}
}

// Within matches addresses of a prefix.
func Within(f Field, p netip.Prefix) Exprs {
	if p.Bits() == 0 {
		return nil
	}
	return Masked(f, net.CIDRMask(p.Bits(), p.Addr().BitLen()), p.Masked().Addr().AsSlice())
}

// Family narrows a rule of the family inet to an address's.
func Family(a netip.Addr) Exprs {
	if a.Is4() {
		return Nfproto(unix.NFPROTO_IPV4)
	}
	return Nfproto(unix.NFPROTO_IPV6)
}

// ToPrefix matches where a packet goes.
func ToPrefix(p netip.Prefix) Exprs {
	if p.Addr().Is4() {
		return Join(Family(p.Addr()), Within(Dest4, p))
	}
	return Join(Family(p.Addr()), Within(Dest6, p))
}

// Port is a port as packets have it.
func Port(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }

// InSet and notInSet match a key that begins at reg.
func InSet(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: Reg, SetName: s.Name, SetID: s.ID}
}

func NotInSet(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: Reg, SetName: s.Name, SetID: s.ID, Invert: true}
}

// Mapped looks a key up that begins at reg, and puts its value where the key was.
func Mapped(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: Reg, SetName: s.Name, SetID: s.ID, IsDestRegSet: true, DestRegister: Reg}
}

// VerdictOf takes the verdict of a key that begins at reg.
func VerdictOf(s *nftables.Set) expr.Any {
	return &expr.Lookup{
		SourceRegister: Reg, SetName: s.Name, SetID: s.ID, IsDestRegSet: true,
		DestRegister: unix.NFT_REG_VERDICT,
	}
}

// Connection matches bits of a connection's state or status.
func Connection(key expr.CtKey, bits uint32) Exprs {
	return Exprs{
		&expr.Ct{Key: key, Register: Reg},
		&expr.Bitwise{
			SourceRegister: Reg, DestRegister: Reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits),
			Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: Reg, Data: make([]byte, 4)},
	}
}

// statusDNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const statusDNAT = 1 << 5

// Fragment matches IPv6 packets that have a fragment header.
func Fragment() Exprs {
	return Exprs{&expr.Exthdr{
		DestRegister: Reg, Type: unix.IPPROTO_FRAGMENT, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT,
		Op: expr.ExthdrOpIpv6,
	}, Equal([]byte{1})}
}

// Known matches what belongs to a connection that the kernel knows, Redirected what one does that
// was led elsewhere.
func Known() Exprs {
	return Connection(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}
func Redirected() Exprs { return Connection(expr.CtKeySTATUS, statusDNAT) }

// NotRedirected is the opposite of Redirected.
func NotRedirected() Exprs {
	e := Redirected()
	e[2].(*expr.Cmp).Op = expr.CmpOpEq
	return e
}

// Verdict, Accept, Jump and Goto end a rule.
func Verdict(k expr.VerdictKind) Exprs { return Exprs{&expr.Verdict{Kind: k}} }
func Accept() Exprs                    { return Verdict(expr.VerdictAccept) }
func Jump(chain string) Exprs          { return Exprs{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}} }

func Goto(chain string) Exprs { return Exprs{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}} }

// Log tells who listens to a group of nfnetlink_log.
func Log(group uint16, prefix string) Exprs {
	return Exprs{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX, Group: group, Data: []byte(prefix)}}
}

// Drop counts what it drops, for people who wonder.
func Drop() Exprs { return Exprs{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }

// IsLocal matches what goes to one of the host's addresses.
func IsLocal() Exprs {
	return Exprs{
		&expr.Fib{Register: Reg, ResultADDRTYPE: true, FlagDADDR: true},
		Equal(binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)),
	}
}

// passed is the bit of a packet's mark which says that the rules of a guest's network have seen it:
// see package guard.
const passed = 1 << 28

// Pass says so. NotPassed takes it back, and matches what did not say so.
func Pass() Exprs {
	return Exprs{
		Meta(expr.MetaKeyMARK, Reg),
		&expr.Bitwise{SourceRegister: Reg, DestRegister: Reg, Len: 4, Mask: native(^uint32(passed)), Xor: native(passed)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: Reg},
	}
}

// NotPassed: see Pass. Of what did it leaves the mark that others see as it was; what it matches is
// for nobody.
func NotPassed() Exprs {
	return Exprs{
		Meta(expr.MetaKeyMARK, Reg),
		// the bit is now the other way round
		&expr.Bitwise{SourceRegister: Reg, DestRegister: Reg, Len: 4, Mask: native(^uint32(0)), Xor: native(passed)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: Reg},
		&expr.Bitwise{SourceRegister: Reg, DestRegister: Reg, Len: 4, Mask: native(passed), Xor: native(0)},
		Equal(native(passed)),
	}
}

func native(n uint32) []byte { return binaryutil.NativeEndian.PutUint32(n) }
