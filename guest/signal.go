package guest

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// The real-time signals as C libraries count them, which keep the first two for themselves.
const (
	rtMin = 34
	rtMax = 64
)

// ParseSignal reads a signal as images have it: SIGTERM, term, 15, SIGRTMIN+3, SIGRTMAX-1.
func ParseSignal(s string) (syscall.Signal, error) {
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	n := int(unix.SignalNum("SIG" + name))
	if number, err := strconv.ParseUint(s, 10, 8); err == nil {
		n = int(number)
	} else if offset, ok := strings.CutPrefix(name, "RTMIN"); ok {
		n = realTime(rtMin, offset)
	} else if offset, ok := strings.CutPrefix(name, "RTMAX"); ok {
		n = realTime(rtMax, offset)
	}
	if n < 1 || n > rtMax {
		return 0, fmt.Errorf("unknown signal %q", s)
	}
	return syscall.Signal(n), nil
}

// realTime returns 0 for what is no offset, or leads out of the range.
func realTime(base int, offset string) int {
	if offset == "" {
		return base
	}
	n, err := strconv.ParseInt(offset, 10, 8)
	if n += int64(base); err != nil || offset[0] >= '0' || n < rtMin {
		return 0
	}
	return int(n)
}
