package snapshot_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/sealed"
	"push.rocks/smartvm/snapshot"
)

func export(t testing.TB, sn *snapshot.Snapshot) []byte {
	t.Helper()
	var b bytes.Buffer
	must(t, sn.Export(t.Context(), &b, nil))
	return b.Bytes()
}

func tempOf(s *snapshot.Store) string { return s.Dir(".tmp") }

func TestArchive_RoundTrip(t *testing.T) {
	sn := commit(t, open(t), "base")
	var done, total int64
	var b bytes.Buffer
	must(t, sn.Export(t.Context(), &b, func(d, of int64) {
		if d < done || d > of {
			t.Errorf("%d of %d bytes, after %d", d, of, done)
		}
		done, total = d, of
	}))
	if want := int64(testMemory + 10<<20 + 7 + 41); total != want {
		t.Errorf("%d bytes in all, want %d", total, want)
	}
	other := open(t)
	got, err := other.Import(t.Context(), bytes.NewReader(b.Bytes()), snapshot.ImportOptions{})
	must(t, err)
	want := sn.Manifest
	want.Imported = true
	if diff := cmp.Diff(want, got.Manifest); diff != "" {
		t.Errorf("-exported +imported:\n%s", diff)
	}
	must(t, got.Verify(t.Context(), nil))
	for name := range sn.Files {
		a, aerr := os.ReadFile(sn.Path(name))
		b, berr := os.ReadFile(got.Path(name))
		if aerr != nil || berr != nil || !bytes.Equal(a, b) {
			t.Errorf("%s is another file: %v, %v", name, aerr, berr)
		}
	}
	if used, err := kept.Usage(got.Dir()); err != nil || used > 1<<20 {
		t.Errorf("the copy takes %d bytes of its disk, %v: holes were not kept", used, err)
	}
	wantEmpty(t, tempOf(other))

	_, err = other.Import(t.Context(), bytes.NewReader(b.Bytes()), snapshot.ImportOptions{Name: "new"})
	wantError(t, "id taken", err, snapshot.ErrExists)
	must(t, other.Remove(t.Context(), "base", false))
	commit(t, other, "base")
	_, err = other.Import(t.Context(), bytes.NewReader(b.Bytes()), snapshot.ImportOptions{})
	wantError(t, "name taken", err, snapshot.ErrExists)
	_, err = other.Import(t.Context(), bytes.NewReader(b.Bytes()), snapshot.ImportOptions{Name: "../new"})
	wantError(t, "bad name", err, snapshot.ErrInvalid)
	got, err = other.Import(t.Context(), bytes.NewReader(b.Bytes()), snapshot.ImportOptions{Name: "new"})
	if err != nil || got.Name != "new" {
		t.Errorf("under another name: %v", err)
	}
	wantEmpty(t, tempOf(other))
}

// An archive of an ephemeral snapshot is one of an ordinary one.
func TestArchive_Ephemeral(t *testing.T) {
	s := open(t)
	m := manifest("")
	m.Ephemeral = true
	sn, err := draft(t, s).Commit(t.Context(), m, nil)
	must(t, err)
	got, err := open(t).Import(t.Context(), bytes.NewReader(export(t, sn)), snapshot.ImportOptions{})
	must(t, err)
	if got.Ephemeral || got.Files["memory"].Digest == "" {
		t.Errorf("imported as %+v", got.Manifest)
	}
}

func TestExport_Refused(t *testing.T) {
	sn := commit(t, open(t), "")
	rewrite(t, sn.Path("memory"), flip(0))
	var b bytes.Buffer
	wantDamage(t, "export", sn.Export(t.Context(), &b, nil), "memory")
	if b.Len() > 0 {
		t.Errorf("wrote %d bytes", b.Len())
	}
	// What was written before a failure is no whole archive.
	sn = commit(t, open(t), "")
	whole := export(t, sn)
	b.Reset()
	ctx, cancel := context.WithCancel(t.Context())
	err := sn.Export(ctx, &b, func(done, _ int64) {
		if done > 1<<20 {
			cancel()
		}
	})
	wantError(t, "canceled", err, context.Canceled)
	if _, err := open(t).Import(t.Context(), &b, snapshot.ImportOptions{}); !errors.Is(err, snapshot.ErrInvalid) {
		t.Errorf("half of it: %v", err)
	}
	wantError(t, "full", sn.Export(t.Context(), &fullDisk{len(whole) / 2}, nil), unix.ENOSPC)
}

type fullDisk struct{ room int }

func (f *fullDisk) Write(p []byte) (int, error) {
	if f.room -= len(p); f.room < 0 {
		return 0, unix.ENOSPC
	}
	return len(p), nil
}

// Cut short or with another bit anywhere, an archive gives nothing, or the very snapshot (a bit may
// mean nothing).
func TestImport_Damaged(t *testing.T) {
	sn := commit(t, open(t), "base")
	whole := export(t, sn)
	s := open(t)
	for i := range 200 {
		data, what := bytes.Clone(whole), "flipped"
		at := i * len(data) / 200
		if i%2 == 0 {
			data, what = data[:at], "cut"
		} else {
			data[at] ^= 1 << (i / 2 % 8)
		}
		got, err := s.Import(t.Context(), bytes.NewReader(data), snapshot.ImportOptions{})
		switch {
		case err == nil && what == "flipped" && cmp.Equal(got.Files, sn.Files):
			must(t, s.Remove(t.Context(), got.ID, false))
		case err == nil || !errors.Is(err, snapshot.ErrInvalid) && !errors.Is(err, snapshot.ErrDamaged):
			t.Errorf("%s at %d of %d: %v", what, at, len(data), err)
		}
		wantIDs(t, s)
	}
	wantEmpty(t, tempOf(s))
}

func TestImport_SourceFails(t *testing.T) {
	whole := export(t, commit(t, open(t), ""))
	s := open(t)
	broken := errors.New("broken wire")
	_, err := s.Import(t.Context(), io.MultiReader(bytes.NewReader(whole[:len(whole)/2]), iotest.ErrReader(broken)),
		snapshot.ImportOptions{})
	wantError(t, "source", err, broken)
	if errors.Is(err, snapshot.ErrInvalid) {
		t.Errorf("%v: the archive is not to blame", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err = s.Import(ctx, bytes.NewReader(whole), snapshot.ImportOptions{Progress: func(int64, int64) { cancel() }})
	wantError(t, "canceled", err, context.Canceled)
	wantIDs(t, s)
	wantEmpty(t, tempOf(s))
}

// entry is one of an archive that is made by hand.
type entry struct {
	header tar.Header
	body   []byte
}

func run(off uint64, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, off)
	return append(binary.BigEndian.AppendUint64(b, uint64(len(data))), data...)
}

// entries are those of an archive of sn, uncompressed.
func entries(t testing.TB, sn *snapshot.Snapshot) []entry {
	t.Helper()
	text, err := json.Marshal(sn.Manifest)
	must(t, err)
	all := []entry{{tar.Header{Name: "manifest.json"}, sealed.Seal(text)}}
	for _, name := range slices.Sorted(maps.Keys(sn.Files)) {
		data, err := os.ReadFile(sn.Path(name))
		must(t, err)
		all = append(all, entry{tar.Header{Name: name}, run(0, data)})
	}
	return all
}

func pack(t testing.TB, all []entry, tail ...byte) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := zstd.NewWriter(&b)
	must(t, err)
	tw := tar.NewWriter(z)
	for _, e := range all {
		e.header.Size, e.header.Mode = int64(len(e.body)), 0o644
		if e.header.Typeflag == 0 {
			e.header.Typeflag = tar.TypeReg
		}
		if e.header.Linkname != "" {
			e.header.Size, e.body = 0, nil
		}
		must(t, tw.WriteHeader(&e.header))
		_, err := tw.Write(e.body)
		must(t, err)
	}
	must(t, tw.Close())
	_, err = z.Write(tail)
	must(t, errors.Join(err, z.Close()))
	return b.Bytes()
}

func TestImport_Hostile(t *testing.T) {
	sn := commit(t, open(t), "base")
	memory, err := os.ReadFile(sn.Path("memory"))
	must(t, err)
	// The manifest is entry 0, the drive 1, memory 2, state 3.
	changeManifest := func(all []entry, from, to string) []entry {
		text := bytes.Replace(all[0].body, []byte(from), []byte(to), 1)
		if bytes.Equal(text, all[0].body) {
			t.Fatalf("%q is not in %s", from, text)
		}
		body, _, _ := bytes.Cut(text, []byte(`,"sum":"`))
		all[0].body = sealed.Seal(append(body, '}'))
		return all
	}
	for name, c := range map[string]struct {
		change func(all []entry) []entry
		want   error
	}{
		"Empty":         {func([]entry) []entry { return nil }, snapshot.ErrInvalid},
		"NoManifest":    {func(all []entry) []entry { return all[1:] }, snapshot.ErrInvalid},
		"ManifestLater": {func(all []entry) []entry { return append(all[1:], all[0]) }, snapshot.ErrInvalid},
		"ManifestAgain": {func(all []entry) []entry { return append(all, all[0]) }, snapshot.ErrInvalid},
		"ManifestLink": {func(all []entry) []entry {
			all[0].header.Typeflag, all[0].header.Linkname = tar.TypeSymlink, "/etc/passwd"
			return all
		}, snapshot.ErrInvalid},
		"ManifestLarge": {func(all []entry) []entry {
			all[0].body = append(all[0].body, bytes.Repeat([]byte(" "), 5<<20)...)
			return all
		}, snapshot.ErrInvalid},
		"ManifestUnknown": {func(all []entry) []entry { return changeManifest(all, `{`, `{"evil":1,`) }, snapshot.ErrInvalid},
		"ManifestVersion": {func(all []entry) []entry {
			return changeManifest(all, `"version":1`, `"version":2`)
		}, snapshot.ErrInvalid},
		"IDPath": {func(all []entry) []entry {
			return changeManifest(all, `"id":"`, `"id":"../`)
		}, snapshot.ErrInvalid},
		"IDHidden": {func(all []entry) []entry {
			return changeManifest(all, `"id":"`, `"id":".`)
		}, snapshot.ErrInvalid},
		"SizeNegative": {func(all []entry) []entry {
			return changeManifest(all, `"size":10485767`, `"size":-1`)
		}, snapshot.ErrInvalid},
		"SizeHuge": {func(all []entry) []entry {
			return changeManifest(all, `"size":10485767`, `"size":9000000000000000000`)
		}, snapshot.ErrInvalid},
		"SizeLie": {func(all []entry) []entry {
			return changeManifest(all, `"size":10485767`, `"size":10485768`)
		}, snapshot.ErrDamaged},
		"SizeLess": {func(all []entry) []entry {
			return changeManifest(all, `"size":10485767`, `"size":10485766`)
		}, snapshot.ErrInvalid},
		"DigestLie": {func(all []entry) []entry {
			return changeManifest(all, `"digest":"`+sn.Files["memory"].Digest, `"digest":"`+sn.Files["state"].Digest)
		}, snapshot.ErrDamaged},
		"DigestNone": {func(all []entry) []entry {
			return changeManifest(all, `,"digest":"`+sn.Files["memory"].Digest+`"`, ``)
		}, snapshot.ErrInvalid},
		"Ephemeral": {func(all []entry) []entry {
			return changeManifest(all, `{`, `{"ephemeral":true,`)
		}, snapshot.ErrInvalid},
		"FileInManifest": {func(all []entry) []entry {
			return changeManifest(all, `"drives/scratch_1"`, `"../../x"`)
		}, snapshot.ErrInvalid},
		"OurFile": {func(all []entry) []entry {
			return changeManifest(all, `"drives/scratch_1"`, `"users/vm"`)
		}, snapshot.ErrInvalid},
		"FileMissing": {func(all []entry) []entry { return all[:3] }, snapshot.ErrInvalid},
		"FileTwice":   {func(all []entry) []entry { return slices.Insert(all, 2, all[1]) }, snapshot.ErrInvalid},
		"FileMore": {func(all []entry) []entry {
			return append(all, entry{tar.Header{Name: "more"}, nil})
		}, snapshot.ErrInvalid},
		"FileOutside":  {func(all []entry) []entry { all[1].header.Name = "../../x"; return all }, snapshot.ErrInvalid},
		"FileAbsolute": {func(all []entry) []entry { all[1].header.Name = "/tmp/x"; return all }, snapshot.ErrInvalid},
		"FileDots": {func(all []entry) []entry {
			all[1].header.Name = "drives/../drives/scratch_1"
			return all
		}, snapshot.ErrInvalid},
		"FileSymlink": {func(all []entry) []entry {
			all[2].header.Typeflag, all[2].header.Linkname = tar.TypeSymlink, "/etc/passwd"
			return all
		}, snapshot.ErrInvalid},
		"FileHardLink": {func(all []entry) []entry {
			all[2].header.Typeflag, all[2].header.Linkname = tar.TypeLink, "state"
			return all
		}, snapshot.ErrInvalid},
		"FileDevice": {func(all []entry) []entry {
			all[2].header.Typeflag, all[2].header.Linkname = tar.TypeBlock, "x"
			return all
		}, snapshot.ErrInvalid},
		"Directory": {func(all []entry) []entry {
			return slices.Insert(all, 1, entry{tar.Header{Name: "drives/", Typeflag: tar.TypeDir, Linkname: "x"}, nil})
		}, snapshot.ErrInvalid},
		"OtherMemory": {func(all []entry) []entry { all[2].body[100] ^= 1; return all }, snapshot.ErrDamaged},
		"OtherState":  {func(all []entry) []entry { all[3].body[40] ^= 1; return all }, snapshot.ErrDamaged},
		"RunOutside":  {func(all []entry) []entry { all[2].body = run(4096, memory); return all }, snapshot.ErrInvalid},
		"RunOverflow": {func(all []entry) []entry { all[2].body = run(1<<64-1, memory); return all }, snapshot.ErrInvalid},
		"RunEmpty": {func(all []entry) []entry {
			all[2].body = append(run(0, nil), run(0, memory)...)
			return all
		}, snapshot.ErrInvalid},
		"RunsOverlap": {func(all []entry) []entry {
			all[2].body = append(run(0, memory[:8192]), run(4096, memory[4096:])...)
			return all
		}, snapshot.ErrInvalid},
		"RunsBackwards": {func(all []entry) []entry {
			all[2].body = append(run(4096, memory[4096:]), run(0, memory[:4096])...)
			return all
		}, snapshot.ErrInvalid},
		"RunCut": {func(all []entry) []entry { all[2].body = all[2].body[:9999]; return all }, snapshot.ErrInvalid},
		"RunHeaderCut": {func(all []entry) []entry {
			all[2].body = append(all[2].body, 1, 2, 3)
			return all
		}, snapshot.ErrInvalid},
		"RunLies": {func(all []entry) []entry {
			binary.BigEndian.PutUint64(all[2].body[8:], 1<<62)
			return all
		}, snapshot.ErrInvalid},
		"RunsMany": {func(all []entry) []entry {
			all[2].body = append(run(0, memory[:10000]), run(10000, memory[10000:])...)
			return all
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := openAt(t, filepath.Join(dir, "snapshots"))
			_, err := s.Import(t.Context(), bytes.NewReader(pack(t, c.change(entries(t, sn)))), snapshot.ImportOptions{})
			if c.want == nil {
				must(t, err)
				return
			}
			wantError(t, "import", err, c.want)
			wantIDs(t, s)
			wantEmpty(t, tempOf(s))
			if found, err := filepath.Glob(dir + "/*"); err != nil || len(found) != 1 {
				t.Errorf("left in the directory above: %q, %v", found, err)
			}
		})
	}
}

func TestImport_Tail(t *testing.T) {
	sn := commit(t, open(t), "base")
	all := entries(t, sn)
	for _, c := range []struct {
		tail []byte
		want error
	}{{make([]byte, 10240), nil}, {[]byte("more"), snapshot.ErrInvalid}, {make([]byte, 2<<20), snapshot.ErrInvalid}} {
		_, err := open(t).Import(t.Context(), bytes.NewReader(pack(t, all, c.tail...)), snapshot.ImportOptions{})
		wantError(t, "tail", err, c.want)
	}
	_, err := open(t).Import(t.Context(), strings.NewReader(string(pack(t, all))+"garbage behind the frame"),
		snapshot.ImportOptions{})
	wantError(t, "behind the frame", err, snapshot.ErrInvalid)
	// What is no zstd, or a window larger than ours.
	for _, text := range []string{"", "not an archive", "\x28\xb5\x2f\xfd\x00\xff"} {
		_, err := open(t).Import(t.Context(), strings.NewReader(text), snapshot.ImportOptions{})
		wantError(t, "foreign", err, snapshot.ErrInvalid)
	}
}
