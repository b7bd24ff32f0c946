package server

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agentproto"
)

// freezer holds programs and file systems still around a snapshot. Programs are stopped by control groups, which they cannot
// see, as they could a signal.
type freezer struct {
	mu     sync.Mutex
	timer  *time.Timer // nil: nothing is frozen
	groups []string    // directories of control groups
	mounts []*os.File  // of file systems
}

const (
	cgroupRoot = "/sys/fs/cgroup"
	// frozenGroup takes programs that are in no group yet: the root of the groups cannot be frozen.
	frozenGroup = "smartvm"
	// freezePatience is how long programs may take to come to rest; one in the kernel's depths may not before the file system
	// answers.
	freezePatience = time.Second
)

// freeze stops programs first: then nothing is written while the file systems settle.
func (s *Server) freeze(ss *session) error {
	f := &s.frozen
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.timer != nil {
		return errors.New("the guest is frozen already")
	}
	f.timer = time.AfterFunc(agentproto.FreezeTimeout, f.thaw)
	f.freezePrograms()
	unix.Sync()
	if ss.req.DropCaches {
		_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	}
	f.freezeMounts()
	return ss.reply(agentproto.Reply{})
}

func (s *Server) thaw(ss *session) error {
	s.frozen.thaw()
	return ss.reply(agentproto.Reply{})
}

// identify is the first that a restored guest hears.
func (s *Server) identify(ss *session) error {
	if ss.req.Identity == nil {
		return errors.New("no identity is given")
	}
	r := agentproto.Reply{Skew: s.welcome(ss.req)}
	s.frozen.thawMounts() // names are written there
	if s.Identify != nil {
		for _, err := range s.Identify(ss.req.Identity) {
			r.Warnings = append(r.Warnings, err.Error())
		}
	}
	s.hangUp()
	s.frozen.thaw()
	s.update(func() {
		if r.Skew != 0 {
			s.skew = r.Skew
		}
	})
	return ss.reply(r)
}

func (f *freezer) thaw() {
	f.thawMounts()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, dir := range f.groups {
		_ = setFrozen(dir, false)
	}
	if f.timer != nil {
		f.timer.Stop()
	}
	f.groups, f.timer = nil, nil
}

func (f *freezer) thawMounts() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range f.mounts {
		_ = control(m, func(fd int) error { return unix.IoctlSetInt(fd, fiThaw, 0) })
		_ = m.Close()
	}
	f.mounts = nil
}

// freezePrograms freezes all control groups below the root but the one that this program is in. What is in the root itself,
// as it is where no init of the image's makes groups, is moved into one before.
func (f *freezer) freezePrograms() {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return
	}
	_, path, _ := strings.Cut(strings.TrimSpace(string(own)), "0::/")
	if top, _, _ := strings.Cut(path, "/"); top == "" {
		gather(filepath.Join(cgroupRoot, frozenGroup))
	} else {
		path = top
	}
	entries, _ := os.ReadDir(cgroupRoot)
	for _, e := range entries {
		dir := filepath.Join(cgroupRoot, e.Name())
		if e.IsDir() && e.Name() != path && setFrozen(dir, true) == nil {
			f.groups = append(f.groups, dir)
		}
	}
	for deadline := time.Now().Add(freezePatience); time.Now().Before(deadline) && slices.ContainsFunc(f.groups, moving); {
		time.Sleep(time.Millisecond)
	}
}

func setFrozen(dir string, on bool) error {
	state := "0"
	if on {
		state = "1"
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte(state), 0)
}

// moving says whether a group that shall be frozen is not yet.
func moving(dir string) bool {
	events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	return err == nil && strings.Contains(string(events), "frozen 0")
}

// gather moves all programs but this one, and others of its file, from the root into a group. Again, until no more come: one
// may have started another meanwhile.
func gather(dir string) {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return
	}
	own, err := os.Stat("/proc/self/exe")
	if err != nil {
		return
	}
	for range 8 {
		list, err := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.procs"))
		if err != nil {
			return
		}
		moved := 0
		for _, pid := range strings.Fields(string(list)) {
			exe, err := os.Stat("/proc/" + pid + "/exe")
			if err != nil || os.SameFile(own, exe) { // the kernel's own have none
				continue
			}
			if os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(pid), 0) == nil {
				moved++
			}
		}
		if moved == 0 {
			return
		}
	}
}

// From linux/fs.h: _IOWR('X', 119, int) and 120.
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// freezeMounts freezes the file systems on drives. What is laid over an image is on none that can be seen; it is synced, and
// who could write to it is frozen.
func (f *freezer) freezeMounts() {
	list, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return
	}
	defer list.Close()
	seen := map[string]bool{}
	for lines := bufio.NewScanner(list); lines.Scan(); {
		device, path, ok := freezable(lines.Text())
		if !ok || seen[device] {
			continue
		}
		seen[device] = true
		m, err := os.Open(path)
		if err != nil {
			continue
		}
		if err := control(m, func(fd int) error { return unix.IoctlSetInt(fd, fiFreeze, 0) }); err != nil {
			_ = m.Close()
			continue
		}
		f.mounts = append(f.mounts, m)
	}
}

// freezable reads a line of mountinfo (proc(5)): a file system on a drive that is written to.
func freezable(line string) (device, path string, ok bool) {
	fields := strings.Fields(line)
	dash := slices.Index(fields, "-")
	if dash < 6 || len(fields) < dash+4 || !strings.HasPrefix(fields[dash+2], "/dev/") {
		return "", "", false
	}
	options := strings.Split(fields[5]+","+fields[dash+3], ",")
	if slices.Contains(options, "ro") {
		return "", "", false
	}
	path, err := strconv.Unquote(fmt.Sprintf(`"%s"`, strings.ReplaceAll(fields[4], `"`, `\"`))) // blanks are \040
	return fields[2], path, err == nil
}
