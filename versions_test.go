package smartvm_test

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/store"
)

// appendNewer adds to a journal what only a newer smartvm knows. The returned function takes it
// away.
func appendNewer(t *testing.T, path string) (undo func()) {
	t.Helper()
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	body := `{"kind":"tunnel","effect":{"name":"x"}}`
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = fmt.Fprintf(f, "%08x %s\n", crc32.ChecksumIEEE([]byte(body)), body)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Truncate(path, int64(len(before))); err != nil {
			t.Error(err)
		}
	}
}

// wantRefused wants that an operation on a VM was left to a newer smartvm.
func wantRefused(t *testing.T, op string, m *smartvm.Machine, err error) {
	t.Helper()
	if !errors.Is(err, smartvm.ErrNotSupported) || !strings.Contains(err.Error(), m.ID()) {
		t.Errorf("%s: %v, want ErrNotSupported of VM %s", op, err, m.ID())
	}
}

// A VM with an effect that only a newer smartvm can undo is left alone as a whole: it is not ended,
// adopted, removed or started again. All others are looked after.
func TestHost_NewerJournal(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h, other := s.open(), s.open()
	ours, newer := s.started(h, s.spec("idle")), s.started(h, s.spec("idle"))
	undo := appendNewer(t, filepath.Join(newer.RuntimeDir(), store.RunJournal))
	seen, err := other.Machine(t.Context(), newer.ID())
	if err != nil {
		t.Fatal(err)
	}
	_, err = seen.Stop(t.Context(), smartvm.StopOptions{})
	wantRefused(t, "stop", newer, err)
	wantRefused(t, "stop all", newer, other.StopAll(t.Context(), smartvm.StopOptions{}))
	wantState(t, ours, smartvm.Stopped)
	wantState(t, newer, smartvm.Running)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = seen.Stop(t.Context(), smartvm.StopOptions{})
	wantRefused(t, "stop unsupervised", newer, err)
	report, err := other.Recover(t.Context())
	wantRefused(t, "recover", newer, err)
	if len(report.Adopted)+len(report.Recovered)+len(report.Removed) > 0 {
		t.Errorf("recovered %+v, want nothing", report)
	}
	wantState(t, seen, smartvm.Running)
	undo()
	if report, err := other.Recover(t.Context()); err != nil || len(report.Adopted) != 1 {
		t.Errorf("recovered %+v, %v, want that it is adopted", report, err)
	}
	if _, err := seen.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	undo = appendNewer(t, filepath.Join(newer.RuntimeDir(), store.CreateJournal))
	wantRefused(t, "start", newer, seen.Start(t.Context()))
	wantRefused(t, "remove", newer, seen.Remove(t.Context()))
	if _, err := other.Machine(t.Context(), newer.ID()); err != nil {
		t.Errorf("%v, want that it is still there", err)
	}
	undo()
	for _, id := range []string{ours.ID(), newer.ID()} {
		m, err := other.Machine(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		s.stopAndRemove(m)
	}
}
