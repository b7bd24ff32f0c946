package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/lab"
)

const (
	// dumpTime is how long a test binary that is ended may take to say where its goroutines are.
	dumpTime = 5 * time.Second
	// leaveTime is how long processes that a test binary started may outlive it.
	leaveTime = 3 * time.Second
)

// supervise runs a test binary in a directory and returns its exit status. Processes that outlive
// the binary are killed, and named as a failure. SIGTERM ends the binary, which says where its
// goroutines are.
func supervise(dir string, command []string) int {
	// Orphans of what we start become our children.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Println("testrun: become a subreaper:", err)
		return 1
	}
	asked, orphans := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM)
	// A terminal tells all of its group of Ctrl-C, and its end. Whoever runs us tells us in his own
	// way.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGHUP)
	signal.Notify(orphans, syscall.SIGCHLD)
	cmd := exec.Command(command[0], command[1:]...) //nolint:noctx // it is ended by signals, in order
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, os.Stdout, os.Stdout
	// Neither a terminal nor our signals are the tests' business.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		fmt.Println("testrun:", err)
		return 1
	}
	// Or those on this machine, which mostly wait, would get little beside the labs.
	_ = unix.Setpriority(unix.PRIO_PROCESS, cmd.Process.Pid, lab.Niceness)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var err error
	var dumped <-chan time.Time
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		case <-orphans: // as init does: tests look for zombies
			reap(cmd.Process.Pid)
		case <-asked:
			_ = cmd.Process.Signal(syscall.SIGQUIT)
			dumped = time.After(dumpTime)
		case <-dumped:
			_ = cmd.Process.Kill()
		}
	}
	left := killDescendants(leaveTime)
	for _, line := range left {
		fmt.Printf("%s%s\n", leftMark, line)
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return max(1, exit.ExitCode())
	case err != nil || len(left) > 0:
		return 1
	}
	return 0
}

// killDescendants waits until this process has no children, at most for so long, kills those that
// are left, with all below them, and returns their command lines.
func killDescendants(patience time.Duration) (left []string) {
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		reap(0)
		pids := children(os.Getpid())
		switch {
		case len(pids) == 0:
			return left
		case time.Now().Before(end):
			continue
		}
		// Their children become ours, and are seen in the next round.
		for _, pid := range pids {
			if line := fmt.Sprintf("%d %s", pid, commandLine(pid)); !slices.Contains(left, line) {
				left = append(left, line)
			}
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// reap takes notice of the end of all children but one.
func reap(but int) {
	for _, pid := range children(os.Getpid()) {
		if pid != but {
			_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
		}
	}
}

func children(pid int) (pids []int) {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil
	}
	for _, t := range tasks {
		data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		for field := range strings.FieldsSeq(string(data)) {
			if child, err := strconv.Atoi(field); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}

func commandLine(pid int) string {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(data), "\x00", " "))
}
