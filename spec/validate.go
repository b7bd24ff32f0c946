package spec

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	maxFieldErrors = 100     // reported at most
	maxValueShown  = 128     // bytes of a string in a FieldError
	maxMemoryMiB   = 1 << 24 // far above any host; the VMM multiplies without looking
	maxPathBytes   = 4095    // PATH_MAX without its NUL
	maxSocketBytes = 107     // sun_path without its NUL
)

// Validate reports everything that is wrong with s and can be known without looking at the host or
// at the version of Firecracker: nil, or an errors.Join of *FieldError in an order that does not
// change.
func (s Spec) Validate() error {
	var p problems
	s.checkIdentity(&p)
	s.checkImage(&p)
	s.checkSecrets(&p)
	s.checkVolumes(&p)
	s.checkMachine(&p)
	s.checkStorage(&p)
	s.checkNetwork(&p)
	s.checkPorts(&p)
	s.checkMMDS(&p)
	s.checkOther(&p)
	s.checkHotplug(&p)
	return errors.Join(p...)
}

// problems collects FieldErrors, at most maxFieldErrors of them.
type problems []error

func (p *problems) add(e FieldError) {
	if text, ok := e.Value.(string); ok {
		e.Value = clip(text)
	}
	switch len(*p) {
	case maxFieldErrors:
		return
	case maxFieldErrors - 1:
		e = FieldError{Path: "$", Reason: "has more problems than are listed here"}
	}
	*p = append(*p, &e)
}

func (p *problems) require(ok bool, path string, value any, reason string) {
	if !ok {
		p.add(FieldError{Path: path, Value: value, Reason: reason})
	}
}

// given reports whether a required string is there.
func (p *problems) given(path, value string) bool {
	p.require(value != "", path, nil, "is required")
	return value != ""
}

// hostPath checks a required path; maxBytes is the longest that the system call it ends in takes.
func (p *problems) hostPath(path, value string, maxBytes int) {
	if p.given(path, value) {
		p.require(!strings.Contains(value, "\x00"), path, value, "must not hold a NUL byte")
		p.require(len(value) <= maxBytes, path, value, fmt.Sprintf("must be at most %d bytes long", maxBytes))
	}
}

func (p *problems) oneOf(path, value string, allowed ...string) {
	p.require(value == "" || slices.Contains(allowed, value), path, value,
		"must be one of "+strings.Join(allowed, ", "))
}

// deviceID checks an id and, in seen, that it is the only one: seen maps ids to their owners.
func (p *problems) deviceID(path, id string, seen map[string]string) {
	if !p.given(path, id) {
		return
	}
	p.require(isID(id, "_"), path, id, "must be 1 to 64 letters, digits or underscores")
	p.unique(path, id, seen)
}

func (p *problems) unique(path, value string, seen map[string]string) {
	if first, taken := seen[value]; taken {
		p.require(false, path, value, "is the same as "+first)
		return
	}
	seen[value] = path
}

func (p *problems) rateLimiter(path string, l *RateLimiter) {
	if l != nil {
		p.bucket(path+".bandwidth", l.Bandwidth)
		p.bucket(path+".ops", l.Ops)
	}
}

// bucket refuses what the VMM would take for "no limit" without having been asked for that.
func (p *problems) bucket(path string, b *TokenBucket) {
	if b == nil {
		return
	}
	const hint = "must not be 0 on its own: the VMM would not limit at all (leave the bucket out for that)"
	p.require(b.Size != 0 || b.RefillTime == 0, path+".size", b.Size, hint)
	p.require(b.RefillTime != 0 || b.Size == 0, path+".refillTime", b.RefillTime, hint)
	const longest = math.MaxUint64 / uint64(time.Millisecond)
	p.require(b.RefillTime <= longest, path+".refillTime", b.RefillTime,
		fmt.Sprintf("must be at most %d milliseconds", uint64(longest)))
}

func (s Spec) checkIdentity(p *problems) {
	p.require(s.ID == "" || isID(s.ID, "-"), "id", s.ID, "must be 1 to 64 letters, digits or hyphens")
	p.require(s.Name == "" || isID(s.Name, "_.-") && isID(s.Name[:1], ""), "name", s.Name,
		"must be 1 to 64 letters, digits, underscores, dots or hyphens and begin with a letter or digit")
	p.require(len(s.Labels) <= 64, "labels", len(s.Labels), "must be at most 64")
	for _, key := range slices.Sorted(maps.Keys(s.Labels)) {
		path := fmt.Sprintf("labels[%q]", clip(key))
		p.require(key != "" && len(key) <= 128, path, nil, "must have a key of 1 to 128 bytes")
		p.require(len(s.Labels[key]) <= 1024, path, s.Labels[key], "must be at most 1024 bytes long")
	}
}

func (s Spec) checkMachine(p *problems) {
	b, m := s.BootSource, s.MachineConfig
	if s.Image == "" || b.KernelImagePath != "" {
		p.hostPath("bootSource.kernelImagePath", b.KernelImagePath, maxPathBytes)
	}
	if b.InitrdPath != "" {
		p.hostPath("bootSource.initrdPath", b.InitrdPath, maxPathBytes)
	}
	p.require(len(b.BootArgs) < 2048, "bootSource.bootArgs", b.BootArgs, "must be shorter than 2048 bytes")
	p.require(printable(b.BootArgs, " "), "bootSource.bootArgs", b.BootArgs, "must be printable ASCII on one line")

	inRange := m.VCPUCount >= 1 && m.VCPUCount <= 32
	p.require(inRange, "machineConfig.vcpuCount", m.VCPUCount, "must be from 1 to 32")
	p.require(!inRange || !m.SMT || m.VCPUCount == 1 || m.VCPUCount%2 == 0,
		"machineConfig.vcpuCount", m.VCPUCount, "must be 1 or even with smt")
	inRange = m.MemSizeMiB >= 1 && m.MemSizeMiB <= maxMemoryMiB
	p.require(inRange, "machineConfig.memSizeMib", m.MemSizeMiB, fmt.Sprintf("must be from 1 to %d", maxMemoryMiB))
	p.require(m.HugePages != "2M" && m.HugePages != "Transparent" || m.MemSizeMiB%2 == 0,
		"machineConfig.memSizeMib", m.MemSizeMiB, "must be even with hugePages "+m.HugePages)
	p.oneOf("machineConfig.cpuTemplate", m.CPUTemplate, "C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None")
	p.oneOf("machineConfig.hugePages", m.HugePages, "None", "2M", "Transparent")
	if s.Balloon != nil && inRange {
		p.require(int64(s.Balloon.AmountMiB) <= int64(m.MemSizeMiB), "balloon.amountMib", s.Balloon.AmountMiB,
			fmt.Sprintf("must be at most machineConfig.memSizeMib (%d)", m.MemSizeMiB))
	}
}

func (s Spec) checkStorage(p *problems) {
	seen, root := map[string]string{}, ""
	if s.Image != "" {
		for _, id := range []string{RootDrive, ScratchDrive, GuestDrive, ModulesDrive, VolumeDrive, ChangesDrive} {
			seen[id] = "image's"
		}
		for i := range s.NamedVolumes {
			seen[NamedDrive(i)] = "image's"
		}
		root = "image's"
	}
	oneRoot := func(path string, isRoot bool) {
		p.require(!isRoot || root == "", path, nil, "cannot be a root device too: "+root+" is one")
		if isRoot {
			root = cmp.Or(root, path)
		}
	}
	for i, d := range s.Drives {
		at := fmt.Sprintf("drives[%d].", i)
		p.deviceID(at+"driveId", d.DriveID, seen)
		p.hostPath(at+"pathOnHost", d.PathOnHost, maxPathBytes)
		oneRoot(at+"isRootDevice", d.IsRootDevice)
		p.require(d.PartUUID == "" || d.IsRootDevice, at+"partuuid", d.PartUUID, "is only for the root device")
		p.require(printable(d.PartUUID, "!"), at+"partuuid", d.PartUUID, "must be printable ASCII without spaces")
		p.oneOf(at+"cacheType", d.CacheType, "Unsafe", "Writeback")
		p.oneOf(at+"ioEngine", d.IOEngine, "Sync", "Async")
		p.require(d.Discard == nil || !*d.Discard || !d.IsReadOnly &&
			d.IOEngine != "Async", at+"discard", true, "is only for a writable drive with ioEngine Sync")
		p.rateLimiter(at+"rateLimiter", d.RateLimiter)
	}
	for i, d := range s.Pmem {
		at := fmt.Sprintf("pmem[%d].", i)
		p.deviceID(at+"id", d.ID, seen)
		p.hostPath(at+"pathOnHost", d.PathOnHost, maxPathBytes)
		oneRoot(at+"isRootDevice", d.IsRootDevice)
		p.rateLimiter(at+"rateLimiter", d.RateLimiter)
	}
}

func (s Spec) checkNetwork(p *problems) {
	ids, taps, macs, ips := map[string]string{}, map[string]string{}, map[string]string{}, map[string]string{}
	for i, n := range s.NetworkInterfaces {
		at := fmt.Sprintf("networkInterfaces[%d].", i)
		p.deviceID(at+"ifaceId", n.IfaceID, ids)
		p.require(n.HostDevName == "" || n.Network == "", at+"network", n.Network, "must not be there beside hostDevName")
		if n.IP.IsValid() {
			p.require(n.HostDevName == "", at+"ip", n.IP, "must not be there beside hostDevName")
			p.require(n.IP.Is4(), at+"ip", n.IP, "must be an IPv4 address: the IPv6 address follows from it")
			p.unique(at+"ip", cmp.Or(n.Network, DefaultNetwork)+" "+n.IP.String(), ips)
		}
		if n.Namespace {
			p.require(n.HostDevName == "" && n.GuestMAC == "" && len(s.NetworkInterfaces) == 1, at+"namespace", true,
				"must not be there beside hostDevName, guestMac or another interface")
		}
		if n.HostDevName != "" {
			// The kernel would take "%d" in a name for a template.
			p.require(len(n.HostDevName) <= 15 && printable(n.HostDevName, "!") && !strings.ContainsAny(n.HostDevName, "/:%") &&
				n.HostDevName != "." && n.HostDevName != "..", at+"hostDevName", n.HostDevName,
				"must be a Linux interface name: 1 to 15 printable ASCII characters without space, slash, colon or percent sign")
			p.unique(at+"hostDevName", n.HostDevName, taps) // a TAP opens once
		}
		if n.GuestMAC != "" {
			p.mac(at+"guestMac", n.GuestMAC, macs)
		}
		p.require(n.MTU == 0 || n.MTU >= 68 && n.MTU <= 65535, at+"mtu", n.MTU, "must be from 68 to 65535")
		p.rateLimiter(at+"rxRateLimiter", n.RxRateLimiter)
		p.rateLimiter(at+"txRateLimiter", n.TxRateLimiter)
	}
}

// checkPorts checks what is about the network as a whole.
func (s Spec) checkPorts(p *problems) {
	ours := slices.ContainsFunc(s.NetworkInterfaces, func(n NetworkInterface) bool { return n.HostDevName == "" })
	p.require(len(s.Ports) == 0 || ours, "ports", nil, "must not be there without an interface on one of our networks")
	p.require(!s.PublishAll || ours, "publishAll", nil, "must not be there without an interface on one of our networks")
	p.require(s.Policy == nil || ours, "policy", nil, "must not be there without an interface on one of our networks")
	p.require(len(s.DNS) == 0 || ours, "dns", nil, "must not be there without an interface on one of our networks")
	p.require(len(s.DNS) <= maxDNS, "dns", len(s.DNS), fmt.Sprintf("must be at most %d", maxDNS))
	for i, a := range s.DNS {
		usable := a.IsValid() && a.Zone() == "" && !a.Is4In6() && !a.IsUnspecified() && !a.IsMulticast()
		p.require(usable, fmt.Sprintf("dns[%d]", i), a, "must be the address of a server, without a zone")
	}
	p.require(len(s.DNSSearch) == 0 || s.Image != "", "dnsSearch", nil, "must not be there without an image")
	p.require(len(s.DNSSearch) <= maxSearch, "dnsSearch", len(s.DNSSearch), fmt.Sprintf("must be at most %d", maxSearch))
	for i, d := range s.DNSSearch {
		usable := len(d) <= 253 && domain.MatchString(d)
		p.require(usable, fmt.Sprintf("dnsSearch[%d]", i), d, "must be a domain, such as example.com")
	}
	s.checkExtraHosts(p, ours)
	p.require(len(s.Ports) <= MaxPorts, "ports", len(s.Ports), fmt.Sprintf("must be at most %d", MaxPorts))
	for i, port := range s.Ports {
		at := fmt.Sprintf("ports[%d].", i)
		p.require(port.GuestPort > 0, at+"guestPort", port.GuestPort, "must be from 1 to 65535")
		if port.Protocol != "" {
			p.oneOf(at+"protocol", port.Protocol, "tcp", "udp")
		}
		p.require(!port.HostIP.Is4In6() && port.HostIP.Zone() == "", at+"hostIp", port.HostIP,
			"must be an IPv4 or IPv6 address without a zone")
		if j := slices.IndexFunc(s.Ports[:i], port.Overlaps); j >= 0 {
			p.require(false, at+"hostPort", port.HostPort, fmt.Sprintf("is the same as ports[%d].hostPort", j))
		}
	}
	if s.Policy != nil {
		for _, e := range s.Policy.Validate() {
			p.add(FieldError{Path: "policy." + e.Path, Value: e.Value, Reason: e.Reason})
		}
	}
}

func (s Spec) checkExtraHosts(p *problems, ours bool) {
	if len(s.ExtraHosts) == 0 {
		return
	}
	p.require(s.Image != "" &&
		ours, "extraHosts", nil, "must not be there without an image and an interface on one of our networks")
	p.require(len(s.ExtraHosts) <= maxExtraHosts, "extraHosts", len(s.ExtraHosts),
		fmt.Sprintf("must be at most %d", maxExtraHosts))
	for i, h := range s.ExtraHosts {
		at := fmt.Sprintf("extraHosts[%d].", i)
		p.require(len(h.Name) <= 253 && domain.MatchString(h.Name) &&
			!strings.HasSuffix(h.Name, "."), at+"name", h.Name, "must be a name, such as db.example")
		usable := h.IP.IsValid() && h.IP.Zone() == "" && !h.IP.Is4In6()
		p.require(h.HostGateway ||
			usable, at+"ip", h.IP, "must be an IPv4 or IPv6 address without a zone, unless hostGateway is true")
		p.require(!h.HostGateway || !h.IP.IsValid(), at+"hostGateway", true, "must not be there beside ip")
	}
}

// MaxPorts is how many ports a VM can publish.
const MaxPorts = 256

const (
	maxDNS        = 3 // what resolvers read
	maxSearch     = 6
	maxExtraHosts = 64
)

var domain = regexp.MustCompile(
	`^[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?$`)

func (p *problems) mac(path, value string, seen map[string]string) {
	mac, err := net.ParseMAC(value)
	if err != nil || len(value) != len("00:00:00:00:00:00") || value[2] != ':' {
		p.require(false, path, value, "must be six groups of two hex digits joined by colons")
		return
	}
	p.require(mac[0]&1 == 0 && slices.Max(mac) > 0, path, value,
		"must be a unicast address, with an even first group, and not zero")
	p.unique(path, mac.String(), seen)
}

func (s Spec) checkMMDS(p *problems) {
	m := s.MMDS
	if m == nil {
		return
	}
	p.oneOf("mmds.version", m.Version, "V1", "V2")
	p.require(len(m.NetworkInterfaces) > 0, "mmds.networkInterfaces", nil, "must name at least one interface")
	known := map[string]bool{}
	for _, n := range s.NetworkInterfaces {
		known[n.IfaceID] = true
	}
	for i, id := range m.NetworkInterfaces {
		p.require(known[id], fmt.Sprintf("mmds.networkInterfaces[%d]", i), id,
			"must be the ifaceId of one of networkInterfaces")
	}
	if m.IPv4Address != "" {
		addr, err := netip.ParseAddr(m.IPv4Address)
		low, high := netip.AddrFrom4([4]byte{169, 254, 1, 0}), netip.AddrFrom4([4]byte{169, 254, 254, 255})
		p.require(err == nil && addr.Is4() && !addr.Less(low) && !high.Less(addr),
			"mmds.ipv4Address", m.IPv4Address, fmt.Sprintf("must be an IPv4 address from %s to %s", low, high))
	}
}

func (s Spec) checkOther(p *problems) {
	if v := s.Vsock; v != nil {
		p.require(v.GuestCID >= 3 && v.GuestCID < math.MaxUint32, "vsock.guestCid", v.GuestCID,
			fmt.Sprintf("must be from 3 to %d", uint32(math.MaxUint32-1)))
		if v.UDSPath != "" {
			p.hostPath("vsock.udsPath", v.UDSPath, maxSocketBytes)
		}
	}
	if l := s.Logger; l != nil {
		levels := []string{"Off", "Error", "Warn", "Warning", "Info", "Debug", "Trace"}
		known := slices.ContainsFunc(levels, func(level string) bool { return strings.EqualFold(level, l.Level) })
		p.require(l.Level == "" || known, "logger.level", l.Level, "must be one of "+strings.Join(levels, ", "))
		if l.LogPath != "" {
			p.hostPath("logger.logPath", l.LogPath, maxPathBytes)
		}
	}
	if s.Metrics != nil {
		p.hostPath("metrics.metricsPath", s.Metrics.MetricsPath, maxPathBytes)
		size := 0
		for name, value := range s.Metrics.Properties {
			size += len(name) + len(value)
		}
		// The VMM takes bodies of 51200 bytes, and a byte is at most six in JSON.
		p.require(size <= maxProperties, "metrics.properties", size,
			fmt.Sprintf("must have at most %d bytes of names and values", maxProperties))
	}
	if s.Entropy != nil {
		p.rateLimiter("entropy.rateLimiter", s.Entropy.RateLimiter)
	}
	if s.Serial != nil {
		p.require(s.Serial.RateLimiter != nil, "serial.rateLimiter", nil, "is required")
		p.bucket("serial.rateLimiter", s.Serial.RateLimiter)
	}
	if len(s.CPUConfig) > 0 {
		var object map[string]json.RawMessage
		p.require(json.Unmarshal(s.CPUConfig, &object) == nil && object != nil, "cpuConfig", string(s.CPUConfig),
			"must be a JSON object")
		template := s.MachineConfig.CPUTemplate
		p.require(template == "" || template == "None", "cpuConfig", nil, "cannot be combined with machineConfig.cpuTemplate")
	}
}

const maxProperties = 8 << 10 // bytes

const defaultBlock = 2 // MiB, of memory that can be plugged in

// Check returns a *FieldError unless sizeMiB can be plugged in: it is in whole blocks, and at most
// TotalSizeMiB.
func (h *MemoryHotplug) Check(sizeMiB int) error {
	block := cmp.Or(h.BlockSizeMiB, defaultBlock)
	if sizeMiB >= 0 && sizeMiB <= h.TotalSizeMiB && sizeMiB%block == 0 {
		return nil
	}
	return &FieldError{
		Path: "requestedSizeMib", Value: sizeMiB,
		Reason: fmt.Sprintf("must be a multiple of blockSizeMib (%d) and at most totalSizeMib (%d)", block, h.TotalSizeMiB),
	}
}

func (s Spec) checkHotplug(p *problems) {
	h := s.MemoryHotplug
	if h == nil {
		return
	}
	const defaultSlot = 128
	slot, block := cmp.Or(h.SlotSizeMiB, defaultSlot), cmp.Or(h.BlockSizeMiB, defaultBlock)
	goodBlock := block >= 2 && block&(block-1) == 0
	p.require(goodBlock, "memoryHotplug.blockSizeMib", block, "must be a power of two, 2 or more")
	goodSlot := slot >= 128 && (!goodBlock || slot%block == 0)
	p.require(goodSlot, "memoryHotplug.slotSizeMib", slot,
		fmt.Sprintf("must be 128 or more and a multiple of blockSizeMib (%d)", block))
	total := h.TotalSizeMiB
	p.require(total >= 1 && total <= maxMemoryMiB && (!goodSlot || total%slot == 0), "memoryHotplug.totalSizeMib", total,
		fmt.Sprintf("must be a multiple of slotSizeMib (%d) and at most %d", slot, maxMemoryMiB))
}

// isID reports whether s is 1 to 64 ASCII letters, digits or bytes of extra.
func isID(s, extra string) bool {
	odd := func(r rune) bool {
		return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && !strings.ContainsRune(extra, r)
	}
	return s != "" && len(s) <= 64 && !strings.ContainsFunc(s, odd)
}

// printable reports whether s is ASCII from lowest to the tilde.
func printable(s, lowest string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < rune(lowest[0]) || r > '~' })
}

func clip(s string) string {
	if len(s) <= maxValueShown {
		return s
	}
	return strings.ToValidUTF8(s[:maxValueShown], "") + "…"
}
