package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Sysctl is a variable of the kernel's network that a network needs, as an effect on the host.
type Sysctl struct {
	Name  string `json:"name"` // below /proc/sys/net
	Value string `json:"value"`
	Old   string `json:"old"`
}

func (s *Sysctl) path() string { return "/proc/sys/net/" + s.Name }

// Apply sets the variable.
func (s *Sysctl) Apply(context.Context) error {
	if err := os.WriteFile(s.path(), []byte(s.Value), 0); err != nil {
		return fmt.Errorf("set net/%s: %w", s.Name, err)
	}
	return nil
}

// Revert gives the variable its old value, unless somebody has set another.
func (s *Sysctl) Revert(context.Context) error {
	now, err := readSysctl(s.Name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && now != s.Value {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.WriteFile(s.path(), []byte(s.Old), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("restore net/%s: %w", s.Name, err)
	}
	return nil
}

func readSysctl(name string) (string, error) {
	data, err := os.ReadFile("/proc/sys/net/" + name)
	return strings.TrimSpace(string(data)), err
}

// forwarding lists what must change for the host to forward. A host that forwards IPv6 ignores routers' advertisements on
// an interface, and so may lose its own address and route, unless that is told to take them all the same.
func forwarding(ipv6 bool) (all []*Sysctl, err error) {
	want := func(name, from, to string) error {
		now, err := readSysctl(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the kernel lacks the protocol
		}
		if err == nil && now == from {
			all = append(all, &Sysctl{Name: name, Value: to, Old: from})
		}
		return err
	}
	if err := want("ipv4/ip_forward", "0", "1"); err != nil || !ipv6 {
		return all, err
	}
	if now, err := readSysctl("ipv6/conf/all/forwarding"); err != nil || now != "0" {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return all, err
	}
	interfaces, err := os.ReadDir("/proc/sys/net/ipv6/conf")
	if err != nil {
		return nil, err
	}
	for _, i := range interfaces {
		if i.Name() == "all" {
			continue
		}
		if err := want(filepath.Join("ipv6/conf", i.Name(), "accept_ra"), "1", "2"); err != nil {
			return nil, err
		}
	}
	return all, want("ipv6/conf/all/forwarding", "0", "1")
}
