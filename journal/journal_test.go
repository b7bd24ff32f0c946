package journal_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/spec"
)

// world is the host of these tests: the names that exist, and who made them.
type world struct {
	ours   map[string]bool
	theirs map[string]bool
	log    []string
	fail   map[string]error
}

type thing struct {
	Name string `json:"name"`
	w    *world
}

func (e *thing) Apply(context.Context) error {
	if e.w.theirs[e.Name] {
		return fmt.Errorf("make %s: %w", e.Name, fs.ErrExist)
	}
	e.w.ours[e.Name] = true
	e.w.log = append(e.w.log, "+"+e.Name)
	return e.w.fail["+"+e.Name]
}

func (e *thing) Revert(context.Context) error {
	if err := e.w.fail["-"+e.Name]; err != nil {
		return err
	}
	e.w.log = append(e.w.log, "-"+e.Name)
	delete(e.w.ours, e.Name)
	return nil
}

// program is a thing that others serve.
type program struct{ thing }

func (*program) Barrier() {}

func newWorld() (*world, journal.Kinds) {
	w := &world{ours: map[string]bool{}, theirs: map[string]bool{}, fail: map[string]error{}}
	return w, journal.Kinds{
		"thing":   func() journal.Effect { return &thing{w: w} },
		"program": func() journal.Effect { return &program{thing{w: w}} },
	}
}

func create(t *testing.T, kinds journal.Kinds) (*journal.Journal, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "j")
	j, err := journal.Create(path, kinds, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j, path
}

func do(t *testing.T, j *journal.Journal, w *world, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := j.Do(t.Context(), &thing{Name: n, w: w}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRevertUndoesNewestFirstAfterReopening(t *testing.T) {
	w, kinds := newWorld()
	j, path := create(t, kinds)
	do(t, j, w, "a", "b", "c")
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, err := journal.Open(path, kinds, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"+a", "+b", "+c", "-c", "-b", "-a"}, w.log); diff != "" {
		t.Error(diff)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("journal after Revert: %v, want it gone", err)
	}
}

func TestForeignObjectIsStruckOut(t *testing.T) {
	w, kinds := newWorld()
	w.theirs["b"] = true
	j, path := create(t, kinds)
	do(t, j, w, "a")
	if err := j.Do(t.Context(), &thing{Name: "b", w: w}); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("got %v, want fs.ErrExist", err)
	}
	do(t, j, w, "c")
	j.Close()
	j, err := journal.Open(path, kinds, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(j.Effects()); n != 2 {
		t.Errorf("got %d effects, want 2", n)
	}
	if err := j.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"+a", "+c", "-c", "-a"}, w.log); diff != "" {
		t.Error(diff)
	}
}

func TestRevertGoesOnAndCanBeRepeated(t *testing.T) {
	w, kinds := newWorld()
	j, path := create(t, kinds)
	do(t, j, w, "a", "b", "c")
	boom := errors.New("boom")
	w.fail["-b"] = boom
	if err := j.Revert(t.Context()); !errors.Is(err, boom) {
		t.Fatalf("got %v, want %v", err, boom)
	}
	if diff := cmp.Diff(map[string]bool{"b": true}, w.ours); diff != "" {
		t.Error(diff)
	}
	delete(w.fail, "-b")
	j.Close()
	j, err := journal.Open(path, kinds, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(w.ours) != 0 {
		t.Errorf("left: %v", w.ours)
	}
}

func TestRevertAfterCancel(t *testing.T) {
	w, kinds := newWorld()
	j, _ := create(t, kinds)
	do(t, j, w, "a")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := j.Revert(ctx); err != nil {
		t.Fatal(err)
	}
	if len(w.ours) != 0 {
		t.Errorf("left: %v", w.ours)
	}
}

// Whatever prefix of the file a crash leaves, what reads is a prefix of the effects, and a record
// that was completed is never lost.
func TestTornTail(t *testing.T) {
	w, kinds := newWorld()
	j, path := create(t, kinds)
	do(t, j, w, "a", "b", "c")
	j.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(whole) + 1 {
		torn := filepath.Join(t.TempDir(), "torn")
		if err := os.WriteFile(torn, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := journal.Open(torn, kinds, nil)
		if err != nil {
			t.Fatalf("%d bytes: %v", n, err)
		}
		want := 0
		for _, b := range whole[:n] {
			if b == '\n' {
				want++
			}
		}
		if got := len(j.Effects()); got != want {
			t.Errorf("%d bytes: got %d effects, want %d", n, got, want)
		}
		// What follows a torn record must not be joined to it.
		do(t, j, w, "d")
		j.Close()
		j, err = journal.Open(torn, kinds, nil)
		if err != nil {
			t.Fatalf("%d bytes, then another record: %v", n, err)
		}
		if got := len(j.Effects()); got != want+1 {
			t.Errorf("%d bytes, then another record: got %d effects, want %d", n, got, want+1)
		}
		j.Close()
	}
}

func TestChangedRecordIsRefused(t *testing.T) {
	w, kinds := newWorld()
	j, path := create(t, kinds)
	do(t, j, w, "a", "b")
	j.Close()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[12] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := journal.Open(path, kinds, nil); !errors.Is(err, journal.ErrCorrupt) {
		t.Errorf("got %v, want ErrCorrupt", err)
	}
	if len(w.ours) != 2 {
		t.Errorf("a corrupt journal reverted something: %v", w.log)
	}
}

// What another version of smartvm has written is refused as a whole, as long as the line is as it
// was written: none of the effects is undone, those that are known neither, and the file stays as
// it is.
func TestOtherVersionsAreRefused(t *testing.T) {
	for name, body := range map[string]string{
		"as ever":             "",
		"an unknown kind":     `{"kind":"newer","effect":{"name":"b"}}`,
		"an unknown field":    `{"kind":"thing","effect":{"name":"b","later":1}}`,
		"another type":        `{"kind":"thing","effect":{"name":{"first":"b"}}}`,
		"a field of the line": `{"kind":"thing","effect":{"name":"b"},"later":1}`,
		"a version":           `{"version":7,"what":["is"],"strike":"new"}`,
	} {
		w, kinds := newWorld()
		j, path := create(t, kinds)
		do(t, j, w, "a")
		j.Close()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if body != "" {
			data = fmt.Appendf(data, "%08x %s\n", crc32.ChecksumIEEE([]byte(body)), body)
		}
		data = append(data, "torn"...)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		err = journal.Check(path, kinds)
		if after, readErr := os.ReadFile(path); readErr != nil || !bytes.Equal(after, data) {
			t.Errorf("%s: it is %q now, %v", name, after, readErr)
		}
		j, openErr := journal.Open(path, kinds, nil)
		for _, err := range []error{err, openErr} {
			if body == "" && err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if body != "" &&
				(!errors.Is(err, spec.ErrNotSupported) || errors.Is(err, journal.ErrCorrupt) ||
					!strings.Contains(err.Error(), path)) {
				t.Errorf("%s: %v, want ErrNotSupported of %s", name, err, path)
			}
		}
		if openErr == nil {
			j.Close()
		}
		if len(w.ours) != 1 {
			t.Errorf("%s: something was reverted: %v", name, w.log)
		}
	}
	if err := journal.Check(filepath.Join(t.TempDir(), "none"), nil); err != nil {
		t.Errorf("no journal: %v", err)
	}
}

func TestIntentIsOnDiskBeforeApply(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	w, kinds := newWorld()
	var seen []string
	j, err := journal.Create(path, kinds, func(s journal.Step) {
		data, _ := os.ReadFile(path)
		seen = append(seen, fmt.Sprintf("%s %v", s.Op, len(data) > 0))
	})
	if err != nil {
		t.Fatal(err)
	}
	do(t, j, w, "a")
	if err := j.Revert(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := []string{"append false", "apply true", "applied true", "revert true", "reverted true", "unlink true"}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Error(diff)
	}
}

func FuzzOpen(f *testing.F) {
	w, kinds := newWorld()
	path := filepath.Join(f.TempDir(), "seed")
	j, err := journal.Create(path, kinds, nil)
	if err != nil {
		f.Fatal(err)
	}
	for i := range 3 {
		if err := j.Do(context.Background(), &thing{Name: fmt.Sprint(i), w: w}); err != nil {
			f.Fatal(err)
		}
	}
	seed, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte("00000000 {}\n"))
	f.Add([]byte("\n\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "j")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := journal.Open(path, kinds, nil)
		if err != nil {
			return
		}
		defer j.Close()
		for _, e := range j.Effects() {
			if _, err := json.Marshal(e); err != nil {
				t.Errorf("effect does not marshal: %v", err)
			}
		}
	})
}

// What a program uses is kept until it has ended: by this process, and by the next that reads the
// journal.
func TestRevertStopsAtABarrier(t *testing.T) {
	w, kinds := newWorld()
	j, path := create(t, kinds)
	do(t, j, w, "lease", "directory")
	if err := j.Do(t.Context(), &program{thing{Name: "program", w: w}}); err != nil {
		t.Fatal(err)
	}
	do(t, j, w, "newer", "newest")
	w.log = nil
	lives, stays := errors.New("it lives"), errors.New("it stays")
	w.fail["-program"], w.fail["-newest"] = lives, stays
	if err := j.Revert(t.Context()); !errors.Is(err, lives) || !errors.Is(err, stays) {
		t.Errorf("got %v, want both errors", err)
	}
	// An effect that is no barrier holds up nothing.
	if diff := cmp.Diff([]string{"-newer"}, w.log); diff != "" {
		t.Error(diff)
	}
	j.Close()
	j, err := journal.Open(path, kinds, nil)
	if err != nil {
		t.Fatal(err)
	}
	delete(w.fail, "-program")
	delete(w.fail, "-newest")
	w.log = nil
	if err := j.Revert(t.Context()); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"-newest", "-newer", "-program", "-directory", "-lease"}, w.log); diff != "" {
		t.Error(diff)
	}
}
