// Package events is the ring of what happens on a host: every process appends to it, and any may follow it.
package events

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/lock"
	"push.rocks/smartvm/status"
)

// Ring is a directory with the newest events, of the last one or two Limits.
type Ring struct {
	Dir   string // is made if need be
	Limit int64  // bytes of a file
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

// Append gives an event its id and time, and adds it.
func (r *Ring) Append(ctx context.Context, e status.Event) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("append event: %w", err)
		}
	}()
	if err := os.Mkdir(r.Dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	dir, err := os.Open(r.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lockTime)
	defer cancel()
	if err := lock.Wait(ctx, dir, lock.Exclusive, nil); err != nil {
		return err
	}
	f, last, err := r.open()
	if err != nil {
		return err
	}
	e.Time = time.Now().UTC()
	e.ID = max(last+1, e.Time.UnixMicro()) // so they grow beyond a reboot, which takes the ring with it
	line, err := json.Marshal(e)
	if err == nil && len(line) >= maxLine {
		err = fmt.Errorf("%d bytes, at most %d", len(line), maxLine)
	}
	if err == nil {
		_, err = f.Write(append(line, '\n'))
	}
	return errors.Join(err, f.Close())
}

// open opens the current file to be appended to, a new one if it is full, and returns the id of the last event. The caller has the lock.
func (r *Ring) open() (*os.File, int64, error) {
	path := filepath.Join(r.Dir, current)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|unix.O_NOFOLLOW, 0)
	last := int64(0)
	if err == nil {
		var size int64
		if last, size, err = tail(f); err == nil && size < r.Limit {
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
	return f, last, err
}

// tail returns the last event's id of a file, or what its header says, and the file's size. What a full disk has cut off is cut off.
func tail(f *os.File) (last, size int64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	size = fi.Size()
	from := max(0, size-2*maxLine)
	data := make([]byte, size-from)
	if _, err := f.ReadAt(data, from); err != nil && !errors.Is(err, io.EOF) {
		return 0, 0, err
	}
	whole := bytes.LastIndexByte(data, '\n') + 1
	if whole < len(data) {
		size = from + int64(whole)
		if err := f.Truncate(size); err != nil {
			return 0, 0, err
		}
	}
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

// reader reads the events of one file.
type reader struct {
	f     *os.File
	lines *bufio.Reader
	part  []byte // of a line that is still being written
	after int64
}

func openReader(path string) (*reader, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	r := &reader{f: f, lines: bufio.NewReaderSize(f, maxLine)}
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
	line, err := r.lines.ReadBytes('\n')
	r.part = append(r.part, line...)
	switch {
	case errors.Is(err, io.EOF):
		return nil, nil
	case err != nil:
		return nil, err
	}
	line, r.part = r.part, nil
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
