package leak_test

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/leak"
)

// TestDiff makes a thing of each kind, expects to read of it and, when it has
// been unmade, of nothing.
func TestDiff(t *testing.T) {
	tests := []struct {
		name string
		root bool // needs root
		make func(t *testing.T, dir string) (unmake func())
		want string // DIR stands for the root
	}{
		{"nothing", false, func(*testing.T, string) func() { return func() {} }, ""},
		{"File", false, makeFile, "left behind: file DIR/file (regular)"},
		{"FIFO", false, makeFIFO, "left behind: file DIR/fifo (FIFO)"},
		{"Lease", false, makeLease, "left behind: file DIR/lease (symbolic link)"},
		{"Directory", false, makeDirectory, "left behind: file DIR/directory (directory)"},
		{"FileGone", false, removeFile, "gone: file DIR/there (regular)"},
		{"Socket", false, makeSocket, "left behind: unix socket DIR/socket"},
		{"Descriptor", false, makeDescriptor, ": /dev/null"},
		{"Goroutine", false, makeGoroutine, "leak_test.makeGoroutine"},
		{"Child", false, makeChild, "left behind: process"},
		{"Zombie", false, makeZombie, ", state Z, "},
		{"ForeignArguments", false, foreign(func(dir string) *exec.Cmd {
			return exec.Command("sh", "-c", "read x", dir+"/argument")
		}), "DIR/argument"},
		{"ForeignEnvironment", false, foreign(func(dir string) *exec.Cmd {
			cmd := exec.Command("cat")
			cmd.Env = []string{"X=a:" + dir + ":b"}
			return cmd
		}), " cat, state"},
		{"ForeignDirectory", false, foreign(func(dir string) *exec.Cmd {
			cmd := exec.Command("cat")
			cmd.Dir = dir
			return cmd
		}), " cat, state"},
		{"OrphanFirecracker", false, foreign(func(dir string) *exec.Cmd {
			cmd := exec.Command("cat")
			cmd.Args[0] = "firecracker"
			return cmd
		}), ": firecracker"},
		{"Cgroup", true, makeCgroup, "/smartvm-leak-test/below"},
		{"Mount", true, makeMount, "left behind: mount DIR/there is: smartvm-test of type tmpfs, root /"},
		{"Loop", true, makeLoop, "of DIR/image"},
		{"LinkAndRoute", true, makeLink, "left behind: network link smartvm0"},
		{"Namespace", true, makeNamespace, "left behind: network namespace /run/netns/smartvm-leak-test"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.root && os.Geteuid() != 0 {
				t.Skip("we are not root")
			}
			dir := t.TempDir()
			write(t, filepath.Join(dir, "there"))
			if tt.name == "LinkAndRoute" || tt.name == "Namespace" {
				separate(t)
			}
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
	before := take(t, root)
	unmake := foreign(func(string) *exec.Cmd {
		cmd := exec.Command("cat")
		cmd.Dir = sibling
		return cmd
	})(t, dir)
	defer unmake()
	if got := before.Diff(take(t, root)); len(got) > 0 {
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
	s, err := leak.Take(leak.Scope{Roots: []string{root}, Self: true})
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
		shell := exec.Command("sh", append([]string{"-c", `exec 3<&0; "$0" "$@" <&3 3<&- & echo $!`, program}, cmd.Args[1:]...)...)
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
	// In the only mount namespace that the oracle sees: our own.
	point := filepath.Join(dir, "there is")
	if err := os.Mkdir(point, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("smartvm-test", point, "tmpfs", 0, "size=4k"); err != nil {
		t.Skip(err)
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
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		t.Skipf("no loop devices: %v: %s", err, out)
	}
	return func() {
		if out, err := exec.Command("losetup", "--detach", strings.TrimSpace(string(out))).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		remover(t, image)()
	}
}

func makeLink(t *testing.T, _ string) func() {
	// A bridge of which nobody else knows: see separate.
	out, err := exec.Command("ip", "link", "add", "smartvm0", "type", "dummy").CombinedOutput()
	if err != nil {
		t.Skipf("no links: %v: %s", err, out)
	}
	return func() {
		if out, err := exec.Command("ip", "link", "delete", "smartvm0").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	}
}

func makeNamespace(t *testing.T, _ string) func() {
	if err := os.MkdirAll("/run/netns", 0o755); err != nil {
		t.Fatal(err)
	}
	path := "/run/netns/smartvm-leak-test"
	write(t, path)
	return remover(t, path)
}

func separate(t *testing.T) { _, _ = runtime.NumCPU(), io.EOF }
