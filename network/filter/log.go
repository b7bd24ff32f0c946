package filter

import (
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/flowlog"
	"push.rocks/smartvm/network/internal/nft"
)

// ending is where what begins a connection ends, but by a policy. Its text is for people.
type ending string

const (
	toGuests       ending = "to other guests"
	amongGuests    ending = "among guests"
	toMetadata     ending = "to link-local and metadata addresses"
	toHostDenied   ending = "to the host"
	toHostAllowed  ending = "to the host, allowed"
	toOutside      ending = "out of an internal network"
	unruled        ending = "no policy"
	connections    ending = "connections"
	newConnections ending = "new connections a second"
)

// endingChains are their chains.
var endingChains = []struct {
	ending
	chain   string
	verdict flowlog.Verdict
}{
	{toGuests, "end-guests", flowlog.Denied},
	{amongGuests, "end-among-guests", flowlog.Allowed},
	{toMetadata, "end-metadata", flowlog.Denied},
	{toHostDenied, "end-host", flowlog.Denied},
	{toHostAllowed, "end-host-allowed", flowlog.Allowed},
	{toOutside, "end-outside", flowlog.Denied},
	{unruled, "end-unruled", flowlog.Allowed},
	{connections, "end-connections", flowlog.Over},
	{newConnections, "end-new-connections", flowlog.Over},
}

// end is what becomes of a packet. Refusing tells the guest, so that it need not wait for who does
// not answer.
func end(v flowlog.Verdict) nft.Exprs {
	if v == flowlog.Allowed {
		return nft.Accept()
	}
	return nft.Goto(refused)
}

// ends leads to an ending.
func (l *layout) ends(at ending) nft.Exprs {
	for _, e := range endingChains {
		if e.ending != at {
			continue
		}
		to := end(e.verdict)
		if l.logs {
			to = nft.Goto(e.chain)
		}
		if e.verdict != flowlog.Allowed {
			to = nft.Join(nft.Exprs{&expr.Counter{}}, to)
		}
		return to
	}
	return nil
}

// endings are all of them, also those that nothing leads to with the settings of now.
func (t *Tables) endings(l *layout) (all []nft.Ruled) {
	most := map[ending]int{connections: t.Connections, newConnections: t.NewConnections}
	for _, e := range endingChains {
		text := string(e.ending)
		if n := most[e.ending]; n > 0 {
			text = fmt.Sprint(n, " ", text)
		}
		if l.logs {
			all = append(all, l.logged(e.chain, flowlog.Reason{Verdict: e.verdict, Rule: text}, end(e.verdict)))
		}
	}
	return all
}

// A guest's beginnings are logged up to so many a second: one that floods costs the host little,
// and takes nothing from the log of others.
const (
	logRate = 200
	logTime = time.Minute // after which nothing is known of a guest that begins nothing
)

// logged is a chain in which what is about to end so is logged. What is known goes by no such
// chain.
func (l *layout) logged(name string, reason flowlog.Reason, end nft.Exprs) nft.Ruled {
	set := l.logDenied
	if reason.Verdict == flowlog.Allowed {
		set = l.logAllowed
	}
	limit := &expr.Limit{Type: expr.LimitTypePkts, Rate: logRate, Unit: expr.LimitTimeSecond, Burst: logRate}
	some := &expr.Dynset{
		SrcRegKey: nft.Reg, SetName: set.Name, SetID: set.ID, Operation: unix.NFT_DYNSET_OP_UPDATE,
		Exprs: []expr.Any{limit},
	}
	return nft.Chain(nftables.Chain{Table: l.inet, Name: name}, nft.Plain(
		nft.Join(nft.Exprs{nft.Load(nft.EtherSource, nft.Reg), some},
			nft.Log(flowlog.Group(l.inet.Name), reason.Prefix()), end), end))
}

// Logs says whether what begins in a network is logged: the kernel may have no nft_log.
func Logs(table string) (bool, error) {
	conn, err := nft.Open()
	if err != nil {
		return false, err
	}
	_, err = conn.GetSetByName(newLayout(table).inet, logDenied)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// withLog changes rules so that they log or, where the kernel cannot, so that they do not.
func withLog(table string, change func(*layout) error) error {
	l := newLayout(table)
	l.logs = true
	err := change(l)
	if (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EOPNOTSUPP)) && change(newLayout(table)) == nil {
		return nil
	}
	return err
}
