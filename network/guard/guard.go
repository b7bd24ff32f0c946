// Package guard keeps guests from everything while the rules of their network are gone: nobody but
// the process that holds a guard can remove it, not by a flush of all rules either (Linux 6.9).
package guard

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables/binaryutil"
	"github.com/mdlayher/netlink"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/internal/nft"
)

// Flags of tables, of linux/netfilter/nf_tables.h. One that persists goes on when who owns it ends,
// and may be owned by another then.
const (
	owned    = 1 << 1
	persists = 1 << 2
)

// Guard is that of one network, as an effect on the host. Where the kernel has none it is nothing.
type Guard struct {
	Bridge string `json:"bridge"`
	Owner  string `json:"owner"` // a random word, by which it is known again
}

// priority is behind that of the network's own rules, which mark what has passed them.
const priority = 10

func (g *Guard) table() *nftables.Table {
	// no interface has a slash
	return &nftables.Table{Name: filter.TablePrefix + "guard/" + g.Bridge, Family: nftables.TableFamilyINet}
}

func (g *Guard) owner() *nftables.Chain {
	return &nftables.Chain{Table: g.table(), Name: "owner-" + g.Owner}
}

// add adds the rules.
func (g *Guard) add(conn *nftables.Conn) error {
	t := g.table()
	conn.AddChain(g.owner())
	for name, hook := range map[string]*nftables.ChainHook{
		"forward": nftables.ChainHookForward,
		"input":   nftables.ChainHookInput,
	} {
		chain := nft.Chain(nft.Base(t, name, hook, nftables.ChainPriorityRef(priority)),
			nft.Plain(nft.Join(nft.Iif(g.Bridge), nft.NotPassed(), nft.Drop())))
		conn.AddChain(&chain.Chain)
		conn.FlushChain(&chain.Chain)
		if err := chain.AddRules(conn); err != nil {
			return err
		}
	}
	return nil
}

// missing says that a kernel has no such tables.
func missing(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)
}

// open makes the guard, with flags, or takes over one that is there, and returns the connection
// that holds it.
func (g *Guard) open(flags netlink.HeaderFlags) (conn *nftables.Conn, err error) {
	var raw *netlink.Conn
	conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		raw = c
		return nil
	}))
	if err != nil {
		return nil, err
	}
	if err = g.own(raw, flags); err == nil {
		err = g.add(conn)
	}
	if err == nil {
		err = conn.Flush()
	}
	if err != nil {
		return nil, errors.Join(err, conn.CloseLasting())
	}
	return conn, nil
}

// own makes the table what only this connection changes. The library has no flags for a table.
func (g *Guard) own(conn *netlink.Conn, flags netlink.HeaderFlags) error {
	attributes, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: []byte(g.table().Name + "\x00")},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binaryutil.BigEndian.PutUint32(owned | persists)},
	})
	if err != nil {
		return err
	}
	message := func(kind uint16, flags netlink.HeaderFlags, family uint8, resource uint16, data []byte) netlink.Message {
		header := binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
		return netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request | flags},
			Data:   append(header, data...),
		}
	}
	_, err = conn.SendMessages([]netlink.Message{
		message(unix.NFNL_MSG_BATCH_BEGIN, 0, 0, unix.NFNL_SUBSYS_NFTABLES, nil),
		message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWTABLE, netlink.Acknowledge|netlink.Create|flags,
			unix.NFPROTO_INET, 0, attributes),
		message(unix.NFNL_MSG_BATCH_END, 0, 0, unix.NFNL_SUBSYS_NFTABLES, nil),
	})
	if err == nil {
		_, err = conn.Receive()
	}
	return err
}

// Apply makes the guard, which nobody holds yet. Returns an error that is fs.ErrExist where a table
// of its name is there.
func (g *Guard) Apply(context.Context) error {
	conn, err := g.open(netlink.Excl)
	if err == nil {
		err = conn.CloseLasting()
	}
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("guard bridge %s: %w", g.Bridge, fs.ErrExist)
	case err != nil && !missing(err):
		return fmt.Errorf("guard bridge %s: %w", g.Bridge, err)
	}
	return nil
}

// releaseTime is how long a process that holds the guard may take to let go of it.
const releaseTime = 2 * time.Second

// Revert removes the guard, when nobody holds it any more.
func (g *Guard) Revert(ctx context.Context) error {
	for deadline := time.Now().Add(releaseTime); ; {
		err := g.remove()
		if err == nil || !errors.Is(err, unix.EPERM) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (g *Guard) remove() error {
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	ours, err := g.there(conn)
	if !ours || err != nil {
		return err
	}
	conn.DelTable(g.table())
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove guard of bridge %s: %w", g.Bridge, err)
	}
	return nil
}

func (g *Guard) there(conn *nftables.Conn) (bool, error) {
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("look for guard of bridge %s: %w", g.Bridge, err)
	}
	own := g.owner()
	return slices.ContainsFunc(chains, func(c *nftables.Chain) bool {
		return c.Table.Name == own.Table.Name && c.Name == own.Name
	}), nil
}

// Keeper holds guards for one process. Its zero value serves. It is safe for concurrent use.
type Keeper struct {
	mu   sync.Mutex
	held map[Guard]*hold
}

type hold struct {
	conn *nftables.Conn
	by   map[string]bool
}

// Hold has the process hold a guard, made if need be, for somebody, until Release. It says whether
// the process does: another may, or the kernel has none.
func (k *Keeper) Hold(g Guard, by string) (bool, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if h := k.held[g]; h != nil {
		h.by[by] = true
		return true, nil
	}
	conn, err := g.open(0)
	if missing(err) || errors.Is(err, unix.EPERM) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("hold guard of bridge %s: %w", g.Bridge, err)
	}
	if k.held == nil {
		k.held = map[Guard]*hold{}
	}
	k.held[g] = &hold{conn, map[string]bool{by: true}}
	return true, nil
}

// Holds says whether the process holds the guard of a bridge.
func (k *Keeper) Holds(bridge string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for g := range k.held {
		if g.Bridge == bridge {
			return true
		}
	}
	return false
}

// Release ends a Hold. With the last of a guard another process may hold it.
func (k *Keeper) Release(g Guard, by string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	h := k.held[g]
	if h == nil {
		return
	}
	if delete(h.by, by); len(h.by) == 0 {
		_ = h.conn.CloseLasting()
		delete(k.held, g)
	}
}
