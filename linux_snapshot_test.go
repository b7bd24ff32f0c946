package smartvm_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
)

// ask runs a script in a guest and returns what it puts out.
func ask(t *testing.T, m *smartvm.Machine, script string) string {
	t.Helper()
	var out bytes.Buffer
	if exit, err := m.Exec(patient(t), smartvm.Cmd{Args: sh(script), Stdout: &out, Stderr: &out}); err != nil ||
		exit.Code != 0 {
		t.Fatalf("VM %s: %q: %+v, %v: %s", m.ID(), script, exit, err, &out)
	}
	return strings.TrimSpace(out.String())
}

// paced lets a script wait without a program that it would have to start each time, which an
// emulated processor feels: it waits in "pause", 50 ms or so many seconds as that is told.
const paced = "mkfifo /tmp/pace$$; exec 4<>/tmp/pace$$; pause() { read -t ${1:-0.05} none <&4; }; "

// begin starts a script in a guest, which goes on when this has returned and puts out what it does
// on the console.
func begin(t *testing.T, m *smartvm.Machine, script string) {
	t.Helper()
	ask(t, m, "("+script+") </dev/null >/dev/console 2>&1 &")
}

func ready(t *testing.T, m *smartvm.Machine) *smartvm.GuestState {
	t.Helper()
	g, err := m.AwaitReady(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func linuxWorld(t *testing.T) *nettest.Namespace {
	t.Helper()
	world := nettest.New(t)
	world.Connect(nettest.Link{Name: "uplink", Addresses: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24")}},
		nettest.Link{Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("198.51.100.2/24")}})
	return world
}

// A restored guest has its programs, its open files and its connections, though the VM that they
// were of is gone.
func TestLinuxSnapshot_GoesOn(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	h := imageHost(t, smartvm.LaunchJailed)
	world := linuxWorld(t)
	lines := make(chan string, 1024)
	world.Must(func() error {
		// Without Go's keepalives: what asks for the guest while it is gone is told by the host that it
		// knows no such connection.
		l, err := (&net.ListenConfig{KeepAlive: -1}).Listen(t.Context(), "tcp", "198.51.100.2:7000")
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			c, err := l.Accept() // once: who connects again is not heard
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			for s := bufio.NewScanner(c); s.Scan(); {
				lines <- s.Text()
			}
		}()
		return nil
	})
	m := bootGuest(t, h, smartvm.Spec{
		Name: "first", Image: "minimal", MachineConfig: linuxMachine(128), NetworkInterfaces: templates[inNamespace],
		Command: sh(paced +
			"exec 3>/root/open; n=0; while :; do n=$((n+1)); echo $n >&3; echo tick $n; pause; done | nc 198.51.100.2 7000"),
	})
	next := func() string { return receive(t, lines, "a line from the guest's connection") }
	next()
	const self = "cat /proc/sys/kernel/random/boot_id; cat /etc/hostname; sed -n 's/^10.*[0-9] //p' /etc/hosts"
	before := ask(t, m, self)
	sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Name: "on", Stop: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(sn.Warnings) > 0 {
		t.Errorf("warnings %q", sn.Warnings)
	}
	t.Logf("paused for %v", sn.Paused)
	wantState(t, m, smartvm.Stopped)
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	for len(lines) > 0 {
		<-lines
	}
	r := startRestored(t, h, "on", smartvm.RestoreOptions{Name: "second"})
	g := ready(t, r)
	t.Logf("resumed after %v, itself after %v, clock wrong by %v", g.VMM, g.Command, g.Skew)
	got := next()
	if !strings.HasPrefix(got, "tick ") {
		t.Errorf("the connection says %q", got)
	}
	count := ask(t, r, "tail -n 1 /root/open")
	if count == "" || count == "1" {
		t.Errorf("the open file ends with %q", count)
	}
	after := ask(t, r, self)
	if want := strings.ReplaceAll(before, "first", "second"); after != want || strings.Count(after, "second") != 2 {
		t.Errorf("the guest is %q, want %q", after, want)
	}
	endGuest(t, r)
	if err := h.RemoveSnapshot(t.Context(), "on", false); err != nil {
		t.Error(err)
	}
}

// Eight forks are eight guests: nothing that identifies one is another's, and their programs never
// see who they were.
func TestLinuxFork(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	h := imageHost(t, smartvm.LaunchJailed)
	world := linuxWorld(t)
	world.Serve(":80", "world")
	m := restoreGuest(t, h, onBridge, smartvm.RestoreOptions{Name: "template"})
	// Nine of them share what one emulated processor can.
	begin(t, m, paced+"while :; do read name </proc/sys/kernel/hostname; echo $name >>/root/names; pause 0.4; done")
	ask(t, m, "until test -s /root/names; do sleep 0.1; done") // its program runs
	forks, err := m.Fork(t.Context(), 8,
		smartvm.ForkOptions{RestoreOptions: smartvm.RestoreOptions{Name: "fork"}, Concurrency: 2})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	names := ""
	for i, f := range append(forks, m) {
		g := ready(t, f)
		want := "template"
		if f != m {
			t.Logf("%s: resumed after %v, itself after %v, clock wrong by %v", f.Name(), g.VMM, g.Command, g.Skew)
			want = fmt.Sprintf("fork-%d", i+1)
		}
		checkClock(t, f)
		text := ask(t, f, "hostname; cat /etc/hostname; cat /etc/machine-id; cat /proc/sys/kernel/random/uuid;"+
			"head -c 16 /dev/urandom | md5sum; cat /sys/class/net/eth0/address; ip -4 -o addr show eth0 | sed 's/.*inet //; s/ .*//'; ip -6 -o addr show eth0 scope global | sed 's/.*inet6 //; s/ .*//'")
		all := strings.Split(text, "\n")
		if len(all) != 8 {
			t.Fatalf("%s says %q", f.Name(), text)
		}
		if all[0] != want || all[1] != want {
			t.Errorf("%s: host name %q and %q", f.Name(), all[0], all[1])
		}
		for _, what := range all {
			if other := seen[what]; other != "" {
				t.Errorf("%s and %s both have %q", f.Name(), other, what)
			}
		}
		for _, what := range all {
			seen[what] = f.Name()
		}
		if got := ask(t, f, "nc -w 5 198.51.100.2 80 </dev/null"); !strings.HasPrefix(got, "world from 198.51.100.1") {
			t.Errorf("%s hears %q from the world", f.Name(), got)
		}
		if f == m {
			continue
		}
		old := ask(t, f, "grep -c template /root/names || true")
		if old == "0" || names != "" && old != names || ask(t, f, "tail -n 1 /root/names") != want {
			t.Errorf("%s: a program in it saw the old name %s times, in the first fork %s times", f.Name(), old, names)
		}
		names = old
	}
	for _, f := range append(forks, m) {
		endGuest(t, f)
	}
	if _, err := h.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
}

func init() { children["snapshot-killed"] = snapshotKilled }

// snapshotKilled makes a snapshot of a VM and is killed before it lets the guest's programs go on.
func snapshotKilled(args []string) int {
	h, err := smartvm.Open(
		smartvm.WithTrace(smartvm.Options{RuntimeDir: args[0], DataDir: args[1], FirecrackerBinary: args[2]},
			func(step string) {
				if step == "call thaw" {
					_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
					select {}
				}
			}))
	if err == nil {
		var m *smartvm.Machine
		if m, err = h.Machine(context.Background(), args[3]); err == nil {
			_, err = m.Snapshot(context.Background(), smartvm.SnapshotOptions{})
		}
	}
	fmt.Fprintln(os.Stderr, "it was not killed:", err)
	return 1
}

// When the process that makes a snapshot dies once the VM runs again, the one that supervises the
// VM lets the guest's programs go on.
func TestLinuxSnapshot_Killed(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	m := restoreGuest(t, h, unconnected, smartvm.RestoreOptions{})
	cmd := exec.CommandContext(patient(t), os.Args[0], h.RuntimeDir(), h.DataDir(), testenv.Firecracker(t), m.ID())
	cmd.Env = append(os.Environ(), "SMARTVM_TEST_CHILD=snapshot-killed")
	out, err := cmd.CombinedOutput()
	if state := cmd.ProcessState; state == nil || state.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("%v: %s", err, out)
	}
	ask(t, m, "true") // which begins when others go on
	endGuest(t, m)
	if _, err := h.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
}

// What a guest does not use is not in a snapshot that its balloon helped with; it has its memory
// back afterwards, and so has one that is restored.
func TestLinuxSnapshot_Balloon(t *testing.T) {
	h := imageHost(t, smartvm.LaunchJailed)
	// Large pages are not given back by pieces.
	m := bootGuest(t, h, smartvm.Spec{
		Image: "minimal", MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}, Balloon: &smartvm.Balloon{},
		Command: sh(idle),
	})
	const available = "awk '/MemAvailable/ {print int($2 / 1024)}' /proc/meminfo"
	// which leaves its traces
	ask(t, m, "mount -t tmpfs none /mnt && head -c 30000000 /dev/urandom >/mnt/used && rm /mnt/used")
	before := ask(t, m, available)
	sizes := map[bool]int64{}
	var last *smartvm.Snapshot
	for _, drop := range []bool{false, true} {
		sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{DropCaches: drop})
		if err != nil || len(sn.Warnings) > 0 {
			t.Fatalf("drop caches %v: %v, warnings %q", drop, err, sn.Warnings)
		}
		if sizes[drop], err = kept.Usage(sn.Path("memory")); err != nil {
			t.Fatal(err)
		}
		if last != nil {
			if err := h.RemoveSnapshot(t.Context(), last.ID, false); err != nil {
				t.Error(err)
			}
		}
		last = sn
	}
	t.Logf("memory: %d MiB, with caches dropped %d MiB; %s MiB available", sizes[false]>>20, sizes[true]>>20, before)
	if sizes[true] > sizes[false]-15<<20 {
		t.Errorf("memory has %d bytes, %d with caches dropped", sizes[false], sizes[true])
	}
	has := func(m *smartvm.Machine) {
		t.Helper()
		config, err := m.VMConfig(t.Context())
		if err != nil || config.Balloon == nil || config.Balloon.AmountMiB != 0 {
			t.Errorf("VM %s: balloon %+v (%v)", m.ID(), config.Balloon, err)
		}
		want, err := strconv.Atoi(before)
		if err != nil {
			t.Fatal(err)
		}
		now := 0
		eventually(t, "the guest has its memory back", func() bool {
			now, err = strconv.Atoi(ask(t, m, available))
			return err == nil && now >= want-10
		})
		t.Logf("VM %s: %d MiB available", m.ID(), now)
	}
	has(m)
	r := startRestored(t, h, last.ID, smartvm.RestoreOptions{})
	has(r)
	endGuest(t, m)
	endGuest(t, r)
	if err := h.RemoveSnapshot(t.Context(), last.ID, false); err != nil {
		t.Error(err)
	}
}

// What exec has under way goes on when snapshots are made of its VM: no byte is lost, nor comes
// twice. In a VM that is restored it is hung up.
func TestLinuxSnapshot_Exec(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	m := restoreGuest(t, h, unconnected, smartvm.RestoreOptions{Name: "first"})
	trap := "trap 'echo hung up >>/root/hup; exit 4' HUP; "
	counts := execute(t, m, paced+trap+
		"(while :; do n=$((n+1)); echo $n; pause; done) >&2 & while read -r line; do echo $line; done; kill $!; exit 7")
	quiet := execute(t, m, trap+"read -r line; echo $line; exit 5")
	typed := make(chan string, 1)
	enough := make(chan struct{})
	go func() {
		var text strings.Builder
		for i := 0; ; i++ {
			select {
			case <-enough:
				typed <- text.String()
				_ = counts.stdin.Close()
				return
			case <-time.After(10 * time.Millisecond):
				fmt.Fprintf(io.MultiWriter(&text, counts.stdin), "line %d\n", i)
			}
		}
	}()
	progress := func() {
		t.Helper()
		for had, end := counts.stdout.len(), time.Now().Add(linuxPatience); counts.stdout.len() < had+
			1000; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("it stands still after %d bytes", had)
			}
		}
	}
	for _, name := range []string{"one", "two", "paused"} {
		progress()
		if name == "paused" {
			if err := m.Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: paused for %v, warnings %q", name, sn.Paused, sn.Warnings)
		if name == "paused" {
			if err := m.Resume(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	progress()
	close(enough)
	want := receive(t, typed, "what was typed")
	if exit := receive(t, counts.done, "the end of exec"); exit.Code != 7 {
		t.Errorf("ended with %+v", exit)
	}
	if got := counts.stdout.String(); got != want {
		t.Errorf("got %d bytes back, want %d: it ends with %.100q, not %.100q", len(got), len(want),
			got[max(0, len(got)-100):], want[len(want)-100:])
	}
	for i, line := range strings.Fields(counts.stderr.String()) {
		if line != fmt.Sprint(i+1) {
			t.Fatalf("%q follows %d", line, i)
		}
	}
	fmt.Fprintln(quiet.stdin, "awake")
	if exit := receive(t, quiet.done, "the end of exec"); exit.Code != 5 || quiet.stdout.String() != "awake\n" {
		t.Errorf("ended with %+v and %q", exit, &quiet.stdout)
	}
	if got := ask(t, m, "cat /root/hup || true"); !strings.Contains(got, "No such file") {
		t.Errorf("its programs were hung up: %q", got)
	}
	r := startRestored(t, h, "one", smartvm.RestoreOptions{Name: "second"})
	if got := ask(t, r,
		"until test $(grep -c hung /root/hup) = 2; do sleep 0.1; done; ps | grep -c '[r]ead -r' || true"); !strings.HasSuffix(
		got, "0") {
		t.Errorf("in the restored VM programs are left: %q", got)
	}
	_, _ = m.Exec(t.Context(), smartvm.Cmd{Args: []string{"sh", "-c", "echo 9 >/root/over"}}) // the VM may end before it
	if _, err := m.Wait(patient(t)); err != nil {
		t.Error(err)
	}
	if g, err := m.Guest(); err != nil || g.Exit == nil || g.Exit.Code != 9 {
		t.Errorf("of its command's end the guest said %+v, %v", g, err)
	}
	endGuest(t, r)
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"one", "two", "paused"} {
		if err := h.RemoveSnapshot(t.Context(), name, false); err != nil {
			t.Error(err)
		}
	}
}

// execution is an exec that is under way.
type execution struct {
	stdin          io.WriteCloser
	stdout, stderr transcript
	done           chan smartvm.CmdExit
}

// execute begins one.
func execute(t *testing.T, m *smartvm.Machine, script string) *execution {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stdin, w := io.Pipe()
	e := &execution{stdin: w, done: make(chan smartvm.CmdExit, 1)}
	go func() {
		exit, err := m.Exec(ctx, smartvm.Cmd{Args: sh(script), Stdin: stdin, Stdout: &e.stdout, Stderr: &e.stderr})
		if err != nil {
			t.Errorf("%q: %v", script, err)
		}
		e.done <- exit
		_ = stdin.Close()
	}()
	t.Cleanup(cancel)
	return e
}

func (c *transcript) len() int { return len(c.String()) }
