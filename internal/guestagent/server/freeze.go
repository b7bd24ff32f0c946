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

// Rest is a guest whose programs and file systems stand still. Its functions let them go on.
type Rest struct{ Files, Programs func() }

// freezer says who holds the guest at rest.
type freezer struct {
	// programs is locked for reading while a program is started, and locked while they stand still.
	programs sync.RWMutex

	mu   sync.Mutex
	by   *session // whose host has asked for that; nil: nothing stands still
	rest Rest
}

// freeze has the guest stand still until its host says otherwise, or goes: a clock would not do, as
// it jumps by the time for which a VM was paused, or a busy host left it alone. Where the VMM has
// cut off the host, a snapshot was made, and this may be another VM.
func (s *Server) freeze(ss *session) error {
	f := &s.frozen
	if err := f.freeze(ss, s.Stop); err != nil {
		return err
	}
	err := ss.reply(agentproto.Reply{})
	ss.listen(nil)
	<-ss.gone
	if !errors.Is(err, ErrCutOff) && !errors.Is(ss.lost, ErrCutOff) {
		f.thaw(ss)
	}
	return nil
}

func (s *Server) thaw(ss *session) error {
	s.frozen.thaw(nil)
	return ss.reply(agentproto.Reply{})
}

// identify is the first that a restored guest hears.
func (s *Server) identify(ss *session) error {
	if ss.req.Identity == nil {
		return errors.New("no identity is given")
	}
	r := agentproto.Reply{Skew: s.welcome(ss.req)}
	s.frozen.thawFiles() // names are written there
	if s.Identify != nil {
		for _, err := range s.Identify(ss.req.Identity) {
			r.Warnings = append(r.Warnings, err.Error())
		}
	}
	s.hangUp()
	s.frozen.thaw(nil)
	s.update(func() {
		if r.Skew != 0 {
			s.skew = r.Skew
		}
	})
	return ss.reply(r)
}

func (f *freezer) freeze(by *session, stop func(dropCaches bool) Rest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.by != nil {
		return errors.New("the guest is frozen already")
	}
	for n := 0; !f.programs.TryLock(); n++ {
		if n == freezeLooks {
			return errors.New("a program is being started, which takes too long")
		}
		time.Sleep(time.Millisecond)
	}
	f.by, f.rest = by, stop(by.req.DropCaches)
	return nil
}

// thaw ends what by has asked for, whoever that was if it is nil.
func (f *freezer) thaw(by *session) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.by == nil || by != nil && f.by != by {
		return
	}
	f.rest.Files()
	f.rest.Programs()
	f.by = nil
	f.programs.Unlock()
}

func (f *freezer) thawFiles() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.by != nil {
		f.rest.Files()
	}
}

// Programs are stopped by control groups, which they cannot see, as they could a signal.
const (
	cgroupRoot = "/sys/fs/cgroup"
	// frozenGroup takes programs that are in the root, which cannot be frozen, or in the group that
	// this program is in.
	frozenGroup = "smartvm"
	// freezeLooks are how often, a millisecond apart, it is looked whether programs have come to rest;
	// one in the kernel's depths may not before the file system answers. It does not leave the kernel.
	freezeLooks = 1000
)

// stop stops programs first: then nothing is written while the file systems settle.
func stop(dropCaches bool) Rest {
	groups := freezePrograms()
	unix.Sync()
	if dropCaches {
		_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	}
	mounts := freezeMounts()
	return Rest{
		Files: func() {
			for _, m := range mounts {
				_ = control(m, func(fd int) error { return unix.IoctlSetInt(fd, fiThaw, 0) })
				_ = m.Close()
			}
			mounts = nil
		},
		Programs: func() {
			for _, dir := range groups {
				_ = setFrozen(dir, false)
			}
		},
	}
}

// freezePrograms freezes all control groups below the root but the one that this program is in, and
// returns their directories. What is in that, or in the root itself, is moved into another before.
func freezePrograms() (groups []string) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	_, path, _ := strings.Cut(strings.TrimSpace(string(own)), "0::/")
	top, _, _ := strings.Cut(path, "/")
	gather(path)
	entries, _ := os.ReadDir(cgroupRoot)
	for _, e := range entries {
		dir := filepath.Join(cgroupRoot, e.Name())
		if e.IsDir() && e.Name() != top && setFrozen(dir, true) == nil {
			groups = append(groups, dir)
		}
	}
	for range freezeLooks {
		if !slices.ContainsFunc(groups, moving) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	return groups
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

// gather moves all programs but this one, and others of its file, from a group into frozenGroup,
// and an init that is in a group of its own (systemd's is init.scope). Again, until no more come:
// one may have started another meanwhile.
func gather(from string) {
	dir := filepath.Join(cgroupRoot, frozenGroup)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return
	}
	own, err := os.Stat("/proc/self/exe")
	if err != nil {
		return
	}
	for range 8 {
		list, err := os.ReadFile(filepath.Join(cgroupRoot, from, "cgroup.procs"))
		if err != nil {
			return
		}
		moved := 0
		for _, pid := range strings.Fields(string(list)) {
			exe, err := os.Stat("/proc/" + pid + "/exe")
			if err != nil || pid == "1" && from != "" || os.SameFile(own, exe) { // the kernel's own have none
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

// freezeMounts freezes the file systems on drives. What is laid over an image is on none that can
// be seen; it is synced, and who could write to it is frozen.
func freezeMounts() (mounts []*os.File) {
	list, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
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
		mounts = append(mounts, m)
	}
	return mounts
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
