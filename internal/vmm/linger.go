package vmm

import (
	"errors"
	"io"
	"time"

	"golang.org/x/sys/unix"
)

// How long a VMM is waited for that may be about to end, and one that is: it has broken off a call.
const (
	lingerTime = 100 * time.Millisecond
	endTime    = 2 * time.Second
)

// Linger gives a VMM of this process, that failed a call by err, the moment it takes to end, so
// that its exit status can be told. It says whether it has.
func (p *Process) Linger(err error) bool {
	wait := lingerTime
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) ||
		errors.Is(err, unix.EPIPE) {
		wait = endTime
	}
	select {
	case <-p.Done():
		return true
	case <-time.After(wait):
		return false
	}
}
