package configure

import (
	"encoding/json"
	"maps"
	"path"
	"slices"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/snapshot"
	"push.rocks/smartvm/spec"
)

// Restored is how a VM differs from the one whose snapshot it starts from.
type Restored struct {
	Taps     map[string]string `json:"taps,omitempty"`     // by interface id, where it has another
	Metadata json.RawMessage   `json:"metadata,omitempty"` // for the guest; a snapshot has none
	Paused   bool              `json:"paused,omitempty"`   // it is left so
	// MemorySocket is where somebody serves its page faults; "": its memory is a file.
	MemorySocket string `json:"memorySocket,omitempty"`
	// HugePages is the kind of its memory's pages: None, Transparent or 2M. Empty: as the snapshot's
	// VM had.
	HugePages string `json:"hugePages,omitempty"`
	// Balloon is how many MiB it is to have, where that took more for the snapshot.
	Balloon *uint32 `json:"balloon,omitempty"`
}

// RestoreCalls are the requests in place of those of Calls for a VM that starts from a snapshot.
// All else is in that.
func RestoreCalls(s *spec.Spec, r *Restored, v firecracker.Version) []Call {
	var list []Call
	if c := s.Serial; c != nil {
		list = append(list,
			put("/serial", firecracker.SerialDevice{RateLimiter: tokenBucket(c.RateLimiter)}, (*firecracker.Client).PutSerial))
	}
	if s.Metrics != nil {
		list = append(list, metrics(s.Metrics))
	}
	if r.Metadata != nil { // what is put before survives
		list = append(list, put("/mmds", any(r.Metadata), (*firecracker.Client).PutMMDS))
	}
	load := firecracker.SnapshotLoadParams{
		SnapshotPath: path.Join(store.RestoreDir, snapshot.StateFile), ResumeVM: !r.Paused,
		HugePages: firecracker.HugePages(r.HugePages),
		MemBackend: &firecracker.MemBackend{
			BackendType: firecracker.MemBackendFile,
			BackendPath: path.Join(store.RestoreDir, snapshot.MemoryFile),
		},
	}
	if r.MemorySocket != "" {
		load.MemBackend = &firecracker.MemBackend{BackendType: firecracker.MemBackendUffd, BackendPath: r.MemorySocket}
	}
	for _, id := range slices.Sorted(maps.Keys(r.Taps)) {
		load.NetworkOverrides = append(load.NetworkOverrides,
			firecracker.NetworkOverride{IfaceID: id, HostDevName: r.Taps[id]})
	}
	knows := func(p firecracker.SnapshotLoadParams) bool { return firecracker.CheckVersion(v, p) == nil }
	switch {
	case !s.MachineConfig.TrackDirtyPages:
	case knows(firecracker.SnapshotLoadParams{TrackDirtyPages: true}):
		load.TrackDirtyPages = true
	default:
		load.EnableDiffSnapshots = true
	}
	list = append(list, put("/snapshot/load", load, (*firecracker.Client).LoadSnapshot))
	if r.Balloon != nil { // the guest's driver does so when the guest goes on
		list = append(list, put("/balloon", *r.Balloon, (*firecracker.Client).PatchBalloon))
	}
	return list
}
