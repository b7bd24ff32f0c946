package spec

import (
	"cmp"
	"encoding/json"
	"net/netip"
	"slices"

	"push.rocks/smartvm/network/policy"
)

// Spec describes one microVM. It is inert: nothing in this package changes a Spec it was given. Its
// JSON form is the original package's machine configuration, with the fields that are marked "ours"
// added.
//
// Paths are host paths; relative ones are resolved against the working directory when the VM is
// created.
type Spec struct {
	// ID names the VM for good: 1-64 of [A-Za-z0-9-]. Empty: one is made.
	ID string `json:"id,omitempty"`
	// Name is a second handle that people type, unique in a runtime directory: 1-64 of [A-Za-z0-9_.-],
	// beginning with a letter or digit. Ours.
	Name string `json:"name,omitempty"`
	// Labels are kept and shown, never interpreted. At most 64, keys up to 128 bytes, values up to
	// 1024. Ours.
	Labels map[string]string `json:"labels,omitempty"`

	BootSource        BootSource         `json:"bootSource"`
	MachineConfig     MachineConfig      `json:"machineConfig"`
	Drives            []Drive            `json:"drives,omitempty"`
	NetworkInterfaces []NetworkInterface `json:"networkInterfaces,omitempty"`
	Vsock             *Vsock             `json:"vsock,omitempty"`
	Balloon           *Balloon           `json:"balloon,omitempty"`
	MMDS              *MMDS              `json:"mmds,omitempty"`
	Logger            *Logger            `json:"logger,omitempty"`
	Metrics           *Metrics           `json:"metrics,omitempty"`

	// The rest is ours.

	// Image is what the VM boots, in place of a kernel and a root drive of its own: the name of an
	// image on this host, which is pulled before. Its file system is shared by all its VMs and stays
	// as it is; what the guest writes goes to Scratch.
	Image string `json:"image,omitempty"`
	// Kernel is the image whose kernel Image boots with, or "host" for this machine's. Empty: Image's
	// own, else the one of the image "kernel", else this machine's. BootSource.KernelImagePath goes
	// before all.
	Kernel string `json:"kernel,omitempty"`
	// Scratch takes what the guest of an image writes.
	Scratch *Scratch `json:"scratch,omitempty"`
	// Command, Entrypoint, Env, User and WorkingDir say what runs in an image, in place of what the
	// image says, or, of Env (NAME=VALUE), in addition. Entrypoint goes before Command, and takes the
	// place of the image's command too. Empty, but not nil, or with one empty element, it clears both:
	// Command is all that runs. An image that says nothing runs its own init.
	Entrypoint []string `json:"entrypoint,omitzero"`
	Command    []string `json:"command,omitempty"`
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"`       // name or uid, and optionally :group or :gid
	WorkingDir string   `json:"workingDir,omitempty"` // absolute
	// Systemd says when the command boots as process 1, as the image's init, in place of running below
	// the agent: SystemdTrue (default), SystemdFalse or SystemdAlways, as with podman.
	Systemd string `json:"systemd,omitempty"`
	// Hostname is the guest's. Empty: Name, else ID.
	Hostname string `json:"hostname,omitempty"`
	// EnvFiles are files with more of Env, one NAME=VALUE a line, as docker has them; Env counts
	// before them. Like Secrets they are read at each start, and what is in them stands nowhere on the
	// host but there.
	EnvFiles []string `json:"envFiles,omitempty"`
	Secrets  []Secret `json:"secrets,omitempty"`
	Volumes  []Volume `json:"volumes,omitempty"`
	// NamedVolumes are disks that outlive the VM, mounted in the guest of an image. At most 8, none
	// twice.
	NamedVolumes []NamedVolume `json:"namedVolumes,omitempty"`

	// Ports are published on the host. PublishAll publishes also those that the image exposes and no
	// element of Ports leads to, each at a free port of the host. Policy says what the guest may
	// reach, on all its networks.
	Ports      []Port         `json:"ports,omitempty"`
	PublishAll bool           `json:"publishAll,omitempty"`
	Policy     *policy.Policy `json:"policy,omitempty"`
	// DNS are the servers that answer the guest for names, at most 3, in place of the host's.
	// DNSSearch are the domains in which the guest of an image looks for names that are not whole, at
	// most 6.
	DNS       []netip.Addr `json:"dns,omitempty"`
	DNSSearch []string     `json:"dnsSearch,omitempty"`
	// ExtraHosts are names that the guest of an image finds in its /etc/hosts, at most 64. With them
	// that file is made anew, whatever the image has.
	ExtraHosts []ExtraHost `json:"extraHosts,omitempty"`

	// PCI puts the VM's devices on a PCI bus, in place of MMIO: there may be 31 of them then. The
	// guest's kernel needs CONFIG_PCI_MSI and CONFIG_VIRTIO_PCI. A VM that is restored has what its
	// snapshot's VM had. Firecracker ≥ 1.13
	PCI           bool            `json:"pci,omitempty"`
	Entropy       *Entropy        `json:"entropy,omitempty"`
	Serial        *Serial         `json:"serial,omitempty"`        // Firecracker ≥ 1.16
	Pmem          []Pmem          `json:"pmem,omitempty"`          // Firecracker ≥ 1.14
	MemoryHotplug *MemoryHotplug  `json:"memoryHotplug,omitempty"` // Firecracker ≥ 1.14
	CPUConfig     json.RawMessage `json:"cpuConfig,omitempty"`     // a CPU template in the VMM's own form, an object
}

// Values of Spec.Systemd.
const (
	// the command is an init: systemd by any path, or /sbin/init, /usr/sbin/init or
	// /usr/local/sbin/init
	SystemdTrue   = "true"
	SystemdFalse  = "false"
	SystemdAlways = "always"
)

// DefaultNetwork is the network of interfaces that name no other.
const DefaultNetwork = "default"

// Port is a port of the host that leads to one of the guest's, on the VM's first interface.
type Port struct {
	HostIP    netip.Addr `json:"hostIp,omitzero"` // zero: all of the host's addresses, of both families
	HostPort  uint16     `json:"hostPort"`        // 0: one that is free, chosen at each start
	GuestPort uint16     `json:"guestPort"`
	Protocol  string     `json:"protocol,omitempty"` // "tcp", which it is if empty, or "udp"
}

// Addresses are those of the host at which the port is: one, or all of a family, as which 0.0.0.0
// and :: stand for them.
func (p Port) Addresses() []netip.Addr {
	if p.HostIP.IsValid() {
		return []netip.Addr{p.HostIP}
	}
	return []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
}

// Overlaps says whether two ports are the same on an address of the host. One that is chosen at the
// start never is.
func (p Port) Overlaps(q Port) bool {
	if p.HostPort == 0 || p.HostPort != q.HostPort || cmp.Or(p.Protocol, "tcp") != cmp.Or(q.Protocol, "tcp") {
		return false
	}
	return slices.ContainsFunc(p.Addresses(), func(a netip.Addr) bool {
		return slices.ContainsFunc(q.Addresses(), func(b netip.Addr) bool {
			return a == b || a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified())
		})
	})
}

// ExtraHost is a name and its address, one of two: a name may stand there twice, with an address of
// each IP version.
type ExtraHost struct {
	Name string     `json:"name"` // such as db.example
	IP   netip.Addr `json:"ip,omitzero"`
	// HostGateway stands for the gateway of the VM's first network, which is the host. It answers
	// there where a policy says AllowHost.
	HostGateway bool `json:"hostGateway,omitempty"`
}

// Scratch is a sparse disk. The zero value is one of DefaultScratchMiB that goes with the VM.
type Scratch struct {
	SizeMiB int `json:"sizeMib,omitempty"` // MiB, ≥ 16; of one that is kept, only when it is made
	// Keep is the name under which the disk outlives the VM, and by which a later VM gets it: 1-64 of
	// [A-Za-z0-9_.-], beginning with a letter or digit. One VM at a time can have it.
	Keep string `json:"keep,omitempty"`
}

// DefaultScratchMiB is the size of a scratch disk, of which only what is written takes space.
const DefaultScratchMiB = 4096

// BootSource is what the guest boots.
type BootSource struct {
	// KernelImagePath is an ELF vmlinux (x86_64) or an Image (aarch64), or a file that holds one, such
	// as a bzImage: it is extracted when the VM is made. Required, but with an Image.
	KernelImagePath string `json:"kernelImagePath,omitempty"`
	InitrdPath      string `json:"initrdPath,omitempty"`
	// BootArgs replaces the VMM's default kernel command line. Under 2048 bytes with what the VMM
	// adds. Empty: DefaultBootArgs.
	BootArgs string `json:"bootArgs,omitempty"`
}

// DefaultBootArgs is the kernel command line of a VM that names none: the serial console on, and a
// reboot or a panic ends the VM instead of leaving it halted.
const DefaultBootArgs = "console=ttyS0 reboot=k panic=1"

// MachineConfig sizes the VM.
type MachineConfig struct {
	VCPUCount       int    `json:"vcpuCount"`  // 1-32; with SMT 1 or even
	MemSizeMiB      int    `json:"memSizeMib"` // MiB, > 0; even with huge pages
	SMT             bool   `json:"smt,omitempty"`
	CPUTemplate     string `json:"cpuTemplate,omitempty"` // C3, T2, T2S, T2CL, T2A, V1N1 or None
	TrackDirtyPages bool   `json:"trackDirtyPages,omitempty"`
	HugePages       string `json:"hugePages,omitempty"` // None, 2M or Transparent (Firecracker ≥ 1.17)
}

// Drive is a block device backed by a raw file or a block device of the host.
type Drive struct {
	DriveID      string `json:"driveId"` // [A-Za-z0-9_]
	PathOnHost   string `json:"pathOnHost"`
	IsRootDevice bool   `json:"isRootDevice"`
	IsReadOnly   bool   `json:"isReadOnly,omitempty"`
	PartUUID     string `json:"partuuid,omitempty"` // only with IsRootDevice
	// CacheType is Unsafe, where the guest's flushes do nothing, or Writeback, where they are fsyncs
	// of the file. Empty: Writeback for a file that the guest writes itself, Unsafe for a copy.
	CacheType   string       `json:"cacheType,omitempty"`
	IOEngine    string       `json:"ioEngine,omitempty"` // Sync (default) or Async
	RateLimiter *RateLimiter `json:"rateLimiter,omitempty"`
	// Discard says whether the guest can trim the drive, which makes holes in the file. It needs
	// Firecracker ≥ 1.17, a writable drive and Sync. Nil: yes where those are. Ours
	Discard *bool `json:"discard,omitempty"`
	// Ephemeral says whether the VM gets a copy of its own that is thrown away with it. Nil: yes for a
	// writable drive (unless the host switches that off), no for a read-only one.
	Ephemeral *bool `json:"ephemeral,omitempty"`
}

// NetworkInterface is a guest NIC attached to a TAP of the host.
type NetworkInterface struct {
	IfaceID string `json:"ifaceId"` // [A-Za-z0-9_]
	// HostDevName is an existing TAP, at most 15 bytes. Empty: one is made, and the interface gets an
	// address of Network.
	HostDevName string `json:"hostDevName,omitempty"`
	Network     string `json:"network,omitempty"` // empty: DefaultNetwork. Ours
	// IP is the interface's IPv4 address in Network, as long as the VM is there; the IPv6 address
	// follows from it. Zero: one that is free. In a Namespace it is the address by which others reach
	// the VM. Ours
	IP netip.Addr `json:"ip,omitzero"`
	// Namespace says that the VM has a network namespace of its own, joined to Network: in it the
	// guest has always the same addresses. Such an interface is a VM's only one. Ours
	Namespace     bool         `json:"namespace,omitempty"`
	GuestMAC      string       `json:"guestMac,omitempty"`
	MTU           int          `json:"mtu,omitempty"` // 68-65535, Firecracker ≥ 1.16. Ours
	RxRateLimiter *RateLimiter `json:"rxRateLimiter,omitempty"`
	TxRateLimiter *RateLimiter `json:"txRateLimiter,omitempty"`
}

// RateLimiter bounds bytes (Bandwidth) and operations (Ops). A nil bucket is unlimited.
type RateLimiter struct {
	Bandwidth *TokenBucket `json:"bandwidth,omitempty"`
	Ops       *TokenBucket `json:"ops,omitempty"`
}

// TokenBucket starts full and refills linearly by Size every RefillTime.
type TokenBucket struct {
	Size         uint64 `json:"size"`                   // bytes or operations
	OneTimeBurst uint64 `json:"oneTimeBurst,omitempty"` // spent first, never refilled
	RefillTime   uint64 `json:"refillTime"`             // milliseconds
}

// Vsock gives the guest a vsock device.
type Vsock struct {
	GuestCID uint32 `json:"guestCid"` // ≥ 3
	// UDSPath is where the host finds the socket, empty for nowhere but in the VM's directory: made as
	// a symbolic link to the VM's own socket while the VM runs. A listener for connections the guest
	// opens goes beside the link's target, with "_PORT" added.
	UDSPath string `json:"udsPath"`
}

// Balloon lets the host take memory back from the guest.
type Balloon struct {
	AmountMiB             uint32 `json:"amountMib"` // MiB, ≤ MemSizeMiB
	DeflateOnOOM          bool   `json:"deflateOnOom"`
	StatsPollingIntervalS uint16 `json:"statsPollingIntervalS,omitempty"` // seconds, 0: no statistics
	FreePageHinting       bool   `json:"freePageHinting,omitempty"`       // Firecracker ≥ 1.14. Ours
	FreePageReporting     bool   `json:"freePageReporting,omitempty"`     // Firecracker ≥ 1.14. Ours
}

// MMDS serves metadata to the guest.
type MMDS struct {
	Version           string   `json:"version,omitempty"` // V2 (default), which asks for a token, or V1
	NetworkInterfaces []string `json:"networkInterfaces"` // len ≥ 1, IfaceIDs
	IPv4Address       string   `json:"ipv4Address,omitempty"`
	IMDSCompat        bool     `json:"imdsCompat,omitempty"` // Firecracker ≥ 1.13. Ours
}

// Logger sets what the VMM logs and where. Without it warnings go to the VM's own directory.
type Logger struct {
	LogPath       string `json:"logPath,omitempty"`
	Level         string `json:"level,omitempty"` // Off, Error, Warn (default here), Info, Debug, Trace
	ShowLevel     bool   `json:"showLevel,omitempty"`
	ShowLogOrigin bool   `json:"showLogOrigin,omitempty"`
}

// Metrics names the file that gets the VMM's metrics, one JSON object a line.
type Metrics struct {
	MetricsPath string `json:"metricsPath"`
	// EmitID has each line name the VM by its id, as "id", and Properties are on each line as
	// "properties": at most 8 KiB of names and values. Firecracker ≥ 1.17. Ours
	EmitID     bool              `json:"emitId,omitempty"`
	Properties map[string]string `json:"properties,omitempty"`
}

// Entropy gives the guest a virtio random number device.
type Entropy struct {
	RateLimiter *RateLimiter `json:"rateLimiter,omitempty"`
}

// Serial bounds the serial console's output; what is over the limit is dropped.
type Serial struct {
	RateLimiter *TokenBucket `json:"rateLimiter"`
}

// Pmem is a persistent memory device backed by a file. Staged by the same rule as a Drive.
type Pmem struct {
	ID           string       `json:"id"` // [A-Za-z0-9_]
	PathOnHost   string       `json:"pathOnHost"`
	IsRootDevice bool         `json:"isRootDevice,omitempty"`
	IsReadOnly   bool         `json:"isReadOnly,omitempty"`
	RateLimiter  *RateLimiter `json:"rateLimiter,omitempty"` // Firecracker ≥ 1.16
	Ephemeral    *bool        `json:"ephemeral,omitempty"`
}

// MemoryHotplug reserves memory that can be plugged in while the VM runs. MiB throughout. The
// kernel command line gets memhp_default_state=online_movable, by which a Linux guest uses what is
// plugged in and can give it back, unless it has a memhp_default_state. Guests need
// CONFIG_VIRTIO_MEM: Linux ≥ 5.16, on aarch64 ≥ 5.18.
type MemoryHotplug struct {
	TotalSizeMiB int `json:"totalSizeMib"`
	SlotSizeMiB  int `json:"slotSizeMib,omitempty"`  // default 128
	BlockSizeMiB int `json:"blockSizeMib,omitempty"` // default 2
}
