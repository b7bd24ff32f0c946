package smartvm_test

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/snapshot"
)

// A VMM whose states have a form that nobody knows, as 1.17's have, is as good as any for
// snapshots, forks and archives.
func TestSnapshot_UnknownForm(t *testing.T) {
	site := newFaultSite(t, fakefc.Script{Version: "1.17.0", Format: "11.0.0"})
	h := site.open(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	started := func(m *smartvm.Machine, err error) *smartvm.Machine {
		t.Helper()
		must(err)
		must(m.Start(t.Context()))
		return m
	}
	ends := func(m *smartvm.Machine) {
		t.Helper()
		if state, err := m.State(t.Context()); err != nil || state != smartvm.Running {
			t.Errorf("VM %s is %s, %v, want running", m.ID(), state, err)
		}
		_, err := m.Stop(t.Context(), smartvm.StopOptions{})
		must(errors.Join(err, m.Remove(t.Context())))
	}
	m := started(h.Create(t.Context(), site.spec))
	sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Name: "base"})
	must(err)
	if sn.Format != "11.0.0" || sn.Firecracker != "1.17.0" {
		t.Errorf("snapshot of Firecracker %s, format %q", sn.Firecracker, sn.Format)
	}
	diff, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Diff: true})
	must(err)
	if diff.Parent != sn.ID {
		t.Errorf("the diff's parent is %q, want %s", diff.Parent, sn.ID)
	}
	forks, err := m.Fork(t.Context(), 2, smartvm.ForkOptions{})
	must(err)
	for _, f := range forks {
		ends(f)
	}
	ends(started(h.Restore(t.Context(), "base", smartvm.RestoreOptions{})))
	ends(m)

	var archive bytes.Buffer
	must(sn.Export(t.Context(), &archive, nil))
	must(h.RemoveSnapshot(t.Context(), "base", false))
	all, err := h.Snapshots()
	must(err)
	imported, err := all.Import(t.Context(), &archive, snapshot.ImportOptions{})
	must(err)
	ends(started(h.Restore(t.Context(), "base", smartvm.RestoreOptions{Trust: true})))

	site.behave(t, fakefc.Script{})
	_, err = site.open(t).Restore(t.Context(), "base", smartvm.RestoreOptions{Trust: true})
	if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), "11.0.0") ||
		!strings.Contains(smartvm.Hint(err), "smartvm firecracker install 1.17.0") {
		t.Errorf("restore of format 11.0.0 by 6.0.0: %v (hint %q)", err, smartvm.Hint(err))
	}
	state, err := os.ReadFile(imported.Path(snapshot.StateFile))
	must(err)
	state[len(state)/2] ^= 1
	replace(t, imported.Path(snapshot.StateFile), state)
	if _, err := h.Restore(t.Context(), "base", smartvm.RestoreOptions{Trust: true}); !errors.Is(err,
		snapshot.ErrDamaged) {
		t.Errorf("a state with another byte: %v, want ErrDamaged", err)
	}
	must(errors.Join(h.RemoveSnapshot(t.Context(), "base", false), h.RemoveSnapshot(t.Context(), diff.ID, false)))
	site.tidy(t)
}

// A diff that the VMM would write wrongly is refused before the VM is touched; a full snapshot is
// not.
func TestSnapshot_WrongDiff(t *testing.T) {
	site := newFaultSite(t, fakefc.Script{Version: "1.14.1", Format: "8.0.0"})
	h := site.open(t)
	site.spec.MachineConfig.TrackDirtyPages, site.spec.MemoryHotplug = true, &smartvm.MemoryHotplug{TotalSizeMiB: 128}
	m := site.started(t, h)
	_, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Diff: true})
	if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), "1.14.1") ||
		!strings.Contains(smartvm.Hint(err), "1.14.2") {
		t.Errorf("a diff: %v (hint %q), want ErrNotSupported", err, smartvm.Hint(err))
	}
	sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(m.Remove(t.Context()), h.RemoveSnapshot(t.Context(), sn.ID, false)); err != nil {
		t.Error(err)
	}
	site.tidy(t)
}

// Who restores a VM that has a vsock device with 1.16.0 is warned, and only he.
func TestRestore_DeafVMM(t *testing.T) {
	for name, c := range map[string]struct {
		version string
		vsock   *smartvm.Vsock
		want    bool
	}{
		"Deaf":    {"1.16.0", &smartvm.Vsock{GuestCID: 3}, true},
		"Mended":  {"1.16.1", &smartvm.Vsock{GuestCID: 3}, false},
		"NoVsock": {"1.16.0", nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			site := newFaultSite(t, fakefc.Script{Version: c.version, Format: "10.0.0"})
			var log bytes.Buffer
			site.options.Log, site.spec.Vsock = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn})),
				c.vsock
			h := site.open(t)
			m := site.started(t, h)
			sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Stop: true})
			if err != nil {
				t.Fatal(err)
			}
			r, err := h.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(log.String(), "1.16.1 mends"); got != c.want {
				t.Errorf("warned: %v, want %v; logged: %s", got, c.want, log.String())
			}
			if err := errors.Join(r.Remove(t.Context()), m.Remove(t.Context()),
				h.RemoveSnapshot(t.Context(), sn.ID, false)); err != nil {
				t.Error(err)
			}
		})
	}
}

// Transparent huge pages are asked for with a version that knows them, without a pool and without
// userfaultfd, and refused by value with an older one.
func TestHugePages_Transparent(t *testing.T) {
	old := newFaultSite(t, fakefc.Script{Version: "1.16.1", Format: "10.0.0"})
	old.spec.MachineConfig.HugePages = "Transparent"
	if _, err := old.open(t).Create(t.Context(), old.spec); !errors.Is(err, smartvm.ErrNotSupported) ||
		!strings.Contains(err.Error(), `huge_pages with value "Transparent" needs Firecracker 1.17.0`) {
		t.Errorf("with 1.16.1: %v, want ErrNotSupported", err)
	}
	site := newFaultSite(t, fakefc.Script{Version: "1.17.0", Format: "11.0.0"})
	site.spec.MachineConfig.HugePages = "Transparent"
	h := site.open(t)
	m := site.started(t, h)
	if config, err := m.VMConfig(t.Context()); err != nil || config.MachineConfig.HugePages != "Transparent" {
		t.Errorf("configured as %+v, %v", config.MachineConfig, err)
	}
	sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Stop: true})
	if err != nil {
		t.Fatal(err)
	}
	r, err := h.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{})
	if err == nil {
		err = r.Start(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	if plan, err := os.ReadFile(filepath.Join(site.dir, "runtime", r.ID(), "machine.json")); err != nil ||
		bytes.Contains(plan, []byte("memorySocket")) || sn.HugePages != "" {
		t.Errorf("restored by userfaultfd, or with pages of a pool (%q): %s, %v", sn.HugePages, plan, err)
	}
	if _, err := r.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(r.Remove(t.Context()), m.Remove(t.Context()),
		h.RemoveSnapshot(t.Context(), sn.ID, false)); err != nil {
		t.Error(err)
	}
	site.tidy(t)
}

// What pages a restored VM has may be chosen with a version that knows this, and is refused before
// anything is made with others.
func TestRestore_HugePages(t *testing.T) {
	site := newFaultSite(t, fakefc.Script{Version: "1.17.0", Format: "11.0.0"})
	h := site.open(t)
	m := site.started(t, h)
	sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Stop: true})
	if err == nil {
		err = m.Remove(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, pages := range []string{"", "None", "Transparent"} {
		r, err := h.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{HugePages: pages})
		if err == nil {
			err = r.Start(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		if config, err := r.VMConfig(t.Context()); err != nil || string(config.MachineConfig.HugePages) != pages {
			t.Errorf("huge pages %q: configured as %+v, %v", pages, config.MachineConfig, err)
		}
		if got := r.Spec().MachineConfig.HugePages; got != pages {
			t.Errorf("huge pages %q: the spec has %q", pages, got)
		}
		if _, err := r.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
			t.Error(err)
		}
		if err := r.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	refused := func(pages, why string) {
		t.Helper()
		if _, err := site.open(t).Restore(t.Context(), sn.ID, smartvm.RestoreOptions{HugePages: pages}); err == nil ||
			!strings.Contains(err.Error(), why) {
			t.Errorf("huge pages %q: %v, want an error with %q", pages, err, why)
		}
	}
	refused("1G", "must be one of None, 2M, Transparent")
	if !hugePages(t) {
		refused("2M", "huge pages: the snapshot has 128 MiB in pages of 2 MiB")
	}
	site.behave(t, fakefc.Script{Version: "1.16.1", Format: "11.0.0"})
	refused("None", "field huge_pages needs Firecracker 1.17.0")
	if err := h.RemoveSnapshot(t.Context(), sn.ID, false); err != nil {
		t.Error(err)
	}
	site.tidy(t)
}
