// Package events is the ring of what happens on a host: every process appends to it, and any may
// follow it.
package events

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/status"
)

// Ring is a directory with the newest events, of the last one or two Limits. Its methods are safe
// for concurrent use.
type Ring struct {
	Dir    string          // is made if need be
	Limit  int64           // bytes of a file
	Failed func(err error) // receives why events could not be added

	mu      sync.Mutex
	pending []status.Event // to be added by write, which runs while writing is not nil
	writing chan struct{}  // closed when it has ended
	left    end            // of the current file as write, which alone uses it, left it
}

// end is where a file ends, and with which event.
type end struct {
	ino        uint64
	size, last int64
}

// Files of a ring. Each begins with a line that says which event is the last before it.
const (
	current = "events"
	older   = "events.1"
)

// header is the first line of a file.
type header struct {
	After int64 `json:"after"` // id of the last event before this file; 0: none was
}

const (
	// maxLine bounds an event in bytes.
	maxLine = 16 << 10
	// lockTime is how long a process waits for others that append, which take microseconds.
	lockTime = time.Second
)

// maxPending bounds what waits to be added. What is over is dropped.
const maxPending = 4096

// Append adds an event, which gets its time and an id, soon: what happens at the same time is added
// at once. Flush waits for it.
func (r *Ring) Append(e status.Event) {
	e.Time = time.Now().UTC()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.pending) < maxPending {
		r.pending = append(r.pending, e)
	}
	if r.writing == nil {
		r.writing = make(chan struct{})
		go r.write(r.writing)
	}
}

// Flush waits until all events are added, or could not be.
func (r *Ring) Flush() {
	r.mu.Lock()
	writing := r.writing
	r.mu.Unlock()
	if writing != nil {
		<-writing
	}
}

// write adds what is pending until nothing is.
func (r *Ring) write(done chan struct{}) {
	defer close(done)
	for {
		r.mu.Lock()
		all := r.pending
		r.pending = nil
		if len(all) == 0 {
			r.writing = nil
			r.mu.Unlock()
			return
		}
		r.mu.Unlock()
		if err := r.add(all); err != nil {
			r.Failed(fmt.Errorf("add %d events: %w", len(all), err))
		}
	}
}

// add gives events their ids and adds them.
func (r *Ring) add(all []status.Event) (err error) {
	if err := os.Mkdir(r.Dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	dir, err := os.Open(r.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	ctx, cancel := context.WithTimeout(context.Background(), lockTime)
	defer cancel()
	if err := lock.Wait(ctx, dir, lock.Exclusive, nil); err != nil {
		return err
	}
	f, last, err := r.open()
	if err != nil {
		return err
	}
	var lines []byte
	var errs []error
	for _, e := range all {
		e.ID = max(last+1, e.Time.UnixMicro()) // so they grow beyond a reboot, which takes the ring with it
		line, err := json.Marshal(e)
		if err == nil && len(line) >= maxLine {
			err = fmt.Errorf("an event of %d bytes, at most %d", len(line), maxLine)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		last, lines = e.ID, append(append(lines, line...), '\n')
	}
	_, err = f.Write(lines)
	r.left.size, r.left.last = r.left.size+int64(len(lines)), last
	if err != nil {
		r.left = end{} // so that an incomplete line is removed
	}
	return errors.Join(append(errs, err, f.Close())...)
}

// open opens the current file to be appended to, a new one if it is full, and returns the id of the
// last event. The caller has the lock.
func (r *Ring) open() (*os.File, int64, error) {
	path := filepath.Join(r.Dir, current)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|unix.O_NOFOLLOW, 0)
	last := int64(0)
	if err == nil {
		err = r.seek(f)
		last = r.left.last
		if err == nil && r.left.size < r.Limit {
			return f, last, nil
		}
		err = errors.Join(err, f.Close())
		if err == nil {
			err = os.Rename(path, filepath.Join(r.Dir, older))
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		return nil, 0, err
	}
	// With its first line it gets its name.
	line, err := json.Marshal(header{last})
	if err == nil {
		err = os.WriteFile(path+".tmp", append(line, '\n'), 0o600)
	}
	if err == nil {
		err = os.Rename(path+".tmp", path)
	}
	if err != nil {
		return nil, 0, err
	}
	f, err = os.OpenFile(path, os.O_RDWR|os.O_APPEND|unix.O_NOFOLLOW, 0)
	if err == nil {
		err = r.seek(f)
	}
	return f, last, err
}

// seek sets where the file ends. It reads what other processes have appended, and removes an
// incomplete line, which a full file system leaves.
func (r *Ring) seek(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if st.Ino == r.left.ino && st.Size == r.left.size {
		return nil
	}
	last, size, err := tail(f, st.Size)
	if err == nil && size < st.Size {
		err = f.Truncate(size)
	}
	if err == nil {
		r.left = end{st.Ino, size, last}
	}
	return err
}

// tail returns the last event's id of a file, or what its header says, and the file's size without
// a line that is not whole.
func tail(f *os.File, size int64) (last, complete int64, err error) {
	from := max(0, size-2*maxLine)
	data := make([]byte, size-from)
	if _, err := f.ReadAt(data, from); err != nil && !errors.Is(err, io.EOF) {
		return 0, 0, err
	}
	whole := bytes.LastIndexByte(data, '\n') + 1
	size = from + int64(whole)
	line := data[:max(0, whole-1)]
	line = line[bytes.LastIndexByte(line, '\n')+1:]
	var e struct {
		ID    int64 `json:"id"`
		After int64 `json:"after"`
	}
	if err := json.Unmarshal(line, &e); err != nil {
		return 0, size, nil //nolint:nilerr // a ring that is damaged begins anew
	}
	return max(e.ID, e.After), size, nil
}

// reader reads the events of one file. A line that is not whole is read once it is, or another is
// in its place.
type reader struct {
	f     *os.File
	off   int64  // of what is not read yet
	data  []byte // is reused
	lines []byte // whole ones that were read
	after int64
}

func openReader(path string) (*reader, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	r := &reader{f: f, data: make([]byte, 4*maxLine)}
	line, err := r.line()
	var h header
	if err == nil && line != nil {
		err = json.Unmarshal(line, &h)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", path, err), f.Close())
	}
	r.after = h.After
	return r, nil
}

// line is nil at the end of what there is yet.
func (r *reader) line() ([]byte, error) {
	if len(r.lines) == 0 {
		n, err := r.f.ReadAt(r.data, r.off)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		whole := bytes.LastIndexByte(r.data[:n], '\n') + 1
		switch {
		case whole == 0 && n == len(r.data):
			return nil, fmt.Errorf("a line of more than %d bytes", n)
		case whole == 0:
			return nil, nil
		}
		r.lines, r.off = r.data[:whole], r.off+int64(whole)
	}
	line, rest, _ := bytes.Cut(r.lines, []byte("\n"))
	r.lines = rest
	return line, nil
}

// next is nil at the end of what there is yet.
func (r *reader) next() (*status.Event, error) {
	line, err := r.line()
	if line == nil || err != nil {
		return nil, err
	}
	e := new(status.Event)
	if err := json.Unmarshal(line, e); err != nil {
		return nil, fmt.Errorf("read %s: %w", r.f.Name(), err)
	}
	return e, nil
}
