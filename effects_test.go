package smartvm_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/cgroup"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/share"
	"push.rocks/smartvm/internal/stage"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/tinyguest"
	"push.rocks/smartvm/internal/vmm"
	"push.rocks/smartvm/journal"
)

// The conformance suite of effects: what package journal expects of one, asked of every kind in
// effects.go.

// effectCase is one kind of effect, on a real object in a directory of the test's own.
type effectCase struct {
	needs []testenv.Capability
	// describe returns a fresh description of the same effect each time.
	describe func(t *testing.T, dir string) journal.Effect
	// there says whether what the effect makes is there.
	there func(e journal.Effect) bool
	// foreign puts in the effect's place what is not its own, and returns what tells that it is
	// untouched. Nil: there can be no such thing.
	foreign func(t *testing.T, e journal.Effect) (untouched func() bool)
	// leaves says that Revert by itself tells a foreign object from its own. Otherwise its place is
	// ours alone, and it is the journal that does not revert what was there before.
	leaves bool
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// foreignFile puts a file at path.
func foreignFile(t *testing.T, path string) (untouched func() bool) {
	t.Helper()
	if err := os.WriteFile(path, []byte("foreign"), 0o600); err != nil {
		t.Fatal(err)
	}
	return func() bool {
		got, err := os.ReadFile(path)
		return err == nil && string(got) == "foreign"
	}
}

// foreignLink puts a symbolic link at path.
func foreignLink(t *testing.T, path string) (untouched func() bool) {
	t.Helper()
	if err := os.Symlink("foreign", path); err != nil {
		t.Fatal(err)
	}
	return func() bool {
		got, err := os.Readlink(path)
		return err == nil && got == "foreign"
	}
}

const jailUser = 1_900_000_002

var effectCases = map[string]effectCase{
	"lease": {
		describe: func(t *testing.T, dir string) journal.Effect {
			st, err := store.Open(filepath.Join(dir, "runtime"))
			if err != nil {
				t.Fatal(err)
			}
			return st.Lease("name", "web", "vm-1")
		},
		there: func(e journal.Effect) bool {
			owner, _ := os.Readlink(filepath.Join(e.(*store.Lease).Dir, "name.web"))
			return owner == "vm-1"
		},
		foreign: func(t *testing.T, e journal.Effect) func() bool {
			return foreignLink(t, filepath.Join(e.(*store.Lease).Dir, "name.web"))
		},
		leaves: true,
	},
	"tree": {
		describe: func(_ *testing.T, dir string) journal.Effect { return &stage.Tree{Path: filepath.Join(dir, "tree")} },
		there:    func(e journal.Effect) bool { return exists(e.(*stage.Tree).Path) },
		foreign:  func(t *testing.T, e journal.Effect) func() bool { return foreignFile(t, e.(*stage.Tree).Path) },
	},
	"content": {
		describe: func(_ *testing.T, dir string) journal.Effect {
			return &stage.Content{Path: filepath.Join(dir, "content"), Text: "text", Size: 4096}
		},
		there:   func(e journal.Effect) bool { return exists(e.(*stage.Content).Path) },
		foreign: func(t *testing.T, e journal.Effect) func() bool { return foreignFile(t, e.(*stage.Content).Path) },
	},
	"share": {
		describe: func(t *testing.T, dir string) journal.Effect {
			source := filepath.Join(dir, "shared")
			if err := errors.Join(os.MkdirAll(source, 0o700),
				os.WriteFile(filepath.Join(source, "f"), []byte("precious"), 0o600)); err != nil {
				t.Fatal(err)
			}
			return &share.Image{
				Path:    filepath.Join(dir, "volumes"),
				Volumes: []smartvm.Volume{{Source: source, Target: "/a"}, {Source: source + "/f", Target: "/b"}},
			}
		},
		there:   func(e journal.Effect) bool { return exists(e.(*share.Image).Path) },
		foreign: func(t *testing.T, e journal.Effect) func() bool { return foreignFile(t, e.(*share.Image).Path) },
	},
	"file": {
		describe: func(t *testing.T, dir string) journal.Effect {
			source := filepath.Join(dir, "source")
			if err := os.WriteFile(source, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			return &stage.File{Source: source, Target: filepath.Join(dir, "target"), UID: -1}
		},
		there:   func(e journal.Effect) bool { return exists(e.(*stage.File).Target) },
		foreign: func(t *testing.T, e journal.Effect) func() bool { return foreignFile(t, e.(*stage.File).Target) },
	},
	"kernel": {
		describe: func(t *testing.T, dir string) journal.Effect {
			source := filepath.Join(dir, "bzImage")
			if err := os.WriteFile(source, bzImage(t, tinyguest.Image(tinyguest.Guest{})), 0o600); err != nil {
				t.Fatal(err)
			}
			return &kernel.Extracted{Source: source, Target: filepath.Join(dir, "vmlinux")}
		},
		there:   func(e journal.Effect) bool { return exists(e.(*kernel.Extracted).Target) },
		foreign: func(t *testing.T, e journal.Effect) func() bool { return foreignFile(t, e.(*kernel.Extracted).Target) },
	},
	"owner": {
		needs: []testenv.Capability{testenv.Root},
		describe: func(t *testing.T, dir string) journal.Effect {
			path := filepath.Join(dir, "drive")
			if !exists(path) {
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			return &stage.Owner{Path: path, UID: jailUser, GID: jailUser, WasUID: 0, WasGID: 0}
		},
		there: func(e journal.Effect) bool {
			fi, err := os.Stat(e.(*stage.Owner).Path)
			return err == nil && fi.Sys().(*syscall.Stat_t).Uid == jailUser
		},
	},
	"link": {
		describe: func(_ *testing.T, dir string) journal.Effect {
			return &stage.Link{Path: filepath.Join(dir, "link"), Target: filepath.Join(dir, "ours")}
		},
		there: func(e journal.Effect) bool {
			to, _ := os.Readlink(e.(*stage.Link).Path)
			return to == e.(*stage.Link).Target
		},
		foreign: func(t *testing.T, e journal.Effect) func() bool { return foreignLink(t, e.(*stage.Link).Path) },
		leaves:  true,
	},
	"cgroup": {
		describe: func(t *testing.T, dir string) journal.Effect {
			parent, err := cgroup.Parent("smartvm-effect-test")
			if err != nil {
				t.Fatal(err)
			}
			if parent == "" {
				t.Skip("no control groups can be made here")
			}
			return &cgroup.Group{Path: filepath.Join(parent, filepath.Base(dir))}
		},
		there: func(e journal.Effect) bool { return exists(e.(*cgroup.Group).Path) },
		foreign: func(t *testing.T, e journal.Effect) func() bool {
			path := e.(*cgroup.Group).Path
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := errors.Join(os.Remove(path), os.Remove(filepath.Dir(path))); err != nil {
					t.Error(err)
				}
			})
			return func() bool { return exists(path) }
		},
	},
	"process": {
		describe: describeProcess,
		there: func(e journal.Effect) bool {
			alive, err := vmm.Attach(e.(*vmm.Process).Dir, e.(*vmm.Process).Cgroup).Alive()
			return err == nil && alive
		},
	},
}

// describeProcess is a program that waits, in the place of a VMM. Its identity is its working
// directory.
func describeProcess(t *testing.T, dir string) journal.Effect {
	t.Helper()
	program, run := filepath.Join(dir, "firecracker"), filepath.Join(dir, "run")
	if !exists(run) {
		err := errors.Join(os.Mkdir(run, 0o700), os.WriteFile(program, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o755))
		if err != nil {
			t.Fatal(err)
		}
	}
	var s vmm.Streams
	for name, to := range map[string]*io.WriteCloser{"console": &s.Console, "log": &s.Log} {
		w, err := logfile.Create(filepath.Join(dir, name), 1<<10)
		if err != nil {
			t.Fatal(err)
		}
		*to = w
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return vmm.New(&vmm.Config{ID: "vm-1", Binary: program, Dir: run, Streams: s})
}

// bzImage wraps a vmlinux as Linux Documentation/arch/x86/boot.rst says.
func bzImage(t *testing.T, vmlinux []byte) []byte {
	t.Helper()
	var payload bytes.Buffer
	z := gzip.NewWriter(&payload)
	if _, err := z.Write(vmlinux); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	const setup = 1024 // one sector of real mode code, and one more
	b := make([]byte, setup)
	b[0x1f1] = 1
	binary.LittleEndian.PutUint16(b[0x1fe:], 0xaa55)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x206:], 0x020f)
	binary.LittleEndian.PutUint16(b[0x236:], 1) // 64-bit
	binary.LittleEndian.PutUint32(b[0x24c:], uint32(payload.Len()))
	return append(b, payload.Bytes()...)
}

// reread returns e as a recovery finds it in a journal.
func reread(t *testing.T, kind string, e journal.Effect) journal.Effect {
	t.Helper()
	text, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	again := smartvm.EffectKinds()[kind]()
	if err := json.Unmarshal(text, again); err != nil {
		t.Fatal(err)
	}
	return again
}

func TestEffects_EachHasACase(t *testing.T) {
	all := smartvm.EffectKinds()
	maps.DeleteFunc(all, func(kind string, _ func() journal.Effect) bool {
		// package network has a suite of its own for these
		return slices.Contains([]string{"use", "tap", "slot", "guest", "bridged"}, kind)
	})
	kinds := slices.Sorted(maps.Keys(all))
	if diff := cmp.Diff(kinds, slices.Sorted(maps.Keys(effectCases))); diff != "" {
		t.Errorf("-effects.go +this suite:\n%s", diff)
	}
}

func eachEffect(t *testing.T, test func(t *testing.T, kind string, tt effectCase, dir string)) {
	for _, kind := range slices.Sorted(maps.Keys(effectCases)) {
		t.Run(kind, func(t *testing.T) {
			tt := effectCases[kind]
			testenv.Require(t, tt.needs...)
			dir := t.TempDir()
			testenv.NoLeaks(t)
			test(t, kind, tt, dir)
		})
	}
}

// Done, done again and undone, by whoever did it and by whoever found it in the journal.
func TestEffects_ApplyAndRevert(t *testing.T) {
	eachEffect(t, func(t *testing.T, kind string, tt effectCase, dir string) {
		ctx := t.Context()
		e := tt.describe(t, dir)
		if got, err := smartvm.EffectKinds().Name(e); err != nil || got != kind {
			t.Fatalf("it is of kind %q, %v", got, err)
		}
		if err := reread(t, kind, e).Revert(ctx); err != nil {
			t.Errorf("revert of what was never applied: %v", err)
		}
		if tt.there(e) {
			t.Fatal("it is there before it is applied")
		}
		for round := range 2 { // what was undone can be done again
			if err := e.Apply(ctx); err != nil {
				t.Fatal(err)
			}
			if !tt.there(e) {
				t.Fatal("applied, it is not there")
			}
			if err := tt.describe(t, dir).Apply(ctx); !errors.Is(err, fs.ErrExist) && (err != nil || kind != "owner") {
				t.Errorf("applied twice: %v, want fs.ErrExist", err)
			}
			if !tt.there(e) {
				t.Error("applied twice, it is gone")
			}
			for range 2 {
				if err := reread(t, kind, e).Revert(ctx); err != nil {
					t.Errorf("revert: %v", err)
				}
				if tt.there(e) {
					t.Error("reverted, it is there")
				}
			}
			if err := e.Revert(ctx); err != nil {
				t.Errorf("revert by the one who applied it: %v", err)
			}
			if kind == "process" && round == 0 { // its directory was for one run
				if err := os.RemoveAll(filepath.Join(dir, "run")); err != nil {
					t.Fatal(err)
				}
				e = tt.describe(t, dir)
			}
		}
	})
}

// What was there before is not taken over and not undone.
func TestEffects_ForeignObject(t *testing.T) {
	eachEffect(t, func(t *testing.T, kind string, tt effectCase, dir string) {
		if tt.foreign == nil {
			t.Skip("there can be none in its place")
		}
		e := tt.describe(t, dir)
		untouched := tt.foreign(t, e)
		path := filepath.Join(dir, "journal")
		j, err := journal.Create(path, smartvm.EffectKinds(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.Do(t.Context(), e); !errors.Is(err, fs.ErrExist) {
			t.Errorf("applied over it: %v, want fs.ErrExist", err)
		}
		if err := j.Close(); err != nil {
			t.Error(err)
		}
		// As after a crash: only what is on disk counts.
		if j, err = journal.Open(path, smartvm.EffectKinds(), nil); err != nil {
			t.Fatal(err)
		}
		if err := j.Revert(t.Context()); err != nil {
			t.Error(err)
		}
		if !untouched() {
			t.Error("the journal's end touched it")
		}
		if tt.leaves {
			if err := reread(t, kind, e).Revert(t.Context()); err != nil {
				t.Error(err)
			}
			if !untouched() {
				t.Error("revert touched it")
			}
		}
	})
}

// A file that was lent and given to somebody else meanwhile stays theirs.
func TestEffects_OwnerMovedOn(t *testing.T) {
	testenv.Require(t, testenv.Root)
	dir := t.TempDir()
	e := effectCases["owner"].describe(t, dir)
	path := e.(*stage.Owner).Path
	if err := errors.Join(e.Apply(t.Context()), os.Chown(path, 7, 7), e.Revert(t.Context())); err != nil {
		t.Fatal(err)
	}
	if got := ownerOf(t, path); got != 7 {
		t.Errorf("it belongs to %d, want 7", got)
	}
}

// What is written to the journal is all of it, and says where the effect is.
func TestEffects_RecordIsEnough(t *testing.T) {
	eachEffect(t, func(t *testing.T, kind string, tt effectCase, dir string) {
		e := tt.describe(t, dir)
		text, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := json.Marshal(reread(t, kind, e)); err != nil || !bytes.Equal(text, again) {
			t.Errorf("%s, %v, want %s", again, err, text)
		}
		if !strings.Contains(string(text), filepath.Base(dir)) {
			t.Errorf("%s does not say where", text)
		}
	})
}

// While it cannot be told that a VMM has ended, what it uses is kept; it is undone once that can be
// told.
func TestEffects_Barriers(t *testing.T) {
	var barriers []string
	for kind, e := range smartvm.EffectKinds() {
		if _, ok := e().(journal.Barrier); ok {
			barriers = append(barriers, kind)
		}
	}
	slices.Sort(barriers)
	if diff := cmp.Diff([]string{"cgroup", "process"}, barriers); diff != "" {
		t.Fatalf("-want +got:\n%s", diff)
	}
	parent, err := cgroup.Parent("smartvm-barrier-test")
	if err != nil {
		t.Fatal(err)
	}
	if parent == "" {
		t.Skip("no control groups can be made here")
	}
	for _, last := range barriers {
		t.Run(last, func(t *testing.T) {
			dir := t.TempDir()
			testenv.NoLeaks(t)
			// Groups are seen by way of a link, and not where it leads elsewhere: as in a container without
			// their hierarchy.
			way := filepath.Join(dir, "groups")
			see := func(to string) {
				t.Helper()
				_ = os.Remove(way)
				if err := os.Symlink(to, way); err != nil {
					t.Fatal(err)
				}
			}
			see(filepath.Dir(parent))
			group := &cgroup.Group{Path: filepath.Join(way, filepath.Base(parent), filepath.Base(filepath.Dir(dir)))}
			lease := effectCases["lease"].describe(t, dir)
			process := describeProcess(t, dir).(*vmm.Process)
			process.Cgroup = group.Path
			done := []journal.Effect{lease, group, process}
			if last == "cgroup" {
				done = done[:2]
			}
			path := filepath.Join(dir, "journal")
			j, err := journal.Create(path, smartvm.EffectKinds(), nil)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range done {
				if err := j.Do(t.Context(), e); err != nil {
					t.Fatal(err)
				}
			}
			again := func() error { // as another process
				if err := j.Close(); err != nil {
					t.Fatal(err)
				}
				if j, err = journal.Open(path, smartvm.EffectKinds(), nil); err != nil {
					t.Fatal(err)
				}
				return j.Revert(t.Context())
			}
			see(dir)
			if err := again(); err == nil || !strings.Contains(err.Error(), "revert "+last) ||
				strings.Count(err.Error(), "revert") > 1 {
				t.Errorf("undone without a look at the group: %v, want an error of %s alone", err, last)
			}
			if !effectCases["lease"].there(lease) {
				t.Error("the lease was given back")
			}
			see(filepath.Dir(parent))
			if last == "process" {
				if alive, err := vmm.Attach(process.Dir, process.Cgroup).Alive(); err != nil || !alive {
					t.Errorf("it lives: %v, %v", alive, err)
				}
			}
			if err := again(); err != nil {
				t.Error(err)
			}
			if effectCases["lease"].there(lease) || exists(group.Path) {
				t.Error("not all was undone")
			}
		})
	}
}
