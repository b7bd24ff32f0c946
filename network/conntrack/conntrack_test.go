package conntrack_test

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network/conntrack"
	"push.rocks/smartvm/network/policy"
)

// add has the kernel know a connection: from and to, as and to whom answers come, in a zone.
func add(t *testing.T, zone uint16, from, to, answers, back string) {
	t.Helper()
	family := uint8(unix.AF_INET)
	first := uint16(nl.CTA_IP_V4_SRC)
	if netip.MustParseAddr(from).Is6() {
		family, first = unix.AF_INET6, nl.CTA_IP_V6_SRC
	}
	r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_ACK|unix.NLM_F_CREATE)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	tuple := func(kind uint16, source, destination string, ports ...uint16) {
		data := nl.NewRtAttr(unix.NLA_F_NESTED|int(kind), nil)
		ip := data.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil)
		ip.AddRtAttr(int(first), netip.MustParseAddr(source).AsSlice())
		ip.AddRtAttr(int(first)+1, netip.MustParseAddr(destination).AsSlice())
		proto := data.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil)
		proto.AddRtAttr(nl.CTA_PROTO_NUM, []byte{unix.IPPROTO_UDP})
		proto.AddRtAttr(nl.CTA_PROTO_SRC_PORT, binary.BigEndian.AppendUint16(nil, ports[0]))
		proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, ports[1]))
		r.AddData(data)
	}
	tuple(nl.CTA_TUPLE_ORIG, from, to, 4000, 80)
	tuple(nl.CTA_TUPLE_REPLY, answers, back, 80, 4000)
	r.AddData(nl.NewRtAttr(nl.CTA_TIMEOUT, binary.BigEndian.AppendUint32(nil, 600)))
	r.AddData(nl.NewRtAttr(nl.CTA_ZONE, binary.BigEndian.AppendUint16(nil, zone)))
	if _, err := r.Execute(unix.NETLINK_NETFILTER, 0); err != nil {
		t.Fatal(err)
	}
}

// known are the sources of the connections that the kernel knows.
func known(t *testing.T) (all []string) {
	t.Helper()
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range flows {
			all = append(all, f.Forward.SrcIP.String())
		}
	}
	slices.Sort(all)
	return all
}

// What a guest has begun, what came to it, translated or not, is forgotten, and nothing of others.
func TestForget(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	const guest, guest6 = "172.30.0.2", "fd00::2"
	add(t, 0, guest, "198.51.100.2", "198.51.100.2", "198.51.100.1") // by NAT
	add(t, 0, "198.51.100.2", "198.51.100.1", guest, "198.51.100.2") // to a published port
	add(t, 7, guest, "198.51.100.2", "198.51.100.2", "198.51.100.1")
	add(t, 0, "172.30.0.1", guest, guest, "172.30.0.1")            // from the host
	add(t, 0, guest6, "2001:db8::2", "2001:db8::2", "2001:db8::1") // and the same by IPv6
	add(t, 0, "2001:db8::2", "2001:db8::1", guest6, "2001:db8::2")
	add(t, 0, "172.30.0.3", "198.51.100.3", "198.51.100.3", "198.51.100.1") // of another guest
	add(t, 0, "fd00::3", "2001:db8::3", "2001:db8::3", "2001:db8::1")
	add(t, 0, "198.51.100.1", "203.0.113.9", "203.0.113.9", "198.51.100.1") // the host's own
	if got := known(t); len(got) != 9 {
		t.Fatalf("the kernel knows %q", got)
	}
	theirs := []netip.Addr{netip.MustParseAddr(guest), netip.MustParseAddr(guest6)}
	if err := conntrack.Forget(func(a netip.Addr) bool { return slices.Contains(theirs, a) }); err != nil {
		t.Fatal(err)
	}
	if got, want := known(t), []string{"172.30.0.3", "198.51.100.1", "fd00::3"}; !slices.Equal(got, want) {
		t.Errorf("left are the connections of %q, want %q", got, want)
	}
	if err := conntrack.ForgetAll(); err != nil {
		t.Fatal(err)
	}
	if got := known(t); len(got) > 0 {
		t.Errorf("left are the connections of %q", got)
	}
}

// A flow has who began it, what it leads to, and what was asked for in place of that.
func TestForgetFlows(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	add(t, 0, "198.51.100.2", "198.51.100.1", "172.30.0.2", "198.51.100.2")
	add(t, 0, "fd00::2", "2001:db8::2", "2001:db8::2", "2001:db8::1")
	var got []conntrack.Flow
	err := conntrack.ForgetFlows(func(f conntrack.Flow) bool {
		got = append(got, f)
		return f.From.Is6()
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(got, func(a, b conntrack.Flow) int { return a.From.Compare(b.From) })
	want := []conntrack.Flow{
		{
			netip.MustParseAddr("198.51.100.2"),
			policy.Target{Address: netip.MustParseAddr("172.30.0.2"), Protocol: unix.IPPROTO_UDP, Port: 80},
			netip.MustParseAddrPort("198.51.100.1:80"),
		},
		{
			netip.MustParseAddr("fd00::2"),
			policy.Target{Address: netip.MustParseAddr("2001:db8::2"), Protocol: unix.IPPROTO_UDP, Port: 80},
			netip.MustParseAddrPort("[2001:db8::2]:80"),
		},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if left := known(t); !slices.Equal(left, []string{"198.51.100.2"}) {
		t.Errorf("left are the connections of %q", left)
	}
}
