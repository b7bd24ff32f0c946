// Package process runs programs of a guest's image.
package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agentproto"
)

// DefaultPath is where programs are looked for, unless the image says otherwise.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Exit codes of a command that could not be run, as shells have them. A signal's number is added to
// ExitSignal.
const (
	ExitNotExecutable = 126
	ExitNotFound      = 127
	ExitSignal        = 128
)

// Environment lays env over the defaults. Of two of a name the later one counts.
func Environment(env []string, home string) []string {
	all := []string{"PATH=" + DefaultPath, "HOME=" + home, "TERM=linux"}
	at := map[string]int{"PATH": 0, "HOME": 1, "TERM": 2}
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if i, ok := at[name]; ok {
			all[i] = e
			continue
		}
		at[name] = len(all)
		all = append(all, e)
	}
	return all
}

// LookPath finds a program as a shell would. Whether it may be run shows when it is.
func LookPath(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if filepath.IsAbs(name) {
			return name, nil
		}
		return filepath.Join(dir, name), nil
	}
	i := slices.IndexFunc(env, func(e string) bool { return strings.HasPrefix(e, "PATH=") })
	for _, in := range filepath.SplitList(strings.TrimPrefix(env[i], "PATH=")) {
		if !filepath.IsAbs(in) {
			in = filepath.Join(dir, in)
		}
		path := filepath.Join(in, name)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w in PATH", fs.ErrNotExist)
}

// Reaper waits for all processes that are below this one, and tells those who have started one how
// it ended.
type Reaper struct {
	mu      sync.Mutex
	waiting map[int]chan<- unix.WaitStatus
}

// Start runs fork, which starts a process, and returns a channel that gets how it ends.
func (r *Reaper) Start(fork func() (pid int, err error)) (int, <-chan unix.WaitStatus, error) {
	// Nothing is reaped meanwhile: it may end before its number is known.
	r.mu.Lock()
	defer r.mu.Unlock()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	Usual()
	pid, err := fork()
	if err != nil {
		return 0, nil, err
	}
	if r.waiting == nil {
		r.waiting = map[int]chan<- unix.WaitStatus{}
	}
	done := make(chan unix.WaitStatus, 1)
	r.waiting[pid] = done
	return pid, done, nil
}

// Run reaps whenever there is a SIGCHLD, until there are no more.
func (r *Reaper) Run(child <-chan os.Signal) {
	for range child {
		r.reap()
	}
}

func (r *Reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil || pid == 0:
			return
		}
		if done := r.waiting[pid]; done != nil {
			done <- status
			delete(r.waiting, pid)
		}
	}
}

// Signal sends a signal to a process that Start has started, or if pid is negative to its group,
// unless it has been reaped: then its number may be another's.
func (r *Reaper) Signal(pid int, s unix.Signal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.waiting[max(pid, -pid)] != nil {
		_ = unix.Kill(pid, s)
	}
}

// Ended is the end of a program, as a shell has it.
func Ended(s unix.WaitStatus) agentproto.Exit {
	if s.Signaled() {
		return agentproto.Exit{Code: ExitSignal + int(s.Signal()), Signal: int(s.Signal())}
	}
	return agentproto.Exit{Code: s.ExitStatus()}
}

// Failed is the end of a program that could not be run, as a shell has it.
func Failed(err error) agentproto.Exit {
	code := ExitNotExecutable
	if errors.Is(err, fs.ErrNotExist) {
		code = ExitNotFound
	}
	return agentproto.Exit{Code: code, Error: err.Error()}
}
