package vmm_test

import (
	"errors"
	"io"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/status"
)

func TestOpenInput(t *testing.T) {
	dir := t.TempDir()
	if _, err := vmm.OpenInput(dir); !errors.Is(err, status.ErrState) ||
		!strings.Contains(err.Error(), "started without") {
		t.Errorf("of a run without: %v, want ErrState", err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, store.InputFIFO), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := vmm.OpenInput(dir); !errors.Is(err, status.ErrState) || !strings.Contains(err.Error(), "ended") {
		t.Errorf("of a run whose VMM has ended: %v, want ErrState", err)
	}
}

// What a VMM does not read is bounded, and no writer waits for it for ever.
func TestInput_Unread(t *testing.T) {
	s := newStand(t, forever)
	s.start(t)
	s.up(t)
	in, err := vmm.OpenInput(s.config.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	text := strings.Repeat("x", 10_000)
	if n, err := io.WriteString(in, text); n != 4096 || !errors.Is(err, status.ErrUnread) {
		t.Errorf("wrote %d of %d bytes, %v, want 4096 and ErrUnread", n, len(text), err)
	}
}
