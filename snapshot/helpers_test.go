package snapshot_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"push.rocks/smartvm/snapshot"
)

// testState is a state in no form of a VMM's: none is looked for.
const testState = "whatever the VMM writes of a VM's devices"

const (
	testFormat = "6.0.0"
	testMemory = 2 << 20 // bytes
)

func memory() []byte {
	b := make([]byte, testMemory)
	copy(b[5000:], "in the first piece")
	copy(b[len(b)-20:], "at the very end")
	return b
}

func manifest(name string) snapshot.Manifest {
	return snapshot.Manifest{
		Name: name, Firecracker: "1.12.1", Format: testFormat, MemSizeMiB: testMemory >> 20, CPUVendor: "AuthenticAMD",
		CPUModel: "EPYC", HostKernel: "6.1.0",
		Labels: map[string]string{"app": "db"}, Machine: []byte(`{"a":1}`), Paused: 3,
	}
}

func open(t testing.TB) *snapshot.Store {
	t.Helper()
	return openAt(t, filepath.Join(t.TempDir(), "snapshots"))
}

func openAt(t testing.TB, dir string) *snapshot.Store {
	t.Helper()
	s, err := snapshot.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// draft is one with a state, a memory and a drive.
func draft(t testing.TB, s *snapshot.Store) *snapshot.Draft {
	t.Helper()
	d, err := s.Begin(t.Context())
	if err == nil {
		err = fill(d.Path())
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// fill puts a snapshot's files into a directory.
func fill(dir string) error {
	err := errors.Join(
		os.WriteFile(filepath.Join(dir, snapshot.StateFile), []byte(testState), 0o600),
		os.WriteFile(filepath.Join(dir, snapshot.MemoryFile), memory(), 0o600),
		os.Mkdir(filepath.Join(dir, snapshot.DrivesDir), 0o755))
	disk, ferr := os.Create(filepath.Join(dir, snapshot.DrivesDir, "scratch_1"))
	if ferr != nil {
		return errors.Join(err, ferr)
	}
	_, werr := disk.WriteAt([]byte("data"), 5<<20)
	return errors.Join(err, disk.Truncate(10<<20+7), werr, disk.Close())
}

func commit(t testing.TB, s *snapshot.Store, name string) *snapshot.Snapshot {
	t.Helper()
	sn, err := draft(t, s).Commit(t.Context(), manifest(name), nil)
	if err != nil {
		t.Fatal(err)
	}
	return sn
}

// wantIDs compares what is listed, and that no draft is left.
func wantIDs(t testing.TB, s *snapshot.Store, want ...string) {
	t.Helper()
	all, err := s.List()
	if err != nil {
		t.Error(err)
	}
	var got []string
	for _, sn := range all {
		got = append(got, sn.ID)
	}
	if len(got) != len(want) {
		t.Errorf("snapshots %q, want %q", got, want)
		return
	}
	for _, id := range want {
		if _, err := s.Get(id); err != nil {
			t.Errorf("snapshot %s: %v", id, err)
		}
	}
}

func wantEmpty(t testing.TB, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		t.Errorf("%s has %v, %v; want nothing", dir, entries, err)
	}
}

func wantError(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// wantDamage wants a *DamagedError that names a file.
func wantDamage(t testing.TB, what string, err error, file string) {
	t.Helper()
	var damage *snapshot.DamagedError
	if !errors.As(err, &damage) || !errors.Is(err, snapshot.ErrDamaged) || damage.File != file {
		t.Errorf("%s: %v, want damage of %s", what, err, file)
	}
}

// use makes a VM's directory and claims a snapshot for it.
func use(t testing.TB, sn *snapshot.Snapshot, vm string) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), vm)
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Symlink(dir, filepath.Join(sn.UsersDir(), vm))); err != nil {
		t.Fatal(err)
	}
	return dir
}

// rewrite changes a file that must not be changed.
func rewrite(t testing.TB, path string, change func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err == nil {
		err = os.WriteFile(path, change(bytes.Clone(data)), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func flip(at int) func([]byte) []byte {
	return func(b []byte) []byte {
		if at < 0 {
			at += len(b)
		}
		b[at] ^= 1
		return b
	}
}

func modeOf(t testing.TB, path string) fs.FileMode {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Mode()
}
