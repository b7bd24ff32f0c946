// Package bridged is what a guest has on a bridge that is not ours, such as one to the host's LAN:
// a port that cannot forge addresses. Of the bridge itself, its other ports, and how the host
// forwards, it changes nothing.
//
// All that there is belongs to one guest: two tables of nftables and an entry of the bridge at its
// port. So guests of several hosts of ours, and the ports of others, have nothing in common that
// one of them could undo.
package bridged

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/internal/nft"
	"push.rocks/smartvm/network/rtnl"
)

// Guest is a guest's interface on a bridge of somebody else's, as an effect on the host. Its tap is
// there already.
type Guest struct {
	Tap    string `json:"tap"`
	Bridge string `json:"bridge"`
	MAC    string `json:"mac"` // as net.ParseMAC takes it
	// IP4 is the only IPv4 address that it may send from. Zero: any. Of IPv6 it may have those whose
	// lower half is made of its MAC (RFC 4291, appendix A), in whatever networks the LAN's routers
	// have.
	IP4  netip.Addr `json:"ip4,omitzero"`
	Host bool       `json:"host,omitempty"` // it reaches the host, and by way of it others
}

// ErrMAC says that the bridge has the guest's MAC elsewhere, for good.
var ErrMAC = errors.New("the bridge has its MAC at another port")

// Table is the name of the tables of a tap.
func Table(tap string) string { return filter.TablePrefix + tap }

// Find returns a bridge that guests of ours may be joined to, by its name. Otherwise the error says
// why they may not.
func Find(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
		return nil, hint.Add(fmt.Errorf("bridge %s: no such interface", name),
			"make it first (ip link add %s type bridge), or name another: ip link show type bridge lists them", name)
	case err != nil:
		return nil, fmt.Errorf("find bridge %s: %w", name, err)
	case link.Type() != "bridge":
		return nil, hint.Add(fmt.Errorf("interface %s is no bridge: it is of type %s", name, link.Type()),
			"make a bridge, and %s its port (ip link set %s master BRIDGE)", name, name)
	case link.Attrs().Group == filter.Group:
		return nil, hint.Add(fmt.Errorf("bridge %s is that of a network of smartvm", name),
			"smartvm network ls names it for --net NAME")
	}
	return link, nil
}

// Filtered says whether the IP rules of the host see what a bridge passes from port to port.
func Filtered(bridge string) bool {
	for _, path := range []string{
		"/proc/sys/net/bridge/bridge-nf-call-iptables",
		"/sys/class/net/" + bridge + "/bridge/nf_call_iptables",
	} {
		if data, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(data)) == "1" {
			return true
		}
	}
	return false
}

// Apply makes the tables and the entry. Returns an error that is fs.ErrExist where tables of the
// name are there, ErrMAC, filter.ErrTooOld.
func (g *Guest) Apply(context.Context) error {
	if err := g.make(false); err != nil {
		return fmt.Errorf("add guest %s to bridge %s: %w", g.Tap, g.Bridge, err)
	}
	return nil
}

// Replace makes them anew in place of what is there, at once.
func (g *Guest) Replace(context.Context) error {
	if err := g.make(true); err != nil {
		return fmt.Errorf("change guest %s of bridge %s: %w", g.Tap, g.Bridge, err)
	}
	return nil
}

func (g *Guest) make(replace bool) error {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return err
	}
	chains, err := g.chains(mac)
	if err != nil {
		return err
	}
	conn, closeLater, err := nft.OpenOnce()
	if err != nil {
		return err
	}
	defer closeLater()
	for _, t := range g.tables() {
		if replace { // what is not there cannot be deleted
			conn.DelTable(conn.AddTable(t))
		}
		conn.CreateTable(t)
	}
	for _, c := range chains {
		conn.AddChain(&c.Chain)
		for _, r := range c.rules {
			conn.AddRule(
				&nftables.Rule{
					Table: c.Table, Chain: &c.Chain, Exprs: r,
					UserData: userdata.AppendString(nil, userdata.TypeComment, c.text),
				})
		}
	}
	switch err := conn.Flush(); {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("table %s: %w", Table(g.Tap), fs.ErrExist)
	case lacks(err):
		return fmt.Errorf("%w: %w", filter.ErrTooOld, err)
	case err != nil:
		return err
	}
	return g.enter(mac)
}

// lacks says whether the kernel has not what is asked for.
func lacks(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EPROTONOSUPPORT)
}

// enter has the bridge find the MAC at the tap, and nowhere else: the port learns nothing.
func (g *Guest) enter(mac net.HardwareAddr) error {
	port, err := rtnl.Index(g.Tap)
	if err != nil {
		return err
	}
	bridge, err := rtnl.Index(g.Bridge)
	if err != nil {
		return err
	}
	if port == 0 || bridge == 0 {
		return errors.New("its port or the bridge is gone")
	}
	all, err := rtnl.Whole(func() ([]netlink.Neigh, error) { return netlink.NeighList(0, unix.AF_BRIDGE) })
	if err != nil {
		return fmt.Errorf("list what the bridge knows: %w", err)
	}
	for _, n := range all {
		// What it has learned may be of the time before; what is there for good is a machine's of this
		// host.
		if n.MasterIndex == bridge && n.LinkIndex != port && n.HardwareAddr.String() == mac.String() &&
			n.State&(netlink.NUD_PERMANENT|netlink.NUD_NOARP) != 0 {
			return hint.Add(fmt.Errorf("%s: %w", mac, ErrMAC),
				"bridge fdb show br %s lists them; without mac= the VM gets one of its own", g.Bridge)
		}
	}
	return set(port, mac)
}

func set(port int, mac net.HardwareAddr) error {
	return netlink.NeighSet(
		&netlink.Neigh{
			LinkIndex: port, Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP,
			Flags: netlink.NTF_MASTER | rtnl.Sticky, HardwareAddr: mac,
		})
}

// Repair makes again what somebody has removed or changed, or all in any case.
func (g *Guest) Repair(ctx context.Context, always bool) error {
	there, err := g.There(ctx)
	if err != nil {
		return err
	}
	if !there || always {
		return g.Replace(ctx)
	}
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return err
	}
	port, err := rtnl.Index(g.Tap)
	if err == nil && port != 0 {
		err = set(port, mac)
	}
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) { // it is no port while there is no bridge of the name
		return fmt.Errorf("add guest %s to bridge %s: %w", g.Tap, g.Bridge, err)
	}
	return nil
}

// Revert removes the tables and the entry.
func (g *Guest) Revert(context.Context) error {
	conn, closeLater, err := nft.OpenOnce()
	if err != nil {
		return err
	}
	defer closeLater()
	for _, t := range g.tables() {
		conn.DelTable(conn.AddTable(t))
	}
	if err := conn.Flush(); err != nil && !lacks(err) {
		return fmt.Errorf("remove guest %s from bridge %s: %w", g.Tap, g.Bridge, err)
	}
	return g.leave()
}

// leave is the opposite of enter. What a bridge knows of a port goes when it is none any more.
func (g *Guest) leave() error {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return err
	}
	port, err := rtnl.Index(g.Tap)
	if port == 0 || err != nil {
		return err
	}
	err = netlink.NeighDel(
		&netlink.Neigh{LinkIndex: port, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, HardwareAddr: mac})
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) && !lacks(err) {
		return fmt.Errorf("remove guest %s from bridge %s: %w", g.Tap, g.Bridge, err)
	}
	return nil
}

// There says whether all rules are, and are those of this guest as it is now.
func (g *Guest) There(context.Context) (bool, error) {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return false, err
	}
	chains, err := g.chains(mac)
	if err != nil {
		return false, err
	}
	conn, closeLater, err := nft.OpenOnce()
	if err != nil {
		return false, err
	}
	defer closeLater()
	for _, c := range chains {
		rules, err := conn.GetRules(c.Table, &c.Chain)
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("look at chain %s of table %s: %w", c.Name, c.Table.Name, err)
		}
		if len(rules) != len(c.rules) {
			return false, nil
		}
		for _, r := range rules {
			if text, _ := userdata.GetString(r.UserData, userdata.TypeComment); text != c.text {
				return false, nil
			}
		}
	}
	return true, nil
}

// version is that of the rules.
const version = 2

// text is what each rule is marked with: of which version it is, and for what guest.
func (g *Guest) text() (string, error) {
	data, err := json.Marshal(g)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("rules %d %.8x", version, sha256.Sum256(data)), nil
}
