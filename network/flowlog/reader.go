package flowlog

import (
	"bytes"
	"io"
	"time"

	"push.rocks/smartvm/internal/logfile"
)

// Reader reads a Log from its oldest event kept, or from a time on, also while it is written.
type Reader struct {
	log   *logfile.Reader
	since time.Time
	rest  []byte
}

// Open returns a reader of the log at path; one that is not there yet is empty. The caller closes
// it.
func Open(path string, since time.Time) (*Reader, error) {
	if since.IsZero() {
		return &Reader{log: logfile.Open(path)}, nil
	}
	log, err := logfile.OpenSince(path, since)
	if err != nil {
		return nil, err
	}
	return &Reader{log: log, since: since}, nil
}

// Next returns the next event, io.EOF at the log's present end. What is no event is left out.
func (r *Reader) Next() (Event, error) {
	buf := make([]byte, maxEvent)
	for {
		if line, rest, ok := bytes.Cut(r.rest, []byte("\n")); ok {
			r.rest = rest
			if e, ok := parse(line); ok && !e.Time.Before(r.since) {
				return e, nil
			}
			continue
		}
		if len(r.rest) > maxEvent { // no line of ours
			r.rest = nil
		}
		n, err := r.log.Read(buf)
		if r.rest = append(r.rest, buf[:n]...); n == 0 && err == nil {
			err = io.EOF
		}
		if n == 0 {
			return Event{}, err
		}
	}
}

// Close closes the log.
func (r *Reader) Close() error { return r.log.Close() }
