package guestagent

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/agentproto"
)

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Exit codes of a command that could not be run, as shells have them. A signal's number is added to exitSignal.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignal        = 128
)

// environment lays env over the defaults. Of two of a name the later one counts.
func environment(env []string, home string) []string {
	all := []string{"PATH=" + defaultPath, "HOME=" + home, "TERM=linux"}
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

// openConsole opens what a program of the image has as its standard streams, and says whether that is a terminal.
func openConsole() (console *os.File, terminal bool, err error) {
	for _, path := range []string{"/dev/console", os.DevNull} {
		console, err = os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
		if err == nil {
			return console, path != os.DevNull, nil
		}
	}
	return nil, false, err
}

// execInit makes this process the image's own init.
func execInit(env []string) error {
	inits := []string{"/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/etc/init", "/bin/init", "/bin/sh"}
	i := slices.IndexFunc(inits, func(path string) bool {
		_, err := os.Stat(path)
		return err == nil
	})
	if i < 0 {
		return fmt.Errorf("run the image's init: it has none of %s", strings.Join(inits, ", "))
	}
	// The console that we have is a file of the initramfs.
	console, _, err := openConsole()
	if err != nil {
		return fmt.Errorf("run the image's init: %w", err)
	}
	for fd := range 3 {
		if err := unix.Dup3(int(console.Fd()), fd, 0); err != nil {
			return fmt.Errorf("run the image's init: %w", err)
		}
	}
	return fmt.Errorf("run %s: %w", inits[i], syscall.Exec(inits[i], inits[i:i+1], environment(env, "/")))
}

// runCommand returns the command's exit code when it has ended, or could not be started.
func (g *guest) runCommand(b *agentproto.Boot) (int, error) {
	passwd, err := readAccounts("/etc/passwd")
	if err != nil {
		return 0, err
	}
	group, err := readAccounts("/etc/group")
	if err != nil {
		return 0, err
	}
	u, err := resolve(b.User, passwd, group)
	if err != nil {
		return 0, err
	}
	stop, err := agentproto.ParseSignal(cmp.Or(b.StopSignal, "SIGTERM"))
	if err != nil {
		return 0, err
	}
	dir := cmp.Or(b.WorkingDir, "/")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, fmt.Errorf("make working directory: %w", err)
	}
	// From now on Ctrl-Alt-Del is a SIGINT for us.
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF); err != nil {
		return 0, fmt.Errorf("take over Ctrl-Alt-Del: %w", err)
	}
	pid, err := start(b.Command, dir, environment(b.Env, u.home), u)
	if err != nil {
		say("run %q: %v", b.Command[0], err)
		if errors.Is(err, fs.ErrNotExist) {
			return exitNotFound, nil
		}
		return exitNotExecutable, nil
	}
	return g.wait(pid, stop), nil
}

// start starts a command with the console as its terminal.
func start(command []string, dir string, env []string, u user) (pid int, err error) {
	path, err := lookPath(command[0], dir, env)
	if err != nil {
		return 0, err
	}
	console, terminal, err := openConsole()
	if err != nil {
		return 0, err
	}
	defer console.Close()
	fd := int(console.Fd())
	if terminal {
		// The session is ours: the end of its leader discards what the terminal has not put out yet.
		_, err = unix.Setsid()
		err = errors.Join(err, unix.IoctlSetInt(fd, unix.TIOCSCTTY, 0))
		// /dev/stdout leads there, and opening it asks for permission again.
		if err := errors.Join(err, console.Chown(int(u.uid), -1)); err != nil {
			return 0, fmt.Errorf("prepare %s: %w", console.Name(), err)
		}
	}
	pid, err = syscall.ForkExec(path, command, &syscall.ProcAttr{
		Dir: dir, Env: env, Files: []uintptr{uintptr(fd), uintptr(fd), uintptr(fd)},
		Sys: &syscall.SysProcAttr{
			Setpgid:    true, // without us, what is typed is for it
			Credential: &syscall.Credential{Uid: u.uid, Gid: u.gid, Groups: u.groups},
		},
	})
	if err == nil && terminal {
		// It may have been stopped already, for using the terminal in the background.
		err = errors.Join(unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, pid), unix.Kill(-pid, unix.SIGCONT))
	}
	return pid, err
}

// lookPath finds a program as a shell would. Whether it may be run shows when it is.
func lookPath(name, dir string, env []string) (string, error) {
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

// wait reaps processes until the command has ended, and returns its exit code. When asked to stop it asks the command
// and, stopPatience later, kills everything.
func (g *guest) wait(command int, stop syscall.Signal) int {
	asked := g.signals.Stop
	var late <-chan time.Time
	for {
		select {
		case <-g.signals.Child:
			if code, ended := reap(command); ended {
				return code
			}
		case <-asked:
			_ = unix.Kill(command, stop)
			asked, late = nil, time.After(stopPatience)
		case <-late:
			_ = unix.Kill(-1, unix.SIGKILL)
		}
	}
}

// reap waits for all processes that have ended, and tells how the command did if it is among them.
func reap(command int) (code int, ended bool) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil || pid == 0:
			return code, ended
		case pid == command && status.Signaled():
			code, ended = exitSignal+int(status.Signal()), true
		case pid == command:
			code, ended = status.ExitStatus(), true
		}
	}
}
