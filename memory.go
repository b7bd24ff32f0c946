package smartvm

// Memory says what gives a restored VM its memory when it touches it.
type Memory string

// The ways.
const (
	// MemoryFile has the kernel map the snapshot's file.
	MemoryFile Memory = "file"
	// MemoryUFFD has the process that supervises the VM serve its page faults (userfaultfd), first
	// those that VMs of the snapshot had at their beginning. If that process dies the VM ends. Large
	// pages need it. Firecracker ≥ 1.12, Linux ≥ 6.1.
	MemoryUFFD Memory = "uffd"
)

// MemoryStats tell what serving a VM's memory took. Counts are of pages.
type MemoryStats struct {
	Faults     int64 `json:"faults"`     // times that the VM waited
	Copied     int64 `json:"copied"`     // brought from the file, with those around the page that was touched
	Prefetched int64 `json:"prefetched"` // of those, brought before the VM touched them
	Zeroed     int64 `json:"zeroed"`     // touched again after the VM had given them back
	Removed    int64 `json:"removed"`    // given back
	Retries    int64 `json:"retries"`    // times that the VM had to see that a removal was read
	PageSize   int64 `json:"pageSize"`   // bytes; 0 until the VMM has connected
	Guarded    bool  `json:"guarded"`    // the kernel kills the VM if this process dies
}

// MemoryStats tells what serving its memory took so far. It returns false for a VM whose memory
// this process does not serve.
func (m *Machine) MemoryStats() (MemoryStats, bool) {
	stats, ok := m.vm.MemoryStats()
	return MemoryStats(stats), ok
}
