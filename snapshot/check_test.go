package snapshot_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"push.rocks/smartvm/internal/sealed"
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
		"StateTruncated": {"state", func(t *testing.T, path string) { rewrite(t, path, cut) }},
		"StateFlipped":   {"state", func(t *testing.T, path string) { rewrite(t, path, flip(30)) }},
		"StateForeign": {"state", func(t *testing.T, path string) {
			rewrite(t, path, func([]byte) []byte { return make([]byte, len(testState)) })
		}},
		"StateMissing":    {"state", func(t *testing.T, path string) { must(t, os.Remove(path)) }},
		"MemoryTruncated": {"memory", func(t *testing.T, path string) { rewrite(t, path, cut) }},
		"MemoryLonger":    {"memory", func(t *testing.T, path string) { rewrite(t, path, more) }},
		"MemoryFlipped":   {"memory", func(t *testing.T, path string) { rewrite(t, path, flip(1<<20)) }},
		"MemoryLastBit":   {"memory", func(t *testing.T, path string) { rewrite(t, path, flip(-1)) }},
		"MemoryLink": {"memory", func(t *testing.T, path string) {
			must(t, errors.Join(os.Rename(path, path+"2"), os.Symlink(path+"2", path)))
		}},
		"MemoryDirectory": {"memory", func(t *testing.T, path string) {
			must(t, errors.Join(os.Remove(path), os.Mkdir(path, 0o700)))
		}},
		"DriveFlipped": {"drives/scratch_1", func(t *testing.T, path string) { rewrite(t, path, flip(7<<20)) }},
		"DrivesMissing": {"drives/scratch_1", func(t *testing.T, path string) {
			must(t, os.RemoveAll(filepath.Dir(path)))
		}},
		"ManifestMissing": {"manifest.json", func(t *testing.T, path string) { must(t, os.Remove(path)) }},
		"ManifestCut": {"manifest.json", func(t *testing.T, path string) {
			rewrite(t, path, func(b []byte) []byte { return b[:len(b)/2] })
		}},
		"ManifestEmpty": {"manifest.json", func(t *testing.T, path string) {
			rewrite(t, path, func([]byte) []byte { return nil })
		}},
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

// The state is read before each use, also where its stamp is the same and where no other file has a
// digest.
func TestCheck_State(t *testing.T) {
	for name, ephemeral := range map[string]bool{"kept": false, "ephemeral": true} {
		t.Run(name, func(t *testing.T) {
			m := manifest("")
			m.Ephemeral = ephemeral
			sn, err := draft(t, open(t)).Commit(t.Context(), m, nil)
			must(t, err)
			must(t, sn.Check(t.Context()))
			path := sn.Path(snapshot.StateFile)
			fi, err := os.Stat(path)
			must(t, err)
			rewrite(t, path, flip(0))
			must(t, os.Chtimes(path, fi.ModTime(), fi.ModTime()))
			wantDamage(t, "changed", sn.Check(t.Context()), snapshot.StateFile)
			rewrite(t, path, flip(0))
			must(t, sn.Check(t.Context()))
		})
	}
}

// An ephemeral snapshot of before states had digests has stamps alone, and is used as ever.
func TestCheck_EphemeralOfOld(t *testing.T) {
	m := manifest("")
	m.Ephemeral = true
	s := open(t)
	sn, err := draft(t, s).Commit(t.Context(), m, nil)
	must(t, err)
	digest := `,"digest":"` + sn.Files[snapshot.StateFile].Digest + `"`
	rewrite(t, filepath.Join(sn.Dir(), "manifest.json"), func(b []byte) []byte {
		body, _, _ := bytes.Cut(bytes.Replace(b, []byte(digest), nil, 1), []byte(`,"sum":"`))
		return sealed.Seal(append(body, '}'))
	})
	old, err := s.Get(sn.ID)
	must(t, err)
	if f := old.Files[snapshot.StateFile]; f.Digest != "" || f.Size == 0 {
		t.Fatalf("the state is %+v, want a size and no digest", f)
	}
	must(t, old.Check(t.Context()))
	rewrite(t, old.Path(snapshot.StateFile), flip(0))
	wantDamage(t, "changed", old.Check(t.Context()), snapshot.StateFile)
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
