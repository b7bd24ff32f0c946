package smartvm_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/snapshot"
)

// counted returns the numbers that a counting guest has written.
func (s *site) counted(id string) (all []uint64) {
	for _, m := range regexp.MustCompile(`(?m)^([0-9A-Fa-f]{8})\r?$`).FindAllStringSubmatch(s.console.get(id), -1) {
		n, err := strconv.ParseUint(m[1], 16, 32)
		if err != nil {
			s.t.Fatal(err)
		}
		all = append(all, n)
	}
	return all
}

// countsOn waits until a guest has counted n numbers, each one more than that before it, and
// returns them.
func (s *site) countsOn(id string, n int) []uint64 {
	s.t.Helper()
	var all []uint64
	eventually(s.t, "the guest counts", func() bool { all = s.counted(id); return len(all) >= n })
	for i := range all[1:] {
		if all[i+1] != all[i]+1 {
			s.t.Fatalf("VM %s counts %d after %d", id, all[i+1], all[i])
		}
	}
	return all
}

func (s *site) snapshot(m *smartvm.Machine, o smartvm.SnapshotOptions) *smartvm.Snapshot {
	s.t.Helper()
	sn, err := m.Snapshot(s.t.Context(), o)
	if err != nil {
		s.t.Fatal(err)
	}
	return sn
}

func (s *site) restored(h *smartvm.Host, ref string, o smartvm.RestoreOptions) *smartvm.Machine {
	s.t.Helper()
	m, err := h.Restore(s.t.Context(), ref, o)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := m.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	return m
}

func (s *site) removeSnapshot(h *smartvm.Host, ref string) {
	s.t.Helper()
	if err := h.RemoveSnapshot(s.t.Context(), ref, false); err != nil {
		s.t.Error(err)
	}
}

// A restored guest goes on from where it was, as often as it is restored, and so does the one it
// was taken from.
func TestSnapshot_GoesOn(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		m := s.started(h, s.spec("count"))
		s.countsOn(m.ID(), 3)
		sn := s.snapshot(m, smartvm.SnapshotOptions{Name: "warm", Labels: map[string]string{"a": "b"}})
		wantState(t, m, smartvm.Running)
		at := len(s.counted(m.ID()))
		s.countsOn(m.ID(), at+3)
		if sn.Paused <= 0 || sn.Labels["a"] != "b" || sn.VM() != m.ID() {
			t.Errorf("snapshot %+v", sn.Manifest)
		}
		first := s.restored(h, "warm", smartvm.RestoreOptions{Name: "first"})
		for _, start := range []string{"restored", "started again"} {
			got := s.countsOn(first.ID(), 3)
			if before := s.counted(m.ID()); got[0] == 0 || got[0] > before[at] {
				t.Errorf("%s, it counts from %d; the snapshot was made before %d", start, got[0], before[at])
			}
			if _, err := first.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
				t.Fatal(err)
			}
			if start == "restored" {
				s.console.forget(first.ID())
				if err := first.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := h.RemoveSnapshot(t.Context(), "warm", false); !errors.Is(err, snapshot.ErrInUse) {
			t.Errorf("remove a snapshot in use: %v", err)
		}
		// Of one that was restored, with another host object.
		if err := first.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		again := s.snapshot(first, smartvm.SnapshotOptions{})
		if again.Parent != sn.ID {
			t.Errorf("parent %q, want %s", again.Parent, sn.ID)
		}
		second := s.restored(h, again.ID[:6], smartvm.RestoreOptions{})
		s.countsOn(second.ID(), 3)
		for _, m := range []*smartvm.Machine{m, first, second} {
			s.stopAndRemove(m)
		}
		s.removeSnapshot(h, "warm")
		s.removeSnapshot(h, again.ID)
	})
}

// What a VM has written to its drives goes with its snapshot, and no VM writes to another's.
func TestSnapshot_Drives(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		spec := s.spec("idle")
		spec.Drives = append(spec.Drives, smartvm.Drive{DriveID: "shared", PathOnHost: s.path("disk"), IsReadOnly: true})
		m := s.started(h, spec)
		in, err := m.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		own := in.Staged["disk"].Path
		overwrite(t, own, "as of the snapshot")
		sn := s.snapshot(m, smartvm.SnapshotOptions{})
		overwrite(t, own, "written afterwards")
		if _, err := os.Stat(sn.Path("drives/shared")); err == nil {
			t.Error("a drive that is only read was copied")
		}
		r := s.restored(h, sn.ID, smartvm.RestoreOptions{ID: "restored"})
		disk := filepath.Join(r.RuntimeDir(), "drives/disk")
		if got, err := os.ReadFile(disk); err != nil || !strings.HasPrefix(string(got), "as of the snapshot") {
			t.Errorf("the restored VM's disk begins with %.20q (%v)", got, err)
		}
		overwrite(t, disk, "by the restored one")
		if got, err := os.ReadFile(sn.Path("drives/disk")); err != nil ||
			!strings.HasPrefix(string(got), "as of the snapshot") {
			t.Errorf("the snapshot's disk begins with %.20q (%v)", got, err)
		}
		if err := sn.Verify(t.Context(), nil); err != nil {
			t.Error(err)
		}
		s.stopAndRemove(m)
		s.stopAndRemove(r)
		s.removeSnapshot(h, sn.ID)
	})
}

func overwrite(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A paused VM stays paused; a restored one can be left so.
func TestSnapshot_Paused(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	m := s.started(h, s.spec("count"))
	s.countsOn(m.ID(), 1)
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	sn := s.snapshot(m, smartvm.SnapshotOptions{})
	wantState(t, m, smartvm.Paused)
	r := s.restored(h, sn.ID, smartvm.RestoreOptions{Paused: true})
	wantState(t, r, smartvm.Paused)
	if got := s.counted(r.ID()); len(got) > 0 {
		t.Errorf("it counted %v while it was paused", got)
	}
	if err := r.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.countsOn(r.ID(), 2)
	s.stopAndRemove(r)
	s.stopAndRemove(m)
	s.removeSnapshot(h, sn.ID)
}

// A snapshot has the format that the VMM's program says, and none when another program is at its
// path by then.
func TestSnapshot_Format(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	dir := t.TempDir()
	path := filepath.Join(dir, "firecracker")
	program, err := os.ReadFile(s.options.FirecrackerBinary)
	if err == nil {
		err = writeAs(path, program, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.options.FirecrackerBinary = path
	want, err := vmm.SnapshotFormat(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	h := s.open()
	m := s.started(h, s.spec("idle"))
	before := s.snapshot(m, smartvm.SnapshotOptions{})
	if before.Format != want || before.Arch != runtime.GOARCH {
		t.Errorf("the snapshot is of %q, format %q; want %q, %q", before.Arch, before.Format, runtime.GOARCH, want)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := fakefc.Install(dir, fakefc.Script{Version: "1.13.1", Format: "8.0.0"}); err != nil {
		t.Fatal(err)
	}
	after := s.snapshot(m, smartvm.SnapshotOptions{})
	if after.Format != "" || after.Firecracker != before.Firecracker {
		t.Errorf("with another program at its path the snapshot has format %q of Firecracker %s, want none of %s",
			after.Format, after.Firecracker, before.Firecracker)
	}
	s.stopAndRemove(m)
	s.removeSnapshot(h, before.ID)
	s.removeSnapshot(h, after.ID)
}

// What is damaged is refused before a VMM is started, and nothing is left.
func TestSnapshot_Damaged(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	m := s.started(h, s.spec("count"))
	sn := s.snapshot(m, smartvm.SnapshotOptions{})
	s.stopAndRemove(m)
	for _, name := range []string{"state", "memory", "drives/disk", "manifest.json"} {
		whole, err := os.ReadFile(sn.Path(name))
		if err != nil {
			t.Fatal(err)
		}
		flipped := bytes.Clone(whole)
		flipped[len(flipped)/2] ^= 1
		for what, bad := range map[string][]byte{"truncated": whole[:len(whole)/2], "flipped": flipped, "empty": nil} {
			replace(t, sn.Path(name), bad)
			if _, err := h.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{}); !errors.Is(err, snapshot.ErrDamaged) {
				t.Errorf("%s %s: %v, want ErrDamaged", name, what, err)
			}
			replace(t, sn.Path(name), whole)
		}
	}
	s.removeSnapshot(h, sn.ID)
}

func replace(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := errors.Join(os.Remove(path), os.WriteFile(path, data, 0o444)); err != nil {
		t.Fatal(err)
	}
}

// Forks go on at once, each as somebody else; the VM goes on too. Their snapshot goes with the last
// of them.
func TestFork(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		h := s.open()
		m := s.started(h, s.spec("count"))
		s.countsOn(m.ID(), 3)
		forks, err := m.Fork(t.Context(), 5, smartvm.ForkOptions{RestoreOptions: smartvm.RestoreOptions{Name: "fork"}})
		if err != nil {
			t.Fatal(err)
		}
		if forks[4].Name() != "fork-5" {
			t.Errorf("the fifth is called %q", forks[4].Name())
		}
		for _, f := range forks {
			if got := s.countsOn(f.ID(), 2); got[0] < 2 {
				t.Errorf("a fork counts from %d", got[0])
			}
		}
		s.countsOn(m.ID(), len(s.counted(m.ID()))+1)
		all, err := h.Snapshots()
		if err != nil {
			t.Fatal(err)
		}
		if list, err := all.List(); err != nil || len(list) != 1 || !list[0].Ephemeral {
			t.Errorf("snapshots %v (%v)", list, err)
		}
		for _, f := range append(forks, m) {
			s.stopAndRemove(f)
		}
		if _, err := h.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if list, err := all.List(); err != nil || len(list) != 0 {
			t.Errorf("snapshots %v (%v), want none", list, err)
		}
	})
}

// A fork that cannot be started leaves none of the others.
func TestFork_AllOrNone(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	m := s.started(h, s.spec("count"))
	sn := s.snapshot(m, smartvm.SnapshotOptions{})
	no := errors.New("no")
	_, err := sn.Fork(t.Context(), 4,
		smartvm.ForkOptions{
			RestoreOptions: smartvm.RestoreOptions{ID: "f"},
			Start: func(ctx context.Context, f *smartvm.Machine) error {
				if f.ID() == "f-3" {
					return no
				}
				return f.Start(ctx)
			},
		})
	if !errors.Is(err, no) {
		t.Errorf("got %v, want %v", err, no)
	}
	if all, err := h.Machines(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("%d VMs are left (%v), want the first alone", len(all), err)
	}
	s.stopAndRemove(m)
	s.removeSnapshot(h, sn.ID)
}

// A VM that is to end with its snapshot ends when there is one, and goes on where there is none:
// with a name that is taken or none, or labels that are too long, it is not even paused.
func TestSnapshot_StopWithoutSnapshot(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	var mu sync.Mutex
	var steps []string
	spoil := func() {}
	s.options = smartvm.WithTrace(s.options, func(step string) {
		mu.Lock()
		defer mu.Unlock()
		if steps = append(steps, step); step == "call commit" {
			spoil()
		}
	})
	h := s.open()
	m := s.started(h, s.spec("count"))
	s.countsOn(m.ID(), 3)
	taken := s.snapshot(m, smartvm.SnapshotOptions{Name: "taken"})
	goesOn := func(what string, o smartvm.SnapshotOptions, want error, paused bool) {
		t.Helper()
		mu.Lock()
		steps = nil
		mu.Unlock()
		o.Stop = true
		if _, err := m.Snapshot(t.Context(), o); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", what, err, want)
		}
		mu.Lock()
		if got := slices.Contains(steps, "call pause"); got != paused {
			t.Errorf("%s: paused: %v, want %v: %q", what, got, paused, steps)
		}
		mu.Unlock()
		wantState(t, m, smartvm.Running)
		s.console.forget(m.ID())
		s.countsOn(m.ID(), 3)
		store, err := h.Snapshots()
		if err != nil {
			t.Fatal(err)
		}
		if all, err := store.List(); err != nil || len(all) != 1 {
			t.Errorf("%s: %d snapshots, %v", what, len(all), err)
		}
	}
	goesOn("a taken name", smartvm.SnapshotOptions{Name: "taken"}, snapshot.ErrExists, false)
	goesOn("a name that is none", smartvm.SnapshotOptions{Name: "my snap"}, snapshot.ErrInvalid, false)
	goesOn("a long label", smartvm.SnapshotOptions{Labels: map[string]string{"a": strings.Repeat("a", 1<<16)}},
		snapshot.ErrInvalid, false)
	mu.Lock()
	spoil = func() {
		drafts, err := filepath.Glob(filepath.Join(filepath.Dir(taken.Dir()), ".tmp", "*", snapshot.StateFile))
		if err != nil || len(drafts) != 1 {
			t.Errorf("%q, %v", drafts, err)
		}
		for _, d := range drafts {
			if err := os.Remove(d); err != nil {
				t.Error(err)
			}
		}
	}
	mu.Unlock()
	goesOn("no state", smartvm.SnapshotOptions{Name: "late"}, snapshot.ErrInvalid, true)
	mu.Lock()
	spoil = func() {}
	mu.Unlock()
	last := s.snapshot(m, smartvm.SnapshotOptions{Name: "last", Stop: true}) // the control
	wantState(t, m, smartvm.Stopped)
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	s.removeSnapshot(h, last.ID)
	s.removeSnapshot(h, taken.ID)
}

// A VM whose page faults are served by this process goes on as any; what it touched is recorded,
// and brought before the next touches it.
func TestRestore_UFFD(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			if _, err := os.Stat("/dev/userfaultfd"); err != nil {
				t.Skip("no /dev/userfaultfd")
			}
			s := newSite(t, launcher)
			h := s.open()
			m := s.started(h, s.spec("count"))
			s.countsOn(m.ID(), 3)
			sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
			wantState(t, m, smartvm.Stopped)
			r := s.restored(h, sn.ID, smartvm.RestoreOptions{Memory: smartvm.MemoryUFFD})
			for range 2 {
				s.console.forget(r.ID())
				if got := s.countsOn(r.ID(), 3); got[0] == 0 {
					t.Error("it counts from the beginning")
				}
				if _, err := r.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
					t.Fatal(err)
				}
				if fi, err := os.Stat(filepath.Join(sn.Dir(), "touched")); err != nil || fi.Size() < 20 {
					t.Errorf("what it touched: %v", err)
				}
				if err := r.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			s.stopAndRemove(r)
			if err := m.Remove(t.Context()); err != nil {
				t.Error(err)
			}
			s.removeSnapshot(h, sn.ID)
		})
	}
}

// A diff is as whole as any: what a guest has written since the last snapshot is in it, and all
// else too.
func TestSnapshot_Diff(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			h := s.open()
			spec := s.spec("count")
			if _, err := s.started(h, spec).Snapshot(t.Context(), smartvm.SnapshotOptions{Diff: true}); !errors.Is(err,
				smartvm.ErrNotSupported) {
				t.Errorf("a diff of memory that is not tracked: %v, want ErrNotSupported", err)
			}
			spec.MachineConfig.TrackDirtyPages = true
			m := s.started(h, spec)
			s.countsOn(m.ID(), 2)
			first := s.snapshot(m, smartvm.SnapshotOptions{Diff: true}) // there is none before it
			s.countsOn(m.ID(), len(s.counted(m.ID()))+3)
			second := s.snapshot(m, smartvm.SnapshotOptions{Diff: true})
			if first.Parent != "" || second.Parent != first.ID {
				t.Errorf("parents %q and %q, want none and %s", first.Parent, second.Parent, first.ID)
			}
			s.removeSnapshot(h, first.ID) // nothing needs it
			r := s.restored(h, second.ID, smartvm.RestoreOptions{})
			got := s.countsOn(r.ID(), 2)
			third := s.snapshot(r, smartvm.SnapshotOptions{Diff: true}) // what is tracked is tracked again
			if got[0] < 5 || third.Parent != second.ID {
				t.Errorf("it counts from %d; parent %q", got[0], third.Parent)
			}
			if err := h.StopAll(t.Context(), smartvm.StopOptions{}); err != nil {
				t.Error(err)
			}
			all, err := h.Machines(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range all {
				if err := m.Remove(t.Context()); err != nil {
					t.Error(err)
				}
			}
			s.removeSnapshot(h, second.ID)
			s.removeSnapshot(h, third.ID)
		})
	}
}

// Where the disk is full the snapshot fails, says so, and leaves nothing; the VM goes on.
func TestSnapshot_DiskFull(t *testing.T) {
	if !nettest.Alone(t) { // mounts of its own
		return
	}
	s := newSite(t, smartvm.LaunchJailed)
	if err := unix.Mount("small", s.options.DataDir, "tmpfs", 0, "size=32m,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(s.options.DataDir, 0); err != nil {
			t.Error(err)
		}
	})
	h := s.open()
	m := s.started(h, s.spec("count"))
	s.countsOn(m.ID(), 1)
	_, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Name: "none"})
	if !errors.Is(err, unix.ENOSPC) || smartvm.Hint(err) == "" {
		t.Errorf("got %v (hint %q), want ENOSPC", err, smartvm.Hint(err))
	}
	wantState(t, m, smartvm.Running)
	s.countsOn(m.ID(), len(s.counted(m.ID()))+2)
	for _, dir := range []string{"snapshots", "snapshots/.tmp"} {
		entries, err := os.ReadDir(filepath.Join(s.options.DataDir, dir))
		if err != nil || len(entries) > 1 {
			t.Errorf("left in %s: %v, %v", dir, entries, err)
		}
	}
	s.stopAndRemove(m)
}

// A snapshot that this VMM cannot load is refused before anything is made, with what would do.
func TestRestore_OtherVMM(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	m := s.started(h, s.spec("count"))
	sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	program, err := fakefc.Install(t.TempDir(), fakefc.Script{Version: "1.14.0", Format: "8.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	s.options.FirecrackerBinary = program
	_, err = s.open().Restore(t.Context(), sn.ID, smartvm.RestoreOptions{})
	if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), "1.14.0") || smartvm.Hint(err) == "" {
		t.Errorf("got %v (hint %q), want ErrNotSupported", err, smartvm.Hint(err))
	}
	s.removeSnapshot(h, sn.ID)
}

// A snapshot that the VMM of new VMs cannot load starts with an installed one that can, unless the
// user has named a VMM.
func TestRestore_InstalledVMM(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	m := s.started(h, s.spec("count"))
	s.countsOn(m.ID(), 3)
	sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	newer, err := fakefc.Install(dir, fakefc.Script{Version: "1.17.0", Format: "11.0.0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	program, err := os.ReadFile(s.options.FirecrackerBinary)
	if err != nil {
		t.Fatal(err)
	}
	s.options.FirecrackerBinary = ""
	refused := func(what string) {
		t.Helper()
		_, err := s.open().Restore(t.Context(), sn.ID, smartvm.RestoreOptions{})
		if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), "11.0.0") ||
			!strings.Contains(smartvm.Hint(err), "smartvm firecracker install "+sn.Firecracker) {
			t.Errorf("%s: %v (hint %q), want ErrNotSupported", what, err, smartvm.Hint(err))
		}
	}
	refused("with nothing installed")
	bin := filepath.Join(s.options.DataDir, "bin")
	for version, text := range map[string][]byte{"v1.20.0": []byte("#!/bin/sh\nexit 1\n"), "v" + sn.Firecracker: program} {
		installed := filepath.Join(bin, version)
		if err := errors.Join(os.MkdirAll(installed, 0o700), writeAs(filepath.Join(installed, "firecracker"), text, 0o755),
			writeAs(filepath.Join(installed, "jailer"), text, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	r := s.restored(s.open(), sn.ID, smartvm.RestoreOptions{})
	s.countsOn(r.ID(), 3)
	if i, err := r.Inspect(t.Context()); err != nil || i.FirecrackerVersion != sn.Firecracker {
		t.Errorf("restored with %+v, %v", i, err)
	}
	s.stopAndRemove(r)
	s.options.FirecrackerBinary = newer
	refused("with a VMM that was named")
	s.removeSnapshot(h, sn.ID)
	if err := os.RemoveAll(bin); err != nil {
		t.Fatal(err)
	}
}

// forkCount is how many forks TestFork_Many makes.
const forkCount = 1000

// Each of a thousand forks goes on from where the VM was, and nothing is left of any.
func TestFork_Many(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := s.spec("count")
	spec.MachineConfig.MemSizeMiB, spec.Drives = 64, nil
	m := s.started(h, spec)
	s.countsOn(m.ID(), 3)
	sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
	if err := m.Remove(t.Context()); err != nil { // whereafter all that it said has come
		t.Fatal(err)
	}
	last := s.counted(m.ID())
	for made := 0; made < forkCount; {
		forks, err := sn.Fork(t.Context(), 50, smartvm.ForkOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var ended sync.WaitGroup
		for _, f := range forks {
			ended.Go(func() {
				if got := s.countsOn(f.ID(), 1); got[0] == 0 || got[0] > last[len(last)-1]+1 {
					t.Errorf("a fork counts from %d; the snapshot was made at %d", got[0], last[len(last)-1])
				}
				s.console.forget(f.ID())
				s.stopAndRemove(f)
			})
		}
		ended.Wait()
		made += len(forks)
	}
	s.removeSnapshot(h, sn.ID)
}

// Who made an imported snapshot does not get at this host's files, TAPs or directories by it.
func TestRestore_Imported(t *testing.T) {
	s := newSite(t, smartvm.LaunchJailed)
	h := s.open()
	spec := s.spec("count")
	spec.Drives = append(spec.Drives, smartvm.Drive{DriveID: "shadow", PathOnHost: s.path("disk"), IsReadOnly: true})
	m := s.started(h, spec)
	sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := sn.Export(t.Context(), &archive, nil); err != nil {
		t.Fatal(err)
	}
	s.removeSnapshot(h, sn.ID)
	all, err := h.Snapshots()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := all.Import(t.Context(), &archive, snapshot.ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err = h.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{})
	if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), "drive shadow is "+s.path("disk")) ||
		smartvm.Hint(err) == "" {
		t.Errorf("got %v (hint %q)", err, smartvm.Hint(err))
	}
	direct := s.options
	direct.Launcher = smartvm.LaunchDirect
	d, err := smartvm.Open(direct)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{}); err == nil ||
		!strings.Contains(err.Error(), "in a jail") {
		t.Errorf("without a jail: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	r := s.restored(h, sn.ID, smartvm.RestoreOptions{Trust: true})
	s.countsOn(r.ID(), 2)
	s.stopAndRemove(r)
	s.removeSnapshot(h, sn.ID)
}
