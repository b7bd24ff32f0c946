package smartvm_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv"
)

// inGuest runs a program in a guest and wants what it puts out, and its code.
func inGuest(t *testing.T, m *smartvm.Machine, cmd smartvm.Cmd, code int, want string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	exit, err := m.Exec(patient(t), cmd)
	if err != nil || exit.Code != code || out.String() != want {
		t.Errorf("%q: got %+v, %v, %q, %q, want %d and %q", cmd.Args, exit, err, &out, &errs, code, want)
	}
}

// In guests of a squashfs and of an OCI image programs run as they do here. For a distribution with
// an init of its own see TestLinuxImage_Systemd.
func TestLinuxGuest(t *testing.T) {
	for _, guest := range []struct {
		image    string
		command  []string
		launcher smartvm.Launcher
		user     string // of the image
	}{
		{"squashed", []string{"/bin/sh", "-c", "while :; do sleep 1; done"}, smartvm.LaunchDirect, "root"},
		{"app", []string{"while :; do sleep 1; done"}, smartvm.LaunchJailed, "nobody"},
	} {
		t.Run(guest.image, func(t *testing.T) {
			h := imageHost(t, guest.launcher)
			m := startGuest(t, h,
				smartvm.Spec{Image: guest.image, Name: "box", Command: guest.command, MachineConfig: linuxMachine(256)})
			checkGuest(t, m, guest.user)
			wantText(t, told(t, m, "grep ' / ' /proc/mounts; echo new > /etc/new && echo it can be written"),
				"overlay / overlay", "it can be written")
			if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
				t.Error(err)
			}
			checkEnded(t, m)
		})
	}
}

// checkGuest wants a guest that was started as "box" to boot, and programs to run in it as they do
// here: as user, if they do not say as whom.
func checkGuest(t *testing.T, m *smartvm.Machine, user string) {
	t.Helper()
	// A guest that still boots is waited for.
	inGuest(t, m, smartvm.Cmd{Args: []string{"echo", "first"}}, 0, "first\n")
	state := ready(t, m)
	if !state.Ready() || state.VMM <= 0 || state.Agent <= state.VMM || state.Command < state.Agent {
		t.Errorf("phases %+v", state)
	}
	t.Logf("VMM %v, agent %v, command %v, skew %v", state.VMM, state.Agent, state.Command, state.Skew)
	checkExec(t, m, user)
	checkCopy(t, m)
	st, err := m.GuestStats(t.Context())
	if err != nil || st.MemoryUsed == 0 || st.Disk == 0 || st.CPUs != 1 {
		t.Errorf("%+v, %v", st, err)
	}
}

// checkEnded removes a VM whose guest has ended.
func checkEnded(t *testing.T, m *smartvm.Machine) {
	t.Helper()
	if _, err := m.Exec(t.Context(), smartvm.Cmd{Args: []string{"true"}}); !errors.Is(err, smartvm.ErrState) {
		t.Errorf("exec in a stopped VM: %v", err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// checkClock wants a guest to have the time.
func checkClock(t *testing.T, m *smartvm.Machine) {
	t.Helper()
	begun := time.Now()
	text := told(t, m, "touch /run/now; stat -c %y /run/now")
	took := time.Since(begun)
	now, err := time.Parse("2006-01-02 15:04:05.999999999 -0700", text)
	// A guest that does not get to run hears late what time it was.
	wrong := testenv.Patience(500 * time.Millisecond)
	if err != nil || now.Before(begun.Add(-wrong)) || now.After(begun.Add(took+wrong)) {
		t.Errorf("VM %s: its clock says %v (%v), ours %v", m.ID(), now, err, begun)
	}
}

func sh(script string) []string { return []string{"sh", "-c", script} }

func checkExec(t *testing.T, m *smartvm.Machine, user string) {
	t.Helper()
	for _, tt := range []struct {
		cmd  smartvm.Cmd
		code int
		want string
	}{
		{smartvm.Cmd{Args: sh("id -un; hostname; echo to nobody >&2; exit 7")}, 7, user + "\nbox\n"},
		{
			smartvm.Cmd{Args: sh("id -un; pwd; echo $A"), User: "root", Dir: "/usr", Env: []string{"A=b"}},
			0,
			"root\n/usr\nb\n",
		},
		{smartvm.Cmd{Args: []string{"cat"}, Stdin: strings.NewReader("\x00\xff typed")}, 0, "\x00\xff typed"},
		{smartvm.Cmd{Args: []string{"no-such-program"}}, 127, ""},
		{smartvm.Cmd{Args: []string{"/etc/passwd"}}, 126, ""},
		{smartvm.Cmd{Args: sh("kill -9 $$")}, 137, ""},
		{smartvm.Cmd{
			Args: sh("tty >/dev/null && stty size; echo $TERM"), TTY: true,
			Size: smartvm.TermSize{Rows: 30, Cols: 90}, Term: "vt220",
		}, 0, "30 90\r\nvt220\r\n"},
		{smartvm.Cmd{Args: sh("head -c 1000000 /dev/zero | tr '\\000' x")}, 0, strings.Repeat("x", 1000000)},
		{smartvm.Cmd{Args: sh("cat /etc/hostname; wc -c </etc/machine-id")}, 0, "box\n33\n"},
	} {
		inGuest(t, m, tt.cmd, tt.code, tt.want)
	}
	begun := time.Now()
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() { inGuest(t, m, smartvm.Cmd{Args: []string{"echo", fmt.Sprint(i)}}, 0, fmt.Sprintln(i)) })
	}
	all.Wait()
	t.Logf("50 at once took %v", time.Since(begun))
	begun = time.Now()
	for range 10 {
		inGuest(t, m, smartvm.Cmd{Args: []string{"true"}}, 0, "")
	}
	t.Logf("one takes %v", time.Since(begun)/10)
	// A shell, as somebody uses it that types.
	out, in := io.Pipe()
	typed, keys := io.Pipe()
	defer keys.Close()
	signals := make(chan syscall.Signal, 1)
	done := make(chan smartvm.CmdExit, 1)
	ctx := patient(t)
	go func() {
		exit, err := m.Exec(ctx,
			smartvm.Cmd{
				Args: []string{"sh", "-i"}, TTY: true, Stdin: typed, Stdout: in, Signals: signals,
				Size: smartvm.TermSize{Rows: 24, Cols: 80},
			})
		if err != nil {
			t.Error(err)
		}
		in.Close()
		done <- exit
	}()
	seen := new(transcript)
	go func() { _, _ = io.Copy(seen, out) }()
	await := func(text string) {
		t.Helper()
		for end := time.Now().Add(linuxPatience); !strings.Contains(seen.String(), text); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%q did not come:\n%s", text, seen)
			}
		}
	}
	typing := func(text string) {
		t.Helper()
		if _, err := io.WriteString(keys, text); err != nil {
			t.Fatal(err)
		}
	}
	typing("echo $((6*7))\n")
	await("42")
	typing("sh -c 'while read x; do echo got $((x+1)); done; exit 4'\n41\n")
	await("got 42")
	typing("\x03") // Ctrl-C, for the one that reads
	await("^C")
	typing("echo $((6*8)); exit 5\n")
	await("48")
	if exit := receive(t, done, "the end of the shell"); exit.Code != 5 {
		t.Errorf("the shell ended with %+v", exit)
	}
}

func checkCopy(t *testing.T, m *smartvm.Machine) {
	t.Helper()
	dir := t.TempDir()
	from, back := filepath.Join(dir, "tree"), filepath.Join(dir, "back")
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	if err := errors.Join(
		os.MkdirAll(filepath.Join(from, "sub"), 0o750), os.WriteFile(filepath.Join(from, "data"), data, 0o640),
		os.WriteFile(filepath.Join(from, "sub/run"), []byte("#!/bin/sh\necho ran\n"), 0o755),
		os.Symlink("sub/run", filepath.Join(from, "link")),
	); err != nil {
		t.Fatal(err)
	}
	ctx := patient(t)
	if err := m.CopyTo(ctx, from, "/tmp/tree", nil, smartvm.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	inGuest(t, m, smartvm.Cmd{Args: []string{"/tmp/tree/link"}, User: "root"}, 0, "ran\n")
	if err := m.CopyFrom(ctx, "/tmp/tree", back, nil, smartvm.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{
		"data": 0o640, "sub/run": 0o755, "sub": 0o750 | os.ModeDir,
		"link": 0o777 | os.ModeSymlink,
	} {
		fi, err := os.Lstat(filepath.Join(back, name))
		if err != nil || fi.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", name, fi, err, want)
		}
	}
	if got, err := os.ReadFile(filepath.Join(back, "data")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("what comes back is not what was sent: %v", err)
	}
	// As a pipeline.
	var archive bytes.Buffer
	if err := m.CopyFrom(ctx, "/tmp/tree/.", "-", &archive, smartvm.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	inGuest(t, m,
		smartvm.Cmd{
			Args: sh("mkdir /tmp/piped && tar x -C /tmp/piped && cmp /tmp/tree/data /tmp/piped/data && rm -r /tmp/tree /tmp/piped"), Stdin: &archive, User: "root",
		}, 0, "")
}

// checkRestart: beside an init of the image's own, a server that is killed is started again.
func checkRestart(t *testing.T, m *smartvm.Machine) {
	t.Helper()
	_, err := m.Exec(patient(t), smartvm.Cmd{Args: sh("kill -9 $PPID; sleep 10"), User: "root"})
	if err == nil {
		t.Error("the agent was killed, and nobody noticed")
	}
	for end := time.Now().Add(linuxPatience); ; time.Sleep(100 * time.Millisecond) {
		if exit, err := m.Exec(patient(t), smartvm.Cmd{Args: []string{"true"}}); err == nil && exit.Code == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatal("the agent does not come back")
		}
	}
}

// An image's command that is run in one call has the caller's streams, and its exit code is known.
func TestLinuxGuest_Run(t *testing.T) {
	h := imageHost(t, smartvm.LaunchJailed)
	var out, errs bytes.Buffer
	console := new(transcript)
	exit, err := h.Run(patient(t),
		smartvm.Spec{Image: "minimal", Command: sh("cat; echo problem >&2; exit 9"), MachineConfig: linuxMachine(256)},
		smartvm.RunOptions{
			Console: console, Command: &smartvm.Cmd{Stdin: strings.NewReader("typed"), Stdout: &out, Stderr: &errs},
		})
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != "typed" || errs.String() != "problem\n" || console.String() != "" {
		t.Errorf("got %q, %q and %q", &out, &errs, console)
	}
	if exit.Outcome != smartvm.OutcomeExited || exit.Command == nil || exit.Command.Code != 9 {
		t.Errorf("ended %+v, command %+v", exit, exit.Command)
	}
}

// An image's command that is asked to end gets a signal, and its exit code is known.
func TestLinuxGuest_Stop(t *testing.T) {
	h := imageHost(t, smartvm.LaunchJailed)
	m := bootGuest(t, h, smartvm.Spec{
		Image: "minimal", MachineConfig: linuxMachine(256),
		Command: sh("trap 'echo asked; exit 3' TERM; echo trapped; while :; do sleep 0.2; done"),
	})
	awaitLog(t, m, "trapped")
	askToEnd(t, m, smartvm.AgentStop)
	exit, err := m.Exit()
	if err != nil || exit.Outcome != smartvm.OutcomeExited || exit.Command == nil || exit.Command.Code != 3 {
		t.Errorf("ended %+v, %v, want code 3", exit, err)
	}
	if log, err := os.ReadFile(m.ConsoleLog()); err != nil || !bytes.Contains(log, []byte("asked\r\n")) {
		t.Errorf("the command was not asked: %v, %q", err, log)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}
