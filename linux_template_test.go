package smartvm_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"push.rocks/smartvm"
)

// template is a guest that only has to run: it is booted once for each data directory, and tests
// restore it from the snapshot that has this name instead of booting one of their own. It has 128
// MiB.
type template string

const (
	unconnected template = "template"
	onBridge    template = "template-on-bridge"
	inNamespace template = "template-in-namespace"
)

// templates have these interfaces. The hosts of the tests that restore one with an interface are
// jailed, but any host can.
var templates = map[template][]smartvm.NetworkInterface{
	unconnected: nil,
	onBridge:    {{IfaceID: "eth0"}},
	inNamespace: {{IfaceID: "eth0", Namespace: true}},
}

// idle is a command that waits, without ever waking up, for a test to write its exit code to
// /root/over.
const idle = "mkfifo /root/over; read code </root/over; exit $code"

// restoreGuest starts a VM from a template and waits until its guest is ready.
func restoreGuest(t *testing.T, h *smartvm.Host, from template, o smartvm.RestoreOptions) *smartvm.Machine {
	t.Helper()
	if _, err := h.Snapshot(string(from)); errors.Is(err, smartvm.ErrSnapshotNotFound) {
		from.prepare(t, h)
	}
	return startRestored(t, h, string(from), o)
}

// startRestored starts a VM from a snapshot and waits until its guest is ready.
func startRestored(t *testing.T, h *smartvm.Host, snapshot string, o smartvm.RestoreOptions) *smartvm.Machine {
	t.Helper()
	ctx := patient(t)
	m, err := h.Restore(ctx, snapshot, o)
	if err == nil {
		err = m.Start(ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	ready(t, m)
	return m
}

// prepare boots the guest and makes the snapshot. No other process does so at the same time: tests
// that have a host with images take turns, see testenv.NoLeaks.
func (x template) prepare(t *testing.T, h *smartvm.Host) {
	t.Helper()
	m := bootGuest(t, h,
		smartvm.Spec{Image: "minimal", Command: sh(idle), MachineConfig: linuxMachine(128), NetworkInterfaces: templates[x]})
	ask(t, m, "until test -p /root/over; do sleep 0.1; done")
	sn, err := m.Snapshot(patient(t), smartvm.SnapshotOptions{Name: string(x), Stop: true})
	if err != nil || len(sn.Warnings) > 0 {
		t.Fatalf("prepare %s: %v, %+v", x, err, sn)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// removeStrays removes the snapshots of a test that failed, which would fail those after it.
func removeStrays(t *testing.T, h *smartvm.Host) {
	t.Helper()
	if !t.Failed() {
		return
	}
	store, err := h.Snapshots()
	if err != nil {
		t.Error(err)
		return
	}
	all, err := store.List()
	for _, sn := range all {
		if _, ok := templates[template(sn.Name)]; !ok {
			t.Logf("removing snapshot %s: %v, %v", sn.ID, err, h.RemoveSnapshot(context.Background(), sn.ID, true))
		}
	}
}

// checkUsers wants no image to have a user but the templates' snapshots, each of which is of one
// image, and those to have none.
func checkUsers(t *testing.T, h *smartvm.Host) {
	t.Helper()
	var want, got []string
	for name := range templates {
		sn, err := h.Snapshot(string(name))
		if errors.Is(err, smartvm.ErrSnapshotNotFound) {
			continue
		}
		if err != nil {
			t.Error(err)
			continue
		}
		want = append(want, "snapshot-"+sn.ID)
		if users, err := sn.Users(); err != nil || len(users) > 0 {
			t.Errorf("snapshot %s still has users: %v, %v", name, users, err)
		}
	}
	users, err := filepath.Glob(filepath.Join(h.DataDir(), "images/objects/*/users/*"))
	for _, u := range users {
		got = append(got, filepath.Base(u))
	}
	slices.Sort(want)
	slices.Sort(got)
	got = slices.Compact(got) // one says so of the root and of the kernel's modules
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("images have users %v, %v, want %v", users, err, want)
	}
}
