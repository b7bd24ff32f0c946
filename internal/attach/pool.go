package attach

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network"
)

// Pool are the warm slots of one network: namespaces that are made before a VM wants one, and stay
// when it is gone. Each is a directory with a journal of what it did to the host, and a lease while
// a VM has it.
type Pool struct {
	Store   *store.Store
	Network network.Config
	Trace   journal.Trace
}

// Slots counts those of a pool.
type Slots struct {
	All  int `json:"all"`
	Free int `json:"free"`
}

// Names in a slot's directory.
const (
	slotFile    = "slot.json"
	slotJournal = "journal"
)

const (
	slotLease = "slot"
	// poolOwner has slots that are being removed, and the addresses of all: no VM can be called so.
	poolOwner = ".pool"
	maxSlot   = 64 << 10
)

// MaxSlots bounds a pool.
const MaxSlots = 4096

func slotKinds() journal.Kinds {
	return journal.Kinds{
		"lease": func() journal.Effect { return new(store.Lease) },
		"use":   func() journal.Effect { return new(network.Use) },
		"slot":  func() journal.Effect { return new(network.Slot) },
	}
}

func (p *Pool) dir() string { return filepath.Join(p.Store.Path(), store.SlotDir, p.Network.Name) }

// lockPools keeps other processes from changing the pools of a store, until unlock.
func lockPools(st *store.Store) (unlock func(), err error) {
	return network.Lock(filepath.Join(st.Path(), store.SlotDir))
}

func (p *Pool) lease(slot, owner string) *store.Lease {
	return p.Store.Lease(slotLease, p.Network.Name+"/"+slot, owner)
}

// holder is the VM that has a slot, or poolOwner; "" if none has.
func (p *Pool) holder(slot string) string { return p.Store.Holder(slotLease, p.Network.Name+"/"+slot) }

func (p *Pool) names() []string {
	entries, _ := os.ReadDir(p.dir())
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// Count says how many slots there are.
func (p *Pool) Count() (n Slots) {
	for _, name := range p.names() {
		if _, err := p.slot(name); err != nil {
			continue
		}
		n.All++
		if p.holder(name) == "" {
			n.Free++
		}
	}
	return n
}

// slot reads a slot. Returns an error that is fs.ErrNotExist if it is not there, or not whole.
func (p *Pool) slot(name string) (*network.Slot, error) {
	s, err := atomicfile.ReadStrict[network.Slot](filepath.Join(p.dir(), name, slotFile), maxSlot)
	if err != nil {
		return nil, fmt.Errorf("slot %s of network %s: %w", name, p.Network.Name, err)
	}
	return &s, nil
}

// fits says whether a slot is of the network as it is now.
func (p *Pool) fits(s *network.Slot) bool {
	c := p.Network
	return s.Bridge == c.Bridge && s.IP4.Masked() == c.Subnet && s.MTU == c.MTU && s.Mutual == c.Bridged() &&
		s.IP6.IsValid() == c.Subnet6.IsValid()
}

// take finds a slot that no VM has, that of wish if it can, and leases it. Returns nil if there is
// none.
func (p *Pool) take(ctx context.Context, vm string, wish *Interface, do Do) (*network.Slot, error) {
	names := p.names()
	if wish != nil {
		if n := slices.Index(names, filepath.Base(filepath.Dir(wish.File))); n > 0 {
			names[0], names[n] = names[n], names[0]
		}
	}
	for _, name := range names {
		if p.holder(name) != "" {
			continue
		}
		s, err := p.slot(name)
		if err != nil || !p.fits(s) {
			continue
		}
		lease := p.lease(name, vm)
		err = do(ctx, lease)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		// What it says is never changed: who removes a slot has its lease, and another has another name.
		if _, err := os.Lstat(filepath.Join(p.dir(), name, slotFile)); err == nil {
			return s, nil
		}
		// It was removed meanwhile: the lease stands for nothing.
		if err := lease.Revert(ctx); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// Resize makes slots, or removes free ones, until there are n or no more are free, and says how
// many there are. Slots that a VM has stay.
func (p *Pool) Resize(ctx context.Context, n int) (Slots, error) {
	if p.Network.LAN != nil && n > 0 {
		return Slots{},
			fmt.Errorf("make a slot of network %s: its bridge is not ours, and namespaces have no address there", p.Network.Name)
	}
	if _, err := os.Lstat(p.dir()); n == 0 && errors.Is(err, fs.ErrNotExist) {
		return Slots{}, nil
	}
	unlock, err := lockPools(p.Store)
	if err != nil {
		return Slots{}, err
	}
	defer unlock()
	if err := os.MkdirAll(p.dir(), 0o700); err != nil {
		return Slots{}, fmt.Errorf("make slots: %w", err)
	}
	err = p.resize(ctx, n)
	_ = os.Remove(p.dir()) // where none is left
	return p.Count(), err
}

func (p *Pool) resize(ctx context.Context, n int) error {
	if err := p.sweep(ctx); err != nil {
		return err
	}
	have := p.Count().All
	for _, name := range p.names() {
		s, err := p.slot(name)
		if err == nil && p.fits(s) && have <= n {
			continue
		}
		err = p.lease(name, poolOwner).Apply(ctx)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err == nil {
			err = p.remove(ctx, name)
		}
		if err != nil {
			return err
		}
		have--
	}
	for ; have < n; have++ {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name := strings.ToLower(rand.Text()[:8])
		if err := p.make(ctx, name); err != nil {
			return errors.Join(fmt.Errorf("make a slot of network %s: %w", p.Network.Name, err), p.remove(ctx, name))
		}
	}
	return nil
}

func (p *Pool) make(ctx context.Context, name string) error {
	dir := filepath.Join(p.dir(), name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	j, err := journal.Create(filepath.Join(dir, slotJournal), slotKinds(), p.Trace)
	if err != nil {
		return err
	}
	i := &Interface{
		ID: name, Network: p.Network, MAC: network.MAC(poolOwner+name, "").String(), MTU: p.Network.MTU,
		File: filepath.Join(dir, store.NetNSFile),
	}
	i.Tap = network.TapName(p.Network.Bridge, poolOwner, name, "")
	err = i.address(ctx, VM{ID: poolOwner, Store: p.Store}, j.Do)
	if err == nil {
		err = j.Do(ctx,
			&network.Use{
				Dir: filepath.Join(p.Store.Path(), store.NetworkDir), Network: p.Network,
				VM: poolOwner + "-" + name, VMDir: dir,
			})
	}
	slot := i.slot()
	if err == nil {
		err = j.Do(ctx, slot)
	}
	if err := errors.Join(err, j.Close()); err != nil {
		return err
	}
	slot.Warm = true
	return atomicfile.WriteJSON(filepath.Join(dir, slotFile), slot)
}

// remove undoes a slot that nobody can take, whole or half made.
func (p *Pool) remove(ctx context.Context, name string) error {
	dir := filepath.Join(p.dir(), name)
	j, err := journal.Open(filepath.Join(dir, slotJournal), slotKinds(), p.Trace)
	if err == nil {
		err = errors.Join(j.Revert(ctx), j.Close())
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove slot %s of network %s: %w", name, p.Network.Name, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove slot %s of network %s: %w", name, p.Network.Name, err)
	}
	return p.lease(name, poolOwner).Revert(ctx)
}

// sweep removes slots that are not whole: who made or removed them has died. Those that cannot be
// read stay, as another version of smartvm may have made them, and its VMs may be in them.
func (p *Pool) sweep(ctx context.Context) error {
	var errs []error
	for _, name := range p.names() {
		_, err := p.slot(name)
		whole := err == nil && p.holder(name) != poolOwner
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			err = nil
			if !whole {
				err = p.remove(ctx, name)
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// SweepPools removes what died processes have left half made in the pools of a store.
func SweepPools(ctx context.Context, st *store.Store, trace journal.Trace) error {
	dirs, _ := filepath.Glob(filepath.Join(st.Path(), store.SlotDir, "*"))
	if dirs == nil {
		return nil
	}
	unlock, err := lockPools(st)
	if err != nil {
		return err
	}
	defer unlock()
	var errs []error
	for _, dir := range dirs {
		p := &Pool{Store: st, Network: network.Config{Name: filepath.Base(dir)}, Trace: trace}
		errs = append(errs, p.sweep(ctx))
		_ = os.Remove(dir) // where none is left
	}
	return errors.Join(errs...)
}

// slot is what is behind an interface in a namespace.
func (i *Interface) slot() *network.Slot {
	s := &network.Slot{
		Name: i.Tap, File: i.File, Bridge: i.Network.Bridge, MAC: i.MAC,
		IP4: netip.PrefixFrom(i.IP4, i.Network.Subnet.Bits()),
		MTU: i.MTU, Mutual: i.Network.Bridged(), Warm: i.Warm,
	}
	gateway4, gateway6 := i.Network.Gateway()
	if !i.Network.Inside {
		s.Gateway = append(s.Gateway, gateway4)
	}
	if i.IP6.IsValid() {
		s.IP6 = netip.PrefixFrom(i.IP6, 64)
		if !i.Network.Inside {
			s.Gateway = append(s.Gateway, gateway6)
		}
	}
	return s
}
