package filter

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// reg is the first of sixteen registers of four bytes, in which concatenated keys are laid out.
const reg = 8

// exprs are what a rule is made of.
type exprs = []expr.Any

func join(parts ...exprs) (all exprs) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func meta(key expr.MetaKey, at uint32) expr.Any { return &expr.Meta{Key: key, Register: at} }

func equal(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: data} }

func metaIs(key expr.MetaKey, data []byte) exprs { return exprs{meta(key, reg), equal(data)} }

func metaIsNot(key expr.MetaKey, data []byte) exprs {
	return exprs{meta(key, reg), &expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: data}}
}

func iif(name string) exprs    { return metaIs(expr.MetaKeyIIFNAME, ifname(name)) }
func oif(name string) exprs    { return metaIs(expr.MetaKeyOIFNAME, ifname(name)) }
func oifNot(name string) exprs { return metaIsNot(expr.MetaKeyOIFNAME, ifname(name)) }

// tapOf matches the interfaces whose names begin so.
func tapOf(prefix string) exprs {
	return exprs{meta(expr.MetaKeyIIFNAME, reg), equal([]byte(prefix))}
}

func l4(proto byte) exprs    { return metaIs(expr.MetaKeyL4PROTO, []byte{proto}) }
func nfproto(fam byte) exprs { return metaIs(expr.MetaKeyNFPROTO, []byte{fam}) }

// ether matches what a frame says that it carries. With a VLAN tag that is the tag: the kernel's own word for the protocol looks behind it.
func ether(proto uint16) exprs { return is(etherType, binary.BigEndian.AppendUint16(nil, proto)) }

// field is a part of a packet.
type field struct {
	base        expr.PayloadBase
	offset, len uint32
}

// Parts of packets that rules look at.
var (
	etherSource = field{expr.PayloadBaseLLHeader, 6, 6}
	etherType   = field{expr.PayloadBaseLLHeader, 12, 2}
	arpFormat   = field{expr.PayloadBaseNetworkHeader, 0, 6}
	arpMAC      = field{expr.PayloadBaseNetworkHeader, 8, 6}
	arpIP       = field{expr.PayloadBaseNetworkHeader, 14, 4}
	arpTarget   = field{expr.PayloadBaseNetworkHeader, 24, 4}
	source4     = field{expr.PayloadBaseNetworkHeader, 12, 4}
	dest4       = field{expr.PayloadBaseNetworkHeader, 16, 4}
	source6     = field{expr.PayloadBaseNetworkHeader, 8, 16}
	dest6       = field{expr.PayloadBaseNetworkHeader, 24, 16}
	sourcePort  = field{expr.PayloadBaseTransportHeader, 0, 2}
	destPort    = field{expr.PayloadBaseTransportHeader, 2, 2}
	icmpType    = field{expr.PayloadBaseTransportHeader, 0, 1}
	ndTarget    = field{expr.PayloadBaseTransportHeader, 8, 16}
)

func load(f field, at uint32) expr.Any {
	return &expr.Payload{DestRegister: at, Base: f.base, Offset: f.offset, Len: f.len}
}

func is(f field, data []byte) exprs { return exprs{load(f, reg), equal(data)} }

// within matches addresses of a prefix.
func within(f field, p netip.Prefix) exprs {
	if p.Bits() == 0 {
		return nil
	}
	mask := net.CIDRMask(p.Bits(), p.Addr().BitLen())
	return exprs{
		load(f, reg),
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: f.len, Mask: mask, Xor: make([]byte, f.len)},
		equal(p.Masked().Addr().AsSlice()),
	}
}

// family narrows a rule of the family inet to an address's.
func family(a netip.Addr) exprs {
	if a.Is4() {
		return nfproto(unix.NFPROTO_IPV4)
	}
	return nfproto(unix.NFPROTO_IPV6)
}

// toPrefix matches where a packet goes.
func toPrefix(p netip.Prefix) exprs {
	if p.Addr().Is4() {
		return join(family(p.Addr()), within(dest4, p))
	}
	return join(family(p.Addr()), within(dest6, p))
}

func port(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }

// inSet and notInSet match a key that begins at reg.
func inSet(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID}
}

func notInSet(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID, Invert: true}
}

// mapped looks a key up that begins at reg, and puts its value where the key was.
func mapped(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID, IsDestRegSet: true, DestRegister: reg}
}

// verdictOf takes the verdict of a key that begins at reg.
func verdictOf(s *nftables.Set) expr.Any {
	return &expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID, IsDestRegSet: true, DestRegister: unix.NFT_REG_VERDICT}
}

// connection matches bits of a connection's state or status.
func connection(key expr.CtKey, bits uint32) exprs {
	return exprs{
		&expr.Ct{Key: key, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: make([]byte, 4)},
	}
}

// statusDNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const statusDNAT = 1 << 5

// fragment matches IPv6 packets that have a fragment header.
func fragment() exprs {
	return exprs{&expr.Exthdr{DestRegister: reg, Type: unix.IPPROTO_FRAGMENT, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT, Op: expr.ExthdrOpIpv6}, equal([]byte{1})}
}

func known() exprs {
	return connection(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}
func redirected() exprs { return connection(expr.CtKeySTATUS, statusDNAT) }

func notRedirected() exprs {
	e := redirected()
	e[2].(*expr.Cmp).Op = expr.CmpOpEq
	return e
}

// AnswerMark is that of connections to what guests have published, on a network that leaves by one interface, and of what guests send in them.
const AnswerMark = 0x53560001

func mark() []byte { return binaryutil.NativeEndian.PutUint32(AnswerMark) }

// ofAnswer matches what belongs to such a connection, or does not.
func ofAnswer(op expr.CmpOp) exprs {
	return exprs{&expr.Ct{Key: expr.CtKeyMARK, Register: reg}, &expr.Cmp{Op: op, Register: reg, Data: mark()}}
}

func verdict(k expr.VerdictKind) exprs { return exprs{&expr.Verdict{Kind: k}} }
func accept() exprs                    { return verdict(expr.VerdictAccept) }
func jump(chain string) exprs          { return exprs{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}} }

func goTo(chain string) exprs { return exprs{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}} }

// drop counts what it drops, for people who wonder.
func drop() exprs { return exprs{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }

// refuse is drop that tells the guest, so that it need not wait for who does not answer.
func refuse() exprs {
	return exprs{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictGoto, Chain: refused}}
}

// isLocal matches what goes to one of the host's addresses.
func isLocal() exprs {
	return exprs{&expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true}, equal(binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL))}
}
