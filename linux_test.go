package smartvm_test

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/lab"
	"push.rocks/smartvm/internal/testenv"
)

// TestPrepareLab makes the images outside the lab, where that takes long.
func TestPrepareLab(t *testing.T) {
	dir := os.Getenv(testenv.DataVariable)
	if dir == "" {
		t.Skip("needs: a run of tests in the lab")
	}
	makeImages(t, dir)
}

// linuxInitrd makes an initramfs of busybox whose init inserts the modules and then runs script.
func linuxInitrd(t *testing.T, script string, modules ...string) string {
	t.Helper()
	var a kernel.Archive
	tree := testenv.Fixture(t, fixtures.GuestModules)
	root, err := os.OpenRoot(tree)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	paths, err := a.AddModules(root.FS(), filepath.Base(tree), modules...)
	if err != nil {
		t.Fatal(err)
	}
	var init strings.Builder
	init.WriteString(
		"#!/bin/busybox sh\n/bin/busybox --install -s /bin\nmount -t proc proc /proc\nmount -t devtmpfs dev /dev\n")
	for _, p := range paths {
		fmt.Fprintf(&init, "insmod %s\n", p)
	}
	init.WriteString(script)
	for _, e := range []kernel.Entry{
		{Path: "proc", Mode: fs.ModeDir | 0o555},
		{Path: "dev/console", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Major: 5, Minor: 1},
		{Path: "bin/busybox", Mode: 0o755, HostPath: testenv.Fixture(t, fixtures.Busybox)},
		{Path: "init", Mode: 0o755, Content: []byte(init.String())},
	} {
		if err := a.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "initrd")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := a.Write(f); err != nil {
		t.Fatal(err)
	}
	return path
}

// linuxMachine is one with memory in MiB that a guest can rely on where it is emulated.
func linuxMachine(memory int) smartvm.MachineConfig {
	m := smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: memory}
	if testenv.InLab() {
		m.HugePages = lab.LargePages
	}
	return m
}

func linuxSpec(t *testing.T, initrd string) smartvm.Spec {
	return smartvm.Spec{
		BootSource: smartvm.BootSource{
			KernelImagePath: testenv.Fixture(t, fixtures.GuestKernel), InitrdPath: initrd,
			BootArgs: image.QuietBootArgs,
		},
		MachineConfig: linuxMachine(256),
	}
}

func linuxHost(t *testing.T, launcher smartvm.Launcher) *smartvm.Host {
	t.Helper()
	testenv.Require(t, testenv.KVM, testenv.LinuxGuest)
	opts := smartvm.Options{
		RuntimeDir: filepath.Join(t.TempDir(), "runtime"), DataDir: filepath.Join(t.TempDir(), "data"),
		FirecrackerBinary: testenv.Firecracker(t), Launcher: launcher,
	}
	if launcher == smartvm.LaunchJailed {
		testenv.Require(t, testenv.Root)
		opts.JailerBinary = testenv.Jailer(t)
	}
	testenv.NoLeaks(t, opts.RuntimeDir, opts.DataDir)
	h, err := smartvm.Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(filepath.Dir(opts.RuntimeDir)); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(filepath.Dir(opts.DataDir)); err != nil {
			t.Error(err)
		}
	})
	return h
}

// transcript collects a console.
type transcript struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (c *transcript) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.Write(p)
}

func (c *transcript) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// linuxPatience bounds a guest's boot: under emulation it takes seconds.
var linuxPatience = testenv.Patience(time.Minute)

// patient returns a context that bounds one step of a test.
func patient(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), linuxPatience)
	t.Cleanup(cancel)
	return ctx
}

// receive waits for what a channel brings.
func receive[T any](t *testing.T, from <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(linuxPatience):
		t.Fatalf("%s: it did not come", what)
	}
	return v
}

// In a jail: see TestLinux_WritesStayInTheCopy and TestLinuxImage_OCI.
func TestLinux_RunsToItsEnd(t *testing.T) {
	h := linuxHost(t, smartvm.LaunchDirect)
	console := new(transcript)
	exit, err := h.Run(patient(t), linuxSpec(t, linuxInitrd(t, "echo release $(uname -r) end\nreboot -f\n")),
		smartvm.RunOptions{Console: console})
	if err != nil {
		t.Fatalf("%v\n%s", err, console)
	}
	if exit.Outcome != smartvm.OutcomeExited || exit.Code != 0 {
		t.Errorf("ended %+v, want exited with 0", exit)
	}
	wantText(t, console.String(), "release "+filepath.Base(testenv.Fixture(t, fixtures.GuestModules))+" end")
}

// awaitLog waits until the VM's console has text in it.
func awaitLog(t *testing.T, m *smartvm.Machine, text string) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(linuxPatience); ; <-tick.C {
		log, err := os.ReadFile(m.ConsoleLog())
		if err == nil && bytes.Contains(log, []byte(text)) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("console lacks %q: %v\n%s", text, err, log)
		}
	}
}

// What a guest writes to its drive is there after a restart and never in the source.
func TestLinux_WritesStayInTheCopy(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			h := linuxHost(t, launcher)
			source := filepath.Join(t.TempDir(), "disk")
			content := append([]byte("original"), make([]byte, 1<<20-8)...)
			if err := os.WriteFile(source, content, 0o644); err != nil {
				t.Fatal(err)
			}
			script := "echo first $(head -c 8 /dev/vda) end\nprintf modified | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null\nreboot -f\n"
			spec := linuxSpec(t, linuxInitrd(t, script, "virtio_blk", "virtio_mmio"))
			spec.Drives = []smartvm.Drive{{DriveID: "disk", PathOnHost: source, CacheType: "Writeback"}}
			m, err := h.Create(t.Context(), spec)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"first original end", "first modified end"} {
				if err := m.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				exit, err := m.Wait(patient(t))
				if err != nil {
					t.Fatal(err)
				}
				log, err := os.ReadFile(m.ConsoleLog())
				if err != nil {
					t.Fatal(err)
				}
				if exit.Outcome != smartvm.OutcomeExited || exit.Code != 0 || !bytes.Contains(log, []byte(want)) {
					t.Errorf("ended %+v; console lacks %q:\n%s", exit, want, log)
				}
			}
			if got, err := os.ReadFile(source); err != nil || !bytes.Equal(got, content) {
				t.Errorf("the source changed: %v, begins %q", err, got[:8])
			}
			if err := m.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// Where source and data directory share a file system with reflinks, a copy shares its blocks until
// it is written.
func TestLinux_Reflink(t *testing.T) {
	testenv.Require(t, testenv.KVM, testenv.Root, testenv.LinuxGuest)
	if !testenv.InLab() {
		t.Skip("needs: the lab, to mount a file system in")
	}
	disk := filepath.Join(t.TempDir(), "btrfs")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 512<<20); err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	for _, command := range [][]string{
		{testenv.Fixture(t, fixtures.MkfsBtrfs), "-q", disk},
		{"mount", "-o", "loop", disk, mnt},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	source := filepath.Join(mnt, "disk")
	content := bytes.Repeat([]byte("original"), reflinkedSize/8)
	if err := os.WriteFile(source, content, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			data := filepath.Join(mnt, "data")
			h, err := smartvm.Open(smartvm.Options{
				RuntimeDir: filepath.Join(t.TempDir(), "runtime"), DataDir: data, Launcher: launcher,
				FirecrackerBinary: testenv.Firecracker(t), JailerBinary: testenv.Jailer(t),
			})
			if err != nil {
				t.Fatal(err)
			}
			script := "printf modified | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null\nwhile :; do echo now $(head -c 8 /dev/vda) end; sleep 1; done\n"
			spec := linuxSpec(t, linuxInitrd(t, script, "virtio_blk", "virtio_mmio"))
			spec.Drives = []smartvm.Drive{{DriveID: "disk", PathOnHost: source, CacheType: "Writeback"}}
			m, err := h.Create(t.Context(), spec)
			if err != nil {
				t.Fatal(err)
			}
			i, err := m.Inspect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got := i.Staged["disk"]; got.Method != "reflink" || !strings.HasPrefix(got.Path, data) {
				t.Errorf("staged %+v, want a reflink below %s", got, data)
			}
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			awaitLog(t, m, "now modified end")
			if launcher == smartvm.LaunchDirect {
				forkReflinked(t, h, m)
			}
			endGuest(t, m)
			if got, err := os.ReadFile(source); err != nil || !bytes.Equal(got, content) {
				t.Errorf("the source changed: %v", err)
			}
			if left, err := os.ReadDir(filepath.Join(data, "staging")); err != nil || len(left) > 0 {
				t.Errorf("left beside the data directory: %v %v", left, err)
			}
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// reflinkedSize is the disk's that is to be reflinked, in bytes. Larger ones take long to be hashed
// in the lab.
const reflinkedSize = 32 << 20

// forkReflinked wants forks of a VM to share the blocks of its disk.
func forkReflinked(t *testing.T, h *smartvm.Host, m *smartvm.Machine) {
	t.Helper()
	sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	used := func() int64 {
		var st unix.Statfs_t
		unix.Sync()
		if err := unix.Statfs(h.DataDir(), &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Blocks-st.Bfree) * st.Bsize
	}
	before := used()
	forks, err := sn.Fork(t.Context(), 3, smartvm.ForkOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range forks {
		awaitLog(t, f, "now modified end")
		i, err := f.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := i.Staged["disk"]
		if _, err := os.Stat(got.Path); err != nil || got.Method != "reflink" || !strings.HasPrefix(got.Path, h.DataDir()) {
			t.Errorf("staged %+v, %v, want a reflink below %s", got, err, h.DataDir())
		}
	}
	if more := used() - before; more > 10<<20 {
		t.Errorf("3 forks of a disk of %d bytes take %d bytes", reflinkedSize, more)
	}
	for _, f := range forks {
		endGuest(t, f)
	}
	if err := h.RemoveSnapshot(t.Context(), sn.ID, false); err != nil {
		t.Error(err)
	}
}
