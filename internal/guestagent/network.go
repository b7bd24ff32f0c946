package guestagent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/guestagent/etc"
	"push.rocks/smartvm/internal/guestagent/rtnl"
)

// setNetwork gives the guest's interfaces their addresses and routes, and says what it could not: a
// guest without a part of its network is better than none.
func setNetwork(b *guest.Boot) {
	for _, i := range b.Interfaces {
		link, err := awaitLink(i.MAC)
		if err == nil {
			err = rtnl.With(func(c rtnl.Conn) error { return setInterface(c, link, i) })
		}
		if err != nil {
			say("set up interface %s: %v", i.MAC, err)
		}
	}
	putNetwork(b)
}

// putNetwork writes what programs read of the network.
func putNetwork(b *guest.Boot) {
	if len(b.DNS) > 0 {
		put("/etc/resolv.conf", etc.ResolvConf(b), b.ScratchDevice != "")
	}
	putHosts(b)
}

// putHosts writes under which address a command finds the guest's own name, and what else the guest
// is told of names.
func putHosts(b *guest.Boot) {
	if len(b.Interfaces) > 0 && !b.HasInit() || len(b.Hosts) > 0 {
		put("/etc/hosts", etc.Hosts(b), b.ScratchDevice != "")
	}
}

// put makes a file of the image this text: in place of what is there, or, where nothing can be
// written, over it.
func put(name, text string, writable bool) {
	target := name
	if !writable {
		if info, err := os.Stat(name); err != nil || !info.Mode().IsRegular() {
			say("%s stays as it is: there is nothing to lay it over", name)
			return
		}
		target = "/run/smartvm-" + strings.ReplaceAll(name[1:], "/", "-")
	}
	err := os.Remove(target) // it may be a link, which leads elsewhere, or a FIFO, which would hold us up
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644); err == nil {
			_, err = f.WriteString(text)
			err = errors.Join(err, f.Close())
		}
	}
	if err == nil && target != name {
		err = unix.Mount(target, name, "", unix.MS_BIND, "")
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // an image without /etc has no use for it
		say("write %s: %v", name, err)
	}
}

// awaitLink waits for the interface that has one of some MACs.
func awaitLink(macs ...string) (link net.Interface, err error) {
	err = await(func() error {
		all, err := net.Interfaces()
		if err != nil {
			return err
		}
		n := slices.IndexFunc(all, func(i net.Interface) bool { return slices.Contains(macs, i.HardwareAddr.String()) })
		if n < 0 {
			return errNotYet
		}
		link = all[n]
		return nil
	})
	return link, err
}

func setInterface(c rtnl.Conn, link net.Interface, i guest.Interface) error {
	name := link.Name
	if i.Name != "" && i.Name != name {
		if err := c.SetLink(link.Index, 0, 0, rtnl.Attribute(unix.IFLA_IFNAME, append([]byte(i.Name), 0))); err != nil {
			say("call %s %s: %v", name, i.Name, err) // by its other name it does as well
		} else {
			name = i.Name
		}
	}
	// A router that is none of ours is not for the guest. Where there is no such file there is no
	// IPv6.
	ipv6 := setIPv6(name, "accept_ra", map[bool]string{true: "2", false: "0"}[i.Routers])
	if i.Routers && ipv6 { // the host lets through such addresses alone as are made of the MAC
		setIPv6(name, "addr_gen_mode", "0")
		setIPv6(name, "use_tempaddr", "0")
	}
	var set [][]byte
	if i.MTU != 0 {
		set = append(set, rtnl.Attribute(unix.IFLA_MTU, binary.NativeEndian.AppendUint32(nil, uint32(i.MTU))))
	}
	if err := c.SetLink(link.Index, unix.IFF_UP, unix.IFF_UP, set...); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	var errs []error
	for _, p := range i.Addresses {
		if p.Addr().Is4() || ipv6 {
			if err := c.AddAddress(link.Index, p); err != nil && !errors.Is(err, unix.EEXIST) {
				errs = append(errs, fmt.Errorf("address %s: %w", p, err))
			}
		}
	}
	for _, g := range i.Gateways {
		if g.Is4() || ipv6 {
			if err := c.AddDefault(link.Index, g); err != nil && !errors.Is(err, unix.EEXIST) {
				errs = append(errs, fmt.Errorf("route by %s: %w", g, err))
			}
		}
	}
	return errors.Join(errs...)
}

// setIPv6 sets a variable of an interface, and says whether the kernel has it.
func setIPv6(name, variable, value string) bool {
	return os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/"+variable, []byte(value), 0) == nil
}
