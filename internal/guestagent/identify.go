package guestagent

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/rtnl"
)

// identify makes a restored guest who it shall be: others have been restored from the same
// snapshot. Network first, since the names in /etc/hosts are of its addresses.
func identify(b *guest.Boot, id *agentproto.Identity) (errs []error) {
	for _, i := range id.Interfaces {
		if err := rekey(i); err != nil {
			errs = append(errs, fmt.Errorf("set up interface %s: %w", i.Now.MAC, err))
		}
	}
	if err := forgetNeighbours(); err != nil {
		errs = append(errs, err)
	}
	if id.Hostname != "" {
		b.Hostname = id.Hostname
		if err := unix.Sethostname([]byte(id.Hostname)); err != nil {
			errs = append(errs, fmt.Errorf("set host name: %w", err))
		}
	}
	if id.MachineID != "" {
		b.MachineID = id.MachineID
	}
	if len(id.Hosts) > 0 { // the host's gateway may have another address here
		b.Hosts = id.Hosts
	}
	errs = append(errs, nameGuest(b)...)
	if len(id.Interfaces) > 0 {
		for _, i := range id.Interfaces {
			for n := range b.Interfaces {
				if b.Interfaces[n].MAC == i.Was.MAC {
					b.Interfaces[n] = i.Now
				}
			}
		}
		if len(id.DNS) > 0 {
			b.DNS = id.DNS
		}
		putNetwork(b)
	} else {
		putHosts(b) // its addresses are the same, but not its name
	}
	forgetNames("/usr/lib/systemd/systemd-resolved", "/lib/systemd/systemd-resolved")
	return errs
}

// forgetNames has the programs that keep answers for names forget them, which they do at a SIGUSR2
// (systemd-resolved(8)): to what those say a policy may let nothing through here before it is asked
// for. Programs that would end by the signal do not get it.
func forgetNames(programs ...string) {
	if !slices.ContainsFunc(programs, func(p string) bool { return unix.Access(p, unix.X_OK) == nil }) {
		return // most images have none
	}
	exes, _ := filepath.Glob("/proc/[0-9]*/exe") // the pattern is good
	for _, exe := range exes {
		if of, err := os.Readlink(exe); err != nil || !slices.Contains(programs, of) {
			continue
		}
		dir := filepath.Dir(exe)
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil && expects(dir, unix.SIGUSR2) {
			_ = unix.Kill(pid, unix.SIGUSR2) // it may be gone
		}
	}
}

// expects says whether a process, that has a directory in /proc, has a handler for a signal, or
// blocks it to wait for it.
func expects(dir string, s unix.Signal) bool {
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(status)) {
		name, mask, _ := strings.Cut(line, ":")
		if name != "SigBlk" && name != "SigCgt" {
			continue
		}
		if bits, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64); err == nil && bits>>(s-1)&1 == 1 {
			return true
		}
	}
	return false
}

// nameGuest writes the guest's names into files that images carry from the machine that they were
// made on, and that their init reads. What is written over an image is the VM's own; a root without
// that stays as it is.
func nameGuest(b *guest.Boot) (errs []error) {
	if b.ScratchDevice == "" {
		return nil
	}
	for path, text := range map[string]string{"/etc/hostname": b.Hostname, "/etc/machine-id": b.MachineID} {
		if text == "" {
			continue
		}
		if err := rewrite(path, text+"\n"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errs
}

// forgetNeighbours has the guest ask again who has which address: that of its gateway may have
// moved. The kernel forgets it all when an interface stops and begins to ask.
func forgetNeighbours() error {
	all, err := net.Interfaces()
	if err != nil {
		return err
	}
	return rtnl.With(func(c rtnl.Conn) error {
		for _, i := range all {
			if len(i.HardwareAddr) == 0 {
				continue
			}
			for _, flags := range []uint32{unix.IFF_NOARP, 0} {
				if err := c.SetLink(i.Index, flags, unix.IFF_NOARP); err != nil {
					return fmt.Errorf("forget the neighbours of %s: %w", i.Name, err)
				}
			}
		}
		return nil
	})
}

// rekey gives an interface another MAC and other addresses.
func rekey(i agentproto.Rekey) error {
	link, err := awaitLink(i.Was.MAC, i.Now.MAC) // the latter where it was done before, and the answer lost
	if err != nil {
		return err
	}
	mac, err := net.ParseMAC(i.Now.MAC)
	if err != nil {
		return err
	}
	i.Now.Name = "" // it keeps the one it has
	return rtnl.With(func(c rtnl.Conn) error {
		for _, p := range i.Was.Addresses {
			if err := c.RemoveAddress(link.Index, p); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("remove address %s: %w", p, err)
			}
		}
		if err := c.SetLink(link.Index, 0, unix.IFF_UP); err != nil {
			return fmt.Errorf("set %s down: %w", link.Name, err)
		}
		if err := c.SetLink(link.Index, 0, 0, rtnl.Attribute(unix.IFLA_ADDRESS, mac)); err != nil {
			return fmt.Errorf("give %s its address: %w", link.Name, err)
		}
		return setInterface(c, link, i.Now)
	})
}
