package smartvm

import (
	"os"
	"path/filepath"
	"time"

	"push.rocks/smartvm/internal/snapshot"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/uffd"
)

// Memory is who gives a restored VM its memory when it touches it.
type Memory string

// The ways.
const (
	// MemoryFile has the kernel map the snapshot's file.
	MemoryFile Memory = "file"
	// MemoryUFFD has the process that looks after the VM serve its page faults (userfaultfd), those first that VMs of the snapshot had
	// at their beginning. If that process dies the VM ends. Large pages need it. Firecracker ≥ 1.12, Linux ≥ 6.1.
	MemoryUFFD Memory = "uffd"
)

// touchedTime is for how long after its start a VM's page faults are recorded, for those that follow it.
const touchedTime = 10 * time.Second

// serveMemory serves a restored VM's page faults, if that is how it gets its memory.
func (m *Machine) serveMemory(r *run) (err error) {
	from := m.rec().Restored
	if from == nil || from.Load.MemorySocket == "" {
		return nil
	}
	o := uffd.Options{
		Socket: filepath.Join(m.root(), from.Load.MemorySocket), Memory: filepath.Join(from.Dir, snapshot.MemoryFile), UID: os.Geteuid(), GID: os.Getegid(),
		Failed: func(err error) { m.host.log.Error("serve memory", "vm", m.rec().ID, "err", err) },
	}
	if m.rec().Jailer != "" {
		o.UID, o.GID = m.rec().UID, m.rec().UID
	}
	set := filepath.Join(from.Dir, store.TouchedFile)
	if o.Prefetch, err = uffd.ReadSet(set); err != nil { // that costs page faults, no more
		m.host.log.Debug("no pages to fetch before", "vm", m.rec().ID, "err", err)
	}
	if r.memory, err = m.host.memory().Listen(o); err != nil {
		return err
	}
	if o.Prefetch == nil {
		record := func() {
			if touched := r.memory.Touched(); touched != nil {
				if err := uffd.WriteSet(set, touched); err != nil {
					m.host.log.Warn("record pages", "vm", m.rec().ID, "err", err)
				}
			}
		}
		r.recorded = time.AfterFunc(touchedTime, record)
		r.record = record
	}
	return nil
}

// endMemory ends that, and with it the VMM if it still runs.
func (r *run) endMemory() error {
	if r.memory == nil {
		return nil
	}
	if r.recorded != nil && r.recorded.Stop() {
		r.record() // it ended before
	}
	return r.memory.Close()
}

// MemoryStats tells what serving its memory took so far, nil for a VM whose memory this process does not serve.
func (m *Machine) MemoryStats() *uffd.Stats {
	m.mu.Lock()
	r := m.run
	m.mu.Unlock()
	if r == nil || r.memory == nil {
		return nil
	}
	stats := r.memory.Stats()
	return &stats
}
