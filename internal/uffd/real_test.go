package uffd_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/bare"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/internal/uffd"
)

// realSnapshot is that of a guest, in files of a directory.
func realSnapshot(t testing.TB, g tinyguest.Guest, mib int, ready func(vm *bare.VM) bool) (state, memory string) {
	t.Helper()
	requireUFFD(t)
	dir := t.TempDir()
	vm := bare.Start(t, dir, "api")
	vm.Boot(t, g, firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: mib})
	vm.Await(t, "the guest", func() bool { return ready(vm) })
	vm.Save(t, "state", "memory")
	if err := vm.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	vm.AwaitEnd(t)
	return filepath.Join(dir, "state"), filepath.Join(dir, "memory")
}

// load restores it, paused.
func load(vm *bare.VM, state, socket string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return vm.LoadSnapshot(ctx, firecracker.SnapshotLoadParams{
		SnapshotPath: state,
		MemBackend:   &firecracker.MemBackend{BackendType: firecracker.MemBackendUffd, BackendPath: socket},
	})
}

func TestReal_GoesOn(t *testing.T) {
	state, memory := realSnapshot(t, tinyguest.Guest{Then: tinyguest.Count}, 128, func(vm *bare.VM) bool {
		return len(vm.Counts()) > 5
	})
	dir := t.TempDir()
	testenv.NoLeaks(t)
	s := uffd.NewServer(nil)
	for range 2 {
		a := make(alarm, 1)
		vm := bare.Start(t, dir, "api")
		must(t, os.RemoveAll(filepath.Join(dir, "memory.socket")))
		session, err := s.Listen(
			uffd.Options{
				Socket: filepath.Join(dir, "memory.socket"), Memory: memory, UID: os.Getuid(), GID: os.Getgid(),
				Failed: a.tell,
			})
		must(t, err)
		must(t, load(vm, state, "memory.socket"))
		must(t, vm.Resume(t.Context()))
		vm.Await(t, "the guest's count", func() bool { return len(vm.Counts()) > 3 })
		if first := slices.Min(vm.Counts()); first < 5 {
			t.Errorf("the guest goes on at %d", first)
		}
		st := session.Stats()
		if !st.Guarded || st.Faults == 0 || st.Copied > 128<<20/page/2 {
			t.Errorf("%+v", st)
		}
		t.Logf("%+v", st)
		// The VMM ends by itself.
		must(t, vm.Process.Kill())
		vm.AwaitEnd(t)
		await(t, "the session's end", session.Done())
		a.silent(t)
		must(t, os.Remove(filepath.Join(dir, "api")))
	}
	must(t, s.Close())
}

// A guest that touches 16,000 pages waits at least ten times less often when they were recorded
// once.
func TestReal_RecordedSet(t *testing.T) {
	const pages = 16_000
	dots := func(vm *bare.VM) bool { return strings.Count(vm.Output(), ".") > 1 }
	state, memory := realSnapshot(t, tinyguest.Guest{Pages: pages, Then: tinyguest.Sweep}, 256, dots)
	s := newServer(t)
	restore := func(set *uffd.Set) (uffd.Stats, *uffd.Set) {
		dir := t.TempDir()
		vm := bare.Start(t, dir, "api")
		session, err := s.Listen(
			uffd.Options{Socket: filepath.Join(dir, "m"), Memory: memory, UID: os.Getuid(), GID: os.Getgid(), Prefetch: set})
		must(t, err)
		must(t, load(vm, state, "m"))
		await(t, "what is prefetched", session.Ready())
		must(t, vm.Resume(t.Context()))
		vm.Await(t, "the guest's sweep", func() bool { return dots(vm) || strings.Contains(vm.Output(), "!") })
		if strings.Contains(vm.Output(), "!") {
			t.Errorf("the guest found other memory than it had: %q", vm.Output())
		}
		must(t, session.Close())
		vm.AwaitEnd(t)
		return session.Stats(), session.Touched()
	}
	without, set := restore(nil)
	path := filepath.Join(t.TempDir(), "set")
	must(t, uffd.WriteSet(path, set))
	set, err := uffd.ReadSet(path)
	must(t, err)
	with, _ := restore(set)
	t.Logf("without a set: %+v", without)
	t.Logf("with it: %+v, %d ranges", with, len(set.Ranges))
	if without.Faults < pages*page/(256<<10) || with.Faults*10 > without.Faults || with.Prefetched < pages {
		t.Errorf("%d faults with the set, %d without", with.Faults, without.Faults)
	}
}

// The handler of a real VMM is killed: so is the VMM, although nobody is there to do it.
func TestReal_HandlerKilled(t *testing.T) {
	state, memory := realSnapshot(t, tinyguest.Guest{Then: tinyguest.Count}, 64, func(vm *bare.VM) bool {
		return len(vm.Counts()) > 1
	})
	dir := t.TempDir()
	h := startChild(t, "handler", filepath.Join(dir, "m"), memory)
	h.want("listening")
	vm := bare.Start(t, dir, "api")
	must(t, load(vm, state, "m"))
	must(t, vm.Resume(t.Context()))
	vm.Await(t, "the guest's count", func() bool { return len(vm.Counts()) > 1 })
	must(t, h.cmd.Process.Kill())
	vm.AwaitEnd(t)
}

// The memory file of a running VM becomes shorter: the alarm comes, and the VMM does not hang.
func TestReal_MemoryTruncated(t *testing.T) {
	const pages = 8000
	state, memory := realSnapshot(t, tinyguest.Guest{Pages: pages, Then: tinyguest.Sweep}, 128, func(vm *bare.VM) bool {
		return strings.Contains(vm.Output(), ".")
	})
	dir := t.TempDir()
	s := newServer(t)
	a := make(alarm, 1)
	session, err := s.Listen(
		uffd.Options{Socket: filepath.Join(dir, "m"), Memory: memory, UID: os.Getuid(), GID: os.Getgid(), Failed: a.tell})
	must(t, err)
	vm := bare.Start(t, dir, "api")
	must(t, load(vm, state, "m"))
	must(t, os.Truncate(memory, tinyguest.DirtyBase))
	_ = vm.Resume(t.Context()) // it may be killed before it answers
	if err := a.await(t); err == nil || session.Err() == nil {
		t.Errorf("alarm: %v, %v", err, session.Err())
	}
	vm.AwaitEnd(t)
}

// In a jail the VMM is another user in another root, and is served and guarded all the same.
func TestReal_Jailed(t *testing.T) {
	const uid = 1_900_000_001
	state, memory := realSnapshot(t, tinyguest.Guest{Then: tinyguest.Count}, 64, func(vm *bare.VM) bool {
		return len(vm.Counts()) > 3
	})
	s := newServer(t)
	var session *uffd.Session
	vm := bare.StartJailed(t, t.TempDir(), uid, func(root string) {
		data, err := os.ReadFile(state)
		must(t, err)
		must(t, os.WriteFile(filepath.Join(root, "state"), data, 0o600))
		must(t, os.Chmod(filepath.Join(root, "state"), 0o444)) //nolint:gosec // another user reads it
		session, err = s.Listen(
			uffd.Options{Socket: filepath.Join(root, "memory.socket"), Memory: memory, UID: uid, GID: uid})
		must(t, err)
	})
	must(t, load(vm, "state", "memory.socket"))
	must(t, vm.Resume(t.Context()))
	vm.Await(t, "the guest's count", func() bool { return len(vm.Counts()) > 3 })
	if first := slices.Min(vm.Counts()); first < 3 || !session.Stats().Guarded {
		t.Errorf("the guest goes on at %d, %+v", first, session.Stats())
	}
	must(t, session.Close())
	vm.AwaitEnd(t)
}

// hugePages wants the host's kernel to have free pages of 2 MiB, as the lab's has.
func hugePages(t *testing.T, pages int) {
	t.Helper()
	requireUFFD(t)
	data, err := os.ReadFile("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
	if err != nil {
		t.Skipf("no pages of 2 MiB: %v", err)
	}
	var free int
	if _, err := fmt.Sscan(string(data), &free); err != nil || free < pages {
		t.Skipf("%d free pages of 2 MiB, of %d needed", free, pages)
	}
}

// A real guest with memory of 2 MiB pages, whose snapshots can be restored in no other way.
func TestLinuxHuge_Real(t *testing.T) {
	const pages, mib = 4000, 64
	hugePages(t, mib/2)
	requireUFFD(t)
	dir := t.TempDir()
	vm := bare.Start(t, dir, "api")
	vm.Boot(t, tinyguest.Guest{Pages: pages, Then: tinyguest.Sweep},
		firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: mib, HugePages: firecracker.HugePages2M})
	dots := func(vm *bare.VM) bool {
		return strings.Count(vm.Output(), ".") > 1 || strings.Contains(vm.Output(), "!")
	}
	vm.Await(t, "the guest", func() bool { return dots(vm) })
	vm.Save(t, "state", "memory")
	must(t, vm.Process.Kill())
	vm.AwaitEnd(t)

	s := newServer(t)
	to := t.TempDir()
	session, err := s.Listen(
		uffd.Options{
			Socket: filepath.Join(to, "m"), Memory: filepath.Join(dir, "memory"), UID: os.Getuid(),
			GID: os.Getgid(),
		})
	must(t, err)
	other := bare.Start(t, to, "api")
	must(t, load(other, filepath.Join(dir, "state"), "m"))
	must(t, other.Resume(t.Context()))
	other.Await(t, "the guest's sweep", func() bool { return dots(other) })
	if strings.Contains(other.Output(), "!") {
		t.Errorf("the guest found other memory than it had: %q", other.Output())
	}
	must(t, session.Close())
	other.AwaitEnd(t)
	st := session.Stats()
	t.Logf("%+v", st)
	if st.PageSize != 2<<20 || st.Faults < pages*page>>21 || st.Copied > mib/2 {
		t.Errorf("%+v", st)
	}
}

// Huge pages that are given back are zeros, though the kernel has no call for that.
func TestLinuxHuge_Removed(t *testing.T) {
	hugePages(t, 16) // Linux 6.1 does not give those that were dropped back to the mapping that had them
	s := newServer(t)
	dir := t.TempDir()
	memory := filepath.Join(dir, "memory")
	must(t, os.WriteFile(memory, bytes.Repeat([]byte("x"), 8<<20), 0o600))
	session, vm, a := serve(t, s, uffd.Options{Socket: filepath.Join(dir, "s"), Memory: memory}, "huge")
	defer func() { a.silent(t) }()
	vm.want("connected")
	vm.ask(strings.Repeat("x", 20), "read 600")
	vm.ask("dropped <nil>", "drop 512 1024")
	vm.ask("", "read 600")
	vm.ask("", "read 1030")
	vm.ask(strings.Repeat("x", 20), "read 1600")
	must(t, session.Close())
	if st := session.Stats(); st.Zeroed != 2 || st.Removed != 2 || st.Faults != 4 {
		t.Errorf("%+v", st)
	}
}
