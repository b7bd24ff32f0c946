package snapshot

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"push.rocks/smartvm/internal/sealed"
)

func TestParseCPU(t *testing.T) {
	for name, c := range map[string]struct{ text, vendor, model string }{
		"x86": {"processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon: 2\n\nvendor_id\t: other\n", "GenuineIntel", "Xeon: 2 (family 6, model 85)"},
		"ARM": {
			"processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n", "0x41",
			"part 0xd0c variant 0x3",
		},
		"Odd": {"nothing of the kind", "", ""},
	} {
		if vendor, model := parseCPU([]byte(c.text)); vendor != c.vendor || model != c.model {
			t.Errorf("%s: %q, %q", name, vendor, model)
		}
	}
}

func TestParseHugePages(t *testing.T) {
	const text = "MemTotal:  1 kB\nHugePages_Total:   20\nHugePages_Free:    10\nHugePages_Rsvd:    3\nHugepagesize:       2048 kB\n"
	if got := parseHugePages([]byte(text)); got != 14 {
		t.Errorf("%d MiB, want 14", got)
	}
	if got := parseHugePages([]byte("HugePages_Free: 1\nHugepagesize: 1048576 kB\n")); got != 0 {
		t.Errorf("%d MiB of pages of another size", got)
	}
}

// What is taken for a manifest is a safe one, and the same when written and read again.
func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(
		`{"version":1,"id":"a","created":"2026-01-02T03:04:05Z","firecracker":"1.12.1","arch":"amd64","memSizeMib":1,"pausedNs":0,` +
			`"ephemeral":true,"files":{"state":{"size":1},"memory":{"size":1048576},"drives/a":{"size":7}},"machine":{ "a": [1] }}`))
	f.Add([]byte(`{"version":1,"files":{"../x":{"size":1}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseManifest(sealed.Seal(data))
		if err != nil {
			return
		}
		for name, file := range m.Files {
			if !filepath.IsLocal(name) || filepath.Clean(name) != name || file.Size < 0 || file.Size > maxFileSize {
				t.Errorf("file %q of %d bytes", name, file.Size)
			}
		}
		if m.ID != filepath.Base(m.ID) || m.ID[0] == '.' {
			t.Errorf("id %q", m.ID)
		}
		text, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseManifest(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if other, err := again.encode(); err != nil || !bytes.Equal(text, other) {
			t.Errorf("%s became %s, %v", text, other, err)
		}
	})
}

// Whatever an archive holds, an import gives a whole snapshot or nothing, and writes nowhere else.
func FuzzImport(f *testing.F) {
	memory := make([]byte, 1<<20)
	state := []byte("what a VMM writes")
	dir := f.TempDir()
	for name, data := range map[string][]byte{"memory": memory, "state": state} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(fuzzTar(f, dir, nil))
	f.Add(fuzzTar(f, dir, []byte("tail")))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		s, err := Open(filepath.Join(dir, "s"))
		if err != nil {
			t.Fatal(err)
		}
		sn, err := s.importTar(t.Context(), bytes.NewReader(data), ImportOptions{})
		all, lerr := s.List()
		if lerr != nil || (err == nil) != (len(all) == 1) {
			t.Errorf("%v, and there are %v, %v", err, all, lerr)
		}
		if err == nil {
			if err := sn.Verify(t.Context(), nil); err != nil {
				t.Error(err)
			}
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("there are %v, %v", entries, err)
		}
		if entries, err := os.ReadDir(s.temp("")); err != nil || len(entries) != 0 {
			t.Errorf("left: %v, %v", entries, err)
		}
	})
}

// fuzzTar is an archive, not compressed, of a snapshot of the files in dir.
func fuzzTar(f *testing.F, dir string, tail []byte) []byte {
	s, err := Open(filepath.Join(f.TempDir(), "s"))
	if err != nil {
		f.Fatal(err)
	}
	d, err := s.Begin(f.Context())
	if err != nil {
		f.Fatal(err)
	}
	if err := os.CopyFS(d.Path(), os.DirFS(dir)); err != nil {
		f.Fatal(err)
	}
	sn, err := d.Commit(f.Context(), Manifest{Firecracker: "1.16.0", MemSizeMiB: 1}, nil)
	if err != nil {
		f.Fatal(err)
	}
	var b bytes.Buffer
	if err := sn.writeTar(f.Context(), tar.NewWriter(&b), nil); err != nil {
		f.Fatal(err)
	}
	return append(b.Bytes(), tail...)
}
