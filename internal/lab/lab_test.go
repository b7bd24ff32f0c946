package lab_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/lab"
	"push.rocks/smartvm/internal/testenv"
)

// shell returns a lab that runs a script with the ordinary PATH.
func shell(t *testing.T, script string, args ...string) lab.Config {
	c := testenv.LabConfig(t)
	c.Command = append([]string{"sh", "-c", script, "sh"}, args...)
	c.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return c
}

func TestRun(t *testing.T) {
	share := t.TempDir()
	testenv.NoLeaks(t, share)
	private := filepath.Join(t.TempDir(), "private")
	c := shell(t, `
		uname -r; hostname; pwd; echo "$ODD"; echo "$1"; echo "$SMARTVM_IN_LAB"
		echo to stderr >&2
		echo to stderr again >/dev/stderr
		cat >"$2" </dev/null && ls "$2"
		echo result >"$3"/result
		[ -w /dev/kvm ] && [ -w /dev/net/tun ] && echo devices
		cat /sys/fs/cgroup/cgroup.controllers
		cat /sys/class/net/lo/flags
		stat -f -c %T /dev/shm /tmp /run
		modprobe dummy && [ -d /sys/module/dummy ] && echo modprobe
		(sleep 600 >/dev/null 2>&1 &)
		exit 42`, "it's $HOME\nand `more`", private, share)
	c.Env = append(c.Env, "ODD='\"$x\\ \t")
	c.Dir = filepath.Dir(c.Kernel)
	c.Share = []string{share}
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	status, err := lab.Run(t.Context(), c)
	if err != nil || status != 42 {
		t.Errorf("status %d, error %v; want 42", status, err)
	}
	want := strings.Join([]string{
		filepath.Base(c.Modules), "smartvm-lab", c.Dir, "'\"$x\\ \t", "it's $HOME\nand `more`", "1",
		private, "devices", "cpuset cpu io memory hugetlb pids rdma misc", "0x9", "tmpfs", "overlayfs", "tmpfs",
		"modprobe", "",
	}, "\n")
	if got := stdout.String(); got != want {
		t.Errorf("stdout: got %q, want %q", got, want)
	}
	if got, want := stderr.String(), "to stderr\nto stderr again\n"; got != want {
		t.Errorf("stderr: got %q, want %q", got, want)
	}
	if _, err := os.Lstat(private); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file outside the share: %v", err)
	}
	result := filepath.Join(share, "result")
	if got, err := os.ReadFile(result); err != nil || string(got) != "result\n" {
		t.Errorf("a file in the share: %q, %v", got, err)
	}
	if err := os.Remove(result); err != nil {
		t.Error(err)
	}
}

// TestRun_Output pushes more than 10 MB, with bytes of every kind, through both
// streams, of a command that a signal ends then.
func TestRun_Output(t *testing.T) {
	c := shell(t,
		`i=0; while [ $i -lt 20 ]; do cat "$1"; i=$((i+1)); done & i=0; while [ $i -lt 20 ]; do cat "$1" >&2; i=$((i+1)); done; wait; kill -TERM $$`)
	file := filepath.Join(t.TempDir(), "data")
	var chunk bytes.Buffer
	for i := range 70_000 {
		chunk.Write([]byte{byte(i), 0, byte(i >> 8), '\n', 0xff, 0, 0, byte(i * 7)})
	}
	if err := os.WriteFile(file, chunk.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Command = append(c.Command, file)
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	if status, err := lab.Run(t.Context(), c); status != 128+int(unix.SIGTERM) || err != nil {
		t.Errorf("status %d, error %v", status, err)
	}
	want := bytes.Repeat(chunk.Bytes(), 20)
	if len(want) < 10<<20 {
		t.Fatalf("%d bytes are too few", len(want))
	}
	// The lab's shell says how the command ended.
	for name, got := range map[string][]byte{
		"stdout": stdout.Bytes(),
		"stderr": bytes.TrimSuffix(stderr.Bytes(), []byte("Terminated\n")),
	} {
		if !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes that differ from the %d written", name, len(got), len(want))
		}
	}
}

// onWrite calls a function when something is written.
type onWrite func(data []byte) error

func (f onWrite) Write(data []byte) (int, error) { return len(data), f(data) }

func TestRun_Cancel(t *testing.T) {
	testenv.NoLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	c := shell(t, "echo up; sleep 600")
	c.Stdout = onWrite(func([]byte) error {
		cancel()
		return nil
	})
	if status, err := lab.Run(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("status %d, error %v", status, err)
	}
}

func TestRun_CancelledBefore(t *testing.T) {
	testenv.NoLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if status, err := lab.Run(ctx, shell(t, "true")); !errors.Is(err, context.Canceled) {
		t.Errorf("status %d, error %v", status, err)
	}
}

func TestRun_WriterFails(t *testing.T) {
	testenv.NoLeaks(t)
	c := shell(t, "echo up; sleep 600")
	c.Stdout = onWrite(func([]byte) error { return io.ErrShortBuffer })
	if status, err := lab.Run(t.Context(), c); !errors.Is(err, io.ErrShortBuffer) {
		t.Errorf("status %d, error %v", status, err)
	}
}

func TestRun_Dies(t *testing.T) {
	testenv.NoLeaks(t)
	c := shell(t, "echo before; echo c >/proc/sysrq-trigger; sleep 600")
	var out bytes.Buffer
	c.Stdout = &out
	status, err := lab.Run(t.Context(), c)
	if !errors.Is(err, lab.ErrDied) || !strings.Contains(fmt.Sprint(err), "sysrq triggered crash") {
		t.Errorf("status %d, error %v", status, err)
	}
	if got := out.String(); got != "before\n" {
		t.Errorf("stdout: %q", got)
	}
}

// TestRun_Stalls stops what gives the sign of life.
func TestRun_Stalls(t *testing.T) {
	testenv.NoLeaks(t)
	c := shell(t, `for p in /proc/[0-9]*; do
		case $(tr '\0' ' ' <$p/cmdline) in *sh\ /run/lab/start.sh*) [ ${p#/proc/} = $$ ] || kill -STOP ${p#/proc/};; esac
	done; echo stopped; sleep 600`)
	var out bytes.Buffer
	booted := 0
	c.Stdout, c.Booted = &out, func() { booted++ }
	status, err := lab.Run(t.Context(), c)
	if !errors.Is(err, lab.ErrStalled) || !strings.Contains(fmt.Sprint(err), "RIP=") {
		t.Errorf("status %d, error %v, want that it stalled and where its processors are", status, err)
	}
	if got := out.String(); got != "stopped\n" || booted != 1 {
		t.Errorf("stdout %q, booted %d times", got, booted)
	}
}

func TestRun_NoKernel(t *testing.T) {
	testenv.NoLeaks(t)
	c := shell(t, "true")
	c.Kernel = filepath.Join(t.TempDir(), "kernel")
	status, err := lab.Run(t.Context(), c)
	var said *lab.ConsoleError
	if !errors.Is(err, lab.ErrBoot) || !errors.As(err, &said) || !strings.Contains(said.Console, c.Kernel) {
		t.Errorf("status %d, error %v", status, err)
	}
}

func TestRun_NoQEMU(t *testing.T) {
	testenv.NoLeaks(t)
	c := shell(t, "true")
	c.QEMU = filepath.Join(t.TempDir(), "qemu")
	if status, err := lab.Run(t.Context(), c); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("status %d, error %v", status, err)
	}
}

func TestRun_Config(t *testing.T) {
	good := lab.Config{
		Kernel: "/k", Modules: "/m", Busybox: "/b", QEMU: "/q", Dir: "/", Command: []string{"true"},
		Env: []string{"PATH=/usr/bin:/bin"},
	}
	tests := map[string]func(*lab.Config){
		"no kernel":            func(c *lab.Config) { c.Kernel = "" },
		"no modules":           func(c *lab.Config) { c.Modules = "" },
		"no busybox":           func(c *lab.Config) { c.Busybox = "" },
		"no QEMU":              func(c *lab.Config) { c.QEMU = "" },
		"no command":           func(c *lab.Config) { c.Command = nil },
		"directory \"x\"":      func(c *lab.Config) { c.Dir = "x" },
		"share \"x\"":          func(c *lab.Config) { c.Share = []string{"x"} },
		"share \"/,\"":         func(c *lab.Config) { c.Share = []string{"/,"} },
		"share \"/dev/null\"":  func(c *lab.Config) { c.Share = []string{"/dev/null"} },
		"9 shares":             func(c *lab.Config) { c.Share = make([]string, 9) },
		"environment \"X\"":    func(c *lab.Config) { c.Env = append(c.Env, "X") },
		"environment \"=X\"":   func(c *lab.Config) { c.Env = append(c.Env, "=X") },
		"NUL":                  func(c *lab.Config) { c.Command = []string{"true", "\x00"} },
		"executable file not ": func(c *lab.Config) { c.Command = []string{"no-such-program"} },
	}
	for want, spoil := range tests {
		c := good
		spoil(&c)
		if _, err := lab.Run(t.Context(), c); !errors.Is(err, lab.ErrConfig) || !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// parentVariable makes a copy of the test binary run a lab until it is killed.
const parentVariable = "SMARTVM_TEST_LAB_PARENT"

// TestRun_ParentKilled kills the process that runs a lab in the way that leaves
// it no time for anything.
func TestRun_ParentKilled(t *testing.T) {
	if os.Getenv(parentVariable) != "" {
		c := shell(t, "echo lab is up; sleep 600")
		c.Stdout = os.Stdout
		_, err := lab.Run(t.Context(), c)
		t.Fatal(err)
	}
	testenv.NoLeaks(t)
	c := testenv.LabConfig(t)
	parent := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	parent.Env = append(os.Environ(), parentVariable+"=1")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<10)
	n, err := out.Read(buf)
	if !strings.Contains(string(buf[:n]), "lab is up") {
		t.Errorf("read %q, error %v", buf[:n], err)
	}
	qemu := childRunning(t, parent.Process.Pid, c.QEMU)
	defer unix.Close(qemu)
	if err := parent.Process.Signal(syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	_ = parent.Wait()
	// A pidfd becomes readable when its process has ended.
	fds := []unix.PollFd{{Fd: int32(qemu), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, int((10 * time.Second).Milliseconds())); n != 1 {
		t.Errorf("QEMU lives on: %v", err)
		_ = unix.PidfdSendSignal(qemu, unix.SIGKILL, nil, 0)
	}
}

// childRunning returns a pidfd of the child of a process that runs a program.
func childRunning(t *testing.T, parent int, program string) int {
	t.Helper()
	program, err := filepath.EvalSymlinks(program)
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		data, _ := os.ReadFile(file)
		for field := range strings.FieldsSeq(string(data)) {
			if exe, _ := os.Readlink("/proc/" + field + "/exe"); exe != program {
				continue
			}
			pid, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}
	}
	t.Fatalf("%d has no child that runs %s", parent, program)
	return -1
}
