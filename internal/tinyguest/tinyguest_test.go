package tinyguest_test

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/tinyguest"
)

// Long enough for an emulated host; reached only when something hangs.
const patience = 60 * time.Second

// firecracker returns the binary's path.
func firecracker(t *testing.T) string {
	t.Helper()
	testenv.Require(t, testenv.KVM)
	return testenv.Firecracker(t)
}

// vm is a running Firecracker. Its console is the pipe out.
type vm struct {
	cmd    *exec.Cmd
	out    *bufio.Reader
	socket string
	log    string
}

// boot starts g in a Firecracker that is killed when the test ends.
func boot(t *testing.T, g tinyguest.Guest) *vm {
	t.Helper()
	return bootWith(t, g, nil)
}

func bootWith(t *testing.T, g tinyguest.Guest, stdin io.Reader) *vm {
	t.Helper()
	bin := firecracker(t)
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	kernel := write("guest", tinyguest.Image(g))
	config := write("vm.json", fmt.Appendf(nil, `{
		"boot-source": {"kernel_image_path": %q, "boot_args": "none"},
		"drives": [],
		"machine-config": {"vcpu_count": 1, "mem_size_mib": 64}
	}`, kernel))
	log := write("log", nil) // Firecracker up to 1.13 does not create it.
	v := &vm{socket: testenv.Socket(t, filepath.Join(dir, "s")), log: log}

	ctx, cancel := context.WithTimeout(context.Background(), patience)
	v.cmd = exec.CommandContext(ctx, bin, "--api-sock", v.socket, "--config-file", config, "--log-path", log)
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	v.cmd.Stdin = stdin
	stdout, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.out = bufio.NewReader(stdout)
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = v.cmd.Wait() // a second Wait returns at once
		if t.Failed() {
			text, _ := os.ReadFile(log)
			t.Logf("firecracker's log:\n%s", text)
		}
	})
	return v
}

// finish reads the console to its end and returns it with the exit status.
func (v *vm) finish(t *testing.T) (string, int) {
	t.Helper()
	text, err := io.ReadAll(v.out)
	if err != nil {
		t.Fatal(err)
	}
	err = v.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(text), v.cmd.ProcessState.ExitCode()
}

// expect reads exactly want from the console.
func (v *vm) expect(t *testing.T, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(v.out, got); err != nil || string(got) != want {
		t.Fatalf("console: got %q, %v; want %q", got[:n], err, want)
	}
}

// call sends a request to the API and fails the test unless it gets 204.
func (v *vm) call(t *testing.T, method, path, body string) {
	t.Helper()
	client := http.Client{Timeout: patience, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", v.socket)
		},
	}}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://localhost"+path, strings.NewReader(body))
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
		t.Fatalf("%s %s %s: got %d %s", method, path, body, resp.StatusCode, text)
	}
}

func TestImage_ends(t *testing.T) {
	for name, c := range map[string]struct {
		guest  tinyguest.Guest
		output string
		status int
	}{
		"reboot":       {tinyguest.Guest{}, "", 0},
		"print reboot": {tinyguest.Guest{Message: "\x01hello, host\xff\n"}, "\x01hello, host\xff\n", 0},
		"dirty":        {tinyguest.Guest{Message: "done", Pages: 4096}, "done", 0},
	} {
		t.Run(name, func(t *testing.T) {
			output, status := boot(t, c.guest).finish(t)
			if output != c.output || status != c.status {
				t.Errorf("got output %q, status %d; want %q, %d", output, status, c.output, c.status)
			}
		})
	}
}

// Guests whose vCPU fails. The status is not certain (see [tinyguest.Crash]),
// the log is.
func TestImage_fails(t *testing.T) {
	for name, c := range map[string]struct {
		then   tinyguest.Then
		reason string
	}{
		"triple fault": {tinyguest.TripleFault, "shutdown"},
		"crash":        {tinyguest.Crash, "internal_error"},
	} {
		t.Run(name, func(t *testing.T) {
			v := boot(t, tinyguest.Guest{Message: "!", Then: c.then})
			output, status := v.finish(t)
			if output != "!" || status != 0 && status != 1 {
				t.Errorf("got output %q, status %d; want \"!\", 0 or 1", output, status)
			}
			log, err := os.ReadFile(v.log)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(strings.ToLower(string(log)), c.reason) {
				t.Errorf("the log does not mention %q", c.reason)
			}
		})
	}
}

// Guests that go on: after the message Firecracker still runs, and takes
// commands.
func TestImage_goesOn(t *testing.T) {
	for name, then := range map[string]tinyguest.Then{"idle": tinyguest.Idle, "spin": tinyguest.Spin} {
		t.Run(name, func(t *testing.T) {
			v := boot(t, tinyguest.Guest{Message: "up", Then: then})
			v.expect(t, "up")
			v.call(t, http.MethodPatch, "/vm", `{"state": "Paused"}`)
			v.call(t, http.MethodPatch, "/vm", `{"state": "Resumed"}`)
			if err := v.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			if output, status := v.finish(t); output != "" || status != -1 {
				t.Errorf("got output %q, status %d; want none, and death by our signal", output, status)
			}
		})
	}
}

func TestImage_dirty(t *testing.T) {
	const pages = 1000
	v := boot(t, tinyguest.Guest{Message: ".", Pages: pages, Then: tinyguest.Idle})
	v.expect(t, ".")
	v.call(t, http.MethodPatch, "/vm", `{"state": "Paused"}`)
	dir := t.TempDir()
	memory := filepath.Join(dir, "memory")
	v.call(t, http.MethodPut, "/snapshot/create",
		fmt.Sprintf(`{"snapshot_path": %q, "mem_file_path": %q}`, filepath.Join(dir, "state"), memory))
	f, err := os.Open(memory)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for page := range int64(pages + 1) {
		addr := tinyguest.DirtyBase + page*tinyguest.PageSize
		word := make([]byte, 8)
		if _, err := f.ReadAt(word, addr); err != nil {
			t.Fatal(err)
		}
		want := uint64(addr)
		if page == pages {
			want = 0
		}
		if got := binary.LittleEndian.Uint64(word); got != want {
			t.Fatalf("page %d: got %#x, want %#x", page, got, want)
		}
	}
}

func TestImage_count(t *testing.T) {
	v := boot(t, tinyguest.Guest{Message: "from\n", Then: tinyguest.Count})
	v.expect(t, "from\n")
	for want := range uint64(20) {
		line, err := v.out.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		got, err := strconv.ParseUint(strings.TrimSuffix(line, "\n"), 16, 32)
		if err != nil || got != want || len(line) != 9 {
			t.Fatalf("got line %q, %v; want %08x", line, err, want)
		}
	}
}

func TestImage_flood(t *testing.T) {
	var line strings.Builder
	line.WriteByte('\n')
	for c := byte('!'); c < 0x7f; c++ {
		line.WriteByte(c)
	}
	boot(t, tinyguest.Guest{Then: tinyguest.Flood}).expect(t, strings.Repeat(line.String(), 100))
}

func TestImage_sweep(t *testing.T) {
	boot(t, tinyguest.Guest{Pages: 100, Message: "m", Then: tinyguest.Sweep}).expect(t, "m...")
}

func TestImage_awaitKey(t *testing.T) {
	v := boot(t, tinyguest.Guest{Message: "k", Then: tinyguest.AwaitKey})
	v.expect(t, "k")
	v.call(t, http.MethodPut, "/actions", `{"action_type": "SendCtrlAltDel"}`)
	if output, status := v.finish(t); output != "" || status != 0 {
		t.Errorf("got output %q, status %d; want none, 0", output, status)
	}
}

func TestImage_echo(t *testing.T) {
	in, err := os.OpenFile(fifo(t), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	v := bootWith(t, tinyguest.Guest{Message: "e", Then: tinyguest.Echo}, in)
	v.expect(t, "e")
	text := strings.Repeat("0123456789\n", 20) // the port holds 64 bytes
	if _, err := io.WriteString(in, text); err != nil {
		t.Fatal(err)
	}
	v.expect(t, text)
}

func fifo(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "in")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestImage_elf(t *testing.T) {
	for then := tinyguest.Reboot; then <= tinyguest.Sweep; then++ {
		image := tinyguest.Image(tinyguest.Guest{Message: "m", Pages: 1, Then: then})
		f, err := elf.NewFile(bytes.NewReader(image))
		if err != nil {
			t.Fatal(err)
		}
		if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC || len(f.Progs) != 1 {
			t.Fatalf("got machine %v, type %v, %d segments", f.Machine, f.Type, len(f.Progs))
		}
		p := f.Progs[0]
		if p.Type != elf.PT_LOAD || p.Paddr != 16<<20 || f.Entry != p.Paddr || p.Off+p.Filesz != uint64(len(image)) {
			t.Errorf("got segment %+v, entry %#x, file of %d bytes", p.ProgHeader, f.Entry, len(image))
		}
	}
}
