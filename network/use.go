package network

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/forward"
	"push.rocks/smartvm/network/guard"
	"push.rocks/smartvm/network/inspect"
	"push.rocks/smartvm/network/subnet"
	"push.rocks/smartvm/network/wireguard"
)

// Names in the directory in which hosts keep what their networks did: a directory a network, with
const (
	forwardingFile = "forwarding.journal" // what all networks need
	journalFile    = "journal"            // what one did
	upFile         = "up.json"            // it is up, and as this says
	usersDir       = "users"              // a symbolic link a VM, to the VM's directory
	namesDir       = "names"              // a symbolic link a VM with a name, to its addresses
	logDir         = "log"                // a socket a guest, for what the rules log of it
)

// Kinds are the effects in those journals.
func Kinds() journal.Kinds {
	return journal.Kinds{
		"sysctl":    func() journal.Effect { return new(forward.Sysctl) },
		"bridge":    func() journal.Effect { return new(Bridge) },
		"tables":    func() journal.Effect { return new(filter.Tables) },
		"wireguard": func() journal.Effect { return new(wireguard.Link) },
		"egress":    func() journal.Effect { return new(wireguard.Egress) },
		"guard":     func() journal.Effect { return new(guard.Guard) },
	}
}

// Use is a VM's part in a network, as an effect on the host: the network is up while anybody has
// one.
type Use struct {
	Dir     string `json:"dir"` // where the networks' journals are, made if need be
	Network Config `json:"network"`
	VM      string `json:"vm"`    // a file name that no other VM has
	VMDir   string `json:"vmDir"` // the VM is gone when this is
	// Name is that by which other guests of a mutual network find Addresses, a file name. It may be
	// empty.
	Name      string       `json:"name,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"`
}

// up is upFile.
type up struct {
	Owner    string `json:"owner"`
	Network  Config `json:"network"`
	Restored int    `json:"restored,omitempty"` // how often it had to be
}

const maxUp = 1 << 20

func (u *Use) path(names ...string) string {
	return filepath.Join(append([]string{u.Dir, u.Network.Name}, names...)...)
}

// errOther says that a network is up with other settings.
var errOther = errors.New("it is up with other settings")

// Who changes a network writes down its settings, and then gives them to what is up: updateTime is
// how long at most that is waited for.
const (
	updateTime = time.Second
	updateStep = 10 * time.Millisecond
)

// Apply brings the network up, if it is not, and says that the VM uses it. Returns ErrTaken where a
// bridge or tables of its name are somebody else's, *OverlapError, filter.ErrTooOld.
func (u *Use) Apply(ctx context.Context) error {
	ctx = u.ahead(ctx)
	refresh := sharedOf(ctx).Refresh
	for deadline := time.Now().Add(updateTime); ; {
		last := time.Now().After(deadline) // however long a look takes, there is one after that
		if refresh != nil {
			if err := refresh(&u.Network); err != nil {
				return err
			}
		}
		err := u.apply(ctx)
		if refresh == nil || !errors.Is(err, errOther) || last {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(updateStep):
		}
	}
}

func (u *Use) apply(ctx context.Context) error {
	unlock, err := Lock(u.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := u.bringUp(ctx); err != nil {
		err = fmt.Errorf("bring up network %s: %w", u.Network.Name, err)
		if errors.Is(err, fs.ErrPermission) {
			err = hint.Add(err, "run smartvm as root (CAP_NET_ADMIN), or the VM with --net none")
		}
		if errors.Is(err, filter.ErrTooOld) {
			err = hint.Add(err, "load the kernel module nf_tables, or run the VM with --net none")
		}
		return err
	}
	if err := os.Symlink(u.VMDir, u.path(usersDir, u.VM)); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("use network %s: %w", u.Network.Name, err)
	}
	if err := u.call(); err != nil {
		return fmt.Errorf("name VM %s on network %s: %w", u.Name, u.Network.Name, err)
	}
	return nil
}

// ahead does what may take long and others need not wait for: it finds where the network's tunnel
// leads, where that is to be made.
func (u *Use) ahead(ctx context.Context) context.Context {
	if u.Network.WireGuardConfig == "" {
		return ctx
	}
	if _, via, err := Current(u.Dir, u.Network.Name); err == nil && via != "" {
		if there, err := (&wireguard.Link{Name: via}).There(ctx); there || err != nil {
			return ctx
		}
	}
	return wireguard.Find(ctx, u.Network.WireGuardConfig)
}

// call makes the VM's name known. One that is there is that of a VM that is gone, or this one's.
func (u *Use) call() error {
	if u.Name == "" || !u.Network.Mutual {
		return nil
	}
	path := u.path(namesDir, strings.ToLower(u.Name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Symlink(u.called(), path)
}

// called are the VM's addresses, as they stand behind its name.
func (u *Use) called() string {
	var all []string
	for _, a := range u.Addresses {
		all = append(all, a.String())
	}
	return strings.Join(all, ",")
}

// Named returns the addresses of the VM of a name on a network that is up.
func Named(dir, network, name string) (all []netip.Addr) {
	if strings.ContainsAny(name, "/\x00") || name == "" || name[0] == '.' {
		return nil
	}
	u := Use{Dir: dir, Network: Config{Name: network}}
	text, err := os.Readlink(u.path(namesDir, strings.ToLower(name)))
	if err != nil {
		return nil
	}
	for part := range strings.SplitSeq(text, ",") {
		if a, err := netip.ParseAddr(part); err == nil {
			all = append(all, a)
		}
	}
	return all
}

func (u *Use) bringUp(ctx context.Context) error {
	lan := u.Network.LAN != nil
	if lan {
		if _, err := bridged.Find(u.Network.Bridge); err != nil {
			return err
		}
	}
	was, err := u.state()
	if err != nil {
		return err
	}
	if was != nil && !same(was.Network, u.Network) {
		if users := u.users(); len(users) > 0 {
			return hint.Add(fmt.Errorf("%w, and %d VMs or warm slots use it", errOther, len(users)),
				"stop them first, or use another network")
		}
		was = nil
	}
	if was != nil {
		return u.repair(ctx, was, false)
	}
	if err := inspect.Allowed(); err != nil { // said before anything is done
		return err
	}
	if err := u.takeDown(ctx); err != nil { // what a crash left
		return err
	}
	var shadowed []string
	if !lan {
		if shadowed, err = subnet.Free(u.Network.Bridge, u.Network.Subnet, u.Network.Subnet6); err != nil {
			return err
		}
	}
	if len(shadowed) > 0 {
		sharedOf(ctx).log().Warn("the network's subnet hides a part of where other routes of the host lead", "network",
			u.Network.Name, "subnet", u.Network.Subnet, "routes", shadowed)
	}
	if err := os.MkdirAll(u.path(usersDir), 0o700); err != nil {
		return err
	}
	now := up{Owner: randomWord(), Network: u.Network}
	j, err := journal.Create(u.path(journalFile), Kinds(), sharedOf(ctx).Trace)
	if err != nil {
		return err
	}
	all := now.effects()
	if !lan {
		all = append(all, now.guard())
	}
	for _, e := range all {
		if err := j.Do(ctx, e); err != nil {
			return errors.Join(err, j.Close(), u.takeDown(ctx))
		}
	}
	if err := j.Close(); err != nil {
		return err
	}
	if err := atomicfile.WriteJSON(u.path(upFile), now); err != nil {
		return errors.Join(err, u.takeDown(ctx))
	}
	if err := forwards(ctx, u.Dir); err != nil {
		return errors.Join(err, u.takeDown(ctx))
	}
	sharedOf(ctx).log().Info("network is up", "network", u.Network.Name, "bridge", u.Network.Bridge)
	if lan && !bridged.Filtered(u.Network.Bridge) {
		return nil
	}
	if blockers, err := inspect.Blockers(nftables.ChainHookForward); err == nil && len(blockers) > 0 {
		sharedOf(ctx).log().Warn(
			"another firewall drops what it does not know: if VMs do not reach the outside, let what comes from and goes to the bridge through there",
			"network", u.Network.Name, "bridge", u.Network.Bridge, "chains", blockers)
	}
	return nil
}

// effects are what a network is on its host.
func (n *up) effects() []journal.Effect {
	c := n.Network
	if c.LAN != nil {
		return nil
	}
	b := &Bridge{Name: c.Bridge, MAC: bridgeMAC(n.Owner), MTU: c.MTU, Routed: c.Routed}
	ip4, ip6 := c.Gateway()
	b.Addresses = append(b.Addresses, prefixOf(ip4, c.Subnet))
	if ip6.IsValid() {
		b.Addresses = append(b.Addresses, prefixOf(ip6, c.Subnet6))
	}
	// The tables first: no guest is there before its rules.
	all := []journal.Effect{c.tables(n.Owner)}
	via := c.via(n.Owner)
	if c.WireGuardConfig != "" {
		all = append(all, &wireguard.Link{Name: via, File: c.WireGuardConfig})
	}
	if via != "" {
		e := &wireguard.Egress{Bridge: c.Bridge, Interface: via, Table: routeTable(n.Owner), Local: []netip.Prefix{c.Subnet}}
		if c.Subnet6.IsValid() {
			e.Local = append(e.Local, c.Subnet6)
		}
		all = append(all, e)
	}
	return append(all, b)
}

func prefixOf(a netip.Addr, of netip.Prefix) netip.Prefix { return netip.PrefixFrom(a, of.Bits()) }

func randomWord() string { return rand.Text()[:12] }

// routeTable draws a table of routes from a random word, far from those that people number.
func routeTable(owner string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(owner)) // never fails
	return 1<<30 | int(h.Sum32()>>3)
}

// Revert takes the VM out, and the network down when it was the last.
func (u *Use) Revert(ctx context.Context) error {
	if _, err := os.Lstat(u.Dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := Lock(u.Dir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.Remove(u.path(usersDir, u.VM)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("leave network %s: %w", u.Network.Name, err)
	}
	if u.Name != "" {
		// Another VM of the name may have come since.
		path := u.path(namesDir, strings.ToLower(u.Name))
		if is, err := os.Readlink(path); err == nil && is == u.called() {
			_ = os.Remove(path) // if it stays, it goes with the network, or a VM of its name
		}
	}
	if len(u.users()) > 0 {
		return nil
	}
	return u.takeDown(ctx)
}

// takeDown undoes what the network did, as far as it did.
func (u *Use) takeDown(ctx context.Context) error {
	if err := journal.Check(u.path(journalFile), Kinds()); err != nil { // before anything is done
		return fmt.Errorf("take down network %s: %w", u.Network.Name, err)
	}
	if err := os.Remove(u.path(upFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("take down network %s: %w", u.Network.Name, err)
	}
	// Forwarding ends before the rules that bound it.
	if err := errors.Join(unforward(ctx, u.Dir), undo(ctx, u.path(journalFile)), os.RemoveAll(u.path())); err != nil {
		return fmt.Errorf("take down network %s: %w", u.Network.Name, err)
	}
	return nil
}

func undo(ctx context.Context, path string) error {
	j, err := journal.Open(path, Kinds(), sharedOf(ctx).Trace)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := j.Revert(ctx); err != nil {
		return errors.Join(err, j.Close())
	}
	return nil
}

// networksUp lists the networks of a directory that are up. The error is about those that another
// version of smartvm has brought up, and others that cannot be read.
func networksUp(dir string) (all []*up, err error) {
	var errs []error
	files, _ := filepath.Glob(filepath.Join(dir, "*", upFile))
	for _, f := range files {
		u := Use{Dir: dir, Network: Config{Name: filepath.Base(filepath.Dir(f))}}
		now, err := u.state()
		if now != nil {
			all = append(all, now)
		}
		errs = append(errs, err)
	}
	return all, errors.Join(errs...)
}

// state returns how the network is up, nil if it is not.
func (u *Use) state() (*up, error) {
	was, err := atomicfile.ReadStrict[up](u.path(upFile), maxUp)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network %s: %w", u.Network.Name, err)
	}
	return &was, nil
}

// users lists the VMs that are there and use the network, and forgets those that are gone.
func (u *Use) users() (vms []string) {
	entries, _ := os.ReadDir(u.path(usersDir))
	for _, e := range entries {
		link := u.path(usersDir, e.Name())
		if _, err := os.Stat(link); errors.Is(err, fs.ErrNotExist) {
			_ = os.Remove(link) // if it stays it is gone through next time
			continue
		}
		vms = append(vms, e.Name())
	}
	return vms
}

// Sweep takes down the networks of a directory that no VM uses.
func Sweep(ctx context.Context, dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := Lock(dir)
	if err != nil {
		return err
	}
	defer unlock()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look for networks: %w", err)
	}
	var errs []error
	for _, e := range entries {
		u := Use{Dir: dir, Network: Config{Name: e.Name()}}
		if e.IsDir() && len(u.users()) == 0 {
			errs = append(errs, u.takeDown(ctx))
		}
	}
	return errors.Join(append(errs, unforward(ctx, dir))...)
}

// Current returns a network as it is up, one without anything where it is not, and the interface by
// which alone its guests leave, "" if it is any.
func Current(dir, network string) (now Config, via string, err error) {
	u := Use{Dir: dir, Network: Config{Name: network}}
	is, err := u.state()
	if is == nil || err != nil {
		return now, "", err
	}
	return is.Network, is.Network.via(is.Owner), nil
}

// LogDir is the directory of flowlog.Config for a network that is up.
func LogDir(dir, network string) string { return filepath.Join(dir, network, logDir) }

// Users lists the directories of the VMs that use a network. Users whose names begin with a dot are
// none.
func Users(dir, network string) (vmDirs []string) {
	u := Use{Dir: dir, Network: Config{Name: network}}
	entries, _ := os.ReadDir(u.path(usersDir))
	for _, e := range entries {
		if vm, err := os.Readlink(u.path(usersDir, e.Name())); err == nil && e.Name()[0] != '.' &&
			!slices.Contains(vmDirs, vm) {
			vmDirs = append(vmDirs, vm)
		}
	}
	return vmDirs
}

// Lock keeps other processes and goroutines from the networks of a directory, made if need be,
// until unlock.
func Lock(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("lock networks: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock networks: %w", err)
	}
	if err := lock.Block(f, lock.Exclusive); err != nil {
		return nil, errors.Join(fmt.Errorf("lock networks: %w", err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

func same(a, b Config) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// guard is not for who repairs: it is held by who supervises guests (Hold).
func (n *up) guard() *guard.Guard { return &guard.Guard{Bridge: n.Network.Bridge, Owner: n.Owner} }

// Hold has this process hold the guard of the network while the VM runs, until release, where no
// other does and the kernel has guards: see Shared.
func (u *Use) Hold(ctx context.Context) (release func(), err error) {
	k := sharedOf(ctx).Guards
	now, err := u.state()
	if k == nil || now == nil || now.Network.LAN != nil || err != nil {
		return func() {}, err
	}
	g := *now.guard()
	_, err = k.Hold(g, u.VM)
	return func() { k.Release(g, u.VM) }, err
}
