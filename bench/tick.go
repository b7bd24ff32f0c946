package main

import (
	"context"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// Setting up KVM's memory and tearing it down wait for grace periods that end on the kernel's tick.
// What begins right after an end, as a bare loop of start and kill does, always has the whole of
// the first tick; what takes a moment longer falls to the next one. So every measurement begins at
// a moment of the tick that is chosen, and in each round all ways begin at the same one. Over the
// rounds the moments cover the tick evenly: they are multiples of the golden ratio.

// moment is when in the tick the measurements of a round begin, from 0 to 1.
func moment(round int) float64 {
	_, part := math.Modf(float64(round) * math.Phi)
	return part
}

// align waits for that moment of a tick.
func align(ctx context.Context, at float64) {
	var length unix.Timespec
	if unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &length) != nil {
		return
	}
	// The coarse clock moves with the tick. Go's own timers are too coarse.
	for begun := coarse(); coarse() == begun && ctx.Err() == nil; {
		nap(50 * time.Microsecond)
	}
	nap(time.Duration(at * float64(length.Nano())))
}

func coarse() (t unix.Timespec) {
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &t)
	return t
}

func nap(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil)
}
