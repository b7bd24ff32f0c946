package guestagent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/initramfs"
	"push.rocks/smartvm/internal/lab"
	"push.rocks/smartvm/internal/testenv"
)

// patience bounds a guest's life: under emulation it boots in seconds.
var patience = testenv.Patience(time.Minute)

// TestPrepareLab makes the initramfs outside the lab, where compiling takes long.
func TestPrepareLab(t *testing.T) {
	dir := os.Getenv(testenv.DataVariable)
	if dir == "" {
		t.Skip("needs: a run of tests in the lab")
	}
	makeInitramfs(t, dir)
}

// initramfsPath returns the path of an initramfs of the agent.
func initramfsPath(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv(testenv.DataVariable); dir != "" {
		return filepath.Join(dir, initramfsFile)
	}
	return makeInitramfs(t, t.TempDir())
}

const initramfsFile = "initramfs"

// makeInitramfs makes an initramfs of the agent as it is now, in a directory.
func makeInitramfs(t *testing.T, dir string) string {
	t.Helper()
	agent := filepath.Join(dir, "agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", agent,
		"push.rocks/smartvm/cmd/smartvm-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	program, err := os.ReadFile(agent)
	if err != nil {
		t.Fatal(err)
	}
	if len(program) > 4<<20 {
		t.Errorf("the agent has %d bytes, over 4 MiB", len(program))
	}
	modules := testenv.Fixture(t, fixtures.GuestModules)
	path := filepath.Join(dir, initramfsFile)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = initramfs.Build(f,
		initramfs.Options{Agent: program, Modules: os.DirFS(modules), Release: filepath.Base(modules)})
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// run runs a program of this machine.
func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, args, err, out)
	}
}

// tool skips the test where a program of this machine is missing.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skip(err)
	}
	return path
}

const passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1001:web:/home/web:/bin/sh\n"

const group = "root:x:0:\nweb:x:1001:\nlogs:x:1002:web,other\n"

// image is a busybox root file system: contents by path. A path that ends in a slash is a
// directory; a content that begins with "->" makes a symbolic link.
type image map[string]string

// complete returns the image with what it does not have itself.
func (i image) complete() image {
	all := image{
		"etc/passwd": passwd, "etc/group": group, "proc/": "", "sys/": "", "dev/": "", "run/": "", "tmp/": "",
		"home/web/": "",
	}
	for path, content := range i {
		delete(all, path+"/")
		all[path] = content
	}
	return all
}

// write writes the image's files to dir.
func (i image) write(t *testing.T, dir string) {
	t.Helper()
	for path, content := range i {
		full := filepath.Join(dir, path)
		target, link := strings.CutPrefix(content, "->")
		parent := filepath.Dir(full)
		if strings.HasSuffix(path, "/") {
			parent = full
		}
		err := os.MkdirAll(parent, 0o755)
		switch {
		case err != nil:
		case link:
			err = os.Symlink(target, full)
		case strings.HasSuffix(path, "/"):
		case content == huge:
			err = errors.Join(os.WriteFile(full, nil, 0o644), os.Truncate(full, 1<<30))
		default:
			err = os.WriteFile(full, []byte(content), 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := os.ReadFile(testenv.Fixture(t, fixtures.Busybox))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "bin"), 0o755),
		os.WriteFile(filepath.Join(dir, "bin/busybox"), busybox, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields(
		"sh cat id echo hostname ls tty sleep seq kill ps reboot env pwd stat touch grep setsid") {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", applet)); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
	}
}

// huge is the content of a file of 1 GiB.
const huge = "huge"

// ext4 and squashfs make root drives.
func (i image) ext4(t *testing.T) string {
	t.Helper()
	return i.changed(t, func(string) error { return nil })
}

// changed is ext4 of a tree that change was given.
func (i image) changed(t *testing.T, change func(dir string) error) string {
	t.Helper()
	dir, path := filepath.Join(t.TempDir(), "tree"), filepath.Join(t.TempDir(), "root.ext4")
	i.complete().write(t, dir)
	if err := change(dir); err != nil {
		t.Fatal(err)
	}
	run(t, tool(t, "mkfs.ext4"), "-q", "-d", dir, path, "24M")
	return path
}

func (i image) squashfs(t *testing.T) string {
	t.Helper()
	dir, path := filepath.Join(t.TempDir(), "tree"), filepath.Join(t.TempDir(), "root.squashfs")
	i.complete().write(t, dir)
	run(t, tool(t, "mksquashfs"), dir, path, "-no-progress", "-noI", "-noD", "-noF", "-noX", "-all-root")
	return path
}

// scratch makes a scratch drive.
func scratch(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "scratch.ext4")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 64<<20)); err != nil {
		t.Fatal(err)
	}
	run(t, tool(t, "mkfs.ext4"), "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1", path)
	return path
}

// config makes the drive that tells the guest what to do.
func config(t *testing.T, b guest.Boot) string {
	t.Helper()
	data, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return file(t, data)
}

func file(t *testing.T, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// drive is a drive of a VM, the first one /dev/vda.
type drive struct {
	path     string
	writable bool
}

// vm is a VM that was started.
type vm struct {
	socket  string
	ended   chan error
	mu      sync.Mutex
	console bytes.Buffer
}

func (v *vm) Write(p []byte) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.console.Write(p)
}

// text is what the console has said, with plain line ends.
func (v *vm) text() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return strings.ReplaceAll(v.console.String(), "\r", "")
}

func start(t *testing.T, drives ...drive) *vm {
	t.Helper()
	type object map[string]any
	doc := object{
		"boot-source": object{
			"kernel_image_path": testenv.Fixture(t, fixtures.GuestKernel), "initrd_path": initramfsPath(t),
			"boot_args": "console=ttyS0 quiet reboot=k panic=1",
		},
		"machine-config": object{"vcpu_count": 1, "mem_size_mib": 256},
	}
	if testenv.InLab() {
		doc["machine-config"].(object)["huge_pages"] = lab.LargePages
	}
	var list []object
	for i, d := range drives {
		list = append(list,
			object{"drive_id": fmt.Sprint("d", i), "path_on_host": d.path, "is_root_device": false, "is_read_only": !d.writable})
	}
	doc["drives"] = list
	data, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	v := &vm{socket: testenv.Socket(t, filepath.Join(t.TempDir(), "api.sock")), ended: make(chan error, 1)}
	cmd := exec.CommandContext(ctx, testenv.Firecracker(t), "--api-sock", v.socket, "--config-file", file(t, data),
		"--level", "Error") // its log and the console are one stream, in which a line can part another
	cmd.Stdout, cmd.Stderr = v, v
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		v.ended <- cmd.Wait()
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return v
}

// wait returns what the console said until the VM ended, as it must by itself.
func (v *vm) wait(t *testing.T) string {
	t.Helper()
	if err := <-v.ended; err != nil {
		t.Errorf("the VM did not end well: %v", err)
	}
	if t.Failed() {
		t.Log(v.text())
	}
	return v.text()
}

// await waits for a text on the console.
func (v *vm) await(t *testing.T, text string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !strings.Contains(v.text(), text); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("console lacks %q:\n%s", text, v.text())
		}
	}
}

// pressKeys sends Ctrl-Alt-Del.
func (v *vm) pressKeys(t *testing.T) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", v.socket)
		},
	}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://vm/actions",
		strings.NewReader(`{"action_type":"SendCtrlAltDel"}`))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s: %s", resp.Status, text)
	}
}

// watch looks for what a test of real guests leaves behind.
func watch(t *testing.T) {
	t.Helper()
	testenv.Require(t, testenv.KVM, testenv.LinuxGuest)
	testenv.NoLeaks(t)
}

// has wants lines on the console.
func has(t *testing.T, console string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if !strings.Contains("\n"+console, "\n"+line+"\n") {
			t.Errorf("console lacks the line %q:\n%s", line, console)
		}
	}
}
