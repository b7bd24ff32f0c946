package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/store"
)

// Where there is no control group, a VMM is the process whose working directory or root is that of its run, a
// place that nothing else has business in. Directories are compared by inode: of a process in a mount namespace of
// its own, as a jailed one is, the paths say nothing.

// identityPoll is how often the end of such a process is looked for.
const identityPoll = 20 * time.Millisecond

// findByDir lists the processes that are at home in the run of dir.
func findByDir(dir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	homes := homesBelow(dir)
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && livesIn(pid, homes) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// homesBelow returns the working directories that a run in dir may have.
func homesBelow(dir string) []fs.FileInfo {
	jail := filepath.Join(dir, store.JailDir)
	places, _ := fs.Glob(os.DirFS(jail), "*/*/root") // the pattern is well-formed; one with dir in it might not be
	for i := range places {
		places[i] = filepath.Join(jail, places[i])
	}
	var homes []fs.FileInfo
	for _, path := range append(places, filepath.Join(dir, store.RootDir)) {
		if fi, err := os.Stat(path); err == nil {
			homes = append(homes, fi)
		}
	}
	return homes
}

func livesIn(pid int, homes []fs.FileInfo) bool {
	for _, link := range []string{"cwd", "root"} {
		at, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid), link))
		if err == nil && slices.ContainsFunc(homes, func(home fs.FileInfo) bool { return os.SameFile(at, home) }) {
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
	homes := homesBelow(dir)
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has ended
		}
		// The descriptor is of whatever has the PID now: only then can it be told who that is.
		if livesIn(pid, homes) {
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
