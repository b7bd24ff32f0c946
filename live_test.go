package smartvm_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/testenv"
)

// ended stops and removes VMs, and finds nothing left of them.
func (s *faultSite) ended(t *testing.T, all ...*smartvm.Machine) {
	t.Helper()
	for _, m := range all {
		if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
			t.Error(err)
		}
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	s.tidy(t)
}

// Memory is plugged and unplugged while the VM runs; a VM that is restored or forked has what its
// origin had, and one that is started anew none.
func TestMachine_MemoryHotplug(t *testing.T) {
	testenv.NoLeaks(t)
	site := newFaultSite(t, fakefc.Script{Version: "1.16.1", Format: "10.0.0"})
	site.spec.MemoryHotplug = &smartvm.MemoryHotplug{TotalSizeMiB: 1024, BlockSizeMiB: 4}
	h, ctx := site.open(t), t.Context()
	m := site.started(t, h)
	wantPlugged := func(m *smartvm.Machine, mib uint64) {
		t.Helper()
		want := smartvm.MemoryHotplugStatus{
			TotalSizeMiB: 1024, SlotSizeMiB: 128, BlockSizeMiB: 4, PluggedSizeMiB: mib,
			RequestedSizeMiB: mib,
		}
		got, err := m.MemoryHotplug(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("VM %s (-want +got):\n%s", m.ID(), diff)
		}
		in, err := m.Inspect(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(&want, in.MemoryHotplug); diff != "" {
			t.Errorf("inspection of VM %s (-want +got):\n%s", m.ID(), diff)
		}
	}
	wantPlugged(m, 0)
	for _, mib := range []int{1024, 0, 512} {
		if err := m.UpdateMemoryHotplug(ctx, mib); err != nil {
			t.Fatal(err)
		}
		wantPlugged(m, uint64(mib))
	}
	for _, mib := range []int{-4, 2, 510, 1028} {
		err := m.UpdateMemoryHotplug(ctx, mib)
		field, ok := errors.AsType[*smartvm.FieldError](err)
		if !ok || field.Value != mib || !strings.Contains(err.Error(), "blockSizeMib (4) and at most totalSizeMib (1024)") {
			t.Errorf("%d MiB: %v, want a FieldError", mib, err)
		}
	}
	wantPlugged(m, 512)
	config, err := m.VMConfig(ctx)
	if err != nil || !strings.HasSuffix(config.BootSource.BootArgs, " memhp_default_state=online_movable") {
		t.Errorf("the guest's command line is %q, %v", config.BootSource.BootArgs, err)
	}

	sn, err := m.Snapshot(ctx, smartvm.SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := h.Restore(ctx, sn.ID, smartvm.RestoreOptions{})
	if err == nil {
		err = r.Start(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	wantPlugged(r, 512)
	if err := r.UpdateMemoryHotplug(ctx, 4); err != nil {
		t.Error(err)
	}
	wantPlugged(r, 4)
	wantPlugged(m, 512)
	if _, err := m.Stop(ctx, smartvm.StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if in, err := m.Inspect(ctx); err != nil || in.MemoryHotplug != nil {
		t.Errorf("at rest it has %+v, %v", in.MemoryHotplug, err)
	}
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	wantPlugged(m, 0)
	if _, err := r.Stop(ctx, smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(r.Remove(ctx), h.RemoveSnapshot(ctx, sn.ID, false)); err != nil {
		t.Error(err)
	}
	site.ended(t, m)
}

// What a VM cannot do says why: its Firecracker is too old, or it was made without it.
func TestMachine_LiveNeeds(t *testing.T) {
	const old, pmemOld = "needs Firecracker 1.14.0 or newer, this is 1.13.2",
		"needs Firecracker 1.16.0 or newer, this is 1.13.2"
	for name, c := range map[string]struct {
		version                string
		want                   error
		hotplug, hinting, pmem string
	}{
		"Old":     {"1.13.2", smartvm.ErrNotSupported, old, old, pmemOld},
		"Without": {"1.16.1", smartvm.ErrState, "no memoryHotplug", "no balloon.freePageHinting", "no pmem device log"},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.NoLeaks(t)
			site := newFaultSite(t, fakefc.Script{Version: c.version})
			site.spec.Balloon = &smartvm.Balloon{AmountMiB: 8}
			m, ctx := site.started(t, site.open(t)), t.Context()
			_, plugged := m.MemoryHotplug(ctx)
			_, hinted := m.BalloonHinting(ctx)
			for _, call := range []struct {
				err  error
				text string
			}{
				{m.UpdateMemoryHotplug(ctx, 128), c.hotplug},
				{plugged, c.hotplug},
				{m.StartBalloonHinting(ctx), c.hinting},
				{m.StopBalloonHinting(ctx), c.hinting},
				{hinted, c.hinting},
				{m.UpdatePmem(ctx, "log", &smartvm.RateLimiter{}), c.pmem},
			} {
				if !errors.Is(call.err, c.want) || !strings.Contains(call.err.Error(), call.text) || smartvm.Hint(call.err) == "" {
					t.Errorf("%v (hint %q), want %v with %q", call.err, smartvm.Hint(call.err), c.want, call.text)
				}
			}
			site.ended(t, m)
		})
	}
}

// What metrics are to say of their VM is asked of a VMM that can, and refused by one that cannot.
func TestMachine_MetricsIdentity(t *testing.T) {
	for version, ok := range map[string]bool{"1.16.1": false, "1.17.0": true} {
		t.Run(version, func(t *testing.T) {
			testenv.NoLeaks(t)
			site := newFaultSite(t, fakefc.Script{Version: version})
			site.spec.Metrics = &smartvm.Metrics{
				MetricsPath: filepath.Join(site.dir, "metrics"), EmitID: true,
				Properties: map[string]string{"customer": "1234"},
			}
			m, err := site.open(t).Create(t.Context(), site.spec)
			if !ok {
				if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), "emit_id") ||
					!strings.Contains(err.Error(), "properties") {
					t.Errorf("%v, want ErrNotSupported of both fields", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := m.Spec().Metrics; !got.EmitID || got.Properties["customer"] != "1234" {
				t.Errorf("its metrics are %+v", got)
			}
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			site.ended(t, m)
		})
	}
}

// A VM has its devices on a PCI bus where its Firecracker can, and no other has.
func TestMachine_PCI(t *testing.T) {
	for name, c := range map[string]struct {
		version string
		pci, ok bool
	}{
		"Old":     {"1.12.1", true, false},
		"New":     {"1.13.0", true, true},
		"Without": {"1.13.0", false, true},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.NoLeaks(t)
			site := newFaultSite(t, fakefc.Script{Version: c.version})
			site.spec.PCI = c.pci
			m, err := site.open(t).Create(t.Context(), site.spec)
			if !c.ok {
				if !errors.Is(err, smartvm.ErrNotSupported) ||
					!strings.Contains(err.Error(), "pci needs Firecracker 1.13.0 or newer, this is 1.12.1") {
					t.Errorf("%v, want ErrNotSupported", err)
				}
				return
			}
			if err == nil {
				err = m.Start(t.Context())
			}
			if err != nil {
				t.Fatal(err)
			}
			in, err := m.Inspect(t.Context())
			if err != nil || len(in.PIDs) == 0 {
				t.Fatal(err, in.PIDs)
			}
			line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", in.PIDs[0]))
			if got := strings.Contains(string(line), "\x00--enable-pci\x00"); err != nil || got != c.pci {
				t.Errorf("the VMM runs as %q, %v", line, err)
			}
			site.ended(t, m)
		})
	}
}
