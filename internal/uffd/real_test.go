package uffd_test

import (
	"context"
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
		SnapshotPath: state, MemBackend: &firecracker.MemBackend{BackendType: firecracker.MemBackendUffd, BackendPath: socket},
	})
}

func TestReal_GoesOn(t *testing.T) {
	state, memory := realSnapshot(t, tinyguest.Guest{Then: tinyguest.Count}, 128, func(vm *bare.VM) bool { return len(vm.Counts()) > 5 })
	dir := t.TempDir()
	testenv.NoLeaks(t)
	s := uffd.NewServer(nil)
	for range 2 {
		a := make(alarm, 1)
		vm := bare.Start(t, dir, "api")
		must(t, os.RemoveAll(filepath.Join(dir, "memory.socket")))
		session, err := s.Listen(uffd.Options{Socket: filepath.Join(dir, "memory.socket"), Memory: memory, UID: os.Getuid(), GID: os.Getgid(), Failed: a.tell})
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

// A guest that touches 16,000 pages waits at least ten times less often when they were recorded once.
func TestReal_RecordedSet(t *testing.T) {
	const pages = 16_000
	dots := func(vm *bare.VM) bool { return strings.Count(vm.Output(), ".") > 1 }
	state, memory := realSnapshot(t, tinyguest.Guest{Pages: pages, Then: tinyguest.Sweep}, 256, dots)
	s := newServer(t)
	restore := func(set *uffd.Set) (uffd.Stats, *uffd.Set) {
		dir := t.TempDir()
		vm := bare.Start(t, dir, "api")
		session, err := s.Listen(uffd.Options{Socket: filepath.Join(dir, "m"), Memory: memory, UID: os.Getuid(), GID: os.Getgid(), Prefetch: set})
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
	state, memory := realSnapshot(t, tinyguest.Guest{Then: tinyguest.Count}, 64, func(vm *bare.VM) bool { return len(vm.Counts()) > 1 })
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
	state, memory := realSnapshot(t, tinyguest.Guest{Pages: pages, Then: tinyguest.Sweep}, 128, func(vm *bare.VM) bool { return strings.Contains(vm.Output(), ".") })
	dir := t.TempDir()
	s := newServer(t)
	a := make(alarm, 1)
	session, err := s.Listen(uffd.Options{Socket: filepath.Join(dir, "m"), Memory: memory, UID: os.Getuid(), GID: os.Getgid(), Failed: a.tell})
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
