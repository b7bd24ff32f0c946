package fakefc_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/testenv"
)

func TestMain(m *testing.M) {
	if fakefc.Called(os.Args) {
		os.Exit(fakefc.Main(os.Args, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// serve starts a server and returns a client that claims version.
func serve(t *testing.T, config fakefc.Config, claimed string) (*fakefc.Server, *firecracker.Client) {
	t.Helper()
	path := testenv.Socket(t, filepath.Join(t.TempDir(), "s"))
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := fakefc.New(config)
	served := make(chan error)
	go func() { served <- server.Serve(listener) }()
	client := dial(t, path, claimed)
	t.Cleanup(func() {
		_ = server.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return server, client
}

// dial returns a client of the socket at path, once it is there.
func dial(t *testing.T, path, claimed string) *firecracker.Client {
	version, err := firecracker.ParseVersion(claimed)
	if err != nil {
		t.Fatal(err)
	}
	path = testenv.Socket(t, path)
	c := firecracker.New(func(ctx context.Context) (net.Conn, error) {
		for {
			conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
			if err == nil || ctx.Err() != nil {
				return conn, err
			}
			time.Sleep(time.Millisecond) // until the socket is there
		}
	}, version)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func fault(t *testing.T, what string, err error, status int, part string) {
	t.Helper()
	var fault *firecracker.APIError
	if !errors.As(err, &fault) || fault.Status != status || !strings.Contains(fault.Fault, part) {
		t.Errorf("%s: %v, want status %d with %q", what, err, status, part)
	}
}

func TestServer_life(t *testing.T) {
	server, c := serve(t, fakefc.Config{ID: "vm", Version: "1.16.1"}, "1.16.1")
	ctx := t.Context()
	boot := firecracker.BootSource{KernelImagePath: "k"}
	drive := firecracker.Drive{DriveID: "d", PathOnHost: "old"}
	fault(t, "start of nothing", c.InstanceStart(ctx), 400, "without kernel")
	fault(t, "early pause", c.Pause(ctx), 400, "before starting")
	memory := 256
	for what, err := range map[string]error{ // evaluated in this order
		"boot source": c.PutBootSource(ctx, boot),
		"machine":     c.PatchMachineConfig(ctx, firecracker.PartialMachineConfiguration{MemSizeMiB: &memory}),
		"drive":       c.PutDrive(ctx, drive),
		"again":       c.PutDrive(ctx, drive),
		"interface":   c.PutNetworkInterface(ctx, firecracker.NetworkInterface{IfaceID: "e", HostDevName: "tap", MTU: 1400}),
		"balloon":     c.PutBalloon(ctx, firecracker.Balloon{DeflateOnOOM: true}),
		"metadata":    c.PutMMDS(ctx, map[string]int{"a": 1}),
		"more":        c.PatchMMDS(ctx, map[string]int{"b": 2}),
		"start":       c.InstanceStart(ctx),
		"target":      c.PatchBalloon(ctx, 7),
		"drive path":  c.PatchDrive(ctx, firecracker.PartialDrive{DriveID: "d", PathOnHost: "new"}),
		"pause":       c.Pause(ctx),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	fault(t, "late boot source", c.PutBootSource(ctx, boot), 400, "after starting")
	fault(t, "no such drive", c.PatchDrive(ctx, firecracker.PartialDrive{DriveID: "x"}), 400, "not found")
	info, err := c.GetInstanceInfo(ctx)
	paused := firecracker.InstanceInfo{
		ID: "vm", State: firecracker.StatePaused, VMMVersion: "1.16.1", AppName: "Firecracker",
	}
	if err != nil || info != paused {
		t.Errorf("%+v, %v, want %+v", info, err, paused)
	}
	config, err := c.GetVMConfig(ctx)
	if err != nil {
		t.Fatal(err)
	}
	drive.PathOnHost = "new"
	want := firecracker.FullVMConfiguration{
		BootSource: &boot, Drives: []firecracker.Drive{drive},
		MachineConfig:     &firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: 256},
		NetworkInterfaces: []firecracker.NetworkInterface{{IfaceID: "e", HostDevName: "tap", MTU: 1400}},
		Balloon:           &firecracker.Balloon{AmountMiB: 7, DeflateOnOOM: true},
	}
	if diff := cmp.Diff(want, config); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
	if metadata, err := c.GetMMDS(ctx); err != nil || string(metadata) != `{"a":1,"b":2}` {
		t.Errorf("metadata %s, %v", metadata, err)
	}
	if !slices.Contains(server.Requests(), fakefc.Request{Method: "PATCH", Path: "/balloon", Body: `{"amount_mib":7}`}) {
		t.Errorf("requests %q", server.Requests())
	}
}

func TestServer_version(t *testing.T) {
	_, c := serve(t, fakefc.Config{Version: "1.12.1"}, "1.16.1") // which is a lie
	fault(t, "field", c.PutNetworkInterface(t.Context(), firecracker.NetworkInterface{IfaceID: "e", MTU: 1400}), 400,
		"mtu")
	fault(t, "endpoint", c.PutSerial(t.Context(), firecracker.SerialDevice{}), 400, "")
	fault(t, "method", c.DeleteDrive(t.Context(), "d"), 400, "Unsupported HTTP method")
	if v, err := c.GetVersion(t.Context()); err != nil || v.String() != "1.12.1" {
		t.Errorf("version %v, %v", v, err)
	}
}

// A guest hears its host after a pause, whatever the version. Those that need no help get none: it
// ends connections.
func TestServer_pause(t *testing.T) {
	for version, helped := range map[string]bool{
		"1.7.0": false, "1.12.1": false, "1.15.1": false, "1.16.0": true, "1.16.1": true, "1.16.2": false, "1.17.0": false,
	} {
		server, c := serve(t, fakefc.Config{Version: version}, version)
		ctx := t.Context()
		if err := errors.Join(
			c.PutBootSource(ctx, firecracker.BootSource{KernelImagePath: "k"}), c.InstanceStart(ctx),
			c.Resume(ctx), // of what runs
			c.Pause(ctx), c.Resume(ctx), c.Pause(ctx), c.Resume(ctx),
		); err != nil {
			t.Errorf("%s: %v", version, err)
		}
		if server.Deaf() {
			t.Errorf("%s: the guest hears nothing any more", version)
		}
		asked := slices.ContainsFunc(server.Requests(), func(r fakefc.Request) bool { return r.Path == "/snapshot/create" })
		if asked != helped {
			t.Errorf("%s: asked for a snapshot: %v, want %v", version, asked, helped)
		}
	}
	// One that cannot answer is not resumed by half.
	_, c := serve(t,
		fakefc.Config{Version: "1.16.1", Faults: map[string]fakefc.Fault{"PUT /snapshot/create": {Exit: &fakefc.Exit{}}}},
		"1.16.1")
	if err := c.Resume(t.Context()); err == nil {
		t.Error("resumed though the VMM has gone")
	}
}

// TestServer_strict sends what the client never would.
// A snapshot is loaded by a fake of the same format, and ends one of another.
func TestServer_snapshot(t *testing.T) {
	dir := t.TempDir()
	state, memory := filepath.Join(dir, "state"), filepath.Join(dir, "memory")
	_, c := serve(t, fakefc.Config{Format: "11.0.0"}, "1.12.1")
	must(t, c.PutMachineConfig(t.Context(), firecracker.MachineConfiguration{VCPUCount: 2, MemSizeMiB: 3}))
	must(t, c.PutBootSource(t.Context(), firecracker.BootSource{KernelImagePath: "k"}))
	must(t, c.InstanceStart(t.Context()))
	create := firecracker.SnapshotCreateParams{SnapshotPath: state, MemFilePath: memory}
	if err := c.CreateSnapshot(t.Context(), create); err == nil || !strings.Contains(err.Error(), "not paused") {
		t.Errorf("snapshot of a running VM: %v", err)
	}
	must(t, c.Pause(t.Context()))
	must(t, c.CreateSnapshot(t.Context(), create))
	if fi, err := os.Stat(memory); err != nil || fi.Size() != 3<<20 {
		t.Errorf("memory: %v, %v", fi, err)
	}
	load := firecracker.SnapshotLoadParams{
		SnapshotPath: state, ResumeVM: true,
		MemBackend: &firecracker.MemBackend{BackendType: firecracker.MemBackendFile, BackendPath: memory},
	}
	_, same := serve(t, fakefc.Config{Format: "11.0.0"}, "1.12.1")
	must(t, same.LoadSnapshot(t.Context(), load))
	if m, err := same.GetMachineConfig(t.Context()); err != nil || m.VCPUCount != 2 {
		t.Errorf("loaded %+v, %v", m, err)
	}
	if info, err := same.GetInstanceInfo(t.Context()); err != nil || info.State != firecracker.StateRunning {
		t.Errorf("loaded it is %+v, %v", info, err)
	}
	exits := make(chan fakefc.Exit, 1)
	_, other := serve(t, fakefc.Config{Exit: func(e fakefc.Exit) { exits <- e }}, "1.12.1")
	if err := other.LoadSnapshot(t.Context(), load); err == nil || !strings.Contains(err.Error(), "bitcode error") {
		t.Errorf("load of another format: %v", err)
	}
	if e := <-exits; e.Status != 1 {
		t.Errorf("ends with %+v", e)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestServer_strict(t *testing.T) {
	for name, request := range map[string]string{
		"unknown field": "PUT /vsock HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n" + `{"cid":3}`,
		"wrong type":    "PUT /vsock HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n" + `{"guest_cid":"3"}`,
		"large":         "PUT /mmds HTTP/1.1\r\nHost: x\r\nContent-Length: 51201\r\n\r\n" + strings.Repeat("1", 51201),
		"chunks":        "PUT /vsock HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
		"unknown path":  "GET /teapot HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		listener, err := net.Listen("unix", testenv.Socket(t, filepath.Join(t.TempDir(), "s")))
		if err != nil {
			t.Fatal(err)
		}
		server := fakefc.New(fakefc.Config{})
		go func() { _ = server.Serve(listener) }()
		conn, err := net.Dial("unix", listener.Addr().String()) //nolint:noctx // local
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, request)
		status := make([]byte, len("HTTP/1.1 400"))
		if _, err := io.ReadFull(conn, status); err != nil || string(status) != "HTTP/1.1 400" {
			t.Errorf("%s: %q, %v", name, status, err)
		}
		_ = conn.Close()
		_ = server.Close()
	}
}

func TestServer_faults(t *testing.T) {
	var ended *fakefc.Exit
	server, c := serve(t, fakefc.Config{
		Exit: func(e fakefc.Exit) { ended = &e },
		Faults: map[string]fakefc.Fault{
			"PUT /boot-source": {Status: 400, Message: "broken"},
			"PUT /drives/d":    {Status: 503, Body: `{ "error": "busy" }`},
			"PUT /vsock":       {},
			"FlushMetrics":     {Exit: &fakefc.Exit{Status: 3}, After: true},
			"InstanceStart":    {Hang: true},
		},
	}, "1.12.1")
	fault(t, "status", c.PutBootSource(t.Context(), firecracker.BootSource{}), 400, "broken")
	fault(t, "raw", c.PutDrive(t.Context(), firecracker.Drive{DriveID: "d"}), 503, "busy")
	if err := c.PutVsock(t.Context(), firecracker.Vsock{}); err != nil {
		t.Error(err)
	}
	fault(t, "handled first", c.FlushMetrics(t.Context()), 400, "before starting")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := c.InstanceStart(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}
	_ = server.Close()
	if ended == nil || ended.Status != 3 {
		t.Errorf("end %+v, want status 3", ended)
	}
}

// start runs the fake program in a directory of its own.
func start(t *testing.T, script fakefc.Script, args ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	dir := t.TempDir()
	program, err := fakefc.Install(dir, script)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, program, args...)
	var stdout bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, []string{}, &stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd, &stdout
}

func TestMain_ends(t *testing.T) {
	for name, row := range map[string]struct {
		script fakefc.Script
		args   []string
		status int
		stdout string
	}{
		"version": {fakefc.Script{Version: "1.6.0"}, []string{"--version"}, 0, "Firecracker v1.6.0\n"},
		"garbage": {fakefc.Script{VersionOutput: "\x7fELF"}, []string{"--version"}, 0, "\x7fELF"},
		"at once": {
			fakefc.Script{ExitAtOnce: &fakefc.Exit{Status: 7, Message: "no KVM"}},
			[]string{"--api-sock", "s"},
			7, "no KVM\n",
		},
		"bad flag":    {fakefc.Script{}, []string{"--api-sock=s"}, 153, ""},
		"no value":    {fakefc.Script{}, []string{"--id", "--api-sock", "s"}, 153, ""},
		"twice":       {fakefc.Script{}, []string{"--id", "a", "--id", "b"}, 153, ""},
		"no file":     {fakefc.Script{}, []string{"--no-api", "--config-file", "none"}, 1, "open none"},
		"socket used": {fakefc.Script{}, []string{"--api-sock", "firecracker.json"}, 1, "RunWithApiError"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd, stdout := start(t, row.script, row.args...)
			_ = cmd.Wait()
			if status := cmd.ProcessState.ExitCode(); status != row.status || !strings.HasPrefix(stdout.String(), row.stdout) {
				t.Errorf("status %d, %q, want %d, %q", status, stdout, row.status, row.stdout)
			}
		})
	}
}

func TestMain_serves(t *testing.T) {
	cmd, stdout := start(t, fakefc.Script{
		Faults:       map[string]fakefc.Fault{"SendCtrlAltDel": {Exit: &fakefc.Exit{Message: "rebooting"}, After: true}},
		ConsoleBytes: 100,
	}, "--id", "vm", "--api-sock", "s")
	socket := filepath.Join(cmd.Dir, "s")
	c := dial(t, socket, "1.12.1")
	for _, do := range []func() error{
		func() error { return c.PutBootSource(t.Context(), firecracker.BootSource{KernelImagePath: "k"}) },
		func() error { return c.InstanceStart(t.Context()) },
		func() error { return c.SendCtrlAltDel(t.Context()) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); err != nil || !strings.Contains(stdout.String(), "rebooting\n") {
		t.Errorf("%v, %q", err, stdout)
	}
	if _, err := os.Lstat(socket); err != nil {
		t.Errorf("the real one leaves its socket behind: %v", err)
	}
}

func TestMain_dies(t *testing.T) {
	for name, script := range map[string]fakefc.Script{
		"accepting": {ExitOnAccept: &fakefc.Exit{Status: 9}},
		"starting":  {Faults: map[string]fakefc.Fault{"InstanceStart": {Exit: &fakefc.Exit{Status: 9}}}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd, _ := start(t, script, "--api-sock", "s")
			if err := dial(t, filepath.Join(cmd.Dir, "s"), "1.12.1").InstanceStart(t.Context()); err == nil {
				t.Error("no error, want the connection lost")
			}
			_ = cmd.Wait()
			if status := cmd.ProcessState.ExitCode(); status != 9 {
				t.Errorf("status %d, want 9", status)
			}
		})
	}
}

func TestMain_configFile(t *testing.T) {
	config := filepath.Join(t.TempDir(), "vm.json")
	if err := os.WriteFile(config, []byte(`{"boot-source":{"kernel_image_path":"k"},"drives":[],"shiny":1}`),
		0o600); err != nil {
		t.Fatal(err)
	}
	cmd, _ := start(t, fakefc.Script{}, "--api-sock", "s", "--config-file", config)
	info, err := dial(t, filepath.Join(cmd.Dir, "s"), "1.12.1").GetInstanceInfo(t.Context())
	if err != nil || info.State != firecracker.StateRunning {
		t.Errorf("%+v, %v", info, err)
	}
}
