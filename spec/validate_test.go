package spec_test

import (
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	vmspec "push.rocks/smartvm/spec"
)

// validSpec is a Spec with one of everything, for a test to break.
func validSpec(t *testing.T) vmspec.Spec {
	t.Helper()
	spec, err := vmspec.Parse([]byte(originalSpec))
	if err != nil {
		t.Fatal(err)
	}
	spec.MachineConfig.CPUTemplate = ""
	spec.Labels = map[string]string{"a": "b"}
	spec.Entropy = &vmspec.Entropy{}
	spec.Serial = &vmspec.Serial{RateLimiter: &vmspec.TokenBucket{Size: 1, RefillTime: 1}}
	spec.Pmem = []vmspec.Pmem{{ID: "pmem0", PathOnHost: "/p"}, {ID: "pmem1", PathOnHost: "/p"}}
	spec.MemoryHotplug = &vmspec.MemoryHotplug{TotalSizeMiB: 256}
	spec.CPUConfig = json.RawMessage(`{}`)
	second := spec.NetworkInterfaces[0]
	second.IfaceID, second.HostDevName, second.GuestMAC = "eth1", "tap1", ""
	spec.NetworkInterfaces = append(spec.NetworkInterfaces, second)
	return spec
}

type breakage struct {
	path   string
	reason string // part of it
	edit   func(*vmspec.Spec)
}

func TestSpec_Validate(t *testing.T) {
	tests := identityRules()
	tests = append(tests, machineRules()...)
	tests = append(tests, storageRules()...)
	tests = append(tests, networkRules()...)
	tests = append(tests, otherRules()...)
	for _, tt := range tests {
		t.Run(tt.path+"/"+tt.reason, func(t *testing.T) {
			spec := validSpec(t)
			tt.edit(&spec)
			all := fieldErrors(t, spec.Validate())
			if len(all) != 1 || all[0].Path != tt.path || !strings.Contains(all[0].Reason, tt.reason) {
				t.Errorf("got %v, want only %q: %q", all, tt.path, tt.reason)
			}
		})
	}
}

func identityRules() []breakage {
	return []breakage{
		{"id", "1 to 64 letters, digits or hyphens", func(s *vmspec.Spec) { s.ID = strings.Repeat("a", 65) }},
		{"id", "1 to 64 letters, digits or hyphens", func(s *vmspec.Spec) { s.ID = "a_b" }},
		{"id", "1 to 64 letters, digits or hyphens", func(s *vmspec.Spec) { s.ID = "../a" }},
		{"id", "1 to 64 letters, digits or hyphens", func(s *vmspec.Spec) { s.ID = "é" }},
		{"name", "1 to 64", func(s *vmspec.Spec) { s.Name = strings.Repeat("a", 65) }},
		{"name", "1 to 64", func(s *vmspec.Spec) { s.Name = "a b" }},
		{"name", "begin with a letter or digit", func(s *vmspec.Spec) { s.Name = ".a" }},
		{"labels", "at most 64", func(s *vmspec.Spec) {
			for i := range 64 {
				s.Labels[fmt.Sprint(i)] = ""
			}
		}},
		{`labels[""]`, "key of 1 to 128 bytes", func(s *vmspec.Spec) { s.Labels[""] = "x" }},
		{`labels["` + strings.Repeat("k", 128) + `…"]`, "key of 1 to 128 bytes", func(s *vmspec.Spec) {
			s.Labels[strings.Repeat("k", 129)] = ""
		}},
		{`labels["a"]`, "at most 1024 bytes", func(s *vmspec.Spec) { s.Labels["a"] = strings.Repeat("v", 1025) }},
	}
}

func machineRules() []breakage {
	return []breakage{
		{"bootSource.kernelImagePath", "is required", func(s *vmspec.Spec) { s.BootSource.KernelImagePath = "" }},
		{"bootSource.kernelImagePath", "NUL", func(s *vmspec.Spec) { s.BootSource.KernelImagePath = "a\x00" }},
		{"bootSource.kernelImagePath", "at most 4095 bytes", func(s *vmspec.Spec) {
			s.BootSource.KernelImagePath = strings.Repeat("a", 4096)
		}},
		{"bootSource.initrdPath", "NUL", func(s *vmspec.Spec) { s.BootSource.InitrdPath = "\x00" }},
		{"bootSource.bootArgs", "shorter than 2048", func(s *vmspec.Spec) {
			s.BootSource.BootArgs = strings.Repeat("a", 2048)
		}},
		{"bootSource.bootArgs", "printable ASCII on one line", func(s *vmspec.Spec) { s.BootSource.BootArgs = "a\nb" }},
		{"bootSource.bootArgs", "printable ASCII on one line", func(s *vmspec.Spec) { s.BootSource.BootArgs = "a\x7f" }},
		{"bootSource.bootArgs", "printable ASCII on one line", func(s *vmspec.Spec) { s.BootSource.BootArgs = "ü" }},
		{"machineConfig.vcpuCount", "from 1 to 32", func(s *vmspec.Spec) { s.MachineConfig.VCPUCount = 0 }},
		{"machineConfig.vcpuCount", "from 1 to 32", func(s *vmspec.Spec) { s.MachineConfig.VCPUCount = -1 }},
		{"machineConfig.vcpuCount", "from 1 to 32", func(s *vmspec.Spec) { s.MachineConfig.VCPUCount = 33 }},
		{"machineConfig.vcpuCount", "1 or even with smt", func(s *vmspec.Spec) { s.MachineConfig.VCPUCount = 3 }},
		{"machineConfig.memSizeMib", "from 1 to", func(s *vmspec.Spec) { s.MachineConfig.MemSizeMiB = 0 }},
		{"machineConfig.memSizeMib", "from 1 to", func(s *vmspec.Spec) { s.MachineConfig.MemSizeMiB = -2 }},
		{"machineConfig.memSizeMib", "from 1 to 16777216", func(s *vmspec.Spec) { s.MachineConfig.MemSizeMiB = 1<<24 + 2 }},
		{"machineConfig.memSizeMib", "even with hugePages 2M", func(s *vmspec.Spec) { s.MachineConfig.MemSizeMiB = 255 }},
		{"machineConfig.memSizeMib", "even with hugePages Transparent", func(s *vmspec.Spec) {
			s.MachineConfig.MemSizeMiB, s.MachineConfig.HugePages = 255, "Transparent"
		}},
		{"machineConfig.cpuTemplate", "one of C3, T2, T2S, T2CL, T2A, V1N1, None", func(s *vmspec.Spec) {
			s.MachineConfig.CPUTemplate, s.CPUConfig = "t2", nil
		}},
		{"machineConfig.hugePages", "one of None, 2M, Transparent", func(s *vmspec.Spec) {
			s.MachineConfig.HugePages = "2m"
		}},
		{"balloon.amountMib", "at most machineConfig.memSizeMib (256)", func(s *vmspec.Spec) { s.Balloon.AmountMiB = 257 }},
		{"cpuConfig", "must be a JSON object", func(s *vmspec.Spec) { s.CPUConfig = json.RawMessage(`[]`) }},
		{"cpuConfig", "must be a JSON object", func(s *vmspec.Spec) { s.CPUConfig = json.RawMessage(`null`) }},
		{"cpuConfig", "must be a JSON object", func(s *vmspec.Spec) { s.CPUConfig = json.RawMessage(`{`) }},
		{"cpuConfig", "cannot be combined", func(s *vmspec.Spec) { s.MachineConfig.CPUTemplate = "T2" }},
		{"memoryHotplug.totalSizeMib", "multiple of slotSizeMib (128)", func(s *vmspec.Spec) {
			s.MemoryHotplug.TotalSizeMiB = 0
		}},
		{"memoryHotplug.totalSizeMib", "multiple of slotSizeMib (128)", func(s *vmspec.Spec) {
			s.MemoryHotplug.TotalSizeMiB = -128
		}},
		{"memoryHotplug.totalSizeMib", "multiple of slotSizeMib (128)", func(s *vmspec.Spec) {
			s.MemoryHotplug.TotalSizeMiB = 129
		}},
		{"memoryHotplug.totalSizeMib", "multiple of slotSizeMib (512)", func(s *vmspec.Spec) {
			s.MemoryHotplug.SlotSizeMiB = 512
		}},
		{"memoryHotplug.totalSizeMib", "at most 16777216", func(s *vmspec.Spec) { s.MemoryHotplug.TotalSizeMiB = 1 << 25 }},
		{"memoryHotplug.slotSizeMib", "128 or more", func(s *vmspec.Spec) { s.MemoryHotplug.SlotSizeMiB = 64 }},
		{"memoryHotplug.slotSizeMib", "128 or more", func(s *vmspec.Spec) { s.MemoryHotplug.SlotSizeMiB = -128 }},
		{"memoryHotplug.slotSizeMib", "multiple of blockSizeMib (256)", func(s *vmspec.Spec) {
			s.MemoryHotplug.BlockSizeMiB = 256
		}},
		{"memoryHotplug.blockSizeMib", "power of two, 2 or more", func(s *vmspec.Spec) { s.MemoryHotplug.BlockSizeMiB = 1 }},
		{"memoryHotplug.blockSizeMib", "power of two, 2 or more", func(s *vmspec.Spec) { s.MemoryHotplug.BlockSizeMiB = 6 }},
		{"memoryHotplug.blockSizeMib", "power of two, 2 or more", func(s *vmspec.Spec) {
			s.MemoryHotplug.BlockSizeMiB = math.MinInt
		}},
	}
}

func storageRules() []breakage {
	return []breakage{
		{"drives[0].driveId", "is required", func(s *vmspec.Spec) { s.Drives[0].DriveID = "" }},
		{"drives[0].driveId", "letters, digits or underscores", func(s *vmspec.Spec) { s.Drives[0].DriveID = "a-b" }},
		{"drives[0].driveId", "letters, digits or underscores", func(s *vmspec.Spec) {
			s.Drives[0].DriveID = strings.Repeat("a", 65)
		}},
		{"drives[1].driveId", "is the same as drives[0].driveId", func(s *vmspec.Spec) { s.Drives[1].DriveID = "rootfs" }},
		{"drives[1].pathOnHost", "is required", func(s *vmspec.Spec) { s.Drives[1].PathOnHost = "" }},
		{"drives[1].pathOnHost", "NUL", func(s *vmspec.Spec) { s.Drives[1].PathOnHost = "a\x00b" }},
		{"drives[1].isRootDevice", "drives[0].isRootDevice is one", func(s *vmspec.Spec) { s.Drives[1].IsRootDevice = true }},
		{"drives[1].partuuid", "only for the root device", func(s *vmspec.Spec) { s.Drives[1].PartUUID = "a-1" }},
		{"drives[0].partuuid", "without spaces", func(s *vmspec.Spec) { s.Drives[0].PartUUID = "a init=/x" }},
		{"drives[0].cacheType", "one of Unsafe, Writeback", func(s *vmspec.Spec) { s.Drives[0].CacheType = "unsafe" }},
		{"drives[0].discard", "is only for a writable drive", func(s *vmspec.Spec) {
			s.Drives[0].Discard, s.Drives[0].IsReadOnly = new(true), true
		}},
		{"drives[0].discard", "is only for a writable drive", func(s *vmspec.Spec) {
			s.Drives[0].Discard, s.Drives[0].IOEngine = new(true), "Async"
		}},
		{"drives[0].ioEngine", "one of Sync, Async", func(s *vmspec.Spec) { s.Drives[0].IOEngine = "io_uring" }},
		{"drives[0].rateLimiter.bandwidth.size", "not be 0 on its own", func(s *vmspec.Spec) {
			s.Drives[0].RateLimiter.Bandwidth.Size = 0
		}},
		{"drives[0].rateLimiter.ops.refillTime", "not be 0 on its own", func(s *vmspec.Spec) {
			s.Drives[0].RateLimiter.Ops.RefillTime = 0
		}},
		{"drives[0].rateLimiter.ops.refillTime", "at most 18446744073709 milliseconds", func(s *vmspec.Spec) {
			s.Drives[0].RateLimiter.Ops.RefillTime = 18446744073710
		}},
		{"pmem[0].id", "is required", func(s *vmspec.Spec) { s.Pmem[0].ID = "" }},
		{"pmem[0].id", "letters, digits or underscores", func(s *vmspec.Spec) { s.Pmem[0].ID = "a.b" }},
		{"pmem[1].id", "is the same as pmem[0].id", func(s *vmspec.Spec) { s.Pmem[1].ID = "pmem0" }},
		{"pmem[0].id", "is the same as drives[1].driveId", func(s *vmspec.Spec) { s.Pmem[0].ID = "data_2" }},
		{"pmem[0].pathOnHost", "is required", func(s *vmspec.Spec) { s.Pmem[0].PathOnHost = "" }},
		{"pmem[1].isRootDevice", "drives[0].isRootDevice is one", func(s *vmspec.Spec) { s.Pmem[1].IsRootDevice = true }},
		{"pmem[0].rateLimiter.ops.size", "not be 0 on its own", func(s *vmspec.Spec) {
			s.Pmem[0].RateLimiter = &vmspec.RateLimiter{Ops: &vmspec.TokenBucket{RefillTime: 1}}
		}},
	}
}

func networkRules() []breakage {
	ports := func(all ...vmspec.Port) func(*vmspec.Spec) {
		return func(s *vmspec.Spec) { s.NetworkInterfaces[1].HostDevName, s.Ports = "", all }
	}
	ip := func(all ...string) func(*vmspec.Spec) {
		return func(s *vmspec.Spec) {
			for i, text := range all {
				if a, err := netip.ParseAddr(text); err == nil {
					s.NetworkInterfaces = append(s.NetworkInterfaces,
						vmspec.NetworkInterface{IfaceID: fmt.Sprint("net", i), Network: "lan", IP: a})
				}
			}
		}
	}
	dns := func(all ...string) func(*vmspec.Spec) {
		return func(s *vmspec.Spec) {
			s.NetworkInterfaces[1].HostDevName = ""
			for _, text := range all {
				s.DNS = append(s.DNS, netip.MustParseAddr(text))
			}
		}
	}
	extra := func(all ...vmspec.ExtraHost) func(*vmspec.Spec) {
		return func(s *vmspec.Spec) {
			s.NetworkInterfaces[1].HostDevName = ""
			s.ExtraHosts = all
		}
	}
	iface := func(edit func(*vmspec.NetworkInterface)) func(*vmspec.Spec) {
		return func(s *vmspec.Spec) { edit(&s.NetworkInterfaces[1]) }
	}
	mac := func(value string) func(*vmspec.Spec) {
		return iface(func(n *vmspec.NetworkInterface) { n.GuestMAC = value })
	}
	tap := func(value string) func(*vmspec.Spec) {
		return iface(func(n *vmspec.NetworkInterface) { n.HostDevName = value })
	}
	return []breakage{
		{"networkInterfaces[1].ifaceId", "is required", iface(func(n *vmspec.NetworkInterface) { n.IfaceID = "" })},
		{"networkInterfaces[1].ifaceId", "letters, digits or underscores", iface(func(n *vmspec.NetworkInterface) {
			n.IfaceID = "eth-1"
		})},
		{
			"networkInterfaces[1].ifaceId", "is the same as networkInterfaces[0].ifaceId",
			iface(func(n *vmspec.NetworkInterface) {
				n.IfaceID = "eth0"
			}),
		},
		{"networkInterfaces[1].namespace", "must not be there beside", iface(func(n *vmspec.NetworkInterface) {
			n.Namespace = true
		})},
		{"networkInterfaces[1].network", "must not be there beside hostDevName", iface(func(n *vmspec.NetworkInterface) {
			n.HostDevName, n.Network = "tap7", "lan"
		})},
		{"ports", "without an interface on one of our networks", func(s *vmspec.Spec) {
			s.Ports = []vmspec.Port{{HostPort: 1, GuestPort: 1}}
		}},
		{"ports[0].guestPort", "from 1 to 65535", ports(vmspec.Port{HostPort: 1})},
		{"ports[0].protocol", "tcp", ports(vmspec.Port{HostPort: 1, GuestPort: 1, Protocol: "sctp"})},
		{
			"ports[1].hostPort", "is the same as ports[0].hostPort",
			ports(vmspec.Port{HostPort: 1, GuestPort: 1}, vmspec.Port{HostPort: 1, GuestPort: 2, Protocol: "tcp"}),
		},
		{
			"ports[1].hostPort", "is the same as ports[0].hostPort",
			ports(vmspec.Port{HostPort: 1, GuestPort: 1},
				vmspec.Port{HostIP: netip.IPv4Unspecified(), HostPort: 1, GuestPort: 2}),
		},
		{
			"ports[1].hostPort", "is the same as ports[0].hostPort",
			ports(vmspec.Port{HostIP: netip.IPv6Unspecified(), HostPort: 1, GuestPort: 1},
				vmspec.Port{HostPort: 1, GuestPort: 2}),
		},
		{
			"ports[1].hostPort", "is the same as ports[0].hostPort",
			ports(vmspec.Port{HostPort: 1, GuestPort: 1}, vmspec.Port{HostIP: netip.IPv6Loopback(), HostPort: 1, GuestPort: 2}),
		},
		{
			"ports[1].hostPort", "is the same as ports[0].hostPort",
			ports(vmspec.Port{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 1, GuestPort: 1},
				vmspec.Port{HostIP: netip.IPv4Unspecified(), HostPort: 1, GuestPort: 2}),
		},
		{"publishAll", "only for a VM with an image", func(s *vmspec.Spec) {
			s.NetworkInterfaces[1].HostDevName, s.PublishAll = "", true
		}},
		{"networkInterfaces[2].ip", "must be an IPv4 address", ip("fd00::5", "")},
		{"networkInterfaces[1].ip", "beside hostDevName", iface(func(n *vmspec.NetworkInterface) {
			n.IP = netip.MustParseAddr("10.0.0.5")
		})},
		{"networkInterfaces[3].ip", "is the same as networkInterfaces[2].ip", ip("10.0.0.5", "10.0.0.5")},
		{"dns", "at most 3", dns("1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4")},
		{"dns[1]", "address of a server", dns("1.1.1.1", "fe80::1%eth0")},
		{"dns", "without an interface on one of our networks", func(s *vmspec.Spec) {
			s.DNS = []netip.Addr{netip.MustParseAddr("1.1.1.1")}
		}},
		{"dnsSearch", "without an image", func(s *vmspec.Spec) { s.DNSSearch = []string{"example.com"} }},
		{"extraHosts", "without an image", extra(vmspec.ExtraHost{Name: "db", IP: netip.IPv6Loopback()})},
		{
			"ports[0].hostIp", "without a zone",
			ports(vmspec.Port{HostIP: netip.MustParseAddr("::ffff:127.0.0.1"), HostPort: 1, GuestPort: 1}),
		},
		{"networkInterfaces[1].hostDevName", "Linux interface name", tap("sixteen_bytes_ab")},
		{"networkInterfaces[1].hostDevName", "Linux interface name", tap("a/b")},
		{"networkInterfaces[1].hostDevName", "Linux interface name", tap("a:1")},
		{"networkInterfaces[1].hostDevName", "Linux interface name", tap("tap%d")},
		{"networkInterfaces[1].hostDevName", "Linux interface name", tap("a b")},
		{"networkInterfaces[1].hostDevName", "Linux interface name", tap("..")},
		{"networkInterfaces[1].hostDevName", "is the same as networkInterfaces[0].hostDevName", tap("tap0")},
		{"networkInterfaces[1].guestMac", "six groups", mac("06-00-AC-10-00-03")},
		{"networkInterfaces[1].guestMac", "six groups", mac("6:0:AC:10:0:3")},
		{"networkInterfaces[1].guestMac", "six groups", mac("06:00:AC:10:00:0g")},
		{"networkInterfaces[1].guestMac", "six groups", mac("06:00:AC:10:00:03:04:05")},
		{"networkInterfaces[1].guestMac", "unicast", mac("01:00:5e:00:00:01")},
		{"networkInterfaces[1].guestMac", "not zero", mac("00:00:00:00:00:00")},
		{"networkInterfaces[1].guestMac", "is the same as networkInterfaces[0].guestMac", mac("06:00:ac:10:00:02")},
		{"networkInterfaces[1].mtu", "from 68 to 65535", iface(func(n *vmspec.NetworkInterface) { n.MTU = 67 })},
		{"networkInterfaces[1].mtu", "from 68 to 65535", iface(func(n *vmspec.NetworkInterface) { n.MTU = 65536 })},
		{"networkInterfaces[1].mtu", "from 68 to 65535", iface(func(n *vmspec.NetworkInterface) { n.MTU = -1 })},
		{"networkInterfaces[1].rxRateLimiter.bandwidth.size", "not be 0", iface(func(n *vmspec.NetworkInterface) {
			n.RxRateLimiter = &vmspec.RateLimiter{Bandwidth: &vmspec.TokenBucket{RefillTime: 1}}
		})},
		{"networkInterfaces[1].txRateLimiter.ops.refillTime", "not be 0", iface(func(n *vmspec.NetworkInterface) {
			n.TxRateLimiter = &vmspec.RateLimiter{Ops: &vmspec.TokenBucket{Size: 1}}
		})},
		{"mmds.version", "one of V1, V2", func(s *vmspec.Spec) { s.MMDS.Version = "v2" }},
		{"mmds.networkInterfaces", "at least one", func(s *vmspec.Spec) { s.MMDS.NetworkInterfaces = nil }},
		{"mmds.networkInterfaces[1]", "ifaceId of one of networkInterfaces", func(s *vmspec.Spec) {
			s.MMDS.NetworkInterfaces = []string{"eth0", "eth9"}
		}},
		{"mmds.ipv4Address", "from 169.254.1.0 to 169.254.254.255", func(s *vmspec.Spec) {
			s.MMDS.IPv4Address = "169.254.0.255"
		}},
		{"mmds.ipv4Address", "from 169.254.1.0 to 169.254.254.255", func(s *vmspec.Spec) {
			s.MMDS.IPv4Address = "169.254.255.0"
		}},
		{"mmds.ipv4Address", "from 169.254.1.0 to 169.254.254.255", func(s *vmspec.Spec) {
			s.MMDS.IPv4Address = "::ffff:169.254.169.254"
		}},
		{"mmds.ipv4Address", "from 169.254.1.0 to 169.254.254.255", func(s *vmspec.Spec) { s.MMDS.IPv4Address = "metadata" }},
	}
}

func otherRules() []breakage {
	return []breakage{
		{"vsock.guestCid", "from 3 to 4294967294", func(s *vmspec.Spec) { s.Vsock.GuestCID = 2 }},
		{"vsock.guestCid", "from 3 to 4294967294", func(s *vmspec.Spec) { s.Vsock.GuestCID = math.MaxUint32 }},
		{"vsock.udsPath", "at most 107 bytes", func(s *vmspec.Spec) { s.Vsock.UDSPath = strings.Repeat("a", 108) }},
		{"logger.level", "one of Off, Error, Warn, Warning, Info, Debug, Trace", func(s *vmspec.Spec) {
			s.Logger.Level = "verbose"
		}},
		{"logger.logPath", "NUL", func(s *vmspec.Spec) { s.Logger.LogPath = "\x00" }},
		{"metrics.metricsPath", "is required", func(s *vmspec.Spec) { s.Metrics.MetricsPath = "" }},
		{"metrics.properties", "at most 8192 bytes", func(s *vmspec.Spec) {
			s.Metrics.Properties = map[string]string{"a": strings.Repeat("b", 8192)}
		}},
		{"entropy.rateLimiter.bandwidth.size", "not be 0", func(s *vmspec.Spec) {
			s.Entropy.RateLimiter = &vmspec.RateLimiter{Bandwidth: &vmspec.TokenBucket{RefillTime: 1}}
		}},
		{"serial.rateLimiter", "is required", func(s *vmspec.Spec) { s.Serial.RateLimiter = nil }},
		{"serial.rateLimiter.refillTime", "not be 0", func(s *vmspec.Spec) { s.Serial.RateLimiter.RefillTime = 0 }},
	}
}

// TestSpec_Validate_Accepts covers the edges of the rules from inside.
func TestSpec_Validate_Accepts(t *testing.T) {
	edits := map[string]func(*vmspec.Spec){
		"as it is":        func(*vmspec.Spec) {},
		"no id":           func(s *vmspec.Spec) { s.ID = "" },
		"longest id":      func(s *vmspec.Spec) { s.ID = strings.Repeat("a", 64) },
		"name":            func(s *vmspec.Spec) { s.Name = "0.a_b-C" },
		"longest label":   func(s *vmspec.Spec) { s.Labels[strings.Repeat("k", 128)] = strings.Repeat("v", 1024) },
		"no boot args":    func(s *vmspec.Spec) { s.BootSource.BootArgs = "" },
		"most boot args":  func(s *vmspec.Spec) { s.BootSource.BootArgs = strings.Repeat("~ ", 1023) + "x" },
		"most vcpus":      func(s *vmspec.Spec) { s.MachineConfig.VCPUCount = 32 },
		"one vcpu, smt":   func(s *vmspec.Spec) { s.MachineConfig.VCPUCount = 1 },
		"odd memory":      func(s *vmspec.Spec) { s.MachineConfig.MemSizeMiB, s.MachineConfig.HugePages = 255, "None" },
		"transparent":     func(s *vmspec.Spec) { s.MachineConfig.HugePages = "Transparent" },
		"whole balloon":   func(s *vmspec.Spec) { s.Balloon.AmountMiB = 256 },
		"template None":   func(s *vmspec.Spec) { s.MachineConfig.CPUTemplate = "None" },
		"unlimited":       func(s *vmspec.Spec) { *s.Drives[0].RateLimiter.Ops = vmspec.TokenBucket{} },
		"empty limiter":   func(s *vmspec.Spec) { s.Drives[0].RateLimiter = &vmspec.RateLimiter{} },
		"longest refill":  func(s *vmspec.Spec) { s.Drives[0].RateLimiter.Ops.RefillTime = 18446744073709 },
		"root on pmem":    func(s *vmspec.Spec) { s.Drives, s.Pmem[1].IsRootDevice = nil, true },
		"id in two kinds": func(s *vmspec.Spec) { s.Drives[1].DriveID = "eth0" },
		"longest tap":     func(s *vmspec.Spec) { s.NetworkInterfaces[0].HostDevName = "fifteen-bytes.x" },
		"free ports": func(s *vmspec.Spec) {
			s.NetworkInterfaces = append(s.NetworkInterfaces, vmspec.NetworkInterface{IfaceID: "net0"})
			s.Ports = []vmspec.Port{{GuestPort: 80}, {GuestPort: 80}, {HostIP: netip.IPv6Loopback(), GuestPort: 80}}
		},
		"one port, other addresses": func(s *vmspec.Spec) {
			s.NetworkInterfaces = append(s.NetworkInterfaces, vmspec.NetworkInterface{IfaceID: "net0"})
			s.Ports = []vmspec.Port{
				{HostIP: netip.IPv4Unspecified(), HostPort: 80, GuestPort: 80},
				{HostIP: netip.IPv6Unspecified(), HostPort: 80, GuestPort: 80},
				{HostPort: 80, GuestPort: 80, Protocol: "udp"},
			}
		},
		"one address, other networks": func(s *vmspec.Spec) {
			for _, name := range []string{"a", "b"} {
				s.NetworkInterfaces = append(s.NetworkInterfaces,
					vmspec.NetworkInterface{IfaceID: name, Network: name, IP: netip.MustParseAddr("10.0.0.5")})
			}
		},
		"least mtu":      func(s *vmspec.Spec) { s.NetworkInterfaces[0].MTU = 68 },
		"most mtu":       func(s *vmspec.Spec) { s.NetworkInterfaces[0].MTU = 65535 },
		"lowest mmds":    func(s *vmspec.Spec) { s.MMDS.Version, s.MMDS.IPv4Address = "", "169.254.1.0" },
		"highest mmds":   func(s *vmspec.Spec) { s.MMDS.Version, s.MMDS.IPv4Address = "V1", "169.254.254.255" },
		"log level":      func(s *vmspec.Spec) { s.Logger = &vmspec.Logger{Level: "wARNING"} },
		"empty logger":   func(s *vmspec.Spec) { s.Logger = &vmspec.Logger{} },
		"longest socket": func(s *vmspec.Spec) { s.Vsock.UDSPath = strings.Repeat("a", 107) },
		"big slots": func(s *vmspec.Spec) {
			s.MemoryHotplug = &vmspec.MemoryHotplug{TotalSizeMiB: 1024, SlotSizeMiB: 512, BlockSizeMiB: 512}
		},
	}
	for name, edit := range edits {
		t.Run(name, func(t *testing.T) {
			spec := validSpec(t)
			edit(&spec)
			if err := spec.Validate(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSpec_Validate_AllAtOnceInOrder(t *testing.T) {
	spec := vmspec.Spec{
		ID: "a_b", Labels: map[string]string{}, Drives: []vmspec.Drive{{}}, NetworkInterfaces: []vmspec.NetworkInterface{{}},
		Vsock: &vmspec.Vsock{}, MMDS: &vmspec.MMDS{}, Metrics: &vmspec.Metrics{}, Serial: &vmspec.Serial{},
		Pmem:          []vmspec.Pmem{{}},
		MemoryHotplug: &vmspec.MemoryHotplug{}, Balloon: &vmspec.Balloon{AmountMiB: 1},
	}
	want := []string{
		"id", "bootSource.kernelImagePath", "machineConfig.vcpuCount", "machineConfig.memSizeMib",
		"drives[0].driveId", "drives[0].pathOnHost", "pmem[0].id", "pmem[0].pathOnHost",
		"networkInterfaces[0].ifaceId", "mmds.networkInterfaces",
		"vsock.guestCid", "metrics.metricsPath", "serial.rateLimiter", "memoryHotplug.totalSizeMib",
	}
	var got []string
	for _, e := range fieldErrors(t, spec.Validate()) {
		got = append(got, e.Path)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestSpec_Validate_BoundsItsReport(t *testing.T) {
	spec := validSpec(t)
	spec.ID = strings.Repeat("é", 1<<20)
	spec.Drives = make([]vmspec.Drive, 10000)
	all := fieldErrors(t, spec.Validate())
	if got, want := len(all), 100; got != want {
		t.Fatalf("got %d problems, want %d", got, want)
	}
	if got, want := all[0].Value, strings.Repeat("é", 64)+"…"; got != want {
		t.Errorf("got value %q, want %q", got, want)
	}
	if diff := cmp.Diff(vmspec.FieldError{Path: "$", Reason: "has more problems than are listed here"},
		all[99]); diff != "" {
		t.Error(diff)
	}
}
