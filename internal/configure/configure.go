// Package configure turns what a VM shall be into requests to the VMM's API.
package configure

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"path"
	"strings"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
)

// Call is one PUT to the VMM's API.
type Call struct {
	Path string `json:"path"`
	Body any    `json:"body"`
	// Send makes the request. Errors are those of the client.
	Send func(context.Context, *firecracker.Client) error `json:"-"`
}

func put[T any](path string, body T, method func(*firecracker.Client, context.Context, T) error) Call {
	return Call{path, body, func(ctx context.Context, c *firecracker.Client) error { return method(c, ctx, body) }}
}

// Calls translates a Spec into requests to a VMM of version v, in an order in which the VMM takes
// them. Paths are those in the VMM's working directory.
func Calls(s *spec.Spec, v firecracker.Version) []Call {
	m := s.MachineConfig
	boot := firecracker.BootSource{KernelImagePath: store.KernelFile, BootArgs: s.BootSource.BootArgs}
	if boot.BootArgs == "" {
		boot.BootArgs = spec.DefaultBootArgs
	}
	if s.MemoryHotplug != nil && !strings.Contains(" "+boot.BootArgs, " memhp_default_state=") {
		boot.BootArgs += " memhp_default_state=online_movable"
	}
	if s.BootSource.InitrdPath != "" {
		boot.InitrdPath = store.InitrdFile
	}
	list := []Call{
		put("/machine-config", firecracker.MachineConfiguration{
			VCPUCount: m.VCPUCount, MemSizeMiB: m.MemSizeMiB, SMT: m.SMT, TrackDirtyPages: m.TrackDirtyPages,
			HugePages: firecracker.HugePages(m.HugePages), CPUTemplate: firecracker.CPUTemplate(m.CPUTemplate),
		}, (*firecracker.Client).PutMachineConfig),
	}
	if s.CPUConfig != nil {
		var config firecracker.CPUConfig
		_ = json.Unmarshal(s.CPUConfig, &config) // validated
		list = append(list, put("/cpu-config", config, (*firecracker.Client).PutCPUConfig))
	}
	list = append(list, put("/boot-source", boot, (*firecracker.Client).PutBootSource))
	list = append(list, storageCalls(s, v)...)
	list = append(list, networkCalls(s)...)
	return append(list, otherCalls(s)...)
}

func storageCalls(s *spec.Spec, v firecracker.Version) []Call {
	var list []Call
	offered := firecracker.CheckVersion(v, firecracker.Drive{Discard: true}) == nil
	for _, d := range s.Drives {
		send := tryDiscard
		discard := offered && !d.IsReadOnly && d.IOEngine != "Async"
		if d.Discard != nil {
			discard, send = *d.Discard, (*firecracker.Client).PutDrive
		}
		list = append(list, put("/drives/"+d.DriveID, firecracker.Drive{
			DriveID: d.DriveID, PathOnHost: DevicePath(d.DriveID), IsRootDevice: d.IsRootDevice, IsReadOnly: d.IsReadOnly,
			PartUUID: d.PartUUID, CacheType: firecracker.CacheType(d.CacheType), IOEngine: firecracker.IOEngine(d.IOEngine),
			RateLimiter: RateLimiter(d.RateLimiter), Discard: discard,
		}, send))
	}
	for _, d := range s.Pmem {
		list = append(list, put("/pmem/"+d.ID, firecracker.Pmem{
			ID: d.ID, PathOnHost: DevicePath(d.ID), RootDevice: d.IsRootDevice, ReadOnly: d.IsReadOnly,
			RateLimiter: RateLimiter(d.RateLimiter),
		}, (*firecracker.Client).PutPmem))
	}
	return list
}

// tryDiscard does without discard where the VMM does not know it: a build of what is to become
// 1.17, which says that it is that already.
func tryDiscard(c *firecracker.Client, ctx context.Context, d firecracker.Drive) error {
	err := c.PutDrive(ctx, d)
	if fault, ok := errors.AsType[*firecracker.APIError](err); ok && d.Discard &&
		strings.Contains(fault.Fault, "unknown field `discard`") {
		d.Discard = false
		err = c.PutDrive(ctx, d)
	}
	return err
}

// DevicePath is what a drive or pmem file is called in the VMM's working directory.
func DevicePath(id string) string { return path.Join(store.DevicesDir, id) }

func networkCalls(s *spec.Spec) []Call {
	var list []Call
	for _, n := range s.NetworkInterfaces {
		list = append(list, put("/network-interfaces/"+n.IfaceID, firecracker.NetworkInterface{
			IfaceID: n.IfaceID, HostDevName: n.HostDevName, GuestMAC: n.GuestMAC, MTU: n.MTU,
			RxRateLimiter: RateLimiter(n.RxRateLimiter), TxRateLimiter: RateLimiter(n.TxRateLimiter),
		}, (*firecracker.Client).PutNetworkInterface))
	}
	if m := s.MMDS; m != nil {
		addr, _ := netip.ParseAddr(m.IPv4Address) // validated, or absent
		list = append(list, put("/mmds/config", firecracker.MMDSConfig{
			NetworkInterfaces: m.NetworkInterfaces, Version: firecracker.MMDSVersion(cmp.Or(m.Version, "V2")),
			IPv4Address: addr, IMDSCompat: m.IMDSCompat,
		}, (*firecracker.Client).PutMMDSConfig))
	}
	if v := s.Vsock; v != nil {
		list = append(list, put("/vsock", firecracker.Vsock{GuestCID: v.GuestCID, UDSPath: store.VsockFile},
			(*firecracker.Client).PutVsock))
	}
	return list
}

func otherCalls(s *spec.Spec) []Call {
	var list []Call
	if b := s.Balloon; b != nil {
		list = append(list, put("/balloon", firecracker.Balloon{
			AmountMiB: b.AmountMiB, DeflateOnOOM: b.DeflateOnOOM, StatsIntervalS: b.StatsPollingIntervalS,
			FreePageHinting: b.FreePageHinting, FreePageReporting: b.FreePageReporting,
		}, (*firecracker.Client).PutBalloon))
	}
	if e := s.Entropy; e != nil {
		list = append(list, put("/entropy", firecracker.EntropyDevice{RateLimiter: RateLimiter(e.RateLimiter)},
			(*firecracker.Client).PutEntropy))
	}
	if c := s.Serial; c != nil {
		list = append(list, put("/serial", firecracker.SerialDevice{RateLimiter: tokenBucket(c.RateLimiter)},
			(*firecracker.Client).PutSerial))
	}
	if h := s.MemoryHotplug; h != nil {
		list = append(list, put("/hotplug/memory", firecracker.MemoryHotplugConfig{
			TotalSizeMiB: uint64(h.TotalSizeMiB), SlotSizeMiB: uint64(h.SlotSizeMiB), BlockSizeMiB: uint64(h.BlockSizeMiB),
		}, (*firecracker.Client).PutMemoryHotplug))
	}
	if s.Metrics != nil {
		list = append(list, metrics(s.Metrics))
	}
	return list
}

func metrics(m *spec.Metrics) Call {
	return put("/metrics", firecracker.Metrics{MetricsPath: store.MetricsFIFO, EmitID: m.EmitID, Properties: m.Properties},
		(*firecracker.Client).PutMetrics)
}

// RateLimiter is r as the VMM has it, nil for nil.
func RateLimiter(r *spec.RateLimiter) *firecracker.RateLimiter {
	if r == nil {
		return nil
	}
	return &firecracker.RateLimiter{Bandwidth: tokenBucket(r.Bandwidth), Ops: tokenBucket(r.Ops)}
}

func tokenBucket(b *spec.TokenBucket) *firecracker.TokenBucket {
	if b == nil {
		return nil
	}
	return &firecracker.TokenBucket{Size: b.Size, OneTimeBurst: b.OneTimeBurst, RefillTimeMs: b.RefillTime}
}
