package uffd

import (
	"log/slog"
	"time"
)

// recordTime is for how long after its start a VM's page faults are recorded, for VMs that start
// later.
const recordTime = 10 * time.Second

// Recording is a Session whose first page faults are recorded in a file, unless they have been
// before.
type Recording struct {
	*Session
	timer  *time.Timer // runs record; nil if there is nothing to record
	record func()
}

// Record listens for a VM of a snapshot. Set is the file with the pages that VMs of the snapshot
// have touched at their start: they are fetched before the VM touches them. If there is none, it is
// written for VMs that start later.
func (s *Server) Record(o Options, set string, log *slog.Logger) (*Recording, error) {
	var err error
	if o.Prefetch, err = ReadSet(set); err != nil { // that costs page faults, no more
		log.Debug("no pages to fetch before", "err", err)
	}
	session, err := s.Listen(o)
	if err != nil {
		return nil, err
	}
	r := &Recording{Session: session}
	if o.Prefetch == nil {
		r.record = func() {
			if touched := session.Touched(); touched != nil {
				if err := WriteSet(set, touched); err != nil {
					log.Warn("record pages", "err", err)
				}
			}
		}
		r.timer = time.AfterFunc(recordTime, r.record)
	}
	return r, nil
}

// Close ends the session, and with it the VMM if it still runs. Nothing is done if r is nil.
func (r *Recording) Close() error {
	if r == nil {
		return nil
	}
	if r.timer != nil && r.timer.Stop() {
		r.record() // it ended before
	}
	return r.Session.Close()
}
