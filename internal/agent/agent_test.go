package agent_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/process"
	"push.rocks/smartvm/internal/guestagent/server"
	"push.rocks/smartvm/internal/testenv"
)

// The agent's server runs in the test itself, behind a socket that speaks as the VMM's does: no
// guest is needed for most of what it does.

// reaper reaps the test's processes: none but the server starts any.
var reaper = sync.OnceValue(func() *process.Reaper {
	child := make(chan os.Signal, 1)
	signal.Notify(child, syscall.SIGCHLD)
	// As the agent does: its programs hear what we may have been started deaf to.
	if ignored := process.Ignored(); len(ignored) > 0 {
		signal.Notify(make(chan os.Signal, 1), ignored...)
	}
	r := new(process.Reaper)
	go r.Run(child)
	return r
})

// vmm accepts what a VMM's vsock socket would.
type vmm struct {
	net.Listener
	port string
}

func (v vmm) Accept() (net.Conn, error) {
	for {
		c, err := v.Listener.Accept()
		if err != nil {
			return nil, err
		}
		line := make([]byte, len("CONNECT \n")+len(v.port))
		if _, err := io.ReadFull(c, line); err != nil || string(line) != "CONNECT "+v.port+"\n" {
			_ = c.Close()
			continue
		}
		if _, err := io.WriteString(c, "OK 1073741824\n"); err != nil {
			_ = c.Close()
			continue
		}
		return c, nil
	}
}

func listen(t *testing.T) (net.Listener, *agent.Client) {
	t.Helper()
	path := testenv.Socket(t, filepath.Join(t.TempDir(), "vsock"))
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return vmm{l, fmt.Sprint(agentproto.Port)}, &agent.Client{Dial: func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
}

func newServer(t *testing.T, boot *guest.Boot) (*server.Server, *agent.Client) {
	t.Helper()
	l, c := listen(t)
	s := server.New(reaper(), boot)
	s.SetClock = func(time.Time) error { return nil } // not this machine's, however late it is
	go func() {
		if err := s.Serve(l); err != nil {
			t.Error(err)
		}
	}()
	return s, c
}

// run runs a shell's script, and returns what it puts out.
func run(t *testing.T, c *agent.Client, cmd guest.Cmd) (exit guest.Exit, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	exit, err := c.Exec(t.Context(), cmd)
	if err != nil {
		t.Fatalf("%q: %v", cmd.Args, err)
	}
	return exit, out.String(), errs.String()
}

func sh(script string) []string { return []string{"sh", "-c", script} }

// tested is true for a script's loop until the test's process ends: whatever fails, no shell goes
// on without it.
const tested = "kill -0 $PPID 2>/dev/null"

// lifeline is a FIFO that gives no byte, and ends when the test does.
func lifeline(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "life")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return path
}

func TestExec(t *testing.T) {
	_, c := newServer(t, &guest.Boot{Env: []string{"A=image", "B=image"}, WorkingDir: "/usr"})
	dir := t.TempDir()
	for name, tt := range map[string]struct {
		cmd            guest.Cmd
		exit           guest.Exit
		stdout, stderr string
	}{
		"streams": {
			cmd: guest.Cmd{Args: sh("echo out; echo err >&2; exit 7")}, exit: guest.Exit{Code: 7},
			stdout: "out\n", stderr: "err\n",
		},
		"environment": {
			cmd:    guest.Cmd{Args: sh("echo $A $B $C; pwd"), Env: []string{"B=mine", "C=new"}},
			stdout: "image mine new\n/usr\n",
		},
		"directory": {cmd: guest.Cmd{Args: sh("pwd"), Dir: dir}, stdout: dir + "\n"},
		"input": {
			cmd:    guest.Cmd{Args: []string{"cat"}, Stdin: strings.NewReader("in\x00\xff\n")},
			stdout: "in\x00\xff\n",
		},
		"no input": {cmd: guest.Cmd{Args: []string{"cat"}}},
		"signal":   {cmd: guest.Cmd{Args: sh("kill -TERM $$")}, exit: guest.Exit{Code: 143, Signal: syscall.SIGTERM}},
		"child stays": {
			cmd:    guest.Cmd{Args: sh(`cat "$LIFE" & echo over`), Env: []string{"LIFE=" + lifeline(t)}},
			stdout: "over\n",
		},
		"input unread": {cmd: guest.Cmd{Args: []string{"true"}, Stdin: bytes.NewReader(make([]byte, 1<<20))}},
		"much": {
			cmd:    guest.Cmd{Args: sh("head -c 3000000 /dev/zero | tr '\\0' x")},
			stdout: strings.Repeat("x", 3000000),
		},
		"terminal": {cmd: guest.Cmd{
			Args: sh("tty >/dev/null && echo $TERM $(stty size); exit 3"), TTY: true,
			Term: "vt100", Size: guest.Size{Rows: 24, Cols: 80},
		}, exit: guest.Exit{Code: 3}, stdout: "vt100 24 80\r\n"},
		"typed": {cmd: guest.Cmd{
			Args: sh("stty -echo; echo ready; cat"), TTY: true,
			Stdin: strings.NewReader("line\n"),
		}, stdout: "ready\r\nline\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			exit, stdout, stderr := run(t, c, tt.cmd)
			if name == "typed" { // what is typed before is echoed
				stdout = strings.TrimPrefix(stdout, "line\r\n")
			}
			if diff := cmp.Diff(tt.exit, exit); diff != "" {
				t.Error(diff)
			}
			if stdout != tt.stdout || stderr != tt.stderr {
				t.Errorf("got %.100q and %.100q, want %.100q and %.100q", stdout, stderr, tt.stdout, tt.stderr)
			}
		})
	}
	for _, tt := range []struct {
		cmd  guest.Cmd
		code int
		text string
	}{
		{guest.Cmd{Args: []string{"no-such-program"}}, 127, `run "no-such-program"`},
		{guest.Cmd{Args: []string{"/etc/passwd"}}, 126, "permission denied"},
		{guest.Cmd{Args: sh("true"), Dir: "/no/such"}, 126, "/no/such"},
		{guest.Cmd{Args: sh("true"), User: "no-such-user"}, 126, "no-such-user"},
		{guest.Cmd{Args: []string{"true", strings.Repeat("x", 1<<20)}}, 126, "argument list too long"},
	} {
		exit, _, _ := run(t, c, tt.cmd)
		if exit.Code != tt.code || !strings.Contains(exit.Reason, tt.text) {
			t.Errorf("%.40q: got %+v, want %d, %q", tt.cmd.Args, exit, tt.code, tt.text)
		}
	}
}

// A gigabyte goes through a program in the guest, and a quarter of it back, and no more than the
// windows is held anywhere: host and agent are both this process.
func TestExec_Flow(t *testing.T) {
	_, c := newServer(t, nil)
	for name, tt := range map[string]struct {
		size, back int64
		command    []string
	}{
		"There":   {1 << 30, 0, sh("cat >/dev/null")},
		"AndBack": {256 << 20, 256 << 20, []string{"cat"}},
	} {
		t.Run(name, func(t *testing.T) {
			var out counting
			in := &watched{left: tt.size}
			exit, err := c.Exec(t.Context(), guest.Cmd{Args: tt.command, Stdin: in, Stdout: &out})
			if err != nil || exit.Code != 0 || out.n != tt.back || out.wrong || in.left != 0 {
				t.Errorf("%+v, %v, %d bytes, wrong: %v, %d left", exit, err, out.n, out.wrong, in.left)
			}
			if in.heap > 32<<20 {
				t.Errorf("the heap grew to %d bytes", in.heap)
			}
		})
	}
}

// watched is so many bytes of a pattern, and looks at the heap meanwhile.
type watched struct {
	left int64
	heap uint64
}

func (w *watched) Read(p []byte) (int, error) {
	if w.left == 0 {
		return 0, io.EOF
	}
	n, _ := pattern{}.Read(p[:min(int64(len(p)), w.left)])
	if w.left/(64<<20) != (w.left-int64(n))/(64<<20) {
		runtime.GC() // what is held counts, not what has passed
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		w.heap = max(w.heap, m.HeapInuse)
	}
	w.left -= int64(n)
	return n, nil
}

type pattern struct{}

// Read copies: a loop over bytes takes a minute for a GiB under the race detector.
func (pattern) Read(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		rest = rest[copy(rest, patternBlock):]
	}
	return len(p), nil
}

var patternBlock = bytes.Repeat([]byte{'p'}, 64<<10)

type counting struct {
	n     int64
	wrong bool
}

func (c *counting) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	c.wrong = c.wrong || bytes.Count(p, []byte{'p'}) != len(p)
	return len(p), nil
}

// Signals and sizes reach a program.
func TestExec_Control(t *testing.T) {
	_, c := newServer(t, nil)
	signals, sizes := make(chan syscall.Signal), make(chan guest.Size)
	out, in := io.Pipe()
	done := make(chan guest.Exit, 1)
	go func() {
		exit, err := c.Exec(t.Context(), guest.Cmd{
			Args: sh(`trap 'echo resized $(stty size)' WINCH; trap 'echo told; exit 5' USR1; echo ready; while ` + tested +
				`; do sleep 0.01; done`),
			TTY: true, Stdout: in, Signals: signals, Resize: sizes,
		})
		if err != nil {
			t.Error(err)
		}
		in.Close()
		done <- exit
	}()
	lines := bufio.NewScanner(out)
	await := func(text string) {
		t.Helper()
		for lines.Scan() {
			if lines.Text() == text {
				return
			}
		}
		t.Fatalf("%q did not come", text)
	}
	await("ready")
	for i := range 1000 {
		sizes <- guest.Size{Rows: 25, Cols: uint16(1 + i)}
	}
	await("resized 25 1000")
	signals <- syscall.SIGUSR1
	await("told")
	if exit := <-done; exit.Code != 5 {
		t.Errorf("got %+v", exit)
	}
}

// A signal reaches a program though it takes no input and nobody takes its output.
func TestExec_Stuck(t *testing.T) {
	_, c := newServer(t, nil)
	signals := make(chan syscall.Signal, 1)
	out, in := io.Pipe()
	done := make(chan guest.Exit, 1)
	go func() {
		exit, err := c.Exec(t.Context(), guest.Cmd{Args: []string{"yes"}, Stdin: pattern{}, Stdout: in, Signals: signals})
		if err != nil {
			t.Error(err)
		}
		in.Close()
		done <- exit
	}()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	signals <- syscall.SIGKILL
	if _, err := io.Copy(io.Discard, out); err != nil { // what was on its way comes, and no more
		t.Error(err)
	}
	if exit := <-done; exit.Signal != syscall.SIGKILL || exit.Code != 137 {
		t.Errorf("got %+v", exit)
	}
}

// When the host goes away the program gets SIGHUP.
func TestExec_Hangup(t *testing.T) {
	_, c := newServer(t, nil)
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	out, in := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := c.Exec(ctx,
			guest.Cmd{
				Args: sh("trap 'echo hup >said; exit' HUP; echo ready; while " + tested + "; do sleep 0.01; done"),
				Dir:  dir, Stdout: in,
			})
		done <- err
	}()
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if got := said(t, dir); got != "hup\n" {
		t.Errorf("the program was not hung up, it said %q", got)
	}
}

func TestExec_Parallel(t *testing.T) {
	_, c := newServer(t, nil)
	var all sync.WaitGroup
	for i := range 50 {
		all.Go(func() {
			var out bytes.Buffer
			exit, err := c.Exec(t.Context(),
				guest.Cmd{Args: []string{"cat"}, Stdin: strings.NewReader(fmt.Sprint(i)), Stdout: &out})
			if err != nil || exit.Code != 0 || out.String() != fmt.Sprint(i) {
				t.Errorf("%d: %+v, %v, %q", i, exit, err, &out)
			}
		})
	}
	all.Wait()
}

// The image's command gets the host's streams, once.
func TestMain_Command(t *testing.T) {
	s, c := newServer(t, &guest.Boot{Command: sh("cat; exit 9")})
	ended := make(chan agentproto.Exit, 1)
	go func() {
		exit, _ := s.Main(nil, nil)
		ended <- exit
		s.Ended(exit)
	}()
	seen := make(chan agentproto.Event, 16)
	watched := make(chan error, 1)
	go func() { watched <- c.Watch(t.Context(), func(e agentproto.Event) { seen <- e }) }()
	<-seen
	var out bytes.Buffer
	exit, err := c.Main(t.Context(), guest.Cmd{Stdin: strings.NewReader("typed"), Stdout: &out})
	if err != nil || exit.Code != 9 || out.String() != "typed" {
		t.Errorf("%+v, %v, %q", exit, err, &out)
	}
	if e := <-ended; e.Code != 9 {
		t.Errorf("the guest saw %+v", e)
	}
	if err := <-watched; err != nil {
		t.Error(err)
	}
	if e := <-seen; e.Exit == nil || e.Exit.Code != 9 {
		t.Errorf("watchers saw %+v", e)
	}
}

// A guest whose clock is wrong sets it, and says by how much it was.
func TestWatch_Skew(t *testing.T) {
	l, c := listen(t)
	s := server.New(reaper(), nil)
	set := make(chan time.Time, 1)
	s.SetClock = func(to time.Time) error { set <- to; return nil }
	go func() { _ = s.Serve(l) }()
	raw, err := c.Connect(t.Context(), agentproto.Port)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	now := time.Now().Add(-time.Hour).Round(0)
	watch := agentproto.Request{Version: agentproto.Version, Op: agentproto.OpWatch, Now: now}
	request, err := watch.Frame()
	if err == nil {
		_, err = raw.Write(request)
	}
	if err != nil {
		t.Fatal(err)
	}
	conn := agentproto.NewConn(raw)
	for {
		k, payload, err := conn.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if k != agentproto.KindEvent {
			continue
		}
		e, err := agentproto.ParseJSON[agentproto.Event](payload)
		if err != nil || (e.Skew-time.Hour).Abs() > time.Minute {
			t.Errorf("skew %v, %v", e.Skew, err)
		}
		break
	}
	if to := <-set; !to.Equal(now) {
		t.Errorf("the clock is set to %v, want %v", to, now)
	}
}

// fakeAgent answers requests as a guest's agent would, each by a function.
func fakeAgent(t *testing.T, answer func(agentproto.Request) agentproto.Reply) *agent.Client {
	t.Helper()
	l, c := listen(t)
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			conn := agentproto.NewConn(raw)
			if _, payload, err := conn.Receive(); err == nil {
				if req, err := agentproto.ParseJSON[agentproto.Request](payload); err == nil {
					_ = conn.SendJSON(agentproto.KindReply, answer(req))
				}
			}
			_ = conn.Close()
		}
	}()
	return c
}

// A guest that is slow to hear what time it is hears it again, before it is told who it is and its
// programs go on.
func TestIdentify_Late(t *testing.T) {
	var asked []agentproto.Op
	c := fakeAgent(t, func(req agentproto.Request) agentproto.Reply {
		asked = append(asked, req.Op)
		if req.Op != agentproto.OpClock {
			if !req.Now.IsZero() {
				t.Errorf("%s has a time, which may be late", req.Op)
			}
			return agentproto.Reply{}
		}
		if late := time.Since(req.Now); late > 200*time.Millisecond {
			t.Errorf("told the time of %v ago", late)
		}
		if len(asked) == 1 {
			time.Sleep(300 * time.Millisecond) // as long as such a guest takes
			return agentproto.Reply{Skew: time.Hour}
		}
		return agentproto.Reply{Skew: -time.Second}
	})
	skew, _, err := c.Identify(t.Context(), &agentproto.Identity{})
	if want := []agentproto.Op{agentproto.OpClock, agentproto.OpClock, agentproto.OpIdentify}; err != nil ||
		!slices.Equal(asked, want) || skew != time.Hour-time.Second {
		t.Errorf("asked %q, want %q; skew %v, %v", asked, want, skew, err)
	}
}

// An agent of before, in a snapshot, hears the time as it is told who it is.
func TestIdentify_OldAgent(t *testing.T) {
	c := fakeAgent(t, func(req agentproto.Request) agentproto.Reply {
		if req.Op == agentproto.OpClock {
			return agentproto.Reply{Error: `the agent does not know how to "clock"`}
		}
		if late := time.Since(req.Now); late > time.Minute {
			t.Errorf("told the time of %v ago", late)
		}
		return agentproto.Reply{Skew: time.Hour}
	})
	if skew, _, err := c.Identify(t.Context(), &agentproto.Identity{}); err != nil || skew != time.Hour {
		t.Errorf("got %v, %v", skew, err)
	}
}

func TestDial(t *testing.T) {
	_, c := newServer(t, nil)
	l, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		data, _ := io.ReadAll(conn)
		_, _ = conn.Write(append([]byte("got "), data...))
		_ = conn.Close()
	}()
	conn, err := c.DialTCP(t.Context(), uint16(l.Addr().(*net.TCPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "this"); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "got this" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := c.DialTCP(t.Context(), 1); !errors.As(err, new(*agent.GuestError)) {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestStats(t *testing.T) {
	_, c := newServer(t, nil)
	st, err := c.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.CPUs < 1 || st.CPU <= 0 || st.MemoryUsed == 0 || st.MemoryUsed > st.Memory || st.DiskUsed > st.Disk ||
		st.Processes < 1 {
		t.Errorf("%+v", st)
	}
}

// tree makes one of everything.
func tree(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "tree")
	random := make([]byte, 300<<10)
	_, _ = rand.Read(random)
	sparse := make([]byte, 1<<20)
	copy(sparse[512<<10:], "middle")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "sub/empty"), 0o755), os.WriteFile(filepath.Join(dir, "random"), random, 0o640),
		os.WriteFile(filepath.Join(dir, "sub/sparse"), sparse, 0o600),
		os.WriteFile(filepath.Join(dir, "run"), []byte("#!/bin/sh\n"), 0o755),
		os.Symlink("/etc/passwd", filepath.Join(dir, "away")),
		os.Link(filepath.Join(dir, "run"), filepath.Join(dir, "sub/run")),
		os.WriteFile(filepath.Join(dir, "nothing"), nil, 0o444), os.Chmod(filepath.Join(dir, "sub"), 0o500),
	); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(filepath.Join(dir, "sub"), 0o700) })
	return dir
}

// list describes a tree.
func list(t *testing.T, dir string) (all []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(at string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, at)
		line := fmt.Sprint(rel, " ", fi.Mode())
		switch {
		case fi.Mode().IsRegular():
			data, err := os.ReadFile(at)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %x %d", fi.Sys().(*syscall.Stat_t).Nlink, data[:min(len(data), 64)],
				fi.ModTime().UnixNano())
			line += fmt.Sprint(bytes.Count(data, []byte{0}), len(data))
		case fi.Mode()&os.ModeSymlink != 0:
			to, err := os.Readlink(at)
			if err != nil {
				return err
			}
			line += " " + to
		}
		all = append(all, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestCopy(t *testing.T) {
	_, c := newServer(t, nil)
	from := tree(t)
	for name, tt := range map[string]struct{ from, to, at string }{
		"new":                {from, "new", "new"},
		"into":               {from, "there", "there/tree"},
		"contents into":      {from + "/.", "there", "there"},
		"contents, new":      {from + "/.", "new", "new"},
		"file":               {from + "/random", "new", "new"},
		"file into":          {from + "/random", "there", "there/random"},
		"file over":          {from + "/random", "over", "over"},
		"symlink":            {from + "/away", "there", "there/away"},
		"relative, slash":    {from + "/", "there/", "there/tree"},
		"file of nothing":    {from + "/nothing", "new", "new"},
		"sparse":             {from + "/sub/sparse", "there/", "there/sparse"},
		"into a deeper path": {from, "there/new", "there/new"},
	} {
		for way, do := range map[string]func(from, to string) error{
			"to":   func(from, to string) error { return c.CopyTo(t.Context(), from, to, nil, guest.CopyOptions{}) },
			"from": func(from, to string) error { return c.CopyFrom(t.Context(), from, to, nil, guest.CopyOptions{}) },
		} {
			t.Run(name+" "+way, func(t *testing.T) {
				dir := t.TempDir()
				if err := errors.Join(os.Mkdir(filepath.Join(dir, "there"), 0o700),
					os.WriteFile(filepath.Join(dir, "over"), []byte("old"), 0o600)); err != nil {
					t.Fatal(err)
				}
				if err := do(tt.from, dir+"/"+tt.to); err != nil {
					t.Fatal(err)
				}
				want, got := list(t, filepath.Clean(tt.from)), list(t, filepath.Join(dir, tt.at))
				if strings.HasPrefix(name, "contents into") {
					want, got = want[1:], got[1:] // the directory itself was there
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Error(diff)
				}
				if name == "sparse" {
					if st, err := os.Stat(filepath.Join(dir, tt.at)); err != nil || st.Sys().(*syscall.Stat_t).Blocks > 64 {
						t.Errorf("its holes are filled: %v", err)
					}
				}
			})
		}
	}
	var archive bytes.Buffer
	if err := c.CopyFrom(t.Context(), from, "-", &archive, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	if err := c.CopyTo(t.Context(), "-", to, &archive, guest.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(list(t, from), list(t, to+"/tree")); diff != "" {
		t.Error(diff)
	}
	for what, err := range map[string]error{
		"from what is not there":         c.CopyFrom(t.Context(), "/no/such", to, nil, guest.CopyOptions{}),
		"to below what is not there":     c.CopyTo(t.Context(), from, to+"/no/such", nil, guest.CopyOptions{}),
		"to a directory that is not one": c.CopyTo(t.Context(), from, to+"/none/", nil, guest.CopyOptions{}),
		"an archive to a file":           c.CopyTo(t.Context(), "-", to+"/none", strings.NewReader(""), guest.CopyOptions{}),
		"what is no archive": c.CopyTo(t.Context(), "-", to, strings.NewReader(strings.Repeat("no archive", 100)),
			guest.CopyOptions{}),
		"not there here":   c.CopyTo(t.Context(), "/no/such", to, nil, guest.CopyOptions{}),
		"to a full device": c.CopyFrom(t.Context(), from, "-", full{}, guest.CopyOptions{}),
	} {
		if err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, syscall.ENOSPC }
