package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// version is that of the format. Host and guest are built together, so there are no others to read.
const version = "1"

// magic begins a block. Behind it stand the version and the length of the JSON in bytes, then the
// JSON on a line of its own.
const magic = "smartvm-boot "

const (
	// MaxSize bounds an encoded Boot, in bytes.
	MaxSize = 256 << 10
	// blockSize divides an encoded Boot: what is left over is zeros.
	blockSize = 4096
)

// ModuleList is the file in an initramfs that lists its kernel modules: their paths, one a line, in
// the order of insertion.
const ModuleList = "/modules"

// Types of a root file system.
const (
	Ext4     = "ext4"
	Squashfs = "squashfs"
	Erofs    = "erofs"
)

// Errors of this package.
var (
	// ErrNoBoot means that the data is something else.
	ErrNoBoot = errors.New("no boot configuration")
	// ErrInvalid means that a Boot makes no sense, or that its encoding is damaged.
	ErrInvalid = errors.New("invalid boot configuration")
	// ErrTooLarge means more than MaxSize, or than a request may have.
	ErrTooLarge = errors.New("too large for the guest's agent")
)

// Boot says how a guest boots. Its first program reads it from a small read-only drive, which it
// knows by how it begins, whatever the drive's place. Text is UTF-8 without NUL.
type Boot struct {
	RootDevice string `json:"rootDevice"` // of the image: /dev/vda
	RootType   string `json:"rootType"`   // Ext4, Squashfs or Erofs
	// ScratchDevice is an ext4 file system that takes what is written over the root. Empty: the root
	// is used as it is, written to where its drive and its type allow.
	ScratchDevice string `json:"scratchDevice,omitempty"`
	// ModulesDevice is an ext4 file system with the kernel's modules, which belongs on
	// /lib/modules/RELEASE. Empty: there are none.
	ModulesDevice string `json:"modulesDevice,omitempty"`
	Hostname      string `json:"hostname,omitempty"`
	// Command is run as the image's only program, or with Init becomes process 1. Empty: the image's
	// own init does.
	Command []string `json:"command,omitempty"`
	// Init says that Command is an init: it runs as root, whatever User says, has the console, and
	// ends with the VM.
	Init bool     `json:"init,omitempty"`
	Env  []string `json:"env,omitempty"` // NAME=VALUE; of two of a name the later one counts
	// User is "name", "uid", "name:group", "uid:gid" or a mix; names are the image's. Empty: root.
	User       string `json:"user,omitempty"`
	WorkingDir string `json:"workingDir,omitempty"` // absolute; made if it is not there. Empty: /
	// Directories are made, as root's, where the image has nothing: its VOLUMEs. Absolute; at most
	// MaxDirectories.
	Directories []string `json:"directories,omitempty"`
	StopSignal  string   `json:"stopSignal,omitempty"` // for ParseSignal. Empty: SIGTERM
	// Attach has Command wait for the host, whose streams it gets, see OpMain. Otherwise it has the
	// console at once.
	Attach bool `json:"attach,omitempty"`
	// Secrets says that the host has more for the command, or the image's init, than stands here: it
	// waits for OpSecrets.
	Secrets bool `json:"secrets,omitempty"`
	// 32 hexadecimal digits, for /etc/machine-id. Empty: the image's own stays
	MachineID string `json:"machineId,omitempty"`

	// Volumes are copies of what the host has. VolumeDevice is an ext4 file system with a directory
	// for each, named after its number, and ChangesDevice one that takes what is written. Without any
	// Volumes it is mounted in ChangesDir, for the host to read.
	Volumes       []Volume `json:"volumes,omitempty"`
	VolumeDevice  string   `json:"volumeDevice,omitempty"`
	ChangesDevice string   `json:"changesDevice,omitempty"`
	// Disks are ext4 file systems of the host's that outlive the guest.
	Disks []Disk `json:"disks,omitempty"`

	Interfaces []Interface  `json:"interfaces,omitempty"`
	DNS        []netip.Addr `json:"dns,omitempty"` // servers, for resolv.conf. Empty: the image's own stay
	Search     []string     `json:"search,omitempty"`
	Hosts      []Host       `json:"hosts,omitempty"` // for /etc/hosts, which is then made anew
}

// HasInit says whether process 1 is the image's, and not the agent.
func (b *Boot) HasInit() bool { return b.Init || len(b.Command) == 0 }

// Host is a name that a guest knows without asking.
type Host struct {
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
}

// Volume is a copy of a directory or a file of the host.
type Volume struct {
	Target   string `json:"target"`             // absolute; made if it is not there
	IsFile   bool   `json:"isFile,omitempty"`   // VolumeFile in the volume's directory
	ReadOnly bool   `json:"readOnly,omitempty"` // nothing of it is on ChangesDevice
}

// Disk is a drive whose directory DiskDir is mounted at Target. Where there is no such directory it
// is made, of what is at Target.
type Disk struct {
	Device   string `json:"device"`
	Target   string `json:"target"` // absolute; made if it is not there
	ReadOnly bool   `json:"readOnly,omitempty"`
}

const (
	// DiskDir is in a Disk: what else an ext4 has, lost+found, is nothing for the guest's programs.
	DiskDir = "volume"
	// VolumeFile is the name of a volume that is a file, in its directory.
	VolumeFile = "file"
	// ChangesDir is where a guest mounts a ChangesDevice that is none of its own. In it each volume
	// has a directory of its number, in that UpperDir, a layer of overlayfs.
	ChangesDir = "/run/smartvm/changes"
	UpperDir   = "upper"
)

// Interface is one of the guest's, which knows it by its MAC.
type Interface struct {
	MAC       string         `json:"mac"`            // lower-case, with colons
	Name      string         `json:"name,omitempty"` // what it shall be called. Empty: what the kernel calls it
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	Gateways  []netip.Addr   `json:"gateways,omitempty"` // of default routes, one of each IP version at most
	Routers   bool           `json:"routers,omitempty"`  // IPv6 is as routers of the network say
	MTU       int            `json:"mtu,omitempty"`      // bytes; 0: the device's
}

// MaxDirectories is how many Directories there may be.
const MaxDirectories = 64

// Bounds of what a guest is told of its network.
const (
	maxInterfaces = 16
	maxAddresses  = 16 // of one interface
	maxDNS        = 3  // what resolvers read
	maxSearch     = 6
	maxHosts      = 128
)

// Encode returns the block for the drive: a multiple of 4096 bytes, at most MaxSize. Returns
// ErrInvalid, ErrTooLarge.
func (b *Boot) Encode() ([]byte, error) {
	if err := b.validate(); err != nil {
		return nil, err
	}
	var doc bytes.Buffer
	e := json.NewEncoder(&doc)
	e.SetEscapeHTML(false)
	if err := e.Encode(b); err != nil {
		return nil, fmt.Errorf("encode boot configuration: %w", err)
	}
	data := append([]byte(magic+version+" "+strconv.Itoa(doc.Len())+"\n"), doc.Bytes()...)
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(data), MaxSize)
	}
	return append(data, make([]byte, -len(data)&(blockSize-1))...), nil
}

// Decode reads a block, no further than MaxSize. Returns ErrNoBoot, ErrInvalid and the errors of r.
func Decode(r io.Reader) (*Boot, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxSize))
	if err != nil {
		return nil, fmt.Errorf("read boot configuration: %w", err)
	}
	data, ok := bytes.CutPrefix(data, []byte(magic))
	if !ok {
		return nil, ErrNoBoot
	}
	line, data, _ := bytes.Cut(data, []byte("\n"))
	got, length, _ := strings.Cut(string(line[:min(len(line), 64)]), " ")
	if got != version {
		return nil, fmt.Errorf("%w: version %q, not %s", ErrInvalid, got, version)
	}
	n, err := strconv.ParseUint(length, 10, 31)
	if err != nil || n > uint64(len(data)) {
		return nil, fmt.Errorf("%w: length %q, with %d bytes there", ErrInvalid, length, len(data))
	}
	d := json.NewDecoder(bytes.NewReader(data[:n]))
	d.DisallowUnknownFields()
	b := new(Boot)
	if err := d.Decode(b); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if d.More() {
		return nil, fmt.Errorf("%w: more than one value", ErrInvalid)
	}
	return b, b.validate()
}

func (b *Boot) validate() error {
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
	}
	for _, list := range [][]string{b.Command, b.Env, {b.Hostname, b.User, b.WorkingDir}} {
		for _, s := range list {
			if !utf8.ValidString(s) || strings.Contains(s, "\x00") {
				return invalid("%q is not text", s)
			}
		}
	}
	for _, e := range b.Env {
		if strings.Index(e, "=") < 1 {
			return invalid("environment %q is not NAME=VALUE", e)
		}
	}
	_, signalErr := ParseSignal(b.StopSignal)
	switch {
	case !isDevice(b.RootDevice):
		return invalid("root device %q", b.RootDevice)
	case b.RootType != Ext4 && b.RootType != Squashfs && b.RootType != Erofs:
		return invalid("root type %q", b.RootType)
	case b.ScratchDevice != "" && !isDevice(b.ScratchDevice):
		return invalid("scratch device %q", b.ScratchDevice)
	case b.ModulesDevice != "" && !isDevice(b.ModulesDevice):
		return invalid("modules on %q", b.ModulesDevice)
	case b.ScratchDevice == b.RootDevice:
		return invalid("root and scratch are both %s", b.RootDevice)
	case len(b.Hostname) > 64 || strings.Trim(b.Hostname, letters+digits+"-._") != "":
		return invalid("host name %q", b.Hostname)
	case len(b.Command) > 0 && b.Command[0] == "":
		return invalid("command without a name")
	case b.WorkingDir != "" && b.WorkingDir[0] != '/':
		return invalid("working directory %q is not absolute", b.WorkingDir)
	case len(b.Directories) > MaxDirectories || slices.ContainsFunc(b.Directories, func(d string) bool {
		return !isTarget(d)
	}):
		return invalid("directories %q", b.Directories)
	case b.VolumeDevice != "" && !isDevice(b.VolumeDevice) || b.ChangesDevice != "" && !isDevice(b.ChangesDevice):
		return invalid("volumes on %q and %q", b.VolumeDevice, b.ChangesDevice)
	case len(b.Volumes) > 0 && b.VolumeDevice == "" || slices.ContainsFunc(b.Volumes, func(v Volume) bool {
		return !v.isValid(b)
	}):
		return invalid("volumes %v", b.Volumes)
	case slices.ContainsFunc(b.Disks, func(d Disk) bool { return !isDevice(d.Device) || !isTarget(d.Target) }):
		return invalid("disks %v", b.Disks)
	case b.MachineID != "" && (len(b.MachineID) != 32 || strings.Trim(b.MachineID, digits+"abcdef") != ""):
		return invalid("machine id %q", b.MachineID)
	case b.StopSignal != "" && signalErr != nil:
		return invalid("stop signal: %v", signalErr)
	}
	return b.validateNetwork(invalid)
}

func (b *Boot) validateNetwork(invalid func(string, ...any) error) error {
	if len(b.Interfaces) > maxInterfaces || len(b.DNS) > maxDNS || len(b.Search) > maxSearch || len(b.Hosts) > maxHosts {
		return invalid("%d interfaces, %d DNS servers, %d search domains, %d hosts", len(b.Interfaces), len(b.DNS),
			len(b.Search), len(b.Hosts))
	}
	for _, i := range b.Interfaces {
		mac, err := net.ParseMAC(i.MAC)
		gateways := map[bool]int{}
		for _, g := range i.Gateways {
			gateways[g.Is4()]++
		}
		switch {
		case err != nil || len(mac) != 6 || mac.String() != i.MAC:
			return invalid("MAC %q", i.MAC)
		case len(i.Name) > 15 || strings.Trim(i.Name, letters+digits+"-_") != "":
			return invalid("interface name %q", i.Name)
		case len(i.Addresses) > maxAddresses || gateways[true] > 1 || gateways[false] > 1:
			return invalid("interface %s has %d addresses and %d gateways", i.MAC, len(i.Addresses), len(i.Gateways))
		case i.MTU != 0 && (i.MTU < 68 || i.MTU > 65535):
			return invalid("MTU %d", i.MTU)
		case slices.ContainsFunc(i.Addresses, func(p netip.Prefix) bool { return !p.IsValid() || p.Addr().Is4In6() }):
			return invalid("addresses %v", i.Addresses)
		case slices.ContainsFunc(i.Gateways, func(a netip.Addr) bool { return !a.IsValid() || a.Is4In6() || a.Zone() != "" }):
			return invalid("gateways %v", i.Gateways)
		}
	}
	for _, a := range b.DNS {
		if !a.IsValid() || a.Zone() != "" {
			return invalid("DNS server %q", a)
		}
	}
	for _, s := range b.Search {
		if !isDomain(s) {
			return invalid("search domain %q", s)
		}
	}
	for _, h := range b.Hosts {
		if !isDomain(h.Name) || !h.Address.IsValid() || h.Address.Zone() != "" {
			return invalid("host %q at %s", h.Name, h.Address)
		}
	}
	return nil
}

func isDomain(s string) bool {
	return s != "" && len(s) <= 253 && strings.Trim(s, letters+digits+"-_.") == ""
}

const (
	lower   = "abcdefghijklmnopqrstuvwxyz"
	letters = lower + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	digits  = "0123456789"
)

func (v Volume) isValid(b *Boot) bool {
	return isTarget(v.Target) && (v.ReadOnly || b.ChangesDevice != "")
}

// isTarget says whether p is a clean path of the guest's, and not its root.
func isTarget(p string) bool {
	return path.IsAbs(p) && path.Clean(p) == p && p != "/" && utf8.ValidString(p) && !strings.Contains(p, "\x00")
}

func isDevice(path string) bool {
	name, ok := strings.CutPrefix(path, "/dev/")
	return ok && name != "" && strings.Trim(name, lower+digits) == ""
}

// DriveDevice is what Linux calls a VM's n-th drive, from 1 on: vdz is followed by vdaa.
func DriveDevice(n int) (device string) {
	for ; n > 0; n = (n - 1) / 26 {
		device = string(rune('a'+(n-1)%26)) + device
	}
	return "/dev/vd" + device
}
