package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Where there is no control group, a VMM is the process whose working directory or root is below its run's
// directory, a place that nothing else has business in.

// identityPoll is how often the end of such a process is looked for.
const identityPoll = 20 * time.Millisecond

// findByDir lists the processes that are at home below dir.
func findByDir(dir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && livesIn(pid, dir) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func livesIn(pid int, dir string) bool {
	for _, link := range []string{"cwd", "root"} {
		at, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), link))
		at = strings.TrimSuffix(at, " (deleted)")
		if err == nil && strings.HasPrefix(at, dir+"/") {
			return true
		}
	}
	return false
}

func killByDir(ctx context.Context, dir string) error {
	pids, err := findByDir(dir)
	if err != nil {
		return err
	}
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has ended
		}
		// The descriptor is of whatever has the PID now: only then can it be told who that is.
		if livesIn(pid, dir) {
			err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		unix.Close(fd)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	}
	return waitByDir(ctx, dir)
}

func waitByDir(ctx context.Context, dir string) error {
	tick := time.NewTicker(identityPoll)
	defer tick.Stop()
	for {
		pids, err := findByDir(dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for process: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}
