package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/tinyguest"
)

func TestMain(m *testing.M) {
	testenv.OthersOut()
	testscript.Main(m, map[string]func(){"smartvm": main})
}

// patience bounds every wait of a script.
const patience = 20 * time.Second

// TestScript is the contract of the command line. Each script has a runtime directory of its own,
// in which no VM may be left.
func TestScript(t *testing.T) { runScripts(t, "../../testdata/script") }

// TestScript_Network is the same for VMs on networks, in a network of its own.
func TestScript_Network(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if nettest.Alone(t) {
		runScripts(t, "../../testdata/script/alone")
	}
}

func runScripts(t *testing.T, dir string) {
	testenv.Require(t, testenv.KVM, testenv.Root)
	// Short, and on the tmpfs that VMs are kept on otherwise.
	base, err := os.MkdirTemp("/dev/shm", "smartvm-script-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	testenv.NoLeaks(t, base)
	firecracker, jailer := testenv.Firecracker(t), testenv.Jailer(t)
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		Condition: func(name string) (bool, error) {
			if name != "foreignexits" {
				return false, fmt.Errorf("unknown condition %q", name)
			}
			return testenv.ForeignExits(t), nil
		},
		Setup: func(e *testscript.Env) error {
			name := strings.TrimPrefix(filepath.Base(e.WorkDir), "script-")
			dir := filepath.Join(base, name)
			e.Setenv("SMARTVM_RUNTIME_DIR", dir)
			e.Setenv("SMARTVM_DATA_DIR", filepath.Join(dir+".data"))
			e.Setenv("SMARTVM_FIRECRACKER", firecracker)
			e.Setenv("SMARTVM_JAILER", jailer)
			e.Setenv("GORACE", "atexit_sleep_ms=0") // the race detector would have each command take a second
			e.Values[backgroundKey{}] = map[string]*background{}
			e.Defer(func() { leave(e.T().(testing.TB), dir) })
			return writeGuests(e.WorkDir)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code": codeCommand, "eventually": eventuallyCommand, "until": untilCommand, "begin": beginCommand,
			"signal": signalCommand, "end": endCommand,
			"endsupervisor": endSupervisorCommand, "releases": releasesCommand, "registry": registryCommand,
		},
	})
}

// writeGuests makes kernels named after what they do.
func writeGuests(dir string) error {
	for name, then := range map[string]tinyguest.Then{
		"reboot": tinyguest.Reboot, "idle": tinyguest.Idle, "count": tinyguest.Count, "heeding": tinyguest.AwaitKey,
		"echo":  tinyguest.Echo,
		"crash": tinyguest.Crash, "flood": tinyguest.Flood,
	} {
		image := tinyguest.Image(tinyguest.Guest{Message: "this is " + name + "\n", Then: then})
		if err := os.WriteFile(filepath.Join(dir, name), image, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// leave removes what a script that went well has emptied, and all that one that failed has left.
func leave(t testing.TB, dir string) {
	h, err := smartvm.Open(smartvm.Options{RuntimeDir: dir, DataDir: dir + ".data"})
	if err != nil {
		return // the script made it unusable on purpose
	}
	defer h.Close()
	ctx := t.Context()
	if _, err := h.Sweep(ctx); err != nil {
		t.Error(err)
	}
	all, err := h.Machines(ctx)
	if err != nil {
		t.Error(err)
	}
	for _, m := range all {
		if !t.Failed() {
			t.Errorf("the script left VM %s", m.ID())
		}
		_, err := m.Stop(ctx, smartvm.StopOptions{})
		if err := errors.Join(err, m.Remove(ctx)); err != nil && !errors.Is(err, smartvm.ErrNotFound) {
			t.Error(err)
		}
	}
	if err := os.RemoveAll(filepath.Join(dir, ".events")); err != nil { // what has happened is kept
		t.Error(err)
	}
	for _, empty := range []string{
		filepath.Join(dir, ".leases"), filepath.Join(dir, ".networks"), dir,
		filepath.Join(dir+".data", "staging"),
	} {
		if err := os.Remove(empty); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
	if err := os.RemoveAll(dir + ".data"); err != nil {
		t.Error(err)
	}
}

// codeCommand runs a program that must exit with a code: code N program args...
func codeCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N program args...")
	}
	if got := exitCode(ts, args[1:]); got != args[0] {
		ts.Fatalf("exit code %s, want %s", got, args[0])
	}
}

// eventuallyCommand is code for a program that now and then ends otherwise: Firecracker can call a
// crash a success.
func eventuallyCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: eventually N program args...")
	}
	for deadline := time.Now().Add(patience); exitCode(ts, args[1:]) != args[0]; {
		if time.Now().After(deadline) {
			ts.Fatalf("no exit code %s within %v", args[0], patience)
		}
	}
}

func exitCode(ts *testscript.TestScript, args []string) string {
	err := ts.Exec(args[0], args[1:]...)
	if err == nil {
		return "0"
	}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		ts.Fatalf("%v", err)
	}
	return strconv.Itoa(exit.ExitCode())
}

// untilCommand runs a program again and again until its standard output matches: [!] until pattern
// program args...
func untilCommand(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage: [!] until pattern program args...")
	}
	want, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		_ = ts.Exec(args[1], args[2:]...) // what is waited for may be that it succeeds
		if want.MatchString(ts.ReadFile("stdout")) != neg {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("not so within %v", patience)
		}
	}
}

// background is a program that a script lets run.
type background struct {
	cmd  *exec.Cmd
	done chan struct{}
}

type backgroundKey struct{}

func named(ts *testscript.TestScript, name string) *background {
	b := ts.Value(backgroundKey{}).(map[string]*background)[name]
	if b == nil {
		ts.Fatalf("there is no background program %q", name)
	}
	return b
}

// beginCommand starts a program whose output goes to the files NAME.out and NAME.err: begin NAME
// program args...
func beginCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: begin NAME program args...")
	}
	var path string
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		path = filepath.Join(dir, args[1])
		if _, err := os.Stat(path); err == nil {
			break
		}
	}
	b := &background{cmd: exec.Command(path, args[2:]...), done: make(chan struct{})}
	for suffix, to := range map[string]*io.Writer{".out": &b.cmd.Stdout, ".err": &b.cmd.Stderr} {
		f, err := os.Create(ts.MkAbs(args[0] + suffix))
		ts.Check(err)
		defer f.Close()
		*to = f
	}
	b.cmd.Dir = ts.MkAbs(".")
	b.cmd.Env = os.Environ()
	for _, name := range []string{
		"PATH", "SMARTVM_RUNTIME_DIR", "SMARTVM_DATA_DIR", "SMARTVM_FIRECRACKER",
		"SMARTVM_JAILER", "GORACE",
	} {
		b.cmd.Env = append(b.cmd.Env, name+"="+ts.Getenv(name))
	}
	ts.Check(b.cmd.Start())
	go func() {
		defer close(b.done)
		_ = b.cmd.Wait()
	}()
	ts.Defer(func() {
		_ = b.cmd.Process.Kill()
		<-b.done
	})
	ts.Value(backgroundKey{}).(map[string]*background)[args[0]] = b
}

// signalCommand sends a signal to a background program: signal NAME INT|TERM|KILL
func signalCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: signal NAME INT|TERM|KILL")
	}
	signals := map[string]os.Signal{"INT": os.Interrupt, "TERM": syscall.SIGTERM, "KILL": os.Kill}
	ts.Check(named(ts, args[0]).cmd.Process.Signal(signals[args[1]]))
}

// endCommand waits for the end of a background program: end NAME CODE, -1 after a signal
func endCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: end NAME CODE")
	}
	b := named(ts, args[0])
	select {
	case <-b.done:
	case <-time.After(patience):
		ts.Fatalf("%s did not end within %v", args[0], patience)
	}
	ts.Logf("[stderr of %s]\n%s", args[0], ts.ReadFile(args[0]+".err"))
	if got := b.cmd.ProcessState.ExitCode(); strconv.Itoa(got) != args[1] {
		ts.Fatalf("%s: exit code %d, want %s", args[0], got, args[1])
	}
}

// endSupervisorCommand signals a VM's supervisor and waits until it is gone: endsupervisor
// TERM|KILL ID
func endSupervisorCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: endsupervisor TERM|KILL ID")
	}
	sig := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL}[args[0]]
	ts.Check(endSupervisor(ts.Getenv("SMARTVM_RUNTIME_DIR"), args[1], sig))
}

// endSupervisor ends the process that supervises a detached VM.
func endSupervisor(runtimeDir, id string, sig syscall.Signal) error {
	pids, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, proc := range pids {
		line, _ := os.ReadFile(filepath.Join(proc, "cmdline"))
		argv := strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
		if len(argv) < 2 || argv[1] != "supervise" || !strings.Contains(string(line), runtimeDir) || argv[len(argv)-1] != id {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err == nil {
			err = syscall.Kill(pid, sig)
		}
		if err != nil {
			return err
		}
		for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
			// Until its last thread is a zombie, or it is gone, it may still hold the VM's lock.
			stat, err := os.ReadFile(filepath.Join(proc, "stat"))
			threads, _ := os.ReadDir(filepath.Join(proc, "task"))
			if err != nil || len(threads) <= 1 && bytes.Contains(stat, []byte(") Z ")) {
				return nil
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("process %d does not end", pid)
			}
		}
	}
	return fmt.Errorf("%s has no supervisor", id)
}
