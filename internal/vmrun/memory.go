package vmrun

import (
	"os"
	"path/filepath"
	"time"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/uffd"
	"push.rocks/smartvm/snapshot"
)

// recordTime is for how long after its start a VM's page faults are recorded, for VMs that start later.
const recordTime = 10 * time.Second

// memoryServer serves a restored VM's page faults.
type memoryServer struct {
	session *uffd.Session
	timer   *time.Timer // when they are recorded, by record; nil: they have been before
	record  func()
}

// serveMemory serves a restored VM's page faults, if that is how it gets its memory. Otherwise it returns nil.
func (v *VM) serveMemory() (*memoryServer, error) {
	from := v.Record().Restored
	if from == nil || from.Load.MemorySocket == "" {
		return nil, nil
	}
	id := v.Record().ID
	o := uffd.Options{
		Socket: filepath.Join(v.Root(), from.Load.MemorySocket), Memory: filepath.Join(from.Dir, snapshot.MemoryFile), UID: os.Geteuid(), GID: os.Getegid(),
		Failed: func(err error) { v.env.Log.Error("serve memory", "vm", id, "err", err) },
	}
	if v.Record().Jailer != "" {
		o.UID, o.GID = v.Record().UID, v.Record().UID
	}
	set := filepath.Join(from.Dir, store.TouchedFile)
	var err error
	if o.Prefetch, err = uffd.ReadSet(set); err != nil { // that costs page faults, no more
		v.env.Log.Debug("no pages to fetch before", "vm", id, "err", err)
	}
	session, err := v.env.Memory().Listen(o)
	if err != nil {
		return nil, err
	}
	s := &memoryServer{session: session}
	if o.Prefetch == nil {
		s.record = func() {
			if touched := session.Touched(); touched != nil {
				if err := uffd.WriteSet(set, touched); err != nil {
					v.env.Log.Warn("record pages", "vm", id, "err", err)
				}
			}
		}
		s.timer = time.AfterFunc(recordTime, s.record)
	}
	return s, nil
}

// close ends that, and with it the VMM if it still runs.
func (s *memoryServer) close() error {
	if s == nil {
		return nil
	}
	if s.timer != nil && s.timer.Stop() {
		s.record() // it ended before
	}
	return s.session.Close()
}

// MemoryStats tells what serving its memory took so far. It returns false for a VM whose memory this process does not serve.
func (v *VM) MemoryStats() (stats uffd.Stats, ok bool) {
	r := v.current()
	if r == nil || r.memory == nil {
		return stats, false
	}
	return r.memory.session.Stats(), true
}
