package flatten_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// ent is an entry of a test's tar.
type ent struct {
	tar.Header
	body string
}

func file(name, body string) ent {
	return ent{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}, body}
}

func dir(name string, mode int64) ent {
	return ent{tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, ""}
}

func symlink(name, to string) ent {
	return ent{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}, ""}
}

func link(name, to string) ent {
	return ent{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}, ""}
}

var someTime = time.Unix(1_600_000_000, 0)

// tarOf makes a tar. Without trailer, it ends after the last entry.
func tarOf(t testing.TB, trailer bool, entries ...ent) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		if e.ModTime.IsZero() && e.Typeflag != tar.TypeXGlobalHeader {
			e.ModTime = someTime
		}
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	err := w.Flush()
	if trailer {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// layer is one of some content, packed as it is in file.
func layer(content, file []byte) flatten.Layer {
	return flatten.Layer{
		DiffID: fmt.Sprintf("sha256:%x", sha256.Sum256(content)),
		Open:   func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(file)), nil },
	}
}

func layers(t testing.TB, all ...[]ent) (l []flatten.Layer) {
	t.Helper()
	for n, entries := range all {
		content := tarOf(t, n%2 == 0, entries...)
		l = append(l, layer(content, content))
	}
	return l
}

func target(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "root.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// fsck has e2fsck find nothing wrong.
func fsck(t testing.TB, f *os.File) {
	t.Helper()
	testenv.Fixture(t, fixtures.MkfsExt4) // of the same package
	if out, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", f.Name()).CombinedOutput(); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

// mounted has a shell script run where f is mounted at $1, which nobody else sees, and returns its
// output.
func mounted(t testing.TB, f *os.File, script string) []byte {
	t.Helper()
	testenv.Require(t, testenv.Root)
	cmd := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-euc", `mount -t ext4 -o ro,loop "$0" "$1"; `+script,
		f.Name(), t.TempDir())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("mount: %v\n%s", err, stderr.String())
	}
	return out
}

// listing reads an image back through the kernel, a line for each name: what it is, and where else
// it is.
func listing(t testing.TB, f *os.File) []string {
	t.Helper()
	fsck(t, f)
	return describe(t,
		bytes.NewReader(mounted(t, f, `tar --xattrs --xattrs-include='*' --sort=name --numeric-owner -C "$1" -cf - .`)))
}

func describe(t testing.TB, r io.Reader) (lines []string) {
	t.Helper()
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			slices.Sort(lines)
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		name := path.Clean(h.Name)
		if name == "lost+found" {
			continue
		}
		line := fmt.Sprintf("%s %c %04o %d:%d", name, h.Typeflag, h.Mode, h.Uid, h.Gid)
		switch h.Typeflag {
		case tar.TypeReg:
			body, err := io.ReadAll(in)
			if err != nil {
				t.Fatal(err)
			}
			if len(body) > 100 {
				body = fmt.Appendf(nil, "%x", sha256.Sum256(body))
			}
			line += fmt.Sprintf(" %q", body)
		case tar.TypeLink:
			line = name + " = " + path.Clean(h.Linkname)
		case tar.TypeSymlink:
			line += " -> " + h.Linkname
		case tar.TypeChar, tar.TypeBlock:
			line += fmt.Sprintf(" %d:%d", h.Devmajor, h.Devminor)
		}
		if h.Typeflag != tar.TypeLink && !h.ModTime.Equal(someTime) && h.ModTime.Unix() != 0 {
			line += " " + h.ModTime.UTC().Format(time.RFC3339Nano)
		}
		for _, k := range slices.Sorted(keys(h.PAXRecords)) {
			if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				line += fmt.Sprintf(" %s=%q", name, h.PAXRecords[k])
			}
		}
		lines = append(lines, line)
	}
}

func keys(m map[string]string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}
