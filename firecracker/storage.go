package firecracker

import (
	"context"
	"net/http"
)

// RateLimiter bounds a device. In updates, an absent bucket is left as it is and a zero one is
// removed.
type RateLimiter struct {
	Bandwidth *TokenBucket `json:"bandwidth,omitempty"` // in bytes
	Ops       *TokenBucket `json:"ops,omitempty"`       // in operations
}

// TokenBucket refills at Size per RefillTimeMs and starts full. A zero Size or RefillTimeMs means
// unlimited.
type TokenBucket struct {
	Size         uint64 `json:"size"`                     // bytes or operations
	OneTimeBurst uint64 `json:"one_time_burst,omitempty"` // extra tokens spent first, never refilled
	RefillTimeMs uint64 `json:"refill_time"`
}

// CacheType says whether a drive offers the guest a flush.
type CacheType string

// The cache types.
const (
	CacheUnsafe    CacheType = "Unsafe"    // the default: no flush
	CacheWriteback CacheType = "Writeback" // a flush is an fsync
)

// IOEngine is how the VMM does a drive's input and output.
type IOEngine string

// The engines.
const (
	IOEngineSync  IOEngine = "Sync"  // the default
	IOEngineAsync IOEngine = "Async" // io_uring, developer preview; Linux >= 5.10.51
)

// Drive is a block device: virtio-block with PathOnHost, or vhost-user-blk with Socket, exactly one
// of them.
type Drive struct {
	DriveID      string       `json:"drive_id"`           // letters, digits and _
	IsRootDevice bool         `json:"is_root_device"`     // at most one among drives and pmem
	PartUUID     string       `json:"partuuid,omitempty"` // of the root partition; used for root devices only
	CacheType    CacheType    `json:"cache_type,omitempty"`
	IsReadOnly   bool         `json:"is_read_only,omitempty"` // not with Socket, whose backend decides
	PathOnHost   string       `json:"path_on_host,omitempty"` // raw image or block device, opened at once
	RateLimiter  *RateLimiter `json:"rate_limiter,omitempty"` // not with Socket
	IOEngine     IOEngine     `json:"io_engine,omitempty"`    // not with Socket
	Socket       string       `json:"socket,omitempty"`       // connected to at once; developer preview; no snapshots then
	// Discard offers the guest discard: what it trims becomes holes in the file. Firecracker >= 1.17;
	// only for a writable drive with PathOnHost and IOEngineSync.
	Discard bool `json:"discard,omitempty" since:"1.17.0"`
}

// PutDrive creates or replaces a drive before boot. In a started VM it plugs a new one in, other
// than a root device; that takes Firecracker >= 1.16 with --enable-pci.
func (c *Client) PutDrive(ctx context.Context, d Drive) error {
	return c.sendTo(ctx, http.MethodPut, "/drives", d.DriveID, d)
}

// PartialDrive is what of a drive can change in a started VM.
type PartialDrive struct {
	DriveID     string       `json:"drive_id"`
	PathOnHost  string       `json:"path_on_host,omitempty"`
	RateLimiter *RateLimiter `json:"rate_limiter,omitempty"`
}

// PatchDrive points a started VM's drive at another file (or the same, resized), which the guest
// must not have mounted, or changes its limits. With the id alone it makes a vhost-user drive read
// its configuration again.
func (c *Client) PatchDrive(ctx context.Context, d PartialDrive) error {
	return c.sendTo(ctx, http.MethodPatch, "/drives", d.DriveID, d)
}

// DeleteDrive unplugs a drive from a started VM with --enable-pci. Firecracker >= 1.16,
// unpublished.
func (c *Client) DeleteDrive(ctx context.Context, id string) error {
	return c.sendTo(ctx, http.MethodDelete, "/drives", id, nil)
}

// Pmem is a virtio-pmem device. Firecracker >= 1.14.
type Pmem struct {
	ID         string `json:"id"`           // letters, digits and _
	PathOnHost string `json:"path_on_host"` // not empty; padded to 2 MiB with memory that is not kept
	RootDevice bool   `json:"root_device,omitempty"`
	ReadOnly   bool   `json:"read_only,omitempty"` // a write kills the VM on aarch64
	// Firecracker >= 1.16; of flushes, each of the whole file
	RateLimiter *RateLimiter `json:"rate_limiter,omitempty" since:"1.16.0"`
}

// PutPmem creates or replaces a device before boot, Firecracker >= 1.14; in a started VM with
// --enable-pci it plugs a new one in, Firecracker >= 1.16.
func (c *Client) PutPmem(ctx context.Context, p Pmem) error {
	return c.sendTo(ctx, http.MethodPut, "/pmem", p.ID, p)
}

// PartialPmem is what of a pmem device can change in a started VM. Firecracker >= 1.16.
type PartialPmem struct {
	ID          string       `json:"id"`
	RateLimiter *RateLimiter `json:"rate_limiter,omitempty"`
}

// PatchPmem changes a device's limits in a started VM. Firecracker >= 1.16.
func (c *Client) PatchPmem(ctx context.Context, p PartialPmem) error {
	return c.sendTo(ctx, http.MethodPatch, "/pmem", p.ID, p)
}

// DeletePmem unplugs a device from a started VM with --enable-pci. Firecracker >= 1.16,
// unpublished.
func (c *Client) DeletePmem(ctx context.Context, id string) error {
	return c.sendTo(ctx, http.MethodDelete, "/pmem", id, nil)
}
