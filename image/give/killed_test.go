package give_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/give"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/testenv/killat"
)

// saveVariable has a copy of this test binary save an image.
const saveVariable = "SMARTVM_TEST_SAVE"

// TestSave_Killed kills a process that saves an image before each change that it makes to the file
// system: its file is what it was or all of the archive, and the next one gets through.
func TestSave_Killed(t *testing.T) {
	if config := os.Getenv(saveVariable); config != "" {
		dir, path, _ := strings.Cut(config, "\n")
		s := open(t, func(o *image.Options) { o.Dir = dir })
		if err := atomicfile.Fill(path, 0o600, func(f *os.File) error {
			return give.Save(t.Context(), s, "app", f)
		}); err != nil {
			t.Fatal(err)
		}
		return
	}
	dir := filepath.Join(t.TempDir(), "images")
	s := open(t, func(o *image.Options) { o.Dir = dir })
	pull(t, s, layout(t, 3), "app") // its layers come from the layout each time
	want := save(t, s, "app")
	for what, old := range map[string][]byte{"a new file": nil, "an old file": []byte("old")} {
		t.Run(what, func(t *testing.T) {
			out := t.TempDir()
			path := filepath.Join(out, "app.tar")
			killed := 0
			for n := 1; ; n++ {
				if old == nil {
					if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
						t.Fatal(err)
					}
				} else if err := os.WriteFile(path, old, 0o600); err != nil {
					t.Fatal(err)
				}
				cmd := exec.Command(os.Args[0],
					"-test.run=^TestSave_Killed$") //nolint:noctx // killed or ended when it has been run
				cmd.Env = append(os.Environ(), saveVariable+"="+dir+"\n"+path, "TMPDIR="+t.TempDir(), "GORACE=atexit_sleep_ms=0")
				ended, err := killat.Run(cmd, n)
				if err != nil {
					t.Fatalf("change %d: ended %v, %v", n, ended, err)
				}
				got, err := os.ReadFile(path)
				if whole := bytes.Equal(got, want); !whole && (ended || !bytes.Equal(got, old) || old == nil && err == nil) {
					t.Fatalf("killed before change %d: %d bytes, %v", n, len(got), err)
				}
				// The next death is at the next change, not among those that clean up after this one.
				if _, err := s.Prune(t.Context(), image.PruneOptions{}); err != nil {
					t.Fatal(err)
				}
				if left, err := filepath.Glob(filepath.Join(dir, "tmp", "*")); err != nil || len(left) > 0 {
					t.Errorf("killed before change %d: %q is left, %v", n, left, err)
				}
				if ended {
					break
				}
				killed++
			}
			if killed < 10 {
				t.Errorf("there were %d changes only", killed)
			}
			if left, err := filepath.Glob(filepath.Join(out, "*")); err != nil || len(left) != 1 {
				t.Errorf("%q is left, %v", left, err)
			}
			if err := s.Verify(t.Context(), "app"); err != nil {
				t.Error(err)
			}
			t.Logf("killed before each of %d changes", killed)
		})
	}
}
