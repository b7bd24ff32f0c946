package vmrun

import (
	"os"
	"path/filepath"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/uffd"
	"push.rocks/smartvm/snapshot"
)

// serveMemory serves a restored VM's page faults, if that is how it gets its memory. Otherwise it
// returns nil.
func (v *VM) serveMemory() (*uffd.Recording, error) {
	rec := v.Record()
	from := rec.Restored
	if from == nil || from.Load.MemorySocket == "" {
		return nil, nil
	}
	log := v.env.Log.With("vm", rec.ID)
	o := uffd.Options{
		Socket: filepath.Join(v.Root(), from.Load.MemorySocket), Memory: filepath.Join(from.Dir, snapshot.MemoryFile),
		UID: os.Geteuid(), GID: os.Getegid(),
		Failed: func(err error) { log.Error("serve memory", "err", err) },
	}
	if rec.Jailer != "" {
		o.UID, o.GID = rec.UID, rec.UID
	}
	return v.env.Memory().Record(o, filepath.Join(from.Dir, store.TouchedFile), log)
}

// MemoryStats tells what serving its memory took so far. It returns false for a VM whose memory
// this process does not serve.
func (v *VM) MemoryStats() (stats uffd.Stats, ok bool) {
	r := v.current()
	if r == nil || r.memory == nil {
		return stats, false
	}
	return r.memory.Stats(), true
}
