package snapshot_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/snapshot"
)

// stalled takes what is written only when it is told to. It says when somebody waits for that.
type stalled struct {
	waits, goOn chan struct{}
	to          bytes.Buffer
	began       bool
}

func newStalled() *stalled { return &stalled{waits: make(chan struct{}), goOn: make(chan struct{})} }

func (w *stalled) Write(p []byte) (int, error) {
	if !w.began {
		w.began = true
		close(w.waits)
	}
	<-w.goOn
	return w.to.Write(p)
}

// Whoever reads an export may take his time: nobody waits for him, and the snapshot stays as long.
func TestExport_Stalled(t *testing.T) {
	s := open(t)
	sn, unrelated := commit(t, s, "base"), commit(t, s, "unrelated")
	w, ended := newStalled(), make(chan error, 1)
	go func() { ended <- sn.Export(t.Context(), w, nil) }()
	<-w.waits
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	other := openAt(t, filepath.Dir(sn.Dir())) // as in another process
	other.Waiting = func(what string) { t.Errorf("waits for %s", what) }
	err := other.Remove(ctx, "base", false)
	wantError(t, "remove", err, snapshot.ErrInUse)
	advice, ok := errors.AsType[interface {
		error
		Hint() string
	}](err)
	if !ok || !strings.Contains(err.Error(), "in use by an export") || !strings.Contains(advice.Hint(), "export") {
		t.Errorf("remove: %v, no word of the export", err)
	}
	vm := use(t, sn, "vm")
	if err := other.Remove(ctx, "base", false); err == nil ||
		!strings.Contains(err.Error(), "an export and by 1 VMs, one in "+vm) {
		t.Errorf("remove: %v", err)
	}
	removed, err := other.Prune(ctx, nil)
	must(t, err)
	if len(removed) != 1 || removed[0] != unrelated.ID {
		t.Errorf("pruned %q, want %s", removed, unrelated.ID)
	}
	_, err = other.Sweep(ctx)
	must(t, err)
	more := commit(t, other, "more")
	must(t, more.Verify(t.Context(), nil))
	second := newStalled() // so may others read it
	close(second.goOn)
	must(t, sn.Export(t.Context(), second, nil))
	must(t, other.Remove(ctx, "more", false))
	close(w.goOn)
	must(t, <-ended)
	if !bytes.Equal(w.to.Bytes(), second.to.Bytes()) {
		t.Error("two exports differ")
	}
	_, err = open(t).Import(t.Context(), &w.to, snapshot.ImportOptions{})
	must(t, err)
	err = other.Remove(ctx, "base", false) // but for the VM
	if err == nil || strings.Contains(err.Error(), "export") {
		t.Errorf("remove: %v", err)
	}
}

// One that is removed by force meanwhile is no whole archive, and its reader hears so.
func TestExport_Removed(t *testing.T) {
	s := open(t)
	d := draft(t, s)
	noise := make([]byte, testMemory) // of which nothing is held back by the compression
	_, _ = rand.Read(noise)
	must(t, os.WriteFile(filepath.Join(d.Path(), snapshot.MemoryFile), noise, 0o600))
	sn, err := d.Commit(t.Context(), manifest("base"), nil)
	must(t, err)
	w, ended := newStalled(), make(chan error, 1)
	go func() { ended <- sn.Export(t.Context(), w, nil) }()
	<-w.waits
	must(t, s.Remove(t.Context(), "base", true))
	wantIDs(t, s)
	close(w.goOn)
	wantError(t, "export", <-ended, snapshot.ErrNotFound)
	if _, err := open(t).Import(t.Context(), &w.to, snapshot.ImportOptions{}); !errors.Is(err, snapshot.ErrInvalid) {
		t.Errorf("what was written: %v", err)
	}
	wantError(t, "export again", sn.Export(t.Context(), io.Discard, nil), snapshot.ErrNotFound)
	wantEmpty(t, tempOf(s))
}

// Who exports and dies keeps nothing.
func TestExport_Killed(t *testing.T) {
	s := open(t)
	sn := commit(t, s, "base")
	cmd := program(testenv.PlainBinary(t), "export", filepath.Dir(sn.Dir()))
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	_, err = out.Read(make([]byte, 1))
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	wantError(t, "remove", s.Remove(ctx, "base", false), snapshot.ErrInUse)
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	must(t, s.Remove(t.Context(), "base", false))
	wantIDs(t, s)
}
