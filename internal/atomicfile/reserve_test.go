package atomicfile_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/internal/atomicfile"
)

// What was reserved is used up, by what fits; anything else is written as without.
func TestWriteReserved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write := func(text string, inode bool) {
		t.Helper()
		reserved, _ := os.Stat(path + atomicfile.ReservedSuffix)
		if err := atomicfile.WriteReserved(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != text {
			t.Errorf("got %q, %v, want %q", got, err, text)
		}
		if fi, err := os.Stat(path); err != nil || inode && !os.SameFile(fi, reserved) {
			t.Errorf("%q is not in the reserved file", text)
		}
		if all, err := os.ReadDir(filepath.Dir(path)); err != nil || len(all) != 1 {
			t.Errorf("there is %v, %v", all, err)
		}
	}
	write("without room", false)
	for range 2 {
		if err := atomicfile.Reserve(path, 100); err != nil {
			t.Fatal(err)
		}
		write("short", true)
	}
	if err := atomicfile.Reserve(path, 100); err != nil {
		t.Fatal(err)
	}
	write(strings.Repeat("long", 100), false)
}
