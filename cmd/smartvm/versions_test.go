package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/testenv"
)

// nextRelease is what a release that comes later changes, by file of this module: it writes newer
// versions, and has fields that are unknown here.
var nextRelease = map[string][][2]string{
	"journal/journal.go": {
		{"const version = 0\n", "const version = 1\n"},
		{"type record struct {\n", "type record struct {\n\tNewer bool `json:\"newer,omitempty\"`\n"},
		{"record{Version: version, ", "record{Version: version, Newer: true, "},
	},
	"internal/plan/record.go": {
		{"const Version = 1\n", "const Version = 2\n"},
		{"type Record struct {\n", "type Record struct {\n\tNewer string `json:\"newer\"`\n"},
	},
	"snapshot/manifest.go": {
		{"const manifestVersion = 1\n", "const manifestVersion = 2\n"},
		{"type Manifest struct {\n", "type Manifest struct {\n\tNewer string `json:\"newer\"`\n"},
	},
}

// build compiles smartvm, with changes to its source.
func build(t *testing.T, changes map[string][][2]string) string {
	t.Helper()
	dir := t.TempDir()
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for name, edits := range changes {
		path, err := filepath.Abs(filepath.Join("../..", name))
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, edit := range edits {
			if !strings.Contains(string(text), edit[0]) {
				t.Fatalf("%s has no %q any more", name, edit[0])
			}
			text = []byte(strings.ReplaceAll(string(text), edit[0], edit[1]))
		}
		changed := filepath.Join(dir, strings.ReplaceAll(name, "/", "-"))
		if err := os.WriteFile(changed, text, 0o600); err != nil {
			t.Fatal(err)
		}
		overlay.Replace[path] = changed
	}
	text, err := json.Marshal(overlay)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "overlay.json"), text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "smartvm")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-overlay", filepath.Join(dir, "overlay.json"), "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("compile smartvm: %v\n%s", err, out)
	}
	return path
}

// program is one of two that share a host.
type program struct {
	t    *testing.T
	path string
	env  []string
}

// try runs a command and returns what it puts out. The error has what it says.
func (p *program) try(args ...string) (string, error) {
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(p.t.Context(), p.path, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = p.env, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, &stderr)
	}
	return strings.TrimSpace(stdout.String()), nil
}

func (p *program) run(args ...string) string {
	p.t.Helper()
	out, err := p.try(args...)
	if err != nil {
		p.t.Error(err)
	}
	return out
}

// refuses wants that a command fails because of what a newer release has made.
func (p *program) refuses(what string, args ...string) (stdout string) {
	p.t.Helper()
	stdout, err := p.try(args...)
	if err == nil || !strings.Contains(err.Error(), what) ||
		!strings.Contains(err.Error(), "it has version 2, this smartvm reads version 1") ||
		!strings.Contains(err.Error(), "hint: ") {
		p.t.Errorf("%s: %q, %v; want that %s has a newer version, and what to do", strings.Join(args, " "), stdout, err, what)
	}
	return stdout
}

// host is one that this release and the next one share.
type host struct {
	now, next  *program
	guests     string // a directory of kernels
	runtimeDir string
}

// newHost returns one on which nothing may be left when the test ends. The caller closes it.
func newHost(t *testing.T) *host {
	testenv.Require(t, testenv.KVM, testenv.Root)
	h := &host{
		now: &program{t: t, path: build(t, nil)}, next: &program{t: t, path: build(t, nextRelease)},
		guests: t.TempDir(),
	}
	base, err := os.MkdirTemp("/dev/shm", "smartvm-versions-")
	if err == nil {
		err = writeGuests(h.guests)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(base) })
	testenv.NoLeaks(t, base)
	h.runtimeDir = filepath.Join(base, "runtime")
	h.now.env = append(os.Environ(), "SMARTVM_RUNTIME_DIR="+h.runtimeDir, "SMARTVM_DATA_DIR="+h.runtimeDir+".data",
		"SMARTVM_FIRECRACKER="+testenv.Firecracker(t), "SMARTVM_JAILER="+testenv.Jailer(t))
	h.next.env = h.now.env
	return h
}

// close removes all VMs.
func (h *host) close(t *testing.T) {
	if t.Failed() { // what the next release has made only that can remove
		ids := strings.Fields(h.next.run("ps", "-aq"))
		h.next.run(append([]string{"rm", "-f"}, ids...)...)
	}
	leave(t, h.runtimeDir)
}

// start starts a detached VM and returns its id.
func (h *host) start(p *program, name, guest string) string {
	p.t.Helper()
	return p.run("run", "-d", "--name", name, "-m", "64", "-k", filepath.Join(h.guests, guest))
}

// files are those of a VM, with what is in those that are not written while it runs.
func (h *host) files(t *testing.T, id string) []string {
	t.Helper()
	var all []string
	dir := filepath.Join(h.runtimeDir, id)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".json") && !strings.HasSuffix(path, ".journal") {
			all = append(all, path)
			return err
		}
		text, err := os.ReadFile(path)
		all = append(all, path+": "+string(text))
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return all
}

// TestUpgrade has VMs outlive an upgrade: the next release lists, snapshots, adopts, stops, starts,
// restores and removes what this one has left.
func TestUpgrade(t *testing.T) {
	h := newHost(t)
	defer h.close(t)
	now, next := h.now, h.next
	web, live, ended := h.start(now, "web", "count"), h.start(now, "live", "count"), h.start(now, "ended", "reboot")
	now.run("snapshot", "create", "--name", "before", "web")
	code := now.run("wait", "ended")
	all := strings.Fields(next.run("ps", "-aq"))
	for _, id := range []string{web, live, ended} {
		if !slices.Contains(all, id) {
			t.Errorf("VMs %v, want %s too", all, id)
		}
	}
	if got := next.run("wait", "ended"); got != code {
		t.Errorf("it ended with %q, want %q", got, code)
	}
	next.run("pause", "live")
	next.run("resume", "live")
	next.run("stop", "-t", "0", "live") // the process that supervises it is of this release
	if err := endSupervisor(h.runtimeDir, web, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got, want := next.run("gc"), "supervises "+web; got != want {
		t.Errorf("gc: %q, want %q", got, want)
	}
	next.run("stop", "-t", "0", "web")
	next.run("start", "web")
	next.run("stop", "-t", "0", "web")
	next.run("restore", "--name", "again", "before")
	next.run("rm", "-f", "again")
	next.run("snapshot", "rm", "before")
	next.run("rm", "web", "live", "ended")
}

// TestDowngrade has VMs outlive a downgrade: this release says of each VM and snapshot of the next
// one that it is of that, touches none, and does its work on its own.
func TestDowngrade(t *testing.T) {
	h := newHost(t)
	defer h.close(t)
	now, next := h.now, h.next
	newer, ours := h.start(next, "newer", "count"), h.start(now, "ours", "count")
	snapshot := next.run("snapshot", "create", "--name", "later", "newer")
	before := h.files(t, newer)
	if got := strings.TrimSpace(now.refuses(newer, "ps", "-q")); got != ours {
		t.Errorf("ps: %q, want %q", got, ours)
	}
	if got := strings.TrimSpace(now.refuses(snapshot, "snapshot", "ls", "-q")); got != "" {
		t.Errorf("snapshot ls: %q, want nothing", got)
	}
	now.refuses(snapshot, "restore", snapshot)
	stopAll(t, h.runtimeDir, newer)
	if got, err := now.try("ps", "-q"); err == nil || strings.TrimSpace(got) != "" {
		t.Errorf("ps: %q, %v; want that our VM has stopped", got, err)
	}
	for _, supervised := range []bool{true, false} {
		if !supervised {
			if err := endSupervisor(h.runtimeDir, newer, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		if got := now.run("gc"); got != "" {
			t.Errorf("gc: %q, want that nothing was done", got)
		}
		for _, op := range [][]string{{"stop", "-t", "0"}, {"rm", "-f"}, {"start"}, {"pause"}, {"snapshot", "create"}} {
			now.refuses(newer, append(op, "newer")...)
		}
		if got := next.run("ps", "-q"); got != newer {
			t.Errorf("ps: %q, want that %s runs on", got, newer)
		}
		if after := h.files(t, newer); !slices.Equal(after, before) {
			t.Errorf("its files are %q, want %q", after, before)
		}
	}
	if got, want := next.run("gc"), "supervises "+newer; got != want {
		t.Errorf("gc: %q, want %q", got, want)
	}
	next.run("stop", "-t", "0", "newer")
	next.run("rm", "newer", "ours")
	next.run("snapshot", "rm", "later")
}

// stopAll stops the VMs of this release, by the library.
func stopAll(t *testing.T, runtimeDir, newer string) {
	t.Helper()
	h, err := smartvm.Open(smartvm.Options{RuntimeDir: runtimeDir, DataDir: runtimeDir + ".data"})
	if err != nil {
		t.Fatal(err)
	}
	err = h.StopAll(t.Context(), smartvm.StopOptions{})
	if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), newer) {
		t.Errorf("stop all: %v, want ErrNotSupported of VM %s", err, newer)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
}
