package stage_test

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"push.rocks/smartvm/internal/stage"
)

// What is zero becomes holes, wherever it is, and not a byte changes.
func TestSparse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	want := make([]byte, 4<<20+123)
	for _, at := range []int{0, 1 << 20, 3<<20 - 1, len(want) - 1} {
		want[at] = 1
	}
	if err := os.WriteFile(path, want, 0o600); err != nil {
		t.Fatal(err)
	}
	blocks := func() int64 {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Sys().(*syscall.Stat_t).Blocks * 512
	}
	before := blocks()
	for range 2 { // twice is as once
		if err := stage.Sparse(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		if got := blocks(); got > before/4 {
			t.Errorf("it takes %d bytes, before it were %d", got, before)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("what is in it has changed (%v)", err)
		}
	}
}
