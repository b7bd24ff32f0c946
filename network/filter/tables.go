package filter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/conntrack"
	"push.rocks/smartvm/network/internal/nft"
	"push.rocks/smartvm/network/internal/sender"
	"push.rocks/smartvm/network/policy"
)

// Tables are those of one network, as an effect on the host: its interface is a bridge.
type Tables struct {
	Name    string         `json:"name"`  // of both tables, at most 32 bytes
	Owner   string         `json:"owner"` // a random word, by which they are known again
	Bridge  string         `json:"bridge"`
	Taps    string         `json:"taps"`               // how the names of all its guests' taps begin, and of no others
	Subnet  netip.Prefix   `json:"subnet"`             // IPv4
	Subnet6 netip.Prefix   `json:"subnet6,omitzero"`   // zero: no IPv6
	Mutual  bool           `json:"mutual,omitempty"`   // guests reach each other
	Routed  bool           `json:"routed,omitempty"`   // by the host, as policies allow
	Inside  bool           `json:"internal,omitempty"` // nothing leaves the network
	Via     string         `json:"via,omitempty"`      // the one interface by which guests leave; "": any
	Tunnel  bool           `json:"tunnel,omitempty"`   // Via is ours, in the host's network for guests alone
	Egress  *policy.Policy `json:"policy,omitempty"`   // what all guests may reach at most
	// Connections is how many the kernel may know of each guest, of IPv4 and of IPv6, and
	// NewConnections how many may begin in a second; what would be over is refused. 0: as many as
	// there are.
	Connections    int `json:"connections,omitempty"`
	NewConnections int `json:"newConnections,omitempty"`
}

// ErrTooOld says that the kernel's nftables lacks what is needed.
var ErrTooOld = errors.New("nftables of this kernel is too old or not there: Linux 5.10 with nf_tables is needed")

// Names of chains and sets in both tables.
const (
	ownerPrefix = "owner-"
	// Rules of an earlier version are replaced when somebody looks who has these. Later ones stay:
	// they have all sets of the earlier.
	versionPrefix = "rules "
	version       = 9
	fromGuest     = "from-guest"
	toGuest       = "to-guest"
	toHost        = "to-host"
	egress        = "egress"
	bounds        = "bounds"
	Narrow        = "narrow" // what keeps the host from forwarding for others: see package forward
	refused       = "refused"
	OverPrefix    = "over " // how rules of bounds are called
	logDenied     = "log-denied"
)

// layout is a network's tables, with the sets that guests have elements in.
type layout struct {
	inet, bridge *nftables.Table
	logs         bool // what begins is logged
	all          []*nftables.Set

	macs                 *nftables.Set // bridge: tap . MAC that a guest may send from
	senders4, senders6   *nftables.Set // bridge: tap . MAC . address, likewise
	policies             *nftables.Set // MAC -> the chain of its own policy, or on to the next rule
	host4, host6         *nftables.Set // sources that may reach the host
	metadata4, metadata6 *nftables.Set // sources that may reach link-local and metadata addresses
	// source -> the port of its DNS proxy, whomever it asks, as its own policy has names
	dns4, dns6           *nftables.Set
	resolver4, resolver6 *nftables.Set // source -> the port of its DNS proxy
	ports4, ports6       *nftables.Set // protocol . port -> guest . port
	portsAt4, portsAt6   *nftables.Set // address . protocol . port -> guest . port
	counted4, counted6   *nftables.Set // source, with its number of connections
	paced4, paced6       *nftables.Set // source, with how many it began of late
	logAllowed           *nftables.Set // MAC, with how many beginnings of its were logged of late
	logDenied            *nftables.Set // likewise
}

func newLayout(name string) *layout {
	l := &layout{
		inet:   &nftables.Table{Name: name, Family: nftables.TableFamilyINet},
		bridge: &nftables.Table{Name: name, Family: nftables.TableFamilyBridge},
	}
	addr4, addr6 := nftables.TypeIPAddr, nftables.TypeIP6Addr
	proto, service := nftables.TypeInetProto, nftables.TypeInetService
	key := nftables.MustConcatSetType
	for _, s := range []struct {
		set       **nftables.Set
		table     *nftables.Table
		name      string
		key, data nftables.SetDatatype
	}{
		{&l.macs, l.bridge, "macs", key(nftables.TypeIFName, nftables.TypeEtherAddr), nftables.SetDatatype{}},
		{&l.senders4, l.bridge, "senders4", key(nftables.TypeIFName, nftables.TypeEtherAddr, addr4), nftables.SetDatatype{}},
		{&l.senders6, l.bridge, "senders6", key(nftables.TypeIFName, nftables.TypeEtherAddr, addr6), nftables.SetDatatype{}},
		{&l.policies, l.inet, "policies", nftables.TypeEtherAddr, nftables.TypeVerdict},
		{&l.host4, l.inet, "host4", addr4, nftables.SetDatatype{}},
		{&l.host6, l.inet, "host6", addr6, nftables.SetDatatype{}},
		{&l.metadata4, l.inet, "metadata4", addr4, nftables.SetDatatype{}},
		{&l.metadata6, l.inet, "metadata6", addr6, nftables.SetDatatype{}},
		{&l.dns4, l.inet, "dns4", addr4, service},
		{&l.dns6, l.inet, "dns6", addr6, service},
		{&l.resolver4, l.inet, "resolver4", addr4, service},
		{&l.resolver6, l.inet, "resolver6", addr6, service},
		{&l.ports4, l.inet, "ports4", key(proto, service), key(addr4, service)},
		{&l.ports6, l.inet, "ports6", key(proto, service), key(addr6, service)},
		{&l.portsAt4, l.inet, "ports-at4", key(addr4, proto, service), key(addr4, service)},
		{&l.portsAt6, l.inet, "ports-at6", key(addr6, proto, service), key(addr6, service)},
		{&l.counted4, l.inet, "counted4", addr4, nftables.SetDatatype{}},
		{&l.counted6, l.inet, "counted6", addr6, nftables.SetDatatype{}},
		{&l.paced4, l.inet, "paced4", addr4, nftables.SetDatatype{}},
		{&l.paced6, l.inet, "paced6", addr6, nftables.SetDatatype{}},
		{&l.logAllowed, l.inet, "log-allowed", nftables.TypeEtherAddr, nftables.SetDatatype{}},
		{&l.logDenied, l.inet, logDenied, nftables.TypeEtherAddr, nftables.SetDatatype{}},
	} {
		*s.set = &nftables.Set{Table: s.table, Name: s.name, KeyType: s.key, DataType: s.data, IsMap: s.data.Bytes > 0 ||
			s.data.Name != ""}
		l.all = append(l.all, *s.set)
	}
	// rules add to it
	for _, s := range []*nftables.Set{l.counted4, l.counted6, l.paced4, l.paced6, l.logAllowed, l.logDenied} {
		s.Dynamic, s.Size = true, 1<<16
	}
	for _, s := range []*nftables.Set{l.logAllowed, l.logDenied} {
		s.HasTimeout, s.Timeout = true, logTime
	}
	return l
}

func (l *layout) senders() sender.Sets {
	return sender.Sets{MACs: l.macs, IPv4: l.senders4, IPv6: l.senders6}
}

// sets are those that are made.
func (l *layout) sets() []*nftables.Set {
	if l.logs {
		return l.all
	}
	return slices.DeleteFunc(slices.Clone(l.all), func(s *nftables.Set) bool {
		return s == l.logAllowed || s == l.logDenied
	})
}

// Apply makes both tables at once. Returns an error that is fs.ErrExist if either is there,
// ErrTooOld where the kernel lacks something.
func (t *Tables) Apply(context.Context) error {
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	return withLog(t.Name, func(l *layout) error { return t.make(conn, l) })
}

// Replace makes both tables anew, in place of what is left of them: at no time is there less.
// Guests must add their part again. Where rules were missing it has the kernel forget the guests'
// connections, as some may have begun that the rules do not allow. Returns what Apply does, where a
// table of the name is somebody else's.
func (t *Tables) Replace(context.Context) error {
	was, err := t.state()
	if err != nil {
		return err
	}
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	err = withLog(t.Name, func(l *layout) error {
		if err := t.deleteOwn(conn); err != nil {
			return err
		}
		return t.make(conn, l)
	})
	if err != nil || was != missing {
		return err
	}
	return conntrack.Forget(func(a netip.Addr) bool { return t.Subnet.Contains(a) || t.Subnet6.Contains(a) })
}

// Renew puts the rules of these settings in place of those of others, at once, where the tables are
// whole but for that, and says whether they are. The guests' parts stay, and connections end that
// are not allowed any more.
func (t *Tables) Renew(context.Context) (done bool, err error) {
	is, err := t.state()
	if err != nil || is != otherSettings {
		return is == current, err
	}
	conn, closeLater, err := nft.OpenOnce()
	if err != nil {
		return false, err
	}
	defer closeLater()
	return true, withLog(t.Name, func(l *layout) error { return t.renew(conn, l) })
}

func (t *Tables) renew(conn *nftables.Conn, l *layout) error {
	before, err := nft.RulesOf(conn, &nftables.Chain{Table: l.inet, Name: egress})
	if err != nil {
		return err
	}
	rules, err := t.rules(l)
	if err != nil {
		return err
	}
	now, err := t.nameSets(l)
	if err != nil {
		return err
	}
	for _, s := range now {
		if err := conn.AddSet(s, nil); err != nil {
			return fmt.Errorf("change table %s: set %s: %w", t.Name, s.Name, err)
		}
	}
	// What has been counted is bound as it was when that began.
	for _, s := range []*nftables.Set{l.counted4, l.counted6, l.paced4, l.paced6} {
		conn.FlushSet(s)
	}
	was := nft.ChainsIn(before, egress+".")
	for i := range rules {
		if c := &rules[i].Chain; strings.HasPrefix(c.Name, egress+".") && !slices.Contains(was, c.Name) {
			conn.AddChain(c)
		}
	}
	for i := range rules {
		was = slices.DeleteFunc(was, func(name string) bool { return name == rules[i].Chain.Name })
		if rules[i].Chain.Name == Narrow {
			continue
		}
		conn.FlushChain(&rules[i].Chain)
		if err := rules[i].AddRules(conn); err != nil {
			return fmt.Errorf("change table %s: %w", t.Name, err)
		}
	}
	nft.RemoveChains(conn, l.inet, was)
	for _, name := range nft.SetsIn(before, networkNames) {
		if !slices.ContainsFunc(now, func(s *nftables.Set) bool { return s.Name == name }) {
			conn.DelSet(&nftables.Set{Table: l.inet, Name: name})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("change table %s: %w", t.Name, err)
	}
	return t.forgetDenied(conn, l)
}

// nameSets are those of the network's policy.
func (t *Tables) nameSets(l *layout) ([]*nftables.Set, error) {
	if t.Egress == nil {
		return nil, nil
	}
	compiled, err := t.Egress.Compile()
	if err != nil {
		return nil, err
	}
	return l.namesOf("", compiled), nil
}

func (t *Tables) make(conn *nftables.Conn, l *layout) error {
	for _, table := range []*nftables.Table{l.inet, l.bridge} {
		conn.CreateTable(table)
		conn.AddChain(&nftables.Chain{Table: table, Name: ownerPrefix + t.Owner})
	}
	rules, err := t.rules(l)
	if err != nil {
		return err
	}
	names, err := t.nameSets(l)
	if err != nil {
		return err
	}
	for _, s := range append(l.sets(), names...) {
		if err := conn.AddSet(s, nil); err != nil {
			return fmt.Errorf("make table %s: set %s: %w", t.Name, s.Name, err)
		}
	}
	if err := nft.AddChains(conn, rules); err != nil {
		return fmt.Errorf("make table %s: %w", t.Name, err)
	}
	switch err := conn.Flush(); {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("make table %s: %w", t.Name, fs.ErrExist)
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EAFNOSUPPORT),
		errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("make table %s: %w: %w", t.Name, ErrTooOld, err)
	case err != nil:
		return fmt.Errorf("make table %s: %w", t.Name, err)
	}
	return nil
}

// Revert removes those of the two tables that are this network's.
func (t *Tables) Revert(context.Context) error {
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	if err := t.deleteOwn(conn); err != nil {
		return err
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove table %s: %w", t.Name, err)
	}
	return nil
}

// deleteOwn adds the deletion of what is this network's to what the connection has to say.
func (t *Tables) deleteOwn(conn *nftables.Conn) error {
	l := newLayout(t.Name)
	for _, table := range []*nftables.Table{l.inet, l.bridge} {
		ours, err := t.owns(conn, table)
		if err != nil {
			return err
		}
		if ours {
			conn.DelTable(table)
		}
	}
	return nil
}

func (t *Tables) owns(conn *nftables.Conn, table *nftables.Table) (bool, error) {
	chains, err := conn.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return false, fmt.Errorf("look at table %s: %w", t.Name, err)
	}
	return slices.ContainsFunc(chains, func(c *nftables.Chain) bool {
		return c.Table.Name == table.Name && c.Name == ownerPrefix+t.Owner
	}), nil
}

// There says whether both tables are, and are this network's, with the rules of this version or a
// later one and of these settings.
func (t *Tables) There(context.Context) (bool, error) {
	is, err := t.state()
	return is == current, err
}

// What is in a network's tables.
type tablesState int

const (
	missing       tablesState = iota // something is
	outdated                         // rules of an earlier version are in force
	otherSettings                    // rules of other settings are
	current
)

func (t *Tables) state() (tablesState, error) {
	l := newLayout(t.Name)
	settings, err := t.settings()
	if err != nil {
		return missing, err
	}
	// A flush leaves tables and chains: a table without rules lets everything through. That the first
	// rule names the owner is quick to see: other chains are many, or long.
	entries, err := nft.Comments(&nftables.Chain{Table: l.inet, Name: entry(l.inet)},
		&nftables.Chain{Table: l.bridge, Name: entry(l.bridge)})
	if err != nil {
		return missing, err
	}
	is := current
	for _, rules := range entries {
		if len(rules) == 0 || rules[0] != ownerPrefix+t.Owner {
			return missing, nil
		}
		of, with, _ := strings.Cut(strings.TrimPrefix(rules[len(rules)-1], versionPrefix), " ")
		if v, err := strconv.Atoi(of); err != nil || v < version {
			is = min(is, outdated)
		} else if with != settings && v == version {
			is = min(is, otherSettings)
		}
	}
	return is, nil
}

// entry is the chain by which a guest's packets come in.
func entry(t *nftables.Table) string {
	if t.Family == nftables.TableFamilyBridge {
		return "prerouting"
	}
	return "forward"
}
