package vmm

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Usage is what processes have used, as the host sees it.
type Usage struct {
	CPU    time.Duration // nanoseconds
	Memory uint64        // resident, bytes
}

// ticks is how the kernel counts CPU time for programs, per second.
const ticks = 100

// UsageOf adds up what processes have used. Those that have ended count for nothing.
func UsageOf(pids []int) (u Usage) {
	for _, pid := range pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		_, rest, found := cutLast(stat, ')')
		f := strings.Fields(string(rest)) // the third of the kernel's fields is the first
		if err != nil || !found || len(f) < 22 {
			continue
		}
		for _, i := range []int{11, 12} {
			if n, err := strconv.ParseInt(f[i], 10, 64); err == nil {
				u.CPU += time.Duration(n) * time.Second / ticks
			}
		}
		if pages, err := strconv.ParseUint(f[21], 10, 52); err == nil {
			u.Memory += pages * uint64(os.Getpagesize())
		}
	}
	return u
}

func cutLast(b []byte, sep byte) (before, after []byte, found bool) {
	i := bytes.LastIndexByte(b, sep)
	if i < 0 {
		return b, nil, false
	}
	return b[:i], b[i+1:], true
}
