package leak

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"

	"push.rocks/smartvm/internal/store"
)

// addMounts adds mounts and, where cgroups are mounted, cgroups.
func (s *Snapshot) addMounts() error {
	seen := map[string]bool{}
	return eachLine("/proc/self/mountinfo", func(line string) error {
		// id parent device root point options [tags] - type source options
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 2 {
			return fmt.Errorf("read mountinfo: line %q", line)
		}
		root, point, fstype, source := left[3], unescape(left[4]), right[0], right[1]
		s.add(mount, fmt.Sprintf("%s: %s of type %s, root %s", point, source, fstype, root))
		if (fstype == "cgroup" || fstype == "cgroup2") && !seen[point] {
			seen[point] = true
			return s.addCgroups(point)
		}
		return nil
	})
}

// unescape undoes the kernel's escapes for blanks and backslashes.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

func (s *Snapshot) addLinks() error {
	return eachLine("/proc/self/net/dev", func(line string) error {
		if name, _, ok := strings.Cut(line, ":"); ok {
			s.add(link, strings.TrimSpace(name))
		}
		return nil
	})
}

func (s *Snapshot) addNamespaces() error {
	const dir = "/run/netns"
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		s.add(netns, filepath.Join(dir, e.Name()))
	}
	return nil
}

// addTables adds nftables, where we may look at them.
func (s *Snapshot) addTables() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	tables, err := conn.ListTables()
	if err != nil {
		return nil //nolint:nilerr // without the right to look there is none to make any
	}
	for _, t := range tables {
		s.add(table, fmt.Sprintf("%s of family %d", t.Name, t.Family))
	}
	return nil
}

// addRoutes leaves out counters, which change by themselves.
func (s *Snapshot) addRoutes() error {
	err := eachLine("/proc/self/net/route", func(line string) error {
		f := strings.Fields(line)
		if len(f) >= 8 && f[0] != "Iface" {
			s.add(route, fmt.Sprintf("IPv4 to %s mask %s by %s on %s, flags %s, metric %s", f[1], f[7], f[2], f[0], f[3], f[6]))
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = eachLine("/proc/self/net/ipv6_route", func(line string) error {
		const cached = 0x01000000 // RTF_CACHE
		f := strings.Fields(line)
		if len(f) < 10 {
			return nil
		}
		if flags, err := strconv.ParseUint(f[8], 16, 32); err != nil || flags&cached != 0 {
			return err
		}
		// what a table has that has none; the kernel never removes a table that there was
		if f[5] == "ffffffff" && f[9] == "lo" {
			return nil
		}
		s.add(route, fmt.Sprintf("IPv6 to %s/%s by %s on %s, flags %s, metric %s", f[0], f[1], f[4], f[9], f[8], f[5]))
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) { // no IPv6
		return nil
	}
	return err
}

func (s *Snapshot) addLoops() error {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil {
			s.add(loop, fmt.Sprintf("%s of %s", strings.Split(f, "/")[3], bytes.TrimSpace(data)))
		}
	}
	return nil
}

// addSockets adds bound unix sockets. One that was bound by a relative path
// cannot be told from others', but its file is below a root.
func (s *Snapshot) addSockets() error {
	return eachLine("/proc/self/net/unix", func(line string) error {
		// Num RefCount Protocol Flags Type St Inode Path
		f := strings.SplitN(strings.Join(strings.Fields(line), " "), " ", 8)
		if len(f) == 8 && s.mentionsRoot(f[7]) {
			s.add(socket, f[7])
		}
		return nil
	})
}

func (s *Snapshot) addFiles() error {
	for _, root := range s.scope.Roots {
		err := walk(root, func(path string, d fs.DirEntry) {
			if slices.Contains(strings.Split(path, "/"), store.EventDir) {
				return // what has happened is kept beyond the VMs, in bounds
			}
			s.add(file, fmt.Sprintf("%s (%s)", path, typeName(d.Type())))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func typeName(t fs.FileMode) string {
	switch {
	case t == 0:
		return "regular"
	case t&fs.ModeDir != 0:
		return "directory"
	case t&fs.ModeSymlink != 0:
		return "symbolic link"
	case t&fs.ModeNamedPipe != 0:
		return "FIFO"
	case t&fs.ModeSocket != 0:
		return "socket"
	default:
		return "device"
	}
}

func (s *Snapshot) addDescriptors() error {
	// The runtime opens descriptors of its own with the first pipe or socket,
	// and keeps them.
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	if err := errors.Join(r.Close(), w.Close()); err != nil {
		return err
	}
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	own := strconv.Itoa(int(dir.Fd()))
	for _, name := range names {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", name))
		if err == nil && name != own {
			s.add(descriptor, fmt.Sprintf("%s: %s", name, target))
		}
	}
	return nil
}

// addGoroutines leaves out the calling one, those of package testing, and the
// one that receives signals, which lives on once there was a Notify.
func (s *Snapshot) addGoroutines() error {
	buf := make([]byte, 64<<10)
	for n := runtime.Stack(buf, true); ; n = runtime.Stack(buf, true) {
		if n < len(buf) {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	stacks := strings.Split(strings.TrimSpace(string(buf)), "\n\n")
	for _, stack := range stacks[1:] {
		if strings.Contains(stack, "\ntesting.tRunner(") || strings.Contains(stack, "\ntesting.(*M).") ||
			strings.Contains(stack, "\nos/signal.loop(") || strings.Contains(stack, "\nruntime.ReadTrace(") {
			continue
		}
		lines := strings.Split(stack, "\n")
		id := strings.TrimPrefix(lines[0], "goroutine ")
		id, _, _ = strings.Cut(id, " ")
		// Where it is changes; where it came from does not.
		origin := "of main"
		if len(lines) > 1 && strings.HasPrefix(lines[len(lines)-2], "created by ") {
			origin, _, _ = strings.Cut(lines[len(lines)-2], " in goroutine")
			origin += " at " + strings.TrimSpace(lines[len(lines)-1])
		}
		s.add(goroutine, id+" "+origin)
	}
	return nil
}

func eachLine(path string, do func(string) error) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		if err := do(strings.TrimSuffix(line, "\n")); err != nil {
			return err
		}
	}
	return nil
}
