package guestagent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"
)

// Go's runtime has a thread that looks every 20 µs, asleep in between, whether a system call takes longer than that, and has others go
// on elsewhere then. On its way up a guest does one thing after another, most of it in the kernel, and each of those timers is its
// host's to set: they and the changes of threads took a third of the time. A thread's timer slack is how late its sleeps may end.
const (
	bootSlack  = 20 * time.Millisecond
	usualSlack = time.Millisecond
)

// slacken sets the timer slack of all threads that there are; others get that of the thread that starts them, but for programs:
// see process.Usual. It needs /proc.
func slacken(slack time.Duration) error {
	tasks, err := os.ReadDir("/proc/self/task")
	text := []byte(strconv.FormatInt(slack.Nanoseconds(), 10))
	for _, task := range tasks {
		err = errors.Join(err, os.WriteFile(filepath.Join("/proc", task.Name(), "timerslack_ns"), text, 0))
	}
	if err != nil {
		return fmt.Errorf("set timer slack: %w", err)
	}
	return nil
}

// frugal keeps the heap small, of which Go would have two thirds as garbage before it looks for any.
func frugal() { debug.SetGCPercent(gcPercent) }

const gcPercent = 50
