package process_test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/guestagent/process"
)

const deafVariable = "SMARTVM_TEST_DEAF"

// A program has no signal ignored or blocked, though the agent has been started so, and the agent
// is as deaf as before.
func TestUsual(t *testing.T) {
	if os.Getenv(deafVariable) != "" {
		deafAgent(t)
		return
	}
	ignored := []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGTSTP, unix.SIGTTOU}
	signal.Ignore(ignored...)
	defer signal.Reset(ignored...)
	// A thread of its own, which ends with its mask.
	done := make(chan struct{})
	var out []byte
	var err error
	go func() {
		defer close(done)
		runtime.LockOSThread()
		blocked := unix.Sigset_t{Val: [16]uint64{1<<(unix.SIGUSR1-1) | 1<<(unix.SIGTERM-1)}}
		if err = unix.PthreadSigmask(unix.SIG_BLOCK, &blocked, nil); err != nil {
			return
		}
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestUsual$", "-test.v")
		cmd.Env = append(os.Environ(), deafVariable+"=1")
		out, err = cmd.CombinedOutput()
	}()
	<-done
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// libcSignals are the three after the standard ones, which belong to a C library's threads: Go
// leaves them as they are.
const libcSignals = 7 << 31

// deafAgent starts a program as the agent does.
func deafAgent(t *testing.T) {
	deaf := process.Ignored()
	if len(deaf) == 0 {
		t.Fatal("no signal is ignored")
	}
	signal.Notify(make(chan os.Signal, 1), deaf...)
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	var reaper process.Reaper
	go reaper.Run(child)
	status, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer status.Close()
	_, done, err := reaper.Start(func() (int, error) {
		return syscall.ForkExec("/bin/grep", []string{"grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"},
			&syscall.ProcAttr{Files: []uintptr{0, w.Fd(), 2}})
	})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(status)
	<-done
	var blocked, ignored uint64
	if _, scanErr := fmt.Sscanf(string(got), "SigBlk:\t%x\nSigIgn:\t%x\n", &blocked, &ignored); err != nil ||
		scanErr != nil || blocked|ignored&^libcSignals != 0 {
		t.Errorf("got %q, %v, want that no signal is blocked or ignored", got, err)
	}
	if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
		t.Error(err)
	}
}
