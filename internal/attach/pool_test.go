package attach_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/spec"
)

// A warm slot that another version of smartvm has made is not swept away: a VM may be in it. One
// that is half made is, also of the same network.
func TestSweepPools_OtherVersions(t *testing.T) {
	st, err := store.Open(filepath.Join(t.TempDir(), "runtime"))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(st.Path(), store.SlotDir, "default")
	newer, halfMade := filepath.Join(dir, "aaa"), filepath.Join(dir, "zzz")
	record := filepath.Join(newer, "slot.json")
	err = errors.Join(os.MkdirAll(newer, 0o700), os.Mkdir(halfMade, 0o700),
		os.WriteFile(record, []byte(`{"name": "a", "shaped": true}`), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	err = attach.SweepPools(t.Context(), st, nil)
	if !errors.Is(err, spec.ErrNotSupported) || !strings.Contains(err.Error(), record) {
		t.Errorf("%v, want ErrNotSupported of %s", err, record)
	}
	if _, err := os.Stat(record); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(halfMade); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want that it is gone", err)
	}
}
