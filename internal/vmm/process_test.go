package vmm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/cgroup"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/vmm"
)

// sink takes a stream.
type sink struct {
	mu     sync.Mutex
	text   bytes.Buffer
	closed bool
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *sink) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

func (s *sink) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// stand is a shell script in the VMM's place, in a control group where one can be made.
type stand struct {
	*vmm.Process
	config       *vmm.Config
	console, log *sink
}

func newStand(t *testing.T, script string) *stand {
	t.Helper()
	dir := t.TempDir()
	testenv.NoLeaks(t, dir)
	program := filepath.Join(dir, "firecracker")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	s := &stand{console: new(sink), log: new(sink)}
	s.config = &vmm.Config{
		ID: "vm-1", Binary: program, Dir: filepath.Join(dir, "run"),
		Streams: vmm.Streams{Console: s.console, Log: s.log},
	}
	if err := os.Mkdir(s.config.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	parent, err := cgroup.Parent("smartvm-vmm-test")
	if err != nil {
		t.Fatal(err)
	}
	if parent != "" {
		group := &cgroup.Group{Path: filepath.Join(parent, filepath.Base(filepath.Dir(dir)))}
		if err := group.Apply(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := group.Revert(context.Background()); err != nil {
				t.Error(err)
			}
		})
		s.config.Cgroup = group.Path
	}
	t.Cleanup(func() {
		if err := errors.Join(os.RemoveAll(s.config.Dir), os.Remove(program)); err != nil {
			t.Error(err)
		}
	})
	s.Process = vmm.New(s.config)
	return s
}

func (s *stand) start(t *testing.T) {
	t.Helper()
	if err := s.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Revert(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// up waits until the script has written a line.
func (s *stand) up(t *testing.T) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !strings.Contains(s.console.String(), "\n") {
		select {
		case <-tick.C:
		case <-s.Done():
			t.Fatalf("it ended: %s", s.Exit())
		}
	}
}

const forever = "echo up\nexec sleep 1000\n"

func TestProcess_Surroundings(t *testing.T) {
	s := newStand(t, `
pwd
echo "args $*"
echo "environment $(tr '\0' ' ' </proc/$$/environ)"
echo "process group $(($(cut -d' ' -f5 /proc/$$/stat) - $$))"
ls -l /proc/$$/fd
echo "groups $(tr '\n' ' ' </proc/$$/cgroup)"
echo warning >&2
`)
	// A descriptor that this process means to keep when it becomes another program is not for the VMM.
	foreign, err := unix.Open("/dev/zero", unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(foreign)
	source := filepath.Join(filepath.Dir(s.config.Dir), "firecracker")
	s.config.Items = []stage.Item{{Source: source, Name: "kernel"}, {Source: source, Name: "drives/a"}}
	s.start(t)
	<-s.Done()
	root := filepath.Join(s.config.Dir, store.RootDir)
	if got := s.Exit(); got != (vmm.Exit{Known: true}) {
		t.Errorf("exit %+v", got)
	}
	lines := strings.Split(s.console.String(), "\n")
	want := []string{
		root,
		"args --id vm-1 --api-sock " + store.SocketFile + " --log-path " + store.LogFIFO + " --level Warning",
		"environment ",
		"process group 0",
	}
	if diff := cmp.Diff(want, lines[:min(len(want), len(lines))]); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	known := map[string]bool{
		filepath.Join(s.config.Dir, store.InputFIFO): true, s.config.Binary: true,
		filepath.Join(s.config.Dir, store.ConsoleFIFO): true, filepath.Join(root, store.LogFIFO): true,
	}
	seen := 0
	for _, line := range lines {
		if _, target, ok := strings.Cut(line, " -> "); ok {
			seen++
			if !known[target] {
				t.Errorf("it inherited %s", target)
			}
		}
	}
	if seen < 3 {
		t.Errorf("%d descriptors", seen)
	}
	if flags, err := unix.FcntlInt(uintptr(foreign), unix.F_GETFD, 0); err != nil || flags != 0 {
		t.Errorf("this process's own descriptor has flags %#x afterwards, %v, want 0", flags, err)
	}
	if s.config.Cgroup != "" && !strings.Contains(s.console.String(), "/"+filepath.Base(s.config.Cgroup)+" ") {
		t.Errorf("not in its group:\n%s", s.console)
	}
	if s.log.String() != "warning\n" || !s.log.closed || !s.console.closed {
		t.Errorf("log %q, closed %v and %v", s.log, s.log.closed, s.console.closed)
	}
	for _, name := range []string{"kernel", "drives/a"} {
		if got, err := os.Readlink(filepath.Join(root, name)); err != nil || got != source {
			t.Errorf("%s leads to %q, %v", name, got, err)
		}
	}
}

func TestProcess_Exit(t *testing.T) {
	for _, tt := range []struct {
		script string
		want   vmm.Exit
		text   string
	}{
		{"exit 0", vmm.Exit{Known: true}, "exit status 0"},
		{"exit 148", vmm.Exit{Known: true, Code: 148}, "exit status 148"},
		{"kill -TERM $$", vmm.Exit{Known: true, Code: -1, Signal: syscall.SIGTERM}, "killed by SIGTERM"},
	} {
		t.Run(tt.script, func(t *testing.T) {
			s := newStand(t, tt.script)
			s.start(t)
			if err := s.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := s.Exit(); got != tt.want || got.String() != tt.text {
				t.Errorf("%+v, %q, want %+v, %q", got, got, tt.want, tt.text)
			}
			if alive, err := s.Alive(); err != nil || alive {
				t.Errorf("alive %v, %v", alive, err)
			}
			if how, err := s.Stop(t.Context(), 0, nil); err != nil || how != "" {
				t.Errorf("stop after the end: %q, %v", how, err)
			}
		})
	}
	if got := (vmm.Exit{}).String(); got != "exit status unknown" {
		t.Errorf("unknown exit: %q", got)
	}
}

func TestProcess_CannotStart(t *testing.T) {
	t.Run("no program", func(t *testing.T) {
		s := newStand(t, "")
		s.config.Binary += "-missing"
		if err := s.Apply(t.Context()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v, want fs.ErrNotExist", err)
		}
		if !s.console.closed || !s.log.closed {
			t.Error("its streams are open")
		}
	})
	t.Run("no group", func(t *testing.T) {
		s := newStand(t, "")
		if s.config.Cgroup == "" {
			t.Skip("no control groups")
		}
		s.Process = vmm.New(&vmm.Config{
			ID: "vm-1", Binary: s.config.Binary, Dir: s.config.Dir, Cgroup: s.config.Cgroup + "-missing",
			Streams: s.config.Streams,
		})
		if err := s.Apply(t.Context()); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v, want fs.ErrNotExist", err)
		}
	})
	t.Run("FIFO taken", func(t *testing.T) {
		s := newStand(t, "")
		root := s.config.Root()
		if err := errors.Join(os.Mkdir(root, 0o700),
			os.WriteFile(filepath.Join(root, store.LogFIFO), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := s.Apply(t.Context()); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%v, want fs.ErrExist", err)
		}
		if err := s.config.Streams.Close(); err != nil {
			t.Error(err)
		}
	})
}

var errGone = errors.New("gone")

// gone is a context that has ended.
func gone(t *testing.T) context.Context {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errGone)
	return ctx
}

func TestProcess_Stop(t *testing.T) {
	s := newStand(t, forever)
	s.start(t)
	s.up(t)
	if alive, err := s.Alive(); err != nil || !alive {
		t.Errorf("alive %v, %v", alive, err)
	}
	if err := s.Wait(gone(t)); !errors.Is(err, errGone) {
		t.Errorf("wait: %v, want %v", err, errGone)
	}
	how, err := s.Process.Stop(t.Context(), time.Minute, func(context.Context) (string, error) {
		return "asked", s.Revert(context.Background())
	})
	if err != nil || how != "asked" {
		t.Errorf("stopped by %q, %v", how, err)
	}
	how, err = s.Process.Stop(t.Context(), time.Minute, func(context.Context) (string, error) {
		t.Error("an ended VMM was asked")
		return "asked", nil
	})
	if err != nil || how != "" {
		t.Errorf("stopped by %q, %v, though it had ended", how, err)
	}
}

func TestProcess_StopNotAsked(t *testing.T) {
	for name, timeout := range map[string]time.Duration{"no time": 0, "refused": time.Minute} {
		t.Run(name, func(t *testing.T) {
			s := newStand(t, forever)
			s.start(t)
			s.up(t)
			how, err := s.Process.Stop(t.Context(), timeout, func(context.Context) (string, error) {
				if timeout == 0 {
					t.Error("it was asked, and has no time")
				}
				return "asked", errors.New("no")
			})
			if err != nil || how != vmm.Killed {
				t.Errorf("stopped by %q, %v", how, err)
			}
		})
	}
}

func TestProcess_StopKills(t *testing.T) {
	s := newStand(t, "trap '' TERM INT\n"+forever)
	s.start(t)
	s.up(t)
	asked := func(ctx context.Context) (string, error) { return "asked", ctx.Err() }
	if _, err := s.Stop(gone(t), time.Minute, asked); !errors.Is(err, errGone) {
		t.Errorf("stop: %v, want %v", err, errGone)
	}
	if alive, err := s.Alive(); err != nil || !alive {
		t.Errorf("a caller who has gone killed it: alive %v, %v", alive, err)
	}
	if how, err := s.Stop(t.Context(), time.Millisecond, asked); err != nil || how != vmm.Killed {
		t.Errorf("stopped by %q, %v", how, err)
	}
	if got := s.Exit(); got.Signal != syscall.SIGKILL || got.SignalName() != "SIGKILL" {
		t.Errorf("exit %+v", got)
	}
	for range 2 {
		if err := s.Revert(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// within fails the test if f takes for ever.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(testenv.Patience(10 * time.Second)):
		t.Fatalf("%s does not return", what)
	}
}

// immortal is a control group whose processes take no notice of signals, as those that wait for a
// dead disk.
func immortal(t *testing.T) (group string, signalled func() bool) {
	t.Helper()
	group = t.TempDir()
	kill := filepath.Join(group, "cgroup.kill")
	err := errors.Join(os.WriteFile(kill, nil, 0o600),
		os.WriteFile(filepath.Join(group, "cgroup.events"), []byte("populated 1\nfrozen 0\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return group, func() bool {
		text, err := os.ReadFile(kill)
		return err == nil && string(text) == "1"
	}
}

// Whatever becomes of the VMM, a call ends with its context, and the VMM has been signalled.
func TestAttach_Immortal(t *testing.T) {
	for name, end := range map[string]func(*vmm.Process) error{
		"stop":   func(p *vmm.Process) error { _, err := p.Stop(gone(t), 0, nil); return err },
		"revert": func(p *vmm.Process) error { return p.Revert(gone(t)) },
	} {
		group, signalled := immortal(t)
		within(t, name, func() {
			if err := end(vmm.Attach(t.TempDir(), group)); !errors.Is(err, errGone) {
				t.Errorf("%s: %v, want %v", name, err, errGone)
			}
		})
		if !signalled() {
			t.Errorf("%s: it was not signalled", name)
		}
	}
}

// A child that somebody has moved to another group is ended all the same.
func TestProcess_Moved(t *testing.T) {
	s := newStand(t, forever)
	if s.config.Cgroup == "" {
		t.Skip("no control groups")
	}
	s.start(t)
	s.up(t)
	pids, err := s.PIDs()
	if err != nil || len(pids) != 1 {
		t.Fatalf("processes %v, %v", pids, err)
	}
	other := &cgroup.Group{Path: s.config.Cgroup + "-other"}
	if err := other.Apply(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := other.Revert(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(other.Path, "cgroup.procs"), []byte(fmt.Sprint(pids[0])), 0); err != nil {
		t.Fatal(err)
	}
	within(t, "revert", func() {
		if err := s.Revert(t.Context()); err != nil {
			t.Error(err)
		}
	})
	if got := s.Exit().Signal; got != syscall.SIGKILL {
		t.Errorf("ended by %v, want SIGKILL", got)
	}
}

// refusing takes nothing.
type refusing struct{ *sink }

var errFull = errors.New("full")

func (refusing) Write([]byte) (int, error) { return 0, errFull }

// Of a stream that cannot be written down the first loss is told, and it goes on.
func TestStreams_Lost(t *testing.T) {
	s := newStand(t, "head -c 20000 /dev/zero; echo warning >&2\n") // more than one write
	lost := map[string]int{}
	s.config.Streams.Console = refusing{s.console}
	s.config.Streams.Lost = func(path string, err error) {
		if !errors.Is(err, errFull) {
			t.Errorf("%s: %v", path, err)
		}
		lost[filepath.Base(path)]++
	}
	s.start(t)
	<-s.Done()
	if diff := cmp.Diff(map[string]int{store.ConsoleFIFO: 1}, lost); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if s.log.String() != "warning\n" || !s.console.closed {
		t.Errorf("log %q, console closed %v", s.log, s.console.closed)
	}
}

// blocking is a writer that blocks.
type blocking struct {
	*sink
	free chan struct{}
}

func (b blocking) Write(p []byte) (int, error) {
	<-b.free
	return b.sink.Write(p)
}

// A writer that blocks is given up, not the VM: its end is told.
func TestStreams_Block(t *testing.T) {
	s := newStand(t, "echo up; echo warning >&2\n")
	free := make(chan struct{})
	s.config.Streams.Console = blocking{s.console, free}
	s.start(t)
	within(t, "the end", func() { <-s.Done() })
	if got := s.Exit(); got != (vmm.Exit{Known: true}) {
		t.Errorf("exit %+v", got)
	}
	if s.log.String() != "warning\n" {
		t.Errorf("log %q", s.log)
	}
	close(free)
	within(t, "the writer", func() {
		for tick := time.Tick(time.Millisecond); !s.console.isClosed(); <-tick {
		}
	})
	if s.console.String() != "up\n" {
		t.Errorf("console %q", s.console)
	}
}

// The VMM's end is noticed though something it started keeps its streams open.
func TestProcess_StreamsHeldOpen(t *testing.T) {
	s := newStand(t, "sleep 1000 &\necho up\n")
	if s.config.Cgroup == "" {
		t.Skip("no control groups")
	}
	s.start(t)
	<-s.Done()
	if got := s.console.String(); got != "up\n" || !s.console.closed {
		t.Errorf("console %q, closed %v", got, s.console.closed)
	}
	// The process effect has done its part; the group's kills the rest.
	if err := (&cgroup.Group{Path: s.config.Cgroup}).Revert(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestProcess_Dial(t *testing.T) {
	s := newStand(t, forever)
	s.start(t)
	s.up(t)
	if _, err := s.Dial(gone(t), store.SocketFile); !errors.Is(err, errGone) {
		t.Errorf("%v, want %v", err, errGone)
	}
	dialled := make(chan error, 1)
	go func() {
		c, err := s.Dial(t.Context(), store.SocketFile)
		if err == nil {
			err = c.Close()
		}
		dialled <- err
	}()
	l := listen(t, s.config.Root(), store.SocketFile)
	defer l.Close()
	if err := <-dialled; err != nil {
		t.Error(err)
	}
}

func TestProcess_DialWhatEnds(t *testing.T) {
	s := newStand(t, "exit 7")
	s.start(t)
	if _, err := s.Dial(t.Context(), store.SocketFile); err == nil ||
		!strings.Contains(err.Error(), "VMM has ended: exit status 7") {
		t.Errorf("dial: %v", err)
	}
}

// listen opens a Unix socket however long its path.
func listen(t *testing.T, dir, name string) net.Listener {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name)})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // d is closed by then
	return l
}

func TestDialSocket(t *testing.T) {
	for _, length := range []int{60, 107, 108, 109, 500} {
		t.Run(fmt.Sprint(length), func(t *testing.T) {
			dir := t.TempDir()
			name := "s"
			for room := length - len(dir) - len("/s"); room > 1; room = length - len(dir) - len("/s") {
				dir = filepath.Join(dir, strings.Repeat("d", min(200, room-1)))
			}
			name = strings.Repeat("s", max(1, length-len(dir)-1))
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			defer listen(t, dir, name).Close()
			c, err := vmm.DialSocket(t.Context(), dir, name)
			if err != nil {
				t.Fatalf("path of %d bytes: %v", len(filepath.Join(dir, name)), err)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			if _, err := vmm.DialSocket(t.Context(), dir, "missing"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("no socket: %v, want fs.ErrNotExist", err)
			}
			// What the VMM may have put there: it does not lead to other sockets.
			other := t.TempDir()
			err = errors.Join(os.Symlink(filepath.Join(dir, name), filepath.Join(other, "link")),
				os.WriteFile(filepath.Join(other, "file"), nil, 0o600))
			if err != nil {
				t.Fatal(err)
			}
			for _, bad := range []string{"link", "file"} {
				if c, err := vmm.DialSocket(t.Context(), other, bad); !errors.Is(err, fs.ErrInvalid) {
					t.Errorf("a %s: %v, %v, want fs.ErrInvalid", bad, c, err)
				}
			}
		})
	}
}

// Where there is no control group, a VMM is known by where it is at home, and its neighbours are
// let be.
func TestAttach_WithoutGroup(t *testing.T) {
	s := newStand(t, forever)
	s.Process = vmm.New(&vmm.Config{ID: "vm-1", Binary: s.config.Binary, Dir: s.config.Dir, Streams: s.config.Streams})
	neighbour := vmm.New(&vmm.Config{
		ID: "vm-1", Binary: s.config.Binary, Dir: s.config.Dir + "-2",
		Streams: vmm.Streams{Console: new(sink), Log: new(sink)},
	})
	if err := errors.Join(os.Mkdir(s.config.Dir+"-2", 0o700), neighbour.Apply(t.Context())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(neighbour.Revert(context.Background()), os.RemoveAll(s.config.Dir+"-2")); err != nil {
			t.Error(err)
		}
	})
	s.start(t)
	s.up(t)
	attached := vmm.Attach(s.config.Dir, "")
	pids, err := attached.PIDs()
	if err != nil || len(pids) == 0 {
		t.Errorf("processes %v, %v", pids, err)
	}
	if err := attached.Wait(gone(t)); !errors.Is(err, errGone) {
		t.Errorf("wait: %v, want %v", err, errGone)
	}
	if how, err := attached.Stop(t.Context(), 0, nil); err != nil || how != vmm.Killed {
		t.Errorf("stopped by %q, %v", how, err)
	}
	if err := s.Wait(t.Context()); err != nil || s.Exit().Signal != syscall.SIGKILL {
		t.Errorf("exit %+v, %v", s.Exit(), err)
	}
	if alive, err := neighbour.Alive(); err != nil || !alive {
		t.Errorf("the neighbour lives: %v, %v", alive, err)
	}
	if err := attached.Wait(t.Context()); err != nil {
		t.Error(err)
	}
}

// The same of a jail, wherever that is.
func TestAttach_JailWithoutGroup(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "odd [a-] *?\\ name")
	testenv.NoLeaks(t)
	home := vmm.Root(dir, "vm-1", "/usr/bin/firecracker", true)
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, store.ConsoleFIFO)
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	console, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	start := func(stdout *os.File) (*exec.Cmd, <-chan error) {
		cmd := exec.Command("sleep", "1000")
		if cmd.Dir = home; stdout != nil {
			cmd.Stdout = stdout
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		return cmd, ended
	}
	sleeper, ended := start(console)
	// Somebody's shell stands there, too.
	shell, shellEnded := start(nil)
	attached := vmm.Attach(dir, "")
	pids, err := attached.PIDs()
	if diff := cmp.Diff([]int{sleeper.Process.Pid}, pids); err != nil || diff != "" {
		t.Errorf("%v\n-want +got:\n%s", err, diff)
		_ = sleeper.Process.Kill()
	}
	if err := attached.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	<-ended
	if alive, err := attached.Alive(); err != nil || alive {
		t.Errorf("alive %v, %v", alive, err)
	}
	_ = shell.Process.Signal(syscall.SIGTERM)
	<-shellEnded
	if got := shell.ProcessState.Sys().(syscall.WaitStatus).Signal(); got != syscall.SIGTERM {
		t.Errorf("the shell was ended by %v", got)
	}
}

func TestAttach_Group(t *testing.T) {
	s := newStand(t, forever)
	if s.config.Cgroup == "" {
		t.Skip("no control groups")
	}
	s.start(t)
	s.up(t)
	attached := vmm.Attach(s.config.Dir, s.config.Cgroup)
	if alive, err := attached.Alive(); err != nil || !alive {
		t.Errorf("alive %v, %v", alive, err)
	}
	if err := attached.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	if alive, err := attached.Alive(); err != nil || alive {
		t.Errorf("alive %v, %v", alive, err)
	}
	<-s.Done()
}

// The VMM's directory may be its own to write in: what is no FIFO is not read.
func TestAdopt_WhatIsNoFIFO(t *testing.T) {
	for name, plant := range map[string]func(path string) error{
		"nothing": func(string) error { return nil },
		"file":    func(path string) error { return os.WriteFile(path, []byte("secret"), 0o600) },
		"link":    func(path string) error { return os.Symlink("/dev/zero", path) },
		"link to another FIFO": func(path string) error {
			return errors.Join(syscall.Mkfifo(path+"-other", 0o600), os.Symlink(path+"-other", path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStand(t, "")
			err := errors.Join(
				os.Mkdir(s.config.Root(), 0o700),
				syscall.Mkfifo(filepath.Join(s.config.Dir, store.ConsoleFIFO), 0o600),
				plant(filepath.Join(s.config.Root(), store.LogFIFO)),
			)
			if err != nil {
				t.Fatal(err)
			}
			if p, err := vmm.Adopt(s.config); err == nil {
				<-p.Done()
				t.Error("it was adopted")
			}
		})
	}
}
