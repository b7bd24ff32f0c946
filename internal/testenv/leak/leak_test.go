package leak_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/leak"
)

// thing is one that the oracle must see.
type thing struct {
	name string
	make func(t *testing.T, dir string) (unmake func())
	want string // DIR stands for the root
}

func TestDiff(t *testing.T) {
	seeEach(t, []thing{
		{"Nothing", func(*testing.T, string) func() { return func() {} }, ""},
		{"File", makeFile, "left behind: file DIR/file (regular)"},
		{"FIFO", makeFIFO, "left behind: file DIR/fifo (FIFO)"},
		{"Lease", makeLease, "left behind: file DIR/lease (symbolic link)"},
		{"Directory", makeDirectory, "left behind: file DIR/directory (directory)"},
		{"FileGone", removeFile, "gone: file DIR/there (regular)"},
		{"Socket", makeSocket, "left behind: unix socket DIR/socket"},
		{"Descriptor", makeDescriptor, ": /dev/null"},
		{"Goroutine", makeGoroutine, "leak_test.makeGoroutine"},
		{"Child", makeChild, "left behind: process"},
		{"Zombie", makeZombie, ", state Z, "},
		{"Foreign/Arguments", foreign(func(dir string) *exec.Cmd {
			return exec.Command("sh", "-c", "read x", dir+"/argument")
		}), "DIR/argument"},
		{"Foreign/Environment", foreign(func(dir string) *exec.Cmd {
			cmd := exec.Command("cat")
			cmd.Env = []string{"X=a:" + dir + ":b"}
			return cmd
		}), " cat, state"},
		{"Foreign/Directory", foreign(func(dir string) *exec.Cmd {
			cmd := exec.Command("cat")
			cmd.Dir = dir
			return cmd
		}), " cat, state"},
		{"Foreign/Firecracker", foreign(func(string) *exec.Cmd {
			cmd := exec.Command("cat")
			cmd.Args[0] = "firecracker"
			return cmd
		}), " firecracker, state"},
	})
}

// apartVariable is set in a copy of the test binary that has network and mount
// namespaces of its own: nothing below touches the host's.
const apartVariable = "SMARTVM_TEST_APART"

func TestDiff_Root(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("we are not root")
	}
	if os.Getenv(apartVariable) == "" {
		testenv.Turn(t)
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), apartVariable+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		if err != nil || !strings.Contains(string(out), "--- PASS: TestDiff_Root/Mount") {
			t.Errorf("in namespaces of its own: %v", err)
		}
		return
	}
	if err := errors.Join(os.MkdirAll("/run/netns", 0o755),
		unix.Mount("tmpfs", "/run/netns", "tmpfs", 0, "size=64k")); err != nil {
		t.Fatal(err)
	}
	seeEach(t, []thing{
		{"Cgroup", makeCgroup, "/smartvm-leak-test/below"},
		{"Mount", makeMount, "left behind: mount DIR/there is: smartvm-test of type tmpfs, root /"},
		{"Loop", makeLoop, "of DIR/image"},
		{"Link", makeLink, "left behind: network link smartvm0"},
		{"Route", makeLink, "left behind: route IPv4 to 0008090A mask 00FFFFFF by 00000000 on smartvm0"},
		{"Namespace", makeNamespace, "left behind: network namespace /run/netns/smartvm-leak-test"},
	})
}

// seeEach makes each thing, expects to read of it and, once it is unmade, of
// nothing.
func seeEach(t *testing.T, things []thing) {
	for _, tt := range things {
		t.Run(tt.name, func(t *testing.T) {
			// A socket's address has room for it, as has a line about a process, whatever TMPDIR is.
			dir, err := os.MkdirTemp("/tmp", "smartvm-leak-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			write(t, filepath.Join(dir, "there"))
			before := take(t, dir)
			unmake := tt.make(t, dir)
			got := before.Diff(take(t, dir))
			unmake()
			want := strings.ReplaceAll(tt.want, "DIR", dir)
			if all := strings.Join(got, "\n"); !strings.Contains(all, want) || (want == "") != (all == "") {
				t.Errorf("got %q, want one with %q", got, want)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if diff, err := before.Settle(ctx); err != nil || len(diff) > 0 {
				t.Errorf("afterwards: %q, error %v", diff, err)
			}
		})
	}
}

func TestTake_RelativeRoot(t *testing.T) {
	if _, err := leak.Take(leak.Scope{Roots: []string{"x"}}); err == nil {
		t.Error("no error")
	}
}

func TestTake_MissingRoot(t *testing.T) {
	root := filepath.Join(t.TempDir(), "missing")
	before := take(t, root)
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	if got := before.Diff(take(t, root)); len(got) != 1 {
		t.Errorf("got %q, want one directory", got)
	}
}

func TestRoot_NotAPrefix(t *testing.T) {
	// A process in a sibling whose name begins like the root's is not ours.
	dir := t.TempDir()
	root, sibling := filepath.Join(dir, "vm"), filepath.Join(dir, "vm-2")
	for _, d := range []string{root, sibling} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	before := takeHost(t, root)
	unmake := foreign(func(string) *exec.Cmd {
		cmd := exec.Command("cat")
		cmd.Dir = sibling
		return cmd
	})(t, dir)
	defer unmake()
	if got := before.Diff(takeHost(t, root)); len(got) > 0 {
		t.Errorf("got %q", got)
	}
}

func TestSettle_Waits(t *testing.T) {
	dir := t.TempDir()
	before := take(t, dir)
	makeFile(t, dir)
	watched := make(chan struct{})
	go func() {
		<-watched
		_ = os.Remove(filepath.Join(dir, "file"))
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	close(watched)
	if diff, err := before.Settle(ctx); err != nil || len(diff) > 0 {
		t.Errorf("got %q, error %v", diff, err)
	}
}

func TestSettle_GivesUp(t *testing.T) {
	dir := t.TempDir()
	before := take(t, dir)
	makeFile(t, dir)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if diff, err := before.Settle(ctx); err != nil || len(diff) != 1 {
		t.Errorf("got %q, error %v", diff, err)
	}
}

func take(t *testing.T, root string) *leak.Snapshot {
	t.Helper()
	return takeScope(t, leak.Scope{Roots: []string{root}, Self: true})
}

// takeHost leaves out our own descriptors and goroutines.
func takeHost(t *testing.T, root string) *leak.Snapshot {
	t.Helper()
	return takeScope(t, leak.Scope{Roots: []string{root}})
}

func takeScope(t *testing.T, scope leak.Scope) *leak.Snapshot {
	t.Helper()
	if os.Getenv(apartVariable) == "" { // else it is our parent's turn
		testenv.Turn(t)
	}
	s, err := leak.Take(scope)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// check returns what unmakes a thing with one step that may not fail.
func check(t *testing.T, unmake func() error) func() {
	return func() {
		t.Helper()
		if err := unmake(); err != nil {
			t.Error(err)
		}
	}
}

func remover(t *testing.T, path string) func() {
	return check(t, func() error { return os.Remove(path) })
}

func makeFile(t *testing.T, dir string) func() {
	path := filepath.Join(dir, "file")
	write(t, path)
	return remover(t, path)
}

func makeFIFO(t *testing.T, dir string) func() {
	path := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return remover(t, path)
}

func makeLease(t *testing.T, dir string) func() {
	path := filepath.Join(dir, "lease")
	if err := os.Symlink("owner", path); err != nil {
		t.Fatal(err)
	}
	return remover(t, path)
}

func makeDirectory(t *testing.T, dir string) func() {
	path := filepath.Join(dir, "directory")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return remover(t, path)
}

func removeFile(t *testing.T, dir string) func() {
	path := filepath.Join(dir, "there")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	return func() { write(t, path) }
}

func makeSocket(t *testing.T, dir string) func() {
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	return check(t, l.Close)
}

func makeDescriptor(t *testing.T, _ string) func() {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	return check(t, f.Close)
}

func makeGoroutine(*testing.T, string) func() {
	end := make(chan struct{})
	go func() { <-end }()
	return func() { close(end) }
}

func makeChild(t *testing.T, _ string) func() {
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return check(t, func() error {
		_ = in.Close()
		return cmd.Wait()
	})
}

func makeZombie(t *testing.T, _ string) func() {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Waits for the end and leaves the zombie.
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	return check(t, cmd.Wait)
}

// foreign starts a program that reads its standard input and does not descend
// from us: its parent, a shell, ends at once.
func foreign(command func(dir string) *exec.Cmd) func(*testing.T, string) func() {
	return func(t *testing.T, dir string) func() {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		cmd := command(dir)
		// A name for the program ($0) that differs from its file needs exec -a,
		// which dash has not: so a link of that name.
		program := cmd.Path
		if name := cmd.Args[0]; filepath.Base(program) != name {
			program = filepath.Join(t.TempDir(), name)
			copyFile(t, cmd.Path, program)
		}
		shell := exec.Command("sh",
			append([]string{"-c", `exec 3<&0; "$0" "$@" <&3 3<&- >/dev/null 2>&1 &`, program}, cmd.Args[1:]...)...)
		shell.Dir, shell.Env, shell.Stdin = cmd.Dir, cmd.Env, r
		out, err := shell.Output()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return check(t, w.Close)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o700); err != nil {
		t.Fatal(err)
	}
}

func makeCgroup(t *testing.T, _ string) func() {
	for _, point := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if err := unix.Statfs(point, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		dir := filepath.Join(point, "smartvm-leak-test")
		if err := os.MkdirAll(filepath.Join(dir, "below"), 0o755); err != nil {
			t.Fatal(err)
		}
		return func() {
			remover(t, filepath.Join(dir, "below"))()
			remover(t, dir)()
		}
	}
	t.Skip("no cgroup v2 is mounted")
	return nil
}

func makeMount(t *testing.T, dir string) func() {
	point := filepath.Join(dir, "there is")
	if err := os.Mkdir(point, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("smartvm-test", point, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	return func() {
		check(t, func() error { return unix.Unmount(point, 0) })()
		remover(t, point)()
	}
}

func makeLoop(t *testing.T, dir string) func() {
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	device := tool(t, "losetup", "--find", "--show", image)
	return func() {
		tool(t, "losetup", "--detach", device)
		remover(t, image)()
	}
}

func makeLink(t *testing.T, _ string) func() {
	tool(t, "ip", "link", "add", "smartvm0", "type", "bridge")
	tool(t, "ip", "address", "add", "10.9.8.7/24", "dev", "smartvm0")
	tool(t, "ip", "link", "set", "smartvm0", "up")
	return func() { tool(t, "ip", "link", "delete", "smartvm0") }
}

// tool runs a program that the machine may lack, or whose wish the kernel may
// not grant.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Skipf("%s %q: %v: %s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func makeNamespace(t *testing.T, _ string) func() {
	path := "/run/netns/smartvm-leak-test"
	write(t, path)
	return remover(t, path)
}
