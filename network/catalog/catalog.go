// Package catalog keeps the networks that people have made.
package catalog

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/bridged"
	"push.rocks/smartvm/network/subnet"
)

// Store keeps the networks that somebody has made, a file each, and knows the default one, which is
// always there, and whose policy is that of networks without one.
type Store struct {
	Dir     string // made when it is needed
	Default network.Config
	// Changed receives each network that was changed, afterwards: "create", "update" or "remove", and
	// its name. It may be nil.
	Changed func(action, name string)
}

// changed reports a change unless there is an error, which it returns.
func (s *Store) changed(err error, action, name string) error {
	if err == nil && s.Changed != nil {
		s.Changed(action, name)
	}
	return err
}

// ErrNotFound means that no network has the name.
var ErrNotFound = errors.New("no such network")

// maxConfig bounds a network's file in bytes.
const maxConfig = 1 << 20

func (s *Store) path(name string) string { return filepath.Join(s.Dir, name+".json") }

// Get returns a network. Returns ErrNotFound, and spec.ErrNotSupported for one that another version
// of smartvm has written and that has settings that are unknown here: they may be limits.
func (s *Store) Get(name string) (network.Config, error) {
	if name == s.Default.Name {
		c := s.Default
		c.Policy = nil // it is the host's, not its own
		own, err := atomicfile.ReadStrict[network.Settings](s.path(name), maxConfig)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return network.Config{}, fmt.Errorf("network %q: %w", name, err)
		}
		if err == nil {
			c.Settings = own
		}
		s.limit(&c)
		return c, c.Validate()
	}
	if bridge, ok := strings.CutPrefix(name, network.OnBridge); ok {
		c := network.Config{Name: name, Bridge: bridge, LAN: new(bridged.LAN)}
		s.limit(&c)
		return c, c.Validate()
	}
	c, err := atomicfile.ReadStrict[network.Config](s.path(name), maxConfig)
	if strings.Contains(name, "/") || errors.Is(err, fs.ErrNotExist) {
		return network.Config{},
			hint.Add(fmt.Errorf("network %q: %w", name, ErrNotFound),
				"smartvm network ls lists them; smartvm network create %s makes it", name)
	}
	if err == nil && c.Name != name {
		err = fmt.Errorf("file is of network %q", c.Name)
	}
	if err != nil {
		return network.Config{}, fmt.Errorf("network %q: %w", name, err)
	}
	s.limit(&c)
	return c, c.Validate()
}

// limit gives a network without a policy the host's.
func (s *Store) limit(c *network.Config) {
	if c.HostPolicy = c.Policy == nil && s.Default.Policy != nil; c.HostPolicy {
		c.Policy = s.Default.Policy
	}
}

// Refresh gives a network the settings that it has now, if it is kept.
func (s *Store) Refresh(c *network.Config) error {
	now, err := s.Get(c.Name)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err == nil {
		c.Refresh(now)
	}
	return err
}

// Refresher is Refresh by the store that open returns at the time.
func Refresher(open func() (*Store, error)) func(*network.Config) error {
	return func(c *network.Config) error {
		s, err := open()
		if err == nil {
			err = s.Refresh(c)
		}
		return err
	}
}

// Update gives a network other settings, for VMs that start from now on: see also Update for one
// that is up. Returns ErrNotFound, and all that is wrong with them, joined.
func (s *Store) Update(name string, change func(*network.Settings)) (network.Config, error) {
	unlock, err := network.Lock(s.Dir)
	if err != nil {
		return network.Config{}, err
	}
	defer unlock()
	c, err := s.Get(name)
	if err != nil {
		return c, err
	}
	if c.HostPolicy {
		c.Policy, c.HostPolicy = nil, false
	}
	change(&c.Settings)
	if err := c.Validate(); err != nil {
		return c, fmt.Errorf("change network %s: %w", name, err)
	}
	if name == s.Default.Name {
		err = atomicfile.WriteJSON(s.path(name), c.Settings)
	} else {
		err = atomicfile.WriteJSON(s.path(name), c)
	}
	s.limit(&c)
	return c, s.changed(err, "update", name)
}

// List returns all networks by name, the default one first. An error is about networks that cannot
// be read, which another version of smartvm may have made: all others are returned with it.
func (s *Store) List() ([]network.Config, error) {
	var all []network.Config
	var errs []error
	add := func(name string) {
		c, err := s.Get(name)
		if err == nil {
			all = append(all, c)
		} else if !errors.Is(err, ErrNotFound) {
			errs = append(errs, err)
		}
	}
	add(s.Default.Name)
	files, err := filepath.Glob(s.path("*"))
	if err != nil {
		return all, errors.Join(append(errs, fmt.Errorf("list networks: %w", err))...)
	}
	slices.Sort(files)
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".json")
		if name != s.Default.Name {
			add(name)
		}
	}
	return all, errors.Join(errs...)
}

// Create keeps a new network. What c leaves open is chosen: a bridge of its name, a subnet that no
// other has. Returns an error that is fs.ErrExist where its name, bridge or subnet are another
// network's.
func (s *Store) Create(c network.Config) (network.Config, error) {
	unlock, err := network.Lock(s.Dir)
	if err != nil {
		return c, err
	}
	defer unlock()
	others, err := s.List()
	if err != nil {
		return c, err
	}
	if slices.Contains([]string{"none", "bridge", "netns"}, c.Name) {
		return c, fmt.Errorf("create network %s: --net means something else by that", c.Name)
	}
	if c.Bridge == "" {
		c.Bridge = "sv-" + c.Name[:min(len(c.Name), 12)]
	}
	if !c.Subnet.IsValid() && c.LAN == nil {
		c.Subnet, err = subnet.Choose(func(p netip.Prefix) bool {
			return slices.ContainsFunc(others, func(o network.Config) bool { return o.Subnet.Overlaps(p) })
		})
		if err == nil && !c.Subnet.IsValid() {
			err = hint.Add(fmt.Errorf("choose a subnet: %w", network.ErrExhausted), "name one with --subnet")
		}
		if err != nil {
			return c, err
		}
	}
	if !c.Subnet6.IsValid() && c.LAN == nil {
		c.Subnet6 = subnet.Local(c.Bridge)
	}
	if err := c.Validate(); err != nil {
		return c, err
	}
	for _, o := range others {
		taken := ""
		switch {
		case o.Name == c.Name:
			taken = "name"
		case o.Bridge == c.Bridge:
			taken = "bridge " + c.Bridge
		case o.Subnet.Overlaps(c.Subnet):
			taken = "subnet " + o.Subnet.String()
		case o.Subnet6.IsValid() && o.Subnet6.Overlaps(c.Subnet6):
			taken = "subnet " + o.Subnet6.String()
		}
		if taken != "" {
			return c, fmt.Errorf("create network %s: %s is that of network %s: %w", c.Name, taken, o.Name, fs.ErrExist)
		}
	}
	return c, s.changed(atomicfile.WriteJSON(s.path(c.Name), c), "create", c.Name)
}

// Remove forgets a network. Returns ErrNotFound; whether VMs use it is for the caller to know.
func (s *Store) Remove(name string) error {
	if name == s.Default.Name {
		return hint.Add(fmt.Errorf("remove network %s: it is always there", name), "it takes no room while no VM uses it")
	}
	if strings.HasPrefix(name, network.OnBridge) {
		return fmt.Errorf("remove network %s: it is a bridge that is not ours", name)
	}
	if _, err := s.Get(name); errors.Is(err, ErrNotFound) {
		return err
	}
	if err := os.Remove(s.path(name)); err != nil {
		return fmt.Errorf("remove network %s: %w", name, err)
	}
	return s.changed(nil, "remove", name)
}
