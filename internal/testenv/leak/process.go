package leak

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// programs are what orphans of ours are called.
func programs() []string { return []string{"firecracker", "jailer", "smartvm", "smartvm-agent"} }

// stat is a process as /proc/<pid>/stat has it.
type stat struct {
	pid, parent int
	name, state string
	threads     string // how many
	start       string // ticks after boot: with the pid, an identity
}

// isInits says whether all of a process has ended and only init is left to be told, which on some
// machines listens every two seconds.
func (p stat) isInits() bool { return p.state == "Z" && p.parent == 1 && p.threads == "1" }

func (s *Snapshot) addProcesses() error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	all := map[int]stat{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, ok := readStat(pid); ok {
			all[pid] = p
		}
	}
	self := os.Getpid()
	above := ancestors(all, self)
	for pid, p := range all {
		if pid == self || p.isInits() {
			continue
		}
		below := ancestors(all, pid)
		orphan := len(below) > 0 && slices.Contains(above, below[0])
		if slices.Contains(below, self) || s.isOurs(p, orphan) {
			s.add(process, fmt.Sprintf("%d %s, state %s, child of %d, started at %s: %.200s",
				pid, p.name, p.state, p.parent, p.start, strings.ReplaceAll(readProc(pid, "cmdline"), "\x00", " ")))
		}
	}
	return nil
}

// readStat returns false for a process that has gone.
func readStat(pid int) (stat, bool) {
	data := readProc(pid, "stat")
	open, end := strings.IndexByte(data, '('), strings.LastIndexByte(data, ')')
	if open < 0 || end < open {
		return stat{}, false
	}
	fields := strings.Fields(data[end+1:])
	const state, parent, threads, start = 0, 1, 17, 19 // counted from behind the name
	if len(fields) <= start {
		return stat{}, false
	}
	ppid, err := strconv.Atoi(fields[parent])
	return stat{
		pid: pid, parent: ppid, name: data[open+1 : end], state: fields[state], threads: fields[threads],
		start: fields[start],
	}, err == nil
}

// ancestors lists the parent of pid and its parents.
func ancestors(all map[int]stat, pid int) []int {
	var up []int
	for p, ok := all[pid]; ok && p.parent != 0 && !slices.Contains(up, p.parent); p, ok = all[p.parent] {
		up = append(up, p.parent)
	}
	return up
}

// isOurs looks for what ties a process that does not descend from us to us.
func (s *Snapshot) isOurs(p stat, orphan bool) bool {
	cmdline := readProc(p.pid, "cmdline")
	exe := readLink(p.pid, "exe")
	if orphan {
		first, _, _ := strings.Cut(cmdline, "\x00")
		for _, name := range []string{p.name, filepath.Base(first), strings.TrimSuffix(filepath.Base(exe), " (deleted)")} {
			if slices.Contains(programs(), name) {
				return true
			}
		}
	}
	for line := range strings.Lines(readProc(p.pid, "cgroup")) {
		for name := range strings.SplitSeq(strings.TrimSpace(line), "/") {
			if ourCgroup(name) {
				return true
			}
		}
	}
	if len(s.scope.Roots) == 0 {
		return false
	}
	where := []string{cmdline, readProc(p.pid, "environ"), exe, readLink(p.pid, "cwd"), readLink(p.pid, "root")}
	return slices.ContainsFunc(where, s.mentionsRoot)
}

// mentionsRoot says whether one of the roots, or a path below it, is in text.
func (s *Snapshot) mentionsRoot(text string) bool {
	for _, root := range s.scope.Roots {
		for rest := text; ; {
			_, after, ok := strings.Cut(rest, root)
			if !ok {
				break
			}
			if after == "" || !isNameByte(after[0]) {
				return true
			}
			rest = after
		}
	}
	return false
}

// isNameByte says whether c would make another name of what stands before it.
func isNameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.'
}

// readProc returns "" for what has gone, or is not for us to see.
func readProc(pid int, name string) string {
	data, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), name))
	return string(data)
}

func readLink(pid int, name string) string {
	target, _ := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), name))
	return target
}

// ourCgroup knows the names of cgroups that smartvm makes, or a jailer that is
// left to its own defaults.
func ourCgroup(name string) bool {
	return strings.HasPrefix(name, "smartvm") || strings.HasPrefix(name, "firecracker")
}

// addCgroups adds those of ours, and all below them, in one hierarchy.
func (s *Snapshot) addCgroups(mountPoint string) error {
	return walk(mountPoint, func(path string, d fs.DirEntry) {
		if !d.IsDir() {
			return
		}
		rel, err := filepath.Rel(mountPoint, path)
		if err == nil && slices.ContainsFunc(strings.Split(rel, "/"), ourCgroup) {
			s.add(cgroup, path)
		}
	})
}

// walk visits a tree as far as it is still there.
func walk(root string, visit func(path string, d fs.DirEntry)) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		// A cgroup that goes while it is read gives ENODEV.
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENODEV):
			return nil
		case err != nil:
			return err
		}
		visit(path, d)
		return nil
	})
}
