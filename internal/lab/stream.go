package lab

import (
	"bytes"
	"sync"
)

// untilMarker cuts a stream at a marker whose first byte is nowhere else in it.
type untilMarker struct {
	marker []byte
	held   []byte // the end of what has come, if the marker may begin there
}

// next takes more of the stream and returns what can be passed on, which stays
// valid until the next call. end says that the marker has come.
func (m *untilMarker) next(data []byte) (out []byte, end bool) {
	all := append(m.held, data...)
	if i := bytes.Index(all, m.marker); i >= 0 {
		return all[:i], true
	}
	// Only the last occurrence of its first byte can begin an unfinished
	// marker.
	keep := len(all)
	if i := bytes.LastIndexByte(all, m.marker[0]); i >= 0 && bytes.HasPrefix(m.marker, all[i:]) {
		keep = i
	}
	m.held = bytes.Clone(all[keep:])
	return all[:keep], false
}

// maxTail is how much of the messages is kept, in bytes.
const maxTail = 8 << 10

// tail keeps the end of what is written to it. It is safe for concurrent use.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

// Write never fails.
func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if n := len(t.buf) - maxTail; n > 0 {
		t.buf = append(t.buf[:0], t.buf[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
