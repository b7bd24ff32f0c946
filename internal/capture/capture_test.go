package capture_test

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/capture"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/vmm"
)

// fakeGuest is an agent that does nothing, and tells what it was asked for. It has as much memory
// to spare as its balloon leaves.
type fakeGuest struct {
	mu    sync.Mutex
	log   []string       // what happened, in its order
	exits map[string]int // of a hook, by its argument
	fc    *firecracker.Client

	version string // of the VMM; empty: 1.12.1
	vmm     *fakefc.Server
}

func TestMain(m *testing.M) {
	testenv.OthersOut()
	m.Run()
}

func (g *fakeGuest) did(what string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.log = append(g.log, what)
}

const spare = 200 // MiB

func (g *fakeGuest) serve(ctx context.Context, raw net.Conn) error {
	defer raw.Close()
	for b := make([]byte, 1); b[0] != '\n'; {
		if _, err := raw.Read(b); err != nil {
			return err
		}
	}
	fmt.Fprintln(raw, "OK 1")
	conn := agentproto.NewConn(raw)
	_, payload, err := conn.Receive()
	if err != nil {
		return err
	}
	req, err := agentproto.ParseJSON[agentproto.Request](payload)
	if err != nil {
		return err
	}
	reply := agentproto.Reply{Version: agentproto.Version}
	switch req.Op {
	case agentproto.OpStats:
		b, err := g.fc.GetBalloon(ctx)
		if err != nil {
			return err
		}
		reply.Stats = &guest.Stats{Memory: 1 << 30, MemoryUsed: 1<<30 - uint64(spare-b.AmountMiB)<<20}
	case agentproto.OpExec:
		g.did(strings.Join(req.Args, " "))
		return conn.SendJSON(agentproto.KindExit, agentproto.Exit{Code: g.exits[req.Args[1]]})
	case agentproto.OpFreeze:
		g.did(fmt.Sprint("freeze ", req.DropCaches))
	default:
		g.did(string(req.Op))
	}
	return conn.SendJSON(agentproto.KindReply, reply)
}

// vm is one of a fake VMM that runs, with a balloon of 8 MiB, and with that guest.
func vm(t *testing.T, g *fakeGuest, faults map[string]fakefc.Fault) *capture.VM {
	t.Helper()
	dir := t.TempDir()
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", testenv.Socket(t, filepath.Join(dir, name)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	dial := func(name string) func(context.Context) (net.Conn, error) {
		address := testenv.Socket(t, filepath.Join(dir, name))
		return func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", address)
		}
	}
	fc := fakefc.New(fakefc.Config{Version: cmp.Or(g.version, "1.12.1"), Faults: faults})
	g.vmm = fc
	api, vsock := listen("api"), listen("vsock")
	go func() { _ = fc.Serve(api) }()
	t.Cleanup(func() { _ = fc.Close() })
	version, err := firecracker.ParseVersion(cmp.Or(g.version, "1.12.1"))
	if err != nil {
		t.Fatal(err)
	}
	g.fc = firecracker.New(dial("api"), version)
	t.Cleanup(func() { _ = g.fc.Close() })
	for _, do := range []func() error{
		func() error { return g.fc.PutBootSource(t.Context(), firecracker.BootSource{KernelImagePath: "k"}) },
		func() error { return g.fc.PutBalloon(t.Context(), firecracker.Balloon{AmountMiB: 8}) },
		func() error { return g.fc.InstanceStart(t.Context()) },
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
	}
	go func() {
		for {
			conn, err := vsock.Accept()
			if err != nil {
				return
			}
			go func() {
				if err := g.serve(t.Context(), conn); err != nil && t.Context().Err() == nil {
					t.Errorf("guest: %v", err)
				}
			}()
		}
	}()
	st, err := store.Open(filepath.Join(dir, "runtime"))
	if err != nil {
		t.Fatal(err)
	}
	lock, err := st.Create("vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lock.Unlock() })
	hold, err := st.Hold("vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hold.Release() })
	return &capture.VM{
		Name: "web", Client: g.fc, Process: vmm.Attach(dir, ""), Root: dir, Running: true, Hold: hold, Balloon: true,
		Agent: &agent.Client{Dial: dial("vsock")}, Forget: func() error {
			return nil
		}, Trace: func(step string) { g.did("- " + step) },
	}
}

// written is what the VMM says to a snapshot.
var written = map[string]fakefc.Fault{"PUT /snapshot/create": {}}

// Whatever goes wrong, and where, the guest goes on, has its memory back, and its hook hears of it.
func TestCapture_GoesOn(t *testing.T) {
	all := []string{
		"/hook freeze", "- freeze", "freeze true", "- inflate", "- pause", "- PUT /snapshot/create",
		"- resume", "- deflate", "- thaw", "thaw", "/hook thaw",
	}
	but := func(left ...string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return slices.Contains(left, s) })
	}
	for name, tt := range map[string]struct {
		faults   map[string]fakefc.Fault
		exits    map[string]int
		want     []string
		err      string
		warnings []string
	}{
		"well": {faults: written, want: all},
		"not written": {
			faults: map[string]fakefc.Fault{"PUT /snapshot/create": {Status: 400, Message: "disk full"}},
			want:   all, err: "disk full",
		},
		"no pause": {
			faults: map[string]fakefc.Fault{"PATCH /vm": {Status: 400, Message: "not now"}},
			want:   but("- PUT /snapshot/create"), err: "not now",
		},
		"no balloon": {faults: map[string]fakefc.Fault{
			"PATCH /balloon":       {Status: 400, Message: "not active"},
			"PUT /snapshot/create": {},
		}, want: all, warnings: []string{"balloon: ", "VM web: its balloon may still"}},
		"hook refuses": {
			exits: map[string]int{"freeze": 3}, want: []string{"/hook freeze", "- thaw", "thaw", "/hook thaw"},
			err: "run /hook freeze in the guest: exit code 3",
		},
		"hook fails": {
			faults: written, exits: map[string]int{"thaw": 4}, want: all,
			warnings: []string{"VM web: run /hook thaw in the guest: exit code 4"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := &fakeGuest{exits: tt.exits}
			v := vm(t, g, tt.faults)
			r, err := v.Capture(t.Context(), t.TempDir(), capture.Options{Hook: "/hook", DropCaches: true})
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("%v, want %q", err, tt.err)
			}
			if diff := gocmp.Diff(tt.want, g.log); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if len(r.Warnings) != len(tt.warnings) {
				t.Errorf("warnings %q, want %q", r.Warnings, tt.warnings)
			}
			for i, w := range tt.warnings {
				if i < len(r.Warnings) && !strings.HasPrefix(r.Warnings[i], w) {
					t.Errorf("warning %q, want %q", r.Warnings[i], w)
				}
			}
			info, ierr := g.fc.GetInstanceInfo(t.Context())
			balloon, berr := g.fc.GetBalloon(t.Context())
			if ierr != nil || berr != nil || info.State != firecracker.StateRunning || balloon.AmountMiB != 8 {
				t.Errorf("it is %s, its balloon has %d MiB (%v, %v)", info.State, balloon.AmountMiB, ierr, berr)
			}
			if r.Balloon != nil && *r.Balloon != 8 || err == nil && r.Balloon == nil {
				t.Errorf("the balloon is to have %v, want 8", r.Balloon)
			}
		})
	}
}

// The balloon has what the guest does not use while the snapshot is made, but for a little.
func TestCapture_Balloon(t *testing.T) {
	g := &fakeGuest{}
	v := vm(t, g, written)
	var during uint32
	v.Forget = func() error {
		b, err := g.fc.GetBalloon(t.Context())
		during = b.AmountMiB
		if mib, ok := v.Hold.Deflates(); !ok || mib != 8 || !v.Hold.Resumes() { // for others, should we die
			t.Errorf("noted: %d, %v, goes on: %v", mib, ok, v.Hold.Resumes())
		}
		return err
	}
	if _, err := v.Capture(t.Context(), t.TempDir(), capture.Options{DropCaches: true}); err != nil {
		t.Fatal(err)
	}
	if want := uint32(spare - 32); during != want {
		t.Errorf("the balloon had %d MiB, want %d", during, want)
	}
	// Nobody asked for it.
	v.Forget = func() error { return nil }
	g.log = nil
	if r, err := v.Capture(t.Context(), t.TempDir(), capture.Options{}); err != nil || r.Balloon != nil ||
		!slices.Contains(g.log, "freeze false") || slices.Contains(g.log, "- inflate") {
		t.Errorf("%v, balloon %v, %q", err, r.Balloon, g.log)
	}
}

// What a process noted that died in the middle of a snapshot is done by the next one, and that
// knows what the balloon had before.
func TestCapture_AfterDeath(t *testing.T) {
	g := &fakeGuest{}
	v := vm(t, g, written)
	if err := v.Hold.MustDeflate(8); err != nil {
		t.Fatal(err)
	}
	if err := g.fc.PatchBalloon(t.Context(), 150); err != nil {
		t.Fatal(err)
	}
	r, err := v.Capture(t.Context(), t.TempDir(), capture.Options{DropCaches: true})
	if err != nil || r.Balloon == nil || *r.Balloon != 8 || len(r.Warnings) > 0 {
		t.Errorf("%v, the balloon is to have %v, warnings %q", err, r.Balloon, r.Warnings)
	}
	if b, err := g.fc.GetBalloon(t.Context()); err != nil || b.AmountMiB != 8 {
		t.Errorf("the balloon has %d MiB (%v), want 8", b.AmountMiB, err)
	}
}

// A hook that cannot be asked is no reason to go on without, and a guest that cannot be told to
// drop its caches is mentioned.
func TestCapture_NobodyListens(t *testing.T) {
	for name, change := range map[string]func(*capture.VM){
		"no agent": func(v *capture.VM) { v.Agent = nil },
		"booting":  func(v *capture.VM) { v.Booting = true },
		"paused":   func(v *capture.VM) { v.Running = false },
	} {
		t.Run(name, func(t *testing.T) {
			g := &fakeGuest{}
			v := vm(t, g, written)
			change(v)
			if !v.Running {
				if err := g.fc.Pause(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := v.Capture(t.Context(), t.TempDir(), capture.Options{Hook: "/hook"}); err == nil ||
				!strings.Contains(err.Error(), "/hook") {
				t.Errorf("with a hook: %v", err)
			}
			if len(g.log) > 0 {
				t.Errorf("it did %q", g.log)
			}
			r, err := v.Capture(t.Context(), t.TempDir(), capture.Options{DropCaches: true})
			if err != nil || len(r.Warnings) != 1 {
				t.Errorf("without: %v, warnings %q", err, r.Warnings)
			}
		})
	}
}

// A hook that does not end is not waited for without end.
func TestRunHook_Hangs(t *testing.T) {
	l, err := net.Listen("unix", testenv.Socket(t, filepath.Join(t.TempDir(), "vsock")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = bufio.NewReader(conn).ReadString('\n')
			fmt.Fprintln(conn, "OK 1")
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	c := &agent.Client{Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String())
	}}
	if err := capture.RunHook(ctx, c, "/hook", capture.HookThaw); err == nil ||
		!strings.Contains(err.Error(), "/hook thaw") {
		t.Errorf("got %v", err)
	}
}

func TestCorruptsDiffs(t *testing.T) {
	above := runtime.GOARCH == "amd64" // elsewhere all memory is one slot
	for _, c := range []struct {
		version string
		mib     int
		hotplug bool
		want    bool
	}{
		{"1.13.1", 4096, false, false},
		{"1.14.0", 3072, false, false},
		{"1.14.0", 3073, false, above},
		{"1.14.1", 4096, false, above},
		{"1.14.1", 128, true, true},
		{"1.14.2", 4096, true, false},
		{"1.15.0", 4096, true, false},
	} {
		v, err := firecracker.ParseVersion(c.version)
		if err != nil {
			t.Fatal(err)
		}
		if got := capture.CorruptsDiffs(v, c.mib, c.hotplug); got != c.want {
			t.Errorf("%s, %d MiB, hotplug %v: %v, want %v", c.version, c.mib, c.hotplug, got, c.want)
		}
	}
}

// A VMM that can leaves the sync of its files for when the VM goes on again; one that cannot is
// asked for nothing that it does not know.
func TestCapture_LeavesSync(t *testing.T) {
	const (
		plain   = `{"snapshot_path":"snapshot.new/state","mem_file_path":"snapshot.new/memory","snapshot_type":"Full"}`
		without = `{"snapshot_path":"snapshot.new/state","mem_file_path":"snapshot.new/memory","snapshot_type":"Full","sync_snapshot_files":false}`
	)
	unknown := map[string]fakefc.Fault{
		"PUT /snapshot/create": {
			Status:  400,
			Message: "unknown field `sync_snapshot_files`, expected one of `mem_file_path`",
		},
	}
	full := map[string]fakefc.Fault{"PUT /snapshot/create": {Status: 400, Message: "disk full"}}
	for name, tt := range map[string]struct {
		version string
		faults  map[string]fakefc.Fault
		want    []string
	}{
		"old":   {"1.15.1", written, []string{plain}},
		"new":   {"1.17.0", written, []string{without}},
		"build": {"1.17.0", unknown, []string{without, plain}},
		"fault": {"1.17.0", full, []string{without}},
	} {
		t.Run(name, func(t *testing.T) {
			g := &fakeGuest{version: tt.version}
			_, err := vm(t, g, tt.faults).Capture(t.Context(), t.TempDir(), capture.Options{})
			if wrong := tt.faults["PUT /snapshot/create"].Status != 0; (err != nil) != wrong {
				t.Errorf("captured: %v", err)
			}
			var got []string
			for _, r := range g.vmm.Requests() {
				if r.Path == "/snapshot/create" {
					got = append(got, r.Body)
				}
			}
			if diff := gocmp.Diff(tt.want, got); diff != "" {
				t.Errorf("asked for (-want +got):\n%s", diff)
			}
		})
	}
}
