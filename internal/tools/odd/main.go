// Command odd becomes a program in an environment that is legal and unusual in every way at once:
// signals are ignored and blocked, the umask is strict, there is no home, TMPDIR is long and has
// spaces, locale and time zone are foreign, there is no terminal type, descriptors are open and
// standard input is not. A program fails in it only if it depends on what it inherits.
//
//	odd -- program argument...
//
// The process stays the same, and so does the exit status. Caches stay where they are. SIGCHLD
// keeps its default action: where it is ignored, no Go program can wait for its children. All
// programs that run in it with the same TMPDIR get the same odd one.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	ownFailure  = 125 // the exit status when the program did not start
	umask       = 0o077
	tempName    = "odd temp directory with more in its name than what fits into the address of a socket which is 107 bytes in all"
	descriptors = 18 // open ones beside the standard streams
)

// ignored are what nohup, shells' background jobs and daemons ignore, and some more.
var ignored = []os.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGTSTP,
	unix.SIGTTIN, unix.SIGTTOU,
}

// blocked are what a program blocks that waits for signals by sigwait or signalfd, and passes on to
// its children if it does not think of it.
var blocked = []unix.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGCHLD, unix.SIGALRM, unix.SIGUSR1,
	unix.SIGWINCH,
}

func main() {
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	fmt.Fprintln(os.Stderr, "odd:", become(args))
	os.Exit(ownFailure)
}

// become does not return when it succeeds.
func become(args []string) error {
	if len(args) == 0 {
		return errors.New("no program")
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	if err := setEnvironment(); err != nil {
		return err
	}
	unix.Umask(umask)
	signal.Ignore(ignored...)
	runtime.LockOSThread() // it is this thread's mask that the program gets
	var mask unix.Sigset_t
	for _, s := range blocked {
		mask.Val[0] |= 1 << (s - 1)
	}
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &mask, nil); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	if err := openDescriptors(); err != nil {
		return fmt.Errorf("open descriptors: %w", err)
	}
	return fmt.Errorf("run %s: %w", program, syscall.Exec(program, args, os.Environ()))
}

func setEnvironment() error {
	caches, err := os.UserCacheDir()
	if err != nil {
		return err
	}
	temp := filepath.Join(os.TempDir(), tempName)
	if err := os.MkdirAll(temp, 0o755); err != nil {
		return err
	}
	set := map[string]string{
		"XDG_CACHE_HOME": caches, "XDG_CONFIG_HOME": "relative", "XDG_DATA_HOME": "/nonexistent/data",
		"XDG_RUNTIME_DIR": "/nonexistent/run",
		"TMPDIR":          temp, "LC_ALL": "tr_TR.UTF-8", "LANG": "de_DE.UTF-8", "TZ": "Pacific/Chatham", "NO_COLOR": "1",
		"COLUMNS": "1", "LINES": "1",
		"CDPATH": "/", "POSIXLY_CORRECT": "1",
	}
	if home, err := os.UserHomeDir(); err == nil && os.Getenv("GOPATH") == "" {
		set["GOPATH"] = filepath.Join(home, "go") // where modules are
	}
	set["HOME"] = "/nonexistent"
	for name, value := range set {
		err = errors.Join(err, os.Setenv(name, value))
	}
	return errors.Join(err, os.Unsetenv("TERM"))
}

// openDescriptors closes standard input, and opens a directory many times: a program that is shut
// in could get out by it.
func openDescriptors() error {
	root, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for range descriptors {
		if err == nil {
			_, err = unix.FcntlInt(uintptr(root), unix.F_DUPFD, 3)
		}
	}
	return errors.Join(err, unix.Close(0))
}
