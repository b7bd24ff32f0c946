package guestagent

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/process"
	"push.rocks/smartvm/internal/guestagent/server"
)

// openConsole opens what a program of the image has as its standard streams, and says whether that
// is a terminal.
func openConsole() (console *os.File, terminal bool, err error) {
	for _, path := range []string{"/dev/console", os.DevNull} {
		console, err = os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
		if err == nil {
			return console, path != os.DevNull, nil
		}
	}
	return nil, false, err
}

// becomeInit returns only if it fails.
func (g *system) becomeInit(b *guest.Boot) error {
	if _, err := makeWorkingDir(b); err != nil {
		say("%v", err) // programs that exec runs elsewhere do without
	}
	if b.Secrets {
		if err := g.hearSecrets(b); err != nil {
			return err
		}
	}
	if err := keepServer(b); err != nil {
		say("%v", err) // the host does without
	}
	return execInit(b)
}

// execInit makes this process the image's init: the command that is one, or the image's own.
func execInit(b *guest.Boot) error {
	command, env := b.Command, process.Environment(b.Env, "/")
	program, err := ownInit()
	if len(command) > 0 {
		program, err = process.LookPath(command[0], cmp.Or(b.WorkingDir, "/"), env)
		if err == nil && b.WorkingDir != "" {
			err = os.Chdir(b.WorkingDir)
		}
	} else {
		command = []string{program}
	}
	if err != nil {
		return fmt.Errorf("run the image's init: %w", err)
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
	runtime.LockOSThread()
	process.Usual()
	return fmt.Errorf("run %s: %w", program, syscall.Exec(program, command, env))
}

// ownInit is the init of an image that says nothing of what to run, where kernels look for it.
func ownInit() (string, error) {
	inits := []string{
		"/sbin/init", "/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/etc/init",
		"/bin/init", "/bin/sh",
	}
	for _, path := range inits {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("it has none of %s", strings.Join(inits, ", "))
}

// makeWorkingDir makes the directory that a command begins in, as docker does.
func makeWorkingDir(b *guest.Boot) (string, error) {
	dir := cmp.Or(b.WorkingDir, "/")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make working directory: %w", err)
	}
	return dir, nil
}

// runCommand returns the command's exit when it has ended, or could not be started.
func (g *system) runCommand(b *guest.Boot, srv *server.Server) (agentproto.Exit, error) {
	stop, err := guest.ParseSignal(cmp.Or(b.StopSignal, "SIGTERM"))
	if err != nil {
		return agentproto.Exit{}, err
	}
	dir, err := makeWorkingDir(b)
	if err != nil {
		return agentproto.Exit{}, err
	}
	// From now on Ctrl-Alt-Del is a SIGINT for us.
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF); err != nil {
		return agentproto.Exit{}, fmt.Errorf("take over Ctrl-Alt-Del: %w", err)
	}
	if b.Attach {
		asked, running := make(chan os.Signal, 1), make(chan int, 1)
		ended := make(chan struct{})
		defer close(ended)
		go g.stopCommand(asked, running, ended, stop)
		exit, _ := srv.Main(asked, func(pid int) { running <- pid; srv.Reached(agentproto.PhaseCommand, uptime()) })
		return exit, nil
	}
	u, err := process.Find(b.User)
	if err != nil {
		return agentproto.Exit{}, err
	}
	pid, done, err := g.reaper.Start(func() (int, error) {
		return start(b.Command, dir, process.Environment(b.Env, u.Home), u)
	})
	if err != nil {
		err = fmt.Errorf("run %q: %w", b.Command[0], err)
		say("%v", err)
		return process.Failed(err), nil
	}
	srv.Reached(agentproto.PhaseCommand, uptime())
	running, ended := make(chan int, 1), make(chan struct{})
	running <- pid
	defer close(ended)
	go g.stopCommand(nil, running, ended, stop)
	return process.Ended(<-done), nil
}

// stopCommand waits for somebody to ask for the end. Then it asks the command that runs and kills
// everything if that does not end in time; where none runs yet it says so to asked.
func (g *system) stopCommand(asked chan<- os.Signal, running <-chan int, ended <-chan struct{}, stop syscall.Signal) {
	select {
	case s := <-g.signals.Stop:
		select {
		case pid := <-running:
			g.reaper.Signal(pid, stop)
		default:
			asked <- s
			return
		}
	case <-ended:
		return
	}
	select {
	case <-time.After(g.patience()):
		_ = unix.Kill(-1, unix.SIGKILL)
	case <-ended:
	}
}

// start starts a command with the console as its terminal.
func start(command []string, dir string, env []string, u process.User) (pid int, err error) {
	path, err := process.LookPath(command[0], dir, env)
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
		if err := errors.Join(err, console.Chown(int(u.UID), -1)); err != nil {
			return 0, fmt.Errorf("prepare %s: %w", console.Name(), err)
		}
	}
	pid, err = syscall.ForkExec(path, command, &syscall.ProcAttr{
		Dir: dir, Env: env, Files: []uintptr{uintptr(fd), uintptr(fd), uintptr(fd)},
		Sys: &syscall.SysProcAttr{
			Setpgid:    true, // without us, what is typed is for it
			Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups},
		},
	})
	if err == nil && terminal {
		// It may have been stopped already, for using the terminal in the background.
		err = errors.Join(unix.IoctlSetPointerInt(fd, unix.TIOCSPGRP, pid), unix.Kill(-pid, unix.SIGCONT))
	}
	return pid, err
}
