// Package cgroup uses control groups, version 2, as the identity of a set of processes: a process
// started in a group of its own can be found and killed by the group's name, whatever becomes of
// its PID.
package cgroup

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Group is one control group. As an effect: Apply makes it, Revert kills what is in it and removes
// it. Its parent is made when it is missing and removed when it is empty.
type Group struct {
	Path string `json:"path"` // absolute directory
}

// Parent returns the directory in which this process may make groups: below the hierarchy's root
// for root, below its own group for others, with name added. Returns "" where there is no such
// place: no version 2 hierarchy, or no right to write in it. A hybrid hierarchy's version 2 mount
// serves, without controllers too.
func Parent(name string) (string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup mount: %w", err)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("find own cgroup: %w", err)
	}
	base := mountpoint(mounts)
	if base == "" {
		return "", nil
	}
	if os.Geteuid() != 0 {
		base = filepath.Join(base, ownPath(own))
	}
	// Moving a process needs the right to write both.
	if unix.Access(base, unix.W_OK) != nil || unix.Access(filepath.Join(base, "cgroup.procs"), unix.W_OK) != nil {
		return "", nil
	}
	return filepath.Join(base, name), nil
}

// mountpoint finds the version 2 mount in the text of mountinfo (proc(5)).
func mountpoint(mountinfo []byte) string {
	s := bufio.NewScanner(bytes.NewReader(mountinfo))
	for s.Scan() {
		before, after, _ := strings.Cut(s.Text(), " - ")
		if f := strings.Fields(before); len(f) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(f[4])
		}
	}
	return ""
}

// ownPath finds this process's version 2 group in the text of /proc/self/cgroup.
func ownPath(text []byte) string {
	s := bufio.NewScanner(bytes.NewReader(text))
	for s.Scan() {
		if path, ok := strings.CutPrefix(s.Text(), "0::"); ok {
			return path
		}
	}
	return "/"
}

// Apply makes the group. Returns fs.ErrExist when there is one.
func (g *Group) Apply(context.Context) error {
	for {
		err := os.Mkdir(g.Path, 0o755)
		if !errors.Is(err, fs.ErrNotExist) {
			if err != nil {
				return fmt.Errorf("make cgroup: %w", err)
			}
			return nil
		}
		// Another VM's end may remove the parent between these two calls: go round.
		if err := os.Mkdir(filepath.Dir(g.Path), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
}

// Barrier keeps what the group's processes use until they have ended.
func (g *Group) Barrier() {}

// Revert kills every process in the group, waits for their end and removes the group.
func (g *Group) Revert(ctx context.Context) error {
	for {
		err := unix.Rmdir(g.Path)
		if err == unix.ENOENT {
			if err := g.seen(); err != nil {
				return fmt.Errorf("remove cgroup: %w", err)
			}
		}
		if err == nil || err == unix.ENOENT {
			break
		}
		if err != unix.EBUSY || ctx.Err() != nil {
			return fmt.Errorf("remove cgroup %s: %w", g.Path, err)
		}
		if alive, err := g.Populated(); err != nil || alive {
			if err := g.Kill(ctx); err != nil {
				return err
			}
			continue
		}
		// The last process is out of the group's count a moment before the group lets go of it.
		pause(ctx, time.Millisecond)
	}
	if err := unix.Rmdir(filepath.Dir(g.Path)); err != nil && err != unix.EBUSY && err != unix.ENOTEMPTY &&
		err != unix.ENOENT {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	return nil
}

// Kill sends SIGKILL to every process in the group and waits until it is empty. That there is no
// group is success.
func (g *Group) Kill(ctx context.Context) error {
	if alive, err := g.Populated(); err != nil || !alive {
		return err
	}
	if err := g.Signal(); err != nil {
		return err
	}
	return g.Wait(ctx)
}

// Signal sends SIGKILL to every process in the group, also to those that are being forked, and does
// not wait for their end.
func (g *Group) Signal() error {
	err := os.WriteFile(filepath.Join(g.Path, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := os.Stat(g.Path); statErr == nil {
			err = g.signalEach() // Linux < 5.14 has no cgroup.kill
		}
	}
	if err = g.unlessGone(err); err != nil {
		return fmt.Errorf("kill cgroup %s: %w", g.Path, err)
	}
	return nil
}

// signalEach signals by PID, but a PID that is in the group now. The group's list is read again
// until all in it have had the signal: a process may have been forked meanwhile.
func (g *Group) signalEach() error {
	for done := map[int]bool{}; ; {
		pids, err := g.PIDs()
		pids = slices.DeleteFunc(pids, func(pid int) bool { return done[pid] })
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			done[pid] = true
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue
			}
			if now, _ := g.PIDs(); slices.Contains(now, pid) {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			}
			unix.Close(fd)
		}
	}
}

// unlessGone returns the error of an access to one of the group's files, nil where that says that
// there is no group.
func (g *Group) unlessGone(err error) error {
	switch {
	case errors.Is(err, unix.ENODEV): // it was removed with the file open
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return g.seen()
	}
	return err
}

// seen returns an error unless the nearest directory above the group that exists is in a version 2
// hierarchy. Where that is not mounted, as in a container, a missing group says nothing about its
// processes.
func (g *Group) seen() error {
	for dir := filepath.Dir(g.Path); ; dir = filepath.Dir(dir) {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		switch {
		case errors.Is(err, unix.ENOENT) && dir != filepath.Dir(dir):
		case err != nil:
			return fmt.Errorf("look for cgroup %s: %w", g.Path, err)
		case st.Type != unix.CGROUP2_SUPER_MAGIC:
			return fmt.Errorf("look for cgroup %s: %s is in no cgroup2 hierarchy", g.Path, dir)
		default:
			return nil
		}
	}
}

// PIDs lists the processes in the group, for people to read: a PID is no identity.
func (g *Group) PIDs() ([]int, error) {
	data, err := os.ReadFile(filepath.Join(g.Path, "cgroup.procs"))
	if err != nil {
		if err = g.unlessGone(err); err != nil {
			err = fmt.Errorf("list cgroup: %w", err)
		}
		return nil, err
	}
	var pids []int
	for _, f := range bytes.Fields(data) {
		var pid int
		if _, err := fmt.Sscan(string(f), &pid); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Populated says whether a process of the group, or of a group below it, is alive. Where there is
// no group, none is. Returns an error where groups cannot be seen at all.
func (g *Group) Populated() (bool, error) {
	data, err := os.ReadFile(filepath.Join(g.Path, "cgroup.events"))
	return g.populated(data, err)
}

func (g *Group) populated(events []byte, err error) (bool, error) {
	if err != nil {
		if err = g.unlessGone(err); err != nil {
			err = fmt.Errorf("read cgroup events: %w", err)
		}
		return false, err
	}
	return bytes.Contains(events, []byte("populated 1")), nil
}

// waitSlice bounds how late Wait sees its context's end. The kernel wakes it for the group's end at
// once.
const waitSlice = 50 * time.Millisecond

// Wait returns when no process of the group is alive, or with the context's cause.
func (g *Group) Wait(ctx context.Context) error {
	f, err := os.Open(filepath.Join(g.Path, "cgroup.events"))
	if err != nil {
		if err = g.unlessGone(err); err != nil {
			err = fmt.Errorf("wait for cgroup: %w", err)
		}
		return err
	}
	defer f.Close()
	buf := make([]byte, 256)
	for {
		n, err := f.ReadAt(buf, 0)
		if n > 0 {
			err = nil
		}
		alive, err := g.populated(buf[:n], err)
		if err != nil || !alive {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("wait for cgroup: %w", context.Cause(ctx))
		}
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(fds, int(waitSlice.Milliseconds())); err != nil && err != unix.EINTR {
			return fmt.Errorf("wait for cgroup: %w", err)
		}
	}
}

// pause sleeps for d and says whether the context still goes on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
