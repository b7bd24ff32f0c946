package smartvm_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/agentbin"
)

// bootGuest starts a VM and waits until its guest is ready. The caller ends it by endGuest.
func bootGuest(t *testing.T, h *smartvm.Host, spec smartvm.Spec) *smartvm.Machine {
	t.Helper()
	m := startGuest(t, h, spec)
	ready(t, m)
	return m
}

// startGuest starts a VM and does not wait for its guest.
func startGuest(t *testing.T, h *smartvm.Host, spec smartvm.Spec) *smartvm.Machine {
	t.Helper()
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return m
}

func endGuest(t *testing.T, m *smartvm.Machine) {
	t.Helper()
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// askToEnd ends a guest that goes by itself when it is asked to in the way want.
func askToEnd(t *testing.T, m *smartvm.Machine, want string) {
	t.Helper()
	how, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: linuxPatience})
	if err != nil || how != want {
		t.Errorf("stopped by %q, %v, want %q", how, err, want)
	}
}

// shutDown is endGuest of a guest that goes by itself when it is asked to.
func shutDown(t *testing.T, m *smartvm.Machine, want string) {
	t.Helper()
	askToEnd(t, m, want)
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// told is what a shell's script in a guest puts out.
func told(t *testing.T, m *smartvm.Machine, script string) string {
	t.Helper()
	var out bytes.Buffer
	exit, err := m.Exec(patient(t), smartvm.Cmd{Args: sh(script), Stdout: &out, User: "root"})
	if err != nil || exit.Code != 0 {
		t.Fatalf("%s: %+v, %v, %q", script, exit, err, &out)
	}
	return strings.TrimSpace(out.String())
}

func number(t *testing.T, text string) int {
	t.Helper()
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

// What the agent is to a guest as its process 1, and what neither it nor we keep of what has been.
func TestLinuxAgent(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	m := restoreGuest(t, h, unconnected, smartvm.RestoreOptions{})
	t.Run("Process1", func(t *testing.T) {
		const reap = "(sleep 0.1 & echo $! >/tmp/orphan); while [ -d /proc/$(cat /tmp/orphan) ]; do sleep 0.1; done; "
		for name, tt := range map[string]struct{ script, want string }{
			"cgroup2": {"grep -c '^cgroup2 /sys/fs/cgroup ' /proc/mounts", "1"},
			"reaps":   {reap + "grep -l '^State:.*Z' /proc/[0-9]*/status 2>/dev/null | wc -l", "0"},
			"stays": {
				"kill -9 1; kill -HUP 1; kill -QUIT 1; kill -ABRT 1; kill -SEGV 1; " + reap + "echo lives",
				"lives",
			},
			"timer slack":   {"cat /proc/$$/timerslack_ns", "50000"},
			"no more drops": {"ls /init /modules 2>/dev/null | wc -l", "0"},
		} {
			if got := told(t, m, tt.script); got != tt.want {
				t.Errorf("%s: got %q, want %q", name, got, tt.want)
			}
		}
		// Emulated, an exec takes its time.
		if clock := time.Unix(int64(number(t, told(t, m, "date +%s"))), 0); time.Since(clock).Abs() > 10*time.Second {
			t.Errorf("the guest's clock says %v", clock)
		}
	})
	t.Run("Large", func(t *testing.T) {
		exit, err := m.Exec(patient(t), smartvm.Cmd{Args: []string{"true", strings.Repeat("x", 1<<20)}})
		if err != nil || exit.Code != 126 || !strings.Contains(exit.Reason, "argument list too long") {
			t.Errorf("a long argument: %+v, %v", exit, err)
		}
		if _, err := m.Exec(patient(t),
			smartvm.Cmd{Args: []string{"true"}, Env: []string{"A=" + strings.Repeat("x", 5<<20)}}); err == nil ||
			!strings.Contains(err.Error(), "too long") {
			t.Errorf("a long environment: %v", err)
		}
	})
	t.Run("Steady", func(t *testing.T) {
		execs := func(n int) {
			for range n {
				inGuest(t, m, smartvm.Cmd{Args: []string{"true"}}, 0, "")
			}
		}
		look := func() (guestKiB, guestFiles, files, goroutines int) {
			// What is free goes back to the guest when nothing has ended for a while. Pages of its program,
			// which it touches by and by, are no growth.
			guestKiB = number(t, told(t, m, "sleep 3; grep RssAnon: /proc/1/status | tr -dc 0-9"))
			return guestKiB, number(t, told(t, m, "ls /proc/1/fd | wc -l")), openFiles(t), runtime.NumGoroutine()
		}
		execs(20)
		kib, guestFiles, files, goroutines := look()
		execs(200)
		kib2, guestFiles2, files2, goroutines2 := look()
		t.Logf("the agent has %d KiB, then %d", kib, kib2)
		if kib2 > kib+512 || guestFiles2 > guestFiles || files2 > files || goroutines2 > goroutines {
			t.Errorf("200 execs: agent %d to %d KiB and %d to %d files; here %d to %d files and %d to %d goroutines",
				kib, kib2, guestFiles, guestFiles2, files, files2, goroutines, goroutines2)
		}
	})
	// A program waits out a pause, and whoever asks meanwhile is told.
	t.Run("Pause", func(t *testing.T) {
		typed, keys := io.Pipe()
		defer keys.Close()
		out, in := io.Pipe()
		done := make(chan error, 1)
		ctx := patient(t)
		go func() {
			exit, err := m.Exec(ctx, smartvm.Cmd{Args: sh("echo ready; read x; echo got $x"), Stdin: typed, Stdout: in})
			if err == nil && exit.Code != 0 {
				err = errors.New(exit.Reason)
			}
			in.CloseWithError(io.EOF)
			done <- err
		}()
		line := make([]byte, len("ready\n"))
		if _, err := io.ReadFull(out, line); err != nil {
			t.Fatal(err)
		}
		if err := m.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		var state *smartvm.StateError
		if _, err := m.Exec(ctx, smartvm.Cmd{Args: []string{"true"}}); !errors.As(err, &state) ||
			state.State != smartvm.Paused {
			t.Errorf("exec in a paused VM: %v", err)
		}
		if _, err := io.WriteString(keys, "it\n"); err != nil {
			t.Fatal(err)
		}
		if err := m.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(out)
		if err := errors.Join(err, <-done); err != nil || string(rest) != "got it\n" {
			t.Errorf("after the pause: %q, %v", rest, err)
		}
	})
	// Whoever is busy in a guest that ends is told so, and what it said last.
	t.Run("Ends", func(t *testing.T) {
		archive, w := io.Pipe()
		defer w.Close()
		copied := make(chan error, 1)
		ctx := patient(t)
		go func() {
			err := m.CopyTo(ctx, "-", "/dev/shm", archive, smartvm.CopyOptions{})
			_ = archive.CloseWithError(err)
			copied <- err
		}()
		const size = 1 << 20 // what comes last waits here for more
		files := tar.NewWriter(w)
		err := files.WriteHeader(&tar.Header{Name: "sign", Typeflag: tar.TypeDir, Mode: 0o755})
		if err == nil {
			err = files.WriteHeader(&tar.Header{Name: "file", Typeflag: tar.TypeReg, Mode: 0o644, Size: 2 * size})
		}
		if err == nil {
			_, err = files.Write(make([]byte, size))
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = m.Exec(ctx,
			smartvm.Cmd{
				Args: sh("until [ -d /dev/shm/sign ]; do sleep 0.1; done; echo last words >/dev/console; sleep 1; echo b >/proc/sysrq-trigger; sleep 100"),
			})
		for what, err := range map[string]error{"exec in": err, "copy to": <-copied} {
			var ended *smartvm.MachineError
			if !errors.As(err, &ended) || ended.Stage != what || ended.Exit == nil ||
				ended.Exit.Outcome != smartvm.OutcomeExited || !strings.Contains(ended.Console, "last words") {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// A small system with an init of its own boots as on a machine of its own, with the agent beside
// it, and goes when it is asked to.
func TestLinuxAgent_BusyboxInit(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	m := bootGuest(t, h, smartvm.Spec{Image: "minimal", Name: "box", MachineConfig: linuxMachine(256)})
	if got := told(t, m, "cat /proc/1/comm /proc/1/timerslack_ns; hostname"); got != "init\n50000\nbox" {
		t.Errorf("process 1: %q", got)
	}
	checkClock(t, m)
	checkRestart(t, m)
	shutDown(t, m, smartvm.AgentStop)
}

// A guest that boots by itself answers when the agent is a service of it. Its VM lives without, and
// the guest, if it reads its keyboard, shuts down by itself when it is asked to.
func TestLinuxAgent_Service(t *testing.T) {
	h := linuxHost(t, smartvm.LaunchDirect)
	disk := filepath.Join(t.TempDir(), "agent")
	program := agentbin.Agent()
	if program == nil {
		t.Fatal("this test was built without an agent: make agent")
	}
	if err := os.WriteFile(disk, append(program, make([]byte, -len(program)&511)...), 0o644); err != nil {
		t.Fatal(err)
	}
	// The kernel signals init, which busybox's shell would not outlive: a trap makes it reboot.
	spec := linuxSpec(t,
		linuxInitrd(t,
			"cat /dev/vda >/agent; chmod 755 /agent; mkdir /tmp /etc; echo root:x:0:0::/:/bin/sh >/etc/passwd\nwhile [ ! -e /tmp/over ]; do /agent serve; sleep 0.1; done\n"+
				"echo 0 >/proc/sys/kernel/ctrl-alt-del; trap 'echo asked to stop; reboot -f' INT\necho no agent\nwhile :; do sleep 0.2; done\n",
			"virtio_blk", "virtio_mmio", "vmw_vsock_virtio_transport"))
	spec.Drives = []smartvm.Drive{{DriveID: "agent", PathOnHost: disk, IsReadOnly: true}}
	spec.Vsock = &smartvm.Vsock{GuestCID: 3}
	m := bootGuest(t, h, spec)
	for _, tt := range []struct {
		cmd  smartvm.Cmd
		code int
		want string
	}{
		{smartvm.Cmd{Args: sh("echo $HOME; pwd; cat; exit 5"), Stdin: strings.NewReader("typed")}, 5, "/\n/\ntyped"},
		{smartvm.Cmd{Args: []string{"no-such-program"}}, 127, ""},
	} {
		inGuest(t, m, tt.cmd, tt.code, tt.want)
	}
	checkCopy(t, m)
	checkRestart(t, m)
	// Without an agent the VM lives on, and says so.
	if _, err := m.Exec(patient(t), smartvm.Cmd{Args: sh("touch /tmp/over; kill -9 $PPID; sleep 10")}); err == nil {
		t.Error("the agent was killed, and nobody noticed")
	}
	awaitLog(t, m, "no agent")
	for end := time.Now().Add(linuxPatience); ; time.Sleep(100 * time.Millisecond) {
		g, err := m.Guest()
		if err != nil {
			t.Fatal(err)
		}
		if g.Degraded != "" {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the guest counts as well: %+v", g)
		}
	}
	if _, err := m.Exec(patient(t), smartvm.Cmd{Args: []string{"true"}}); !errors.Is(err, smartvm.ErrNoAgent) {
		t.Errorf("exec without an agent: %v", err)
	}
	if state, err := m.State(t.Context()); err != nil || state != smartvm.Running {
		t.Errorf("the VM is %s, %v", state, err)
	}
	shutDown(t, m, smartvm.CtrlAltDel)
}
