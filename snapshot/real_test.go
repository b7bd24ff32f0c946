package snapshot_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/testenv/bare"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/snapshot"
)

// A real VM's state is read, its snapshot is stored, found damaged where a bit is another one, and restored.
func TestReal_Snapshot(t *testing.T) {
	const mib = 32
	vm := bare.Start(t, t.TempDir(), "api")
	vm.Boot(t, tinyguest.Guest{Then: tinyguest.Count}, firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: mib})
	vm.Await(t, "the guest's count", func() bool { return len(vm.Counts()) > 3 })
	s := open(t)
	d, err := s.Begin(t.Context())
	must(t, err)
	vm.Save(t, filepath.Join(d.Path(), snapshot.StateFile), filepath.Join(d.Path(), snapshot.MemoryFile))
	st, err := snapshot.ReadState(filepath.Join(d.Path(), snapshot.StateFile))
	must(t, err)
	version, err := vm.GetVersion(t.Context())
	must(t, err)
	if want := formatWritten(version); st.Arch != "amd64" || st.Format != want {
		t.Errorf("state is %+v, want format %s", st, want)
	}
	last := slices.Max(vm.Counts())
	sn, err := d.Commit(t.Context(), snapshot.Manifest{Firecracker: version.String(), MemSizeMiB: mib}, nil)
	must(t, err)
	must(t, sn.Check(t.Context()))

	// Any bit of the state.
	for at := range 64 {
		path := filepath.Join(t.TempDir(), "state")
		data, err := os.ReadFile(sn.Path(snapshot.StateFile))
		must(t, err)
		must(t, os.WriteFile(path, flip(at*len(data)/64)(data), 0o600))
		if _, err := snapshot.ReadState(path); err == nil {
			t.Errorf("byte %d of the state is wrong and was not seen", at*len(data)/64)
		}
	}

	other := bare.Start(t, t.TempDir(), "api")
	must(t, other.LoadSnapshot(t.Context(), firecracker.SnapshotLoadParams{
		SnapshotPath: sn.Path(snapshot.StateFile), ResumeVM: true,
		MemBackend: &firecracker.MemBackend{BackendType: firecracker.MemBackendFile, BackendPath: sn.Path(snapshot.MemoryFile)},
	}))
	other.Await(t, "the restored guest's count", func() bool { return len(other.Counts()) > 3 })
	if first := slices.Min(other.Counts()); first <= last || first > last+10 {
		t.Errorf("the restored guest goes on at %d, it was at %d", first, last)
	}
	must(t, sn.Check(t.Context()))
}

// formatWritten is firecracker.md 1.5.
func formatWritten(v firecracker.Version) string {
	return map[int]string{11: "5.0.0", 12: "6.0.0", 13: "8.0.0", 14: "8.0.0", 15: "9.0.0", 16: "10.0.0"}[v.Minor]
}
