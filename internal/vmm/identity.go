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

// Where there is no control group, a VMM is the process whose root is the jail of its run, or whose
// working directory is that of its run and whose standard output is the run's console: a shell may
// stand in that directory too. What it executes says less: the program may be a script, or have
// been replaced by a newer one since. Directories are compared by inode: of a process in a mount
// namespace of its own, as a jailed one is, the paths say nothing.

// identityPoll is how often the end of such a process is looked for.
const identityPoll = 20 * time.Millisecond

// findByDir lists the processes that are at home in the run of dir.
func findByDir(dir string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	run := placesOf(dir)
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && run.has(pid) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// places are the files by which the process of a run is known.
type places struct {
	homes   []fs.FileInfo // the working directories that it may have
	console fs.FileInfo   // nil: it has none, and no VMM was started
}

// placesOf returns those of the run in dir.
func placesOf(dir string) *places {
	jail := filepath.Join(dir, store.JailDir)
	jails, _ := fs.Glob(os.DirFS(jail), "*/*/root") // the pattern is well-formed; one with dir in it might not be
	for i := range jails {
		jails[i] = filepath.Join(jail, jails[i])
	}
	run := new(places)
	for _, path := range append(jails, filepath.Join(dir, store.RootDir)) {
		if fi, err := os.Stat(path); err == nil {
			run.homes = append(run.homes, fi)
		}
	}
	run.console, _ = os.Stat(filepath.Join(dir, store.ConsoleFIFO))
	return run
}

// has says whether a process is the run's.
func (r *places) has(pid int) bool {
	at := func(link string, places ...fs.FileInfo) bool {
		fi, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pid), link))
		return err == nil && slices.ContainsFunc(places, func(place fs.FileInfo) bool {
			return place != nil && os.SameFile(fi, place)
		})
	}
	return at("root", r.homes...) || at("cwd", r.homes...) && at("fd/1", r.console)
}

// signalByDir sends SIGKILL to the processes of the run in dir.
func signalByDir(dir string) error {
	pids, err := findByDir(dir)
	if err != nil {
		return err
	}
	run := placesOf(dir)
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has ended
		}
		// The descriptor is of whatever has the PID now: only then can it be told who that is.
		if run.has(pid) {
			err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		unix.Close(fd)
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	}
	return nil
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
