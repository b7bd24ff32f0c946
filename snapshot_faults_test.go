package smartvm_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/sealed"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/snapshot"
)

// Snapshots that are disturbed: by other snapshots, by the end of their VM, by other processes, by
// who made them.

// wantSnapshots checks that there are as many, that all are whole, and that nothing is half made.
// It returns them.
func (s *site) wantSnapshots(h *smartvm.Host, n int, when string) []*snapshot.Snapshot {
	s.t.Helper()
	all, err := h.Snapshots()
	if err != nil {
		s.t.Fatal(err)
	}
	list, err := all.List()
	if err != nil || len(list) != n {
		s.t.Errorf("%s: %d snapshots (%v), want %d", when, len(list), err, n)
	}
	for _, sn := range list {
		if err := sn.Verify(s.t.Context(), nil); err != nil {
			s.t.Errorf("%s: %v", when, err)
		}
	}
	if half, err := os.ReadDir(s.path("data/snapshots/.tmp")); err != nil || len(half) > 0 {
		s.t.Errorf("%s: half made: %v, %v", when, half, err)
	}
	return list
}

// goesOn restores a snapshot of a guest that counts, which must be somewhere from one number to
// another, and removes the VM.
func (s *site) goesOn(h *smartvm.Host, ref string, from, to uint64) {
	s.t.Helper()
	r := s.restored(h, ref, smartvm.RestoreOptions{})
	if got := s.countsOn(r.ID(), 3); got[0] < from || got[0] > to {
		s.t.Errorf("of snapshot %s: it counts from %d, want %d to %d", ref, got[0], from, to)
	}
	s.stopAndRemove(r)
}

// last is the number that a guest has written last, as far as it is known.
func (s *site) last(id string) uint64 {
	all := s.counted(id)
	if len(all) == 0 {
		return 0
	}
	return all[len(all)-1]
}

// passed is a number to which a guest has come only now: what it wrote is known a little later.
func (s *site) passed(id string) uint64 {
	s.t.Helper()
	was := s.last(id)
	eventually(s.t, "the guest counts", func() bool { return s.last(id) > was })
	return s.last(id)
}

// Several at once take turns or are refused, and each that is made is of one moment, diffs too.
func TestSnapshot_AtOnce(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			h := s.open()
			spec := s.spec("count")
			spec.MachineConfig.TrackDirtyPages, spec.MachineConfig.MemSizeMiB = true, 64
			m := s.started(h, spec)
			s.countsOn(m.ID(), 2)
			made := map[string][2]uint64{} // by id: where the guest was before and after
			refused := 0
			// While one is made another is refused.
			before := s.last(m.ID())
			maker, err := s.at("pause", func() {
				other, err := s.open().Machine(t.Context(), m.ID())
				if err == nil {
					_, err = other.Snapshot(t.Context(), smartvm.SnapshotOptions{})
				}
				if errors.Is(err, smartvm.ErrState) && strings.Contains(err.Error(), "a snapshot of it is being made") {
					refused++
				}
			}).Machine(t.Context(), m.ID())
			if err != nil {
				t.Fatal(err)
			}
			made[s.snapshot(maker, smartvm.SnapshotOptions{}).ID] = [2]uint64{before, s.passed(m.ID())}
			if refused != 1 {
				t.Fatal("another is made meanwhile")
			}
			var mu sync.Mutex
			for round := range 6 {
				var all sync.WaitGroup
				for i := range 3 {
					all.Go(func() {
						foreign, err := s.open().Machine(t.Context(), m.ID())
						if err != nil {
							t.Error(err)
							return
						}
						before := s.last(m.ID())
						// Any of the three may be the one that is made: in the last round it is a diff, whichever it
						// is.
						sn, err := foreign.Snapshot(t.Context(), smartvm.SnapshotOptions{Diff: (round+i)%2 == 0 || round == 5})
						after := s.passed(m.ID())
						mu.Lock()
						defer mu.Unlock()
						switch {
						case err == nil:
							made[sn.ID] = [2]uint64{before, after}
						case errors.Is(err, smartvm.ErrState) && strings.Contains(err.Error(), "a snapshot of it is being made"):
							refused++
						default:
							t.Error(err)
						}
					})
				}
				all.Wait()
				s.countsOn(m.ID(), len(s.counted(m.ID()))+2)
			}
			wantState(t, m, smartvm.Running)
			t.Logf("%d made, %d refused", len(made), refused)
			if len(made) < 7 || refused == 0 {
				t.Errorf("%d made, %d refused", len(made), refused)
			}
			diffs := 0
			for _, sn := range s.wantSnapshots(h, len(made), "at once") {
				if sn.Parent != "" {
					diffs++
				}
				s.goesOn(h, sn.ID, made[sn.ID][0], made[sn.ID][1])
				s.removeSnapshot(h, sn.ID)
			}
			if diffs == 0 {
				t.Error("none was a diff")
			}
			s.stopAndRemove(m)
		})
	}
}

// After another start the VMM knows nothing of what was written before: a diff is a whole snapshot
// then. So it is of a VM that was killed, and of one that is restored.
func TestSnapshot_DiffOfAnotherRun(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := s.spec("count")
	spec.MachineConfig.TrackDirtyPages, spec.MachineConfig.MemSizeMiB = true, 64
	m := s.started(h, spec)
	s.countsOn(m.ID(), 30)
	first := s.snapshot(m, smartvm.SnapshotOptions{})
	for what, end := range map[string]func() error{
		"stopped": func() error { _, err := m.Stop(t.Context(), smartvm.StopOptions{}); return err },
		"killed": func() error {
			if err := syscall.Kill(vmmProcess(t, m), syscall.SIGKILL); err != nil {
				return err
			}
			_, err := m.Wait(t.Context())
			return err
		},
	} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		s.console.forget(m.ID())
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		before := s.countsOn(m.ID(), 2)
		sn := s.snapshot(m, smartvm.SnapshotOptions{Diff: true})
		if sn.Parent != "" {
			t.Errorf("%s and started: a diff to %s", what, sn.Parent)
		}
		s.goesOn(h, sn.ID, before[1], s.passed(m.ID()))
		next := s.snapshot(m, smartvm.SnapshotOptions{Diff: true})
		if next.Parent != sn.ID {
			t.Errorf("%s and started: the next is a diff to %q, want %s", what, next.Parent, sn.ID)
		}
		s.goesOn(h, next.ID, before[1], s.passed(m.ID()))
		s.removeSnapshot(h, sn.ID)
		s.removeSnapshot(h, next.ID)
	}
	s.stopAndRemove(m)
	r := s.restored(h, first.ID, smartvm.RestoreOptions{})
	before := s.countsOn(r.ID(), 2)
	sn := s.snapshot(r, smartvm.SnapshotOptions{Diff: true})
	s.goesOn(h, sn.ID, before[1], s.passed(r.ID()))
	s.stopAndRemove(r)
	s.wantSnapshots(h, 2, "in the end")
	s.removeSnapshot(h, sn.ID)
	s.removeSnapshot(h, first.ID)
}

// snapshotSteps are those of a snapshot at which something can happen to its VM.
var snapshotSteps = []string{"pause", "PUT /snapshot/create", "copy drive", "resume", "commit"}

// at calls what once, at a step of the snapshots that h makes.
func (s *site) at(step string, what func()) *smartvm.Host {
	s.t.Helper()
	var once sync.Once
	o := smartvm.WithTrace(s.options, func(got string) {
		if got == "call "+step {
			once.Do(what)
		}
	})
	h, err := smartvm.Open(o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := h.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return h
}

// A VMM that dies in the middle of it leaves no snapshot, or a whole one; the VM can be started
// again, and the next one is made.
func TestSnapshot_VMMDies(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		for _, step := range snapshotSteps {
			t.Run(string(launcher)+" "+step, func(t *testing.T) {
				s := newSite(t, launcher)
				h := s.open()
				m := s.started(h, s.spec("count"))
				s.countsOn(m.ID(), 2)
				pid := vmmProcess(t, m)
				died := false
				other := s.at(step, func() {
					died = true
					if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
						t.Error(err)
					}
					if _, err := m.Wait(context.Background()); err != nil {
						t.Error(err)
					}
				})
				foreign, err := other.Machine(t.Context(), m.ID())
				if err != nil {
					t.Fatal(err)
				}
				_, err = foreign.Snapshot(t.Context(), smartvm.SnapshotOptions{Name: "broken"})
				want := 0
				if step == "commit" { // by then all is written down
					want = 1
				}
				if !died || (err == nil) != (want == 1) {
					t.Errorf("it died: %v; %v", died, err)
				}
				s.wantSnapshots(h, want, "the VMM died")
				s.console.forget(m.ID())
				if err := m.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
				before := s.countsOn(m.ID(), 2)
				again := s.snapshot(m, smartvm.SnapshotOptions{Name: "again"})
				s.goesOn(h, "again", before[1], s.passed(m.ID()))
				s.wantSnapshots(h, want+1, "again")
				s.stopAndRemove(m)
				s.removeSnapshot(h, again.ID)
				if want == 1 {
					s.removeSnapshot(h, "broken")
				}
			})
		}
	}
}

// Who ends the VM meanwhile by force has his way, and there is no snapshot; who asks its guest to
// end is heard when it is made.
func TestSnapshot_StoppedMeanwhile(t *testing.T) {
	for _, row := range []struct {
		how  string
		stop smartvm.StopOptions
		made int
	}{
		{"by force", smartvm.StopOptions{}, 0},
		{"removed by force", smartvm.StopOptions{}, 0},
		{"asked", smartvm.StopOptions{Timeout: 20 * time.Second}, 1},
	} {
		t.Run(row.how, func(t *testing.T) {
			s := newSite(t, smartvm.LaunchJailed)
			other, h := s.remote(), s.open()
			m := s.started(h, s.spec("key"))
			eventually(t, "it is up", func() bool { return strings.Contains(s.console.get(m.ID()), "key is up") })
			maker := s.at("copy drive", func() {
				other.send(request{Op: "stop", Ref: m.ID(), Stop: row.stop})
				if row.made == 0 {
					if a := other.receive(); a.Err != "" || a.Text != string(smartvm.Killed) {
						t.Errorf("stop: %+v", a)
					}
				}
				if row.how == "removed by force" {
					other.ask(request{Op: "remove", Ref: m.ID()})
				}
			})
			foreign, err := maker.Machine(t.Context(), m.ID())
			if err != nil {
				t.Fatal(err)
			}
			_, err = foreign.Snapshot(t.Context(), smartvm.SnapshotOptions{Name: "it"})
			if (err == nil) != (row.made == 1) {
				t.Errorf("snapshot: %v", err)
			}
			if row.made == 1 {
				if a := other.receive(); a.Err != "" || a.Text != smartvm.CtrlAltDel {
					t.Errorf("stop: %+v", a)
				}
			}
			s.wantSnapshots(h, row.made, row.how)
			if row.made == 1 {
				s.removeSnapshot(h, "it")
			}
			if row.how == "removed by force" {
				if all, err := h.Machines(t.Context()); err != nil || len(all) > 0 {
					t.Errorf("%d VMs are left (%v)", len(all), err)
				}
				return
			}
			wantState(t, m, smartvm.Stopped)
			if err := m.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// A restored VM whose process died is taken up as what it is: same name, same labels, same memory,
// and from then on like any other.
func TestRestore_Adopted(t *testing.T) {
	eachVariant(t, func(t *testing.T, s *site) {
		other, h := s.remote(), s.open()
		m := s.started(h, s.spec("count"))
		s.countsOn(m.ID(), 3)
		sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
		at := s.last(m.ID())
		o := smartvm.RestoreOptions{ID: "restored", Name: "second", Labels: map[string]string{"a": "b"}}
		other.ask(request{Op: "restore", Ref: sn.ID, Restore: o})
		other.ask(request{Op: "start", Ref: o.ID})
		other.kill()
		report, err := h.Recover(t.Context())
		wantReport(t, report, err, smartvm.Report{Adopted: []string{o.ID}})
		r, err := h.Machine(t.Context(), o.Name)
		if err != nil {
			t.Fatal(err)
		}
		wantState(t, r, smartvm.Running)
		if spec := r.Spec(); r.ID() != o.ID || spec.Labels["a"] != "b" {
			t.Errorf("it is %s with labels %v", r.ID(), spec.Labels)
		}
		eventually(t, "it goes on", func() bool { return len(s.counted(o.ID)) > 2 })
		if got := s.counted(o.ID); got[0] < at {
			t.Errorf("it counts from %d; the snapshot was made at %d", got[0], at)
		}
		if err := h.RemoveSnapshot(t.Context(), sn.ID, false); !errors.Is(err, smartvm.ErrSnapshotInUse) {
			t.Errorf("remove its snapshot: %v", err)
		}
		again := s.snapshot(r, smartvm.SnapshotOptions{})
		if again.Parent != sn.ID {
			t.Errorf("parent %q, want %s", again.Parent, sn.ID)
		}
		to := s.passed(o.ID)
		s.stopAndRemove(r)
		s.goesOn(h, again.ID, at, to)
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
		s.removeSnapshot(h, sn.ID)
		s.removeSnapshot(h, again.ID)
	})
}

// One whose memory its process served ends with that, so nobody takes it up; it can be started
// again.
func TestRestore_ServerDies(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			if _, err := os.Stat("/dev/userfaultfd"); err != nil {
				t.Skip("no /dev/userfaultfd")
			}
			s := newSite(t, launcher)
			other, h := s.remote(), s.open()
			m := s.started(h, s.spec("count"))
			s.countsOn(m.ID(), 3)
			sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
			if err := m.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			other.ask(request{
				Op: "restore", Ref: sn.ID,
				Restore: smartvm.RestoreOptions{ID: "restored", Memory: smartvm.MemoryUFFD},
			})
			other.ask(request{Op: "start", Ref: "restored"})
			r, err := h.Machine(t.Context(), "restored")
			if err != nil {
				t.Fatal(err)
			}
			wantState(t, r, smartvm.Running)
			other.kill()
			eventually(t, "it ends", func() bool {
				state, err := r.State(t.Context())
				return err == nil && state == smartvm.Lost
			})
			report, err := h.Recover(t.Context())
			wantReport(t, report, err, smartvm.Report{Recovered: []string{"restored"}})
			if err := r.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.countsOn("restored", 3)
			s.stopAndRemove(r)
			s.removeSnapshot(h, sn.ID)
		})
	}
}

// Whatever an imported snapshot says of its VM, it is refused, or no more than a VM: nothing
// outside comes to be or is touched, also when it is trusted.
func TestRestore_OddManifest(t *testing.T) {
	s := newSite(t, smartvm.LaunchJailed)
	h := s.open()
	m := s.started(h, s.spec("count"))
	sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.write("victim", []byte("mine"))
	if err := os.MkdirAll(s.path("outside/users"), 0o700); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(sn.Path("manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	drive := func(spec object) object { return spec["drives"].([]any)[0].(object) }
	// Which of a stranger's are taken, and which of those that are trusted.
	const (
		never = iota
		trusted
		always
	)
	for name, tt := range map[string]struct {
		change func(machine, spec object)
		taken  int
	}{
		"nothing odd":        {func(object, object) {}, always},
		"no machine":         {func(machine, _ object) { clear(machine) }, never},
		"drive of ..":        {func(_, spec object) { drive(spec)["driveId"] = "../../victim" }, never},
		"drive ..":           {func(_, spec object) { drive(spec)["driveId"] = ".." }, never},
		"drive of a path":    {func(_, spec object) { drive(spec)["driveId"] = "/etc/passwd" }, never},
		"drive of no name":   {func(_, spec object) { drive(spec)["driveId"] = "" }, never},
		"drive of a newline": {func(_, spec object) { drive(spec)["driveId"] = "a\nb" }, never},
		"drive not in it":    {func(machine, spec object) { machine["drives"] = []any{"disk", "other"} }, never},
		"drive in it of ..":  {func(machine, spec object) { machine["drives"] = []any{"../../../victim"} }, never},
		"a host's file": {func(machine, spec object) {
			machine["drives"] = []any{}
			drive(spec)["pathOnHost"] = s.path("victim")
		}, trusted},
		"a host's file by ..": {func(machine, spec object) {
			machine["drives"] = []any{}
			drive(spec)["pathOnHost"] = "images/objects/../../../victim"
			drive(spec)["isReadOnly"] = true
		}, never},
		"image outside":   {func(machine, _ object) { machine["images"] = []any{"../outside/users"} }, never},
		"image by a path": {func(machine, _ object) { machine["images"] = []any{s.path("outside/users")} }, trusted},
		"interface of ..": {func(_, spec object) {
			spec["networkInterfaces"] = []any{object{"ifaceId": "../x", "hostDevName": "lo"}}
		}, never},
		"a host's TAP": {func(_, spec object) {
			spec["networkInterfaces"] = []any{object{"ifaceId": "eth0", "hostDevName": "lo"}}
		}, trusted},
		"another's interface": {func(machine, _ object) { machine["interfaces"] = []any{object{"id": "../../x"}} }, always},
		"unknown field":       {func(machine, _ object) { machine["evil"] = true }, never},
	} {
		t.Run(name, func(t *testing.T) {
			var manifest object
			if err := json.Unmarshal(whole, &manifest); err != nil {
				t.Fatal(err)
			}
			machine := manifest["machine"].(object)
			tt.change(machine, machine["spec"].(object))
			manifest["imported"] = true
			delete(manifest, "sum")
			text, err := json.Marshal(manifest)
			if err != nil {
				t.Fatal(err)
			}
			replace(t, sn.Path("manifest.json"), sealed.Seal(text))
			if _, err := h.Sweep(t.Context()); err != nil {
				t.Errorf("sweep: %v", err)
			}
			for _, trust := range []bool{false, true} {
				r, err := h.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{Trust: trust, ID: "odd"})
				if want := tt.taken == always || trust && tt.taken == trusted; (err == nil) != want {
					t.Errorf("trusted %v: %v", trust, err)
				}
				if err == nil {
					if err := r.Remove(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
			if all, err := h.Machines(t.Context()); err != nil || len(all) > 0 {
				t.Errorf("%d VMs are left (%v)", len(all), err)
			}
			if got, err := os.ReadFile(s.path("victim")); err != nil || string(got) != "mine" ||
				ownerOf(t, s.path("victim")) != os.Getuid() {
				t.Errorf("the host's file is %q now (%v)", got, err)
			}
			if left, err := os.ReadDir(s.path("outside/users")); err != nil || len(left) > 0 {
				t.Errorf("claimed outside: %v, %v", left, err)
			}
		})
	}
	replace(t, sn.Path("manifest.json"), whole)
	s.removeSnapshot(h, sn.ID)
	if err := errors.Join(os.Remove(s.path("victim")), os.RemoveAll(s.path("outside"))); err != nil {
		t.Fatal(err)
	}
}

// An image that a snapshot needs stays, also if its maker died before he could say so, and it was
// imported. Without it a restore says what to pull.
func TestSnapshot_Image(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	s.options.Images = image.Options{Agent: []byte("no guest runs it")}
	h := s.open()
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	load := func() {
		t.Helper()
		if _, err := images.Import(t.Context(),
			image.ImportOptions{Name: "tiny", Kernel: s.path("count"), Rootfs: root}); err != nil {
			t.Fatal(err)
		}
	}
	load()
	m := s.started(h, smartvm.Spec{Image: "tiny", MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}})
	s.countsOn(m.ID(), 2)
	sn := s.snapshot(m, smartvm.SnapshotOptions{Stop: true})
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	claims := func() []string {
		t.Helper()
		found, err := filepath.Glob(s.path("data/images/objects/*/users/snapshot-" + sn.ID))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	made := claims()
	if len(made) == 0 {
		t.Fatal("it claims no image")
	}
	stays := func(when string) {
		t.Helper()
		for _, claim := range made {
			if err := os.Remove(claim); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatal(err)
			}
		}
		if _, err := h.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		if got := claims(); len(got) != len(made) {
			t.Errorf("%s: it claims %q, want %q", when, got, made)
		}
		if _, err := images.Remove(t.Context(), "tiny", false); !errors.As(err, new(*image.InUseError)) {
			t.Errorf("%s: remove its image: %v", when, err)
		}
	}
	stays("made")
	var archive bytes.Buffer
	if err := sn.Export(t.Context(), &archive, nil); err != nil {
		t.Fatal(err)
	}
	if sn.Image() != "tiny" || sn.Lacks() != nil {
		t.Errorf("of image %q, lacks %v", sn.Image(), sn.Lacks())
	}
	s.removeSnapshot(h, sn.ID)
	if _, err := images.Remove(t.Context(), "tiny", false); err != nil {
		t.Fatal(err)
	}
	all, err := h.Snapshots()
	if err != nil {
		t.Fatal(err)
	}
	imported, err := all.Import(t.Context(), &archive, snapshot.ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	_, restoreErr := h.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{Trust: true})
	for _, err := range []error{h.AsSnapshot(imported).Lacks(), restoreErr} {
		if err == nil || !strings.Contains(err.Error(), "image tiny is not here") ||
			smartvm.Hint(err) != "smartvm image pull tiny" {
			t.Errorf("without its image: %v (hint %q)", err, smartvm.Hint(err))
		}
	}
	load()
	stays("imported")
	r := s.restored(h, sn.ID, smartvm.RestoreOptions{Trust: true})
	s.countsOn(r.ID(), 2)
	s.stopAndRemove(r)
	s.removeSnapshot(h, sn.ID)
	if _, err := images.Remove(t.Context(), "tiny", false); err != nil {
		t.Error(err)
	}
	for _, dir := range []string{"images", "base-images", "volumes"} { // which nobody else looks at
		if err := os.RemoveAll(s.path("data/" + dir)); err != nil {
			t.Error(err)
		}
	}
}

// A VM whose VMM is slow to answer is what it is, not what it is taken for meanwhile.
func TestMachine_PausedAndSlow(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	s.options = smartvm.WithHealInterval(s.options, 10*time.Millisecond)
	h := s.open()
	m := s.started(h, s.spec("count"))
	s.countsOn(m.ID(), 2)
	pid := vmmProcess(t, m)
	// Longer than anybody waits who only wants to know.
	stall := func() {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(1500*time.Millisecond, func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
	}
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	stall()
	sn := s.snapshot(m, smartvm.SnapshotOptions{})
	wantState(t, m, smartvm.Paused)
	stall()
	if err := m.Resume(t.Context()); err != nil {
		t.Error(err)
	}
	wantState(t, m, smartvm.Running)
	// One that was held still by who has died goes on even if it cannot say that it stands still.
	if err := m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(s.options.RuntimeDir)
	if err != nil {
		t.Fatal(err)
	}
	hold, err := st.Hold(m.ID())
	if err != nil {
		t.Fatal(err)
	}
	stall()
	if err := errors.Join(hold.MustResume(), hold.Abandon()); err != nil {
		t.Fatal(err)
	}
	s.passed(m.ID())
	s.stopAndRemove(m)
	s.removeSnapshot(h, sn.ID)
}
