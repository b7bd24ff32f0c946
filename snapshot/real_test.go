package snapshot_test

import (
	"path/filepath"
	"slices"
	"testing"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/testenv/bare"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/snapshot"
)

// A real VM's snapshot is stored, found damaged where a byte of its state is another one, and
// restored.
func TestReal_Snapshot(t *testing.T) {
	const mib = 32
	vm := bare.Start(t, t.TempDir(), "api")
	vm.Boot(t, tinyguest.Guest{Then: tinyguest.Count}, firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: mib})
	vm.Await(t, "the guest's count", func() bool { return len(vm.Counts()) > 3 })
	s := open(t)
	d, err := s.Begin(t.Context())
	must(t, err)
	vm.Save(t, filepath.Join(d.Path(), snapshot.StateFile), filepath.Join(d.Path(), snapshot.MemoryFile))
	version, err := vm.GetVersion(t.Context())
	must(t, err)
	last := slices.Max(vm.Counts())
	sn, err := d.Commit(t.Context(), snapshot.Manifest{Firecracker: version.String(), MemSizeMiB: mib}, nil)
	must(t, err)
	must(t, sn.Check(t.Context()))

	for at := range 16 { // of the state, in sixteenths
		change := func(b []byte) []byte { return flip(at * len(b) / 16)(b) }
		rewrite(t, sn.Path(snapshot.StateFile), change)
		wantDamage(t, "changed", sn.Check(t.Context()), snapshot.StateFile)
		rewrite(t, sn.Path(snapshot.StateFile), change)
	}
	must(t, sn.Check(t.Context()))

	other := bare.Start(t, t.TempDir(), "api")
	must(t, other.LoadSnapshot(t.Context(), firecracker.SnapshotLoadParams{
		SnapshotPath: sn.Path(snapshot.StateFile), ResumeVM: true,
		MemBackend: &firecracker.MemBackend{
			BackendType: firecracker.MemBackendFile,
			BackendPath: sn.Path(snapshot.MemoryFile),
		},
	}))
	other.Await(t, "the restored guest's count", func() bool { return len(other.Counts()) > 3 })
	if first := slices.Min(other.Counts()); first <= last || first > last+10 {
		t.Errorf("the restored guest goes on at %d, it was at %d", first, last)
	}
	must(t, sn.Check(t.Context()))
}
