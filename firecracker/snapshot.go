package firecracker

import (
	"context"
	"net/http"
)

// SnapshotType says which memory a snapshot holds.
type SnapshotType string

// The types of snapshot.
const (
	SnapshotFull SnapshotType = "Full" // the default
	SnapshotDiff SnapshotType = "Diff" // pages dirtied since the last; developer preview
)

// SnapshotCreateParams says where a snapshot goes.
type SnapshotCreateParams struct {
	SnapshotPath string       `json:"snapshot_path"` // state of VMM and devices; overwritten
	MemFilePath  string       `json:"mem_file_path"` // guest memory; a diff is merged into a file of the same size
	SnapshotType SnapshotType `json:"snapshot_type,omitempty"`
	// SyncSnapshotFiles is whether the VMM syncs both files before it answers. Absent, it does.
	// Firecracker >= 1.17.
	SyncSnapshotFiles *bool `json:"sync_snapshot_files,omitempty" since:"1.17.0"`
}

// CreateSnapshot writes a snapshot of a paused VM. Disk contents and metadata are not in it.
func (c *Client) CreateSnapshot(ctx context.Context, p SnapshotCreateParams) error {
	return c.send(ctx, http.MethodPut, "/snapshot/create", p)
}

// MemBackendType is who serves a restored VM's page faults.
type MemBackendType string

// The backends.
const (
	MemBackendFile MemBackendType = "File" // the kernel, from a private mapping of the memory file
	MemBackendUffd MemBackendType = "Uffd" // a process listening on a unix socket
)

// MemBackend is where a restored VM's memory comes from.
type MemBackend struct {
	BackendType MemBackendType `json:"backend_type"`
	BackendPath string         `json:"backend_path"` // the memory file, or the handler's socket
}

// NetworkOverride puts a restored interface on another TAP.
type NetworkOverride struct {
	IfaceID     string `json:"iface_id"`
	HostDevName string `json:"host_dev_name"`
}

// VsockOverride puts a restored vsock device on another socket.
type VsockOverride struct {
	UDSPath string `json:"uds_path"`
}

// SnapshotLoadParams says what to restore and how. Exactly one of MemBackend and MemFilePath is
// set.
type SnapshotLoadParams struct {
	SnapshotPath string      `json:"snapshot_path"`
	MemBackend   *MemBackend `json:"mem_backend,omitempty"`
	MemFilePath  string      `json:"mem_file_path,omitempty"` // deprecated
	// Firecracker >= 1.13; not kept in snapshots
	TrackDirtyPages bool `json:"track_dirty_pages,omitempty" since:"1.13.0"`
	// TrackDirtyPages' name before 1.13
	EnableDiffSnapshots bool `json:"enable_diff_snapshots,omitempty"`
	// else the VM is left paused
	ResumeVM bool `json:"resume_vm,omitempty"`
	// Firecracker >= 1.17; HugePages2M only by MemBackendUffd
	HugePages        HugePages         `json:"huge_pages,omitempty" since:"1.17.0"`
	NetworkOverrides []NetworkOverride `json:"network_overrides,omitempty" since:"1.12.0"` // Firecracker >= 1.12
	VsockOverride    *VsockOverride    `json:"vsock_override,omitempty" since:"1.16.0"`    // Firecracker >= 1.16
	// advances kvm-clock; x86_64, Linux >= 5.16; Firecracker >= 1.14.4, not 1.15.0
	ClockRealtime bool `json:"clock_realtime,omitempty" since:"1.14.4,1.15.1"`
}

// LoadSnapshot restores a VM in a process in which nothing but logger, metrics, serial, CPU
// template and metadata was configured. The VMM exits after nearly every failure. The memory file
// must stay as it is for the VM's whole life.
func (c *Client) LoadSnapshot(ctx context.Context, p SnapshotLoadParams) error {
	return c.send(ctx, http.MethodPut, "/snapshot/load", p)
}
