package flowlog

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"push.rocks/smartvm/internal/logfile"
)

// Bounds of a guest's log.
const (
	limit    = 2 << 20 // bytes that are kept
	rate     = 5       // events of a kind a second
	burst    = 300     // events of a kind at once
	maxNames = 1024    // addresses whose names are known
	lostTime = time.Second

	repeatTime = 5 * time.Second // in which what is the same is one event
	maxRepeats = 256             // of them are known at a time
)

// Log keeps the newest of what a guest tried in a file. What is the same as a moment ago is
// counted, and so is what comes too fast, each kind by itself, so that a flood of one hides no
// other.
type Log struct {
	mu      sync.Mutex
	file    *logfile.Writer // nil: closed
	buckets map[kind]*bucket
	names   map[netip.Addr]string
	lost    uint64
	lostOf  string      // the network of the last of these
	tell    *time.Timer // of what was lost
	repeats map[Event]*repeat
	merge   *time.Timer // nil: there are no repeats
	err     error       // the first of writing
}

// kind is what is counted by itself.
type kind struct {
	verdict Verdict
	dns     bool
}

// bucket has so many events left at a time.
type bucket struct {
	left float64
	at   time.Time
}

// repeat is how often an event has come again since it was logged, of which it is the key without a
// time.
type repeat struct {
	since, last time.Time
	count       uint64
}

// Create opens the log at path, which goes on if it is there.
func Create(path string) (*Log, error) {
	w, err := logfile.CreateTimed(path, limit)
	if err != nil {
		return nil, err
	}
	return &Log{file: w, buckets: map[kind]*bucket{}, names: map[netip.Addr]string{}, repeats: map[Event]*repeat{}}, nil
}

// Answered notes that the guest was told a name's addresses.
func (l *Log) Answered(name string, addresses []netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range addresses {
		if _, known := l.names[a]; !known && len(l.names) >= maxNames {
			for one := range l.names {
				delete(l.names, one)
				break
			}
		}
		l.names[a] = name
	}
}

// Refused logs a question for a name that a policy does not allow.
func (l *Log) Refused(network, of, name, kind string) {
	l.Add(Event{
		Time: time.Now().UTC(), Network: network, Reason: Reason{Denied, of, "default deny"}, Protocol: dns,
		Host: name, Type: kind,
	})
}

// Add logs an event, with the name that its destination has for the guest.
func (l *Log) Add(e Event) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.Host == "" {
		e.Host = l.names[e.Destination]
	}
	key := e
	key.Time = time.Time{}
	if r := l.repeats[key]; r != nil {
		r.count++
		r.last = e.Time
		return
	}
	if !l.admit(e, 1) || l.file == nil || len(l.repeats) >= maxRepeats {
		return
	}
	l.repeats[key] = &repeat{since: e.Time}
	if l.merge == nil {
		l.merge = time.AfterFunc(repeatTime, func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.writeRepeats()
		})
	}
}

// writeRepeats logs what has come again, and forgets what has not.
func (l *Log) writeRepeats() {
	if l.file == nil {
		return
	}
	for key, r := range l.repeats {
		if r.count == 0 {
			delete(l.repeats, key)
			continue
		}
		e := key
		e.Time, e.Since, e.Count = r.last, r.since, r.count
		l.admit(e, r.count)
		r.since, r.count = r.last, 0
	}
	l.merge.Reset(repeatTime)
	if len(l.repeats) == 0 {
		l.merge.Stop()
		l.merge = nil
	}
}

// admit logs an event that stands for some, unless there were too many of its kind, and says
// whether it did.
func (l *Log) admit(e Event, count uint64) bool {
	k := kind{e.Verdict, e.Protocol == dns}
	b := l.buckets[k]
	if b == nil {
		b = &bucket{left: burst}
		l.buckets[k] = b
	}
	now := time.Now()
	b.left = min(burst, b.left+rate*max(0, now.Sub(b.at).Seconds()))
	b.at = now
	if b.left < 1 {
		l.lostOf = e.Network
		if l.lost += count; l.tell == nil && l.file != nil {
			l.tell = time.AfterFunc(lostTime, func() {
				l.mu.Lock()
				defer l.mu.Unlock()
				l.writeLost()
			})
		}
		return false
	}
	b.left--
	l.write(e)
	return true
}

func (l *Log) writeLost() {
	l.tell = nil
	if l.lost > 0 {
		l.write(Event{Time: time.Now().UTC(), Network: l.lostOf, Reason: Reason{Verdict: Lost}, Count: l.lost})
		l.lost = 0
	}
}

func (l *Log) write(e Event) {
	if l.file == nil {
		return
	}
	line, err := json.Marshal(e)
	if err == nil {
		_, err = l.file.Write(append(line, '\n'))
	}
	if l.err == nil && err != nil {
		l.err = fmt.Errorf("log what a guest tried: %w", err)
	}
}

// Close ends the log. Returns what went wrong with it first.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	if l.tell != nil {
		l.tell.Stop()
	}
	if l.merge != nil {
		l.writeRepeats()
	}
	if l.merge != nil {
		l.merge.Stop()
	}
	l.writeLost()
	err := errors.Join(l.err, l.file.Close())
	l.file = nil
	return err
}
