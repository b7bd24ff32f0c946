package firecracker

import (
	"context"
	"net/http"
)

// Balloon is the VM's one balloon device.
type Balloon struct {
	AmountMiB    uint32 `json:"amount_mib"` // to take from the guest; not above the VM's memory
	DeflateOnOOM bool   `json:"deflate_on_oom"`
	// seconds; 0 switches statistics off for good
	StatsIntervalS uint16 `json:"stats_polling_interval_s,omitempty"`
	// developer preview; Firecracker >= 1.14
	FreePageHinting   bool `json:"free_page_hinting,omitempty" since:"1.14.0"`
	FreePageReporting bool `json:"free_page_reporting,omitempty" since:"1.14.0"` // Firecracker >= 1.14
}

// GetBalloon returns the balloon's configuration. Without a balloon it is an [*APIError].
func (c *Client) GetBalloon(ctx context.Context) (Balloon, error) {
	var b Balloon
	err := c.get(ctx, "/balloon", &b)
	return b, err
}

// PutBalloon creates or replaces the balloon before boot.
func (c *Client) PutBalloon(ctx context.Context, b Balloon) error {
	return c.send(ctx, http.MethodPut, "/balloon", b)
}

type balloonUpdate struct {
	AmountMiB uint32 `json:"amount_mib"`
}

// PatchBalloon sets the balloon's target in a started VM, in MiB. It is refused until the guest's
// driver is active.
func (c *Client) PatchBalloon(ctx context.Context, amountMiB uint32) error {
	return c.send(ctx, http.MethodPatch, "/balloon", balloonUpdate{AmountMiB: amountMiB})
}

// BalloonStats is what the balloon says, and what the guest says of its memory: nil where it does
// not. Pages are of 4 KiB.
type BalloonStats struct {
	TargetPages uint64 `json:"target_pages"`
	ActualPages uint64 `json:"actual_pages"`
	TargetMiB   uint64 `json:"target_mib"`
	ActualMiB   uint64 `json:"actual_mib"`

	SwapIn             *uint64 `json:"swap_in,omitempty"`  // bytes
	SwapOut            *uint64 `json:"swap_out,omitempty"` // bytes
	MajorFaults        *uint64 `json:"major_faults,omitempty"`
	MinorFaults        *uint64 `json:"minor_faults,omitempty"`
	FreeMemory         *uint64 `json:"free_memory,omitempty"`      // bytes
	TotalMemory        *uint64 `json:"total_memory,omitempty"`     // bytes
	AvailableMemory    *uint64 `json:"available_memory,omitempty"` // bytes
	DiskCaches         *uint64 `json:"disk_caches,omitempty"`      // bytes
	HugetlbAllocations *uint64 `json:"hugetlb_allocations,omitempty"`
	HugetlbFailures    *uint64 `json:"hugetlb_failures,omitempty"`

	// Firecracker >= 1.14 with a guest of Linux >= 6.12.
	OOMKill       *uint64 `json:"oom_kill,omitempty"`
	AllocStall    *uint64 `json:"alloc_stall,omitempty"`
	AsyncScan     *uint64 `json:"async_scan,omitempty"`
	DirectScan    *uint64 `json:"direct_scan,omitempty"`
	AsyncReclaim  *uint64 `json:"async_reclaim,omitempty"`
	DirectReclaim *uint64 `json:"direct_reclaim,omitempty"`
}

// GetBalloonStats returns the statistics of a started VM. They must have been switched on before
// boot.
func (c *Client) GetBalloonStats(ctx context.Context) (BalloonStats, error) {
	var s BalloonStats
	err := c.get(ctx, "/balloon/statistics", &s)
	return s, err
}

type balloonStatsUpdate struct {
	StatsIntervalS uint16 `json:"stats_polling_interval_s"`
}

// PatchBalloonStats changes the interval of statistics in a started VM, in seconds. It can switch
// them neither on nor off.
func (c *Client) PatchBalloonStats(ctx context.Context, intervalS uint16) error {
	return c.send(ctx, http.MethodPatch, "/balloon/statistics", balloonStatsUpdate{StatsIntervalS: intervalS})
}

type hintingStart struct {
	AcknowledgeOnStop bool `json:"acknowledge_on_stop"`
}

// StartBalloonHinting begins a run of free page hinting in a started VM, developer preview.
// AcknowledgeOnStop, which the VMM defaults to true, ends the run as soon as the guest has hinted
// everything. Firecracker >= 1.14.
func (c *Client) StartBalloonHinting(ctx context.Context, acknowledgeOnStop bool) error {
	return c.send(ctx, http.MethodPatch, "/balloon/hinting/start", hintingStart{AcknowledgeOnStop: acknowledgeOnStop})
}

// BalloonHinting is the state of free page hinting: the last command of each side. Firecracker >=
// 1.14.
type BalloonHinting struct {
	HostCommand  uint64  `json:"host_cmd"`
	GuestCommand *uint64 `json:"guest_cmd,omitempty"` // nil until the guest gave one
}

// GetBalloonHinting returns the state of free page hinting in a started VM. Firecracker >= 1.14.
func (c *Client) GetBalloonHinting(ctx context.Context) (BalloonHinting, error) {
	var h BalloonHinting
	err := c.get(ctx, "/balloon/hinting/status", &h)
	return h, err
}

// StopBalloonHinting ends a run of free page hinting. Firecracker >= 1.14.
func (c *Client) StopBalloonHinting(ctx context.Context) error {
	return c.send(ctx, http.MethodPatch, "/balloon/hinting/stop", nil)
}

// MemoryHotplugConfig is a virtio-mem device. Firecracker >= 1.14.
type MemoryHotplugConfig struct {
	TotalSizeMiB uint64 `json:"total_size_mib"`           // at least one slot, in whole slots
	SlotSizeMiB  uint64 `json:"slot_size_mib,omitempty"`  // at least 128, the default; whole blocks
	BlockSizeMiB uint64 `json:"block_size_mib,omitempty"` // a power of two, at least 2, the default
}

// PutMemoryHotplug creates the device before boot, with nothing plugged. Firecracker >= 1.14.
func (c *Client) PutMemoryHotplug(ctx context.Context, m MemoryHotplugConfig) error {
	return c.send(ctx, http.MethodPut, "/hotplug/memory", m)
}

// MemoryHotplugStatus is the device's configuration and progress. Firecracker >= 1.14.
type MemoryHotplugStatus struct {
	TotalSizeMiB     uint64 `json:"total_size_mib"`
	SlotSizeMiB      uint64 `json:"slot_size_mib"`
	BlockSizeMiB     uint64 `json:"block_size_mib"`
	PluggedSizeMiB   uint64 `json:"plugged_size_mib"`
	RequestedSizeMiB uint64 `json:"requested_size_mib"`
}

// GetMemoryHotplug returns the device's status in a started VM. Firecracker >= 1.14.
func (c *Client) GetMemoryHotplug(ctx context.Context) (MemoryHotplugStatus, error) {
	var s MemoryHotplugStatus
	err := c.get(ctx, "/hotplug/memory", &s)
	return s, err
}

type memoryHotplugUpdate struct {
	RequestedSizeMiB uint64 `json:"requested_size_mib"`
}

// PatchMemoryHotplug asks a started VM's guest to bring its plugged memory to a size in MiB, in
// whole blocks. It returns at once: the work is done when plugged equals requested in the status.
// It is refused until the guest's driver is active. Firecracker >= 1.14.
func (c *Client) PatchMemoryHotplug(ctx context.Context, requestedSizeMiB uint64) error {
	return c.send(ctx, http.MethodPatch, "/hotplug/memory", memoryHotplugUpdate{RequestedSizeMiB: requestedSizeMiB})
}
