package snapshot_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"push.rocks/smartvm/snapshot"
)

// Whatever happens to a file, Check says which and what.
func TestCheck_Damage(t *testing.T) {
	cut := func(b []byte) []byte { return b[:len(b)-1] }
	more := func(b []byte) []byte { return append(b, 0) }
	for name, c := range map[string]struct {
		file   string
		damage func(t *testing.T, path string)
	}{
		"StateTruncated":   {"state", func(t *testing.T, path string) { rewrite(t, path, cut) }},
		"StateFlipped":     {"state", func(t *testing.T, path string) { rewrite(t, path, flip(30)) }},
		"StateForeign":     {"state", func(t *testing.T, path string) { rewrite(t, path, func([]byte) []byte { return make([]byte, 41) }) }},
		"StateOther":       {"state", func(t *testing.T, path string) { rewrite(t, path, func([]byte) []byte { return state("6.0.1") }) }},
		"StateOfOtherArch": {"state", func(t *testing.T, path string) { rewrite(t, path, func([]byte) []byte { return armState() }) }},
		"StateMissing":     {"state", func(t *testing.T, path string) { must(t, os.Remove(path)) }},
		"MemoryTruncated":  {"memory", func(t *testing.T, path string) { rewrite(t, path, cut) }},
		"MemoryLonger":     {"memory", func(t *testing.T, path string) { rewrite(t, path, more) }},
		"MemoryFlipped":    {"memory", func(t *testing.T, path string) { rewrite(t, path, flip(1<<20)) }},
		"MemoryLastBit":    {"memory", func(t *testing.T, path string) { rewrite(t, path, flip(-1)) }},
		"MemoryLink": {"memory", func(t *testing.T, path string) {
			must(t, errors.Join(os.Rename(path, path+"2"), os.Symlink(path+"2", path)))
		}},
		"MemoryDirectory": {"memory", func(t *testing.T, path string) { must(t, errors.Join(os.Remove(path), os.Mkdir(path, 0o700))) }},
		"DriveFlipped":    {"drives/scratch_1", func(t *testing.T, path string) { rewrite(t, path, flip(7<<20)) }},
		"DrivesMissing":   {"drives/scratch_1", func(t *testing.T, path string) { must(t, os.RemoveAll(filepath.Dir(path))) }},
		"ManifestMissing": {"manifest.json", func(t *testing.T, path string) { must(t, os.Remove(path)) }},
		"ManifestCut":     {"manifest.json", func(t *testing.T, path string) { rewrite(t, path, func(b []byte) []byte { return b[:len(b)/2] }) }},
		"ManifestEmpty":   {"manifest.json", func(t *testing.T, path string) { rewrite(t, path, func([]byte) []byte { return nil }) }},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			sn := commit(t, s, "base")
			must(t, sn.Check(t.Context()))
			c.damage(t, sn.Path(c.file))
			wantDamage(t, "check", sn.Check(t.Context()), c.file)
			wantDamage(t, "check again", sn.Check(t.Context()), c.file)
			wantDamage(t, "verify", sn.Verify(t.Context(), nil), c.file)
			must(t, s.Remove(t.Context(), sn.ID, false))
			wantIDs(t, s)
		})
	}
}

func armState() []byte {
	b := state(testFormat)
	b = b[:len(b)-8]
	copy(b, []byte{0, 0, 0xaa, 0xaa, 0x84, 0x19, 0x10, 0x07})
	return seal(b)
}

// A file whose stamp is unknown or another is read once, not each time.
func TestCheck_Stamps(t *testing.T) {
	s := open(t)
	sn := commit(t, s, "")
	memory := sn.Path(snapshot.MemoryFile)
	// The bits are other ones, but the stamp is the same: that is what Verify is for.
	fi, err := os.Stat(memory)
	must(t, err)
	must(t, os.Chmod(memory, 0o600))
	f, err := os.OpenFile(memory, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte{1}, 0)
	must(t, errors.Join(err, f.Close(), os.Chtimes(memory, fi.ModTime(), fi.ModTime())))
	must(t, sn.Check(t.Context()))
	wantDamage(t, "verify", sn.Verify(t.Context(), nil), snapshot.MemoryFile)
	// Without the stamps all is read.
	must(t, os.Remove(filepath.Join(sn.Dir(), "seen.json")))
	wantDamage(t, "without stamps", sn.Check(t.Context()), snapshot.MemoryFile)
}

// A copy has other inodes and times, and is whole.
func TestCheck_Copied(t *testing.T) {
	sn := commit(t, open(t), "")
	dir := filepath.Join(t.TempDir(), "copy")
	must(t, os.CopyFS(filepath.Join(dir, sn.ID), os.DirFS(sn.Dir())))
	must(t, os.Chmod(dir, 0o700))
	got, err := openAt(t, dir).Get(sn.ID)
	must(t, err)
	must(t, got.Check(t.Context()))
	// Now its stamps are known, and other bits under the same stamp are not looked for.
	before, err := os.ReadFile(filepath.Join(got.Dir(), "seen.json"))
	must(t, err)
	must(t, got.Check(t.Context()))
	after, err := os.ReadFile(filepath.Join(got.Dir(), "seen.json"))
	must(t, err)
	if string(before) != string(after) {
		t.Errorf("stamps were %s, are %s", before, after)
	}
	orig, err := os.ReadFile(filepath.Join(sn.Dir(), "seen.json"))
	must(t, err)
	if string(before) == string(orig) {
		t.Error("the copy has the stamps of what it was copied from")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
