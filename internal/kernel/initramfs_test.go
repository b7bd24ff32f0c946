package kernel_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/kernel"
)

// build adds entries and returns the archive's bytes.
func build(t *testing.T, entries ...kernel.Entry) []byte {
	t.Helper()
	var a kernel.Archive
	for _, e := range entries {
		if err := a.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if err := a.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// list renders what a foreign reader finds: name, mode, owner, inode, links,
// date, content.
func list(t *testing.T, archive []byte) []string {
	t.Helper()
	var lines []string
	for r := cpio.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return lines
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("%s %o %d:%d %d %d %d %s", h.Name, uint32(h.Mode),
			h.Uid, h.Guid, h.Inode, h.Links, h.ModTime.Unix(), string(content)+h.Linkname))
	}
}

func entries(t *testing.T) []kernel.Entry {
	t.Helper()
	hostPath := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(hostPath, []byte("from the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	return []kernel.Entry{
		{Path: "/init", Mode: 0o755, Content: []byte("#!/bin/sh\n")},
		{Path: "usr/bin/tool", Mode: 0o755 | fs.ModeSetuid, HostPath: hostPath, UID: 1, GID: 2},
		{Path: "usr//bin/./other", Mode: 0o644 | fs.ModeSetgid},
		{Path: "usr-merged", Mode: fs.ModeSymlink, Target: "usr/bin"},
		{Path: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
		{Path: "/dev/console", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Major: 5, Minor: 1},
		{Path: "/dev/vda", Mode: fs.ModeDevice | 0o660, GID: 6, Major: 254, Minor: 1<<20 - 1},
		{Path: "/dev", Mode: fs.ModeDir | 0o711},
	}
}

func TestArchive(t *testing.T) {
	archive := build(t, entries(t)...)
	want := []string{
		"dev 40711 0:0 1 2 0 ",
		"dev/console 20600 0:0 2 1 0 ",
		"dev/vda 60660 0:6 3 1 0 ",
		"init 100755 0:0 4 1 0 #!/bin/sh\n",
		"tmp 41777 0:0 5 2 0 ",
		"usr 40755 0:0 6 2 0 ",
		"usr-merged 120777 0:0 7 1 0 usr/bin",
		"usr/bin 40755 0:0 8 2 0 ",
		"usr/bin/other 102644 0:0 9 1 0 ",
		"usr/bin/tool 104755 1:2 10 1 0 from the host",
	}
	if diff := cmp.Diff(want, list(t, archive)); diff != "" {
		t.Errorf("archive (-want +got):\n%s", diff)
	}
	if len(archive)%4 != 0 {
		t.Errorf("%d bytes: not aligned", len(archive))
	}
}

// The reader above skips device numbers: this is a member, byte for byte.
func TestArchive_device(t *testing.T) {
	got := build(t, kernel.Entry{Path: "vda", Mode: fs.ModeDevice | 0o660, UID: 10, GID: 6, Major: 254, Minor: 17})
	want := "070701" + // magic
		"00000001" + "000061b0" + "0000000a" + "00000006" + // inode, mode, uid, gid
		"00000001" + "00000000" + "00000000" + // links, date, size
		"00000000" + "00000000" + "000000fe" + "00000011" + // device, device number
		"00000004" + "00000000" + // name size, checksum
		"vda\x00" + "\x00\x00" // name, padding
	if !strings.HasPrefix(string(got), want) {
		t.Errorf("got %q, want it to begin with %q", got, want)
	}
}

func TestArchive_deterministic(t *testing.T) {
	e := entries(t)
	forth := build(t, e...)
	slices.Reverse(e)
	if back := build(t, e...); !bytes.Equal(forth, back) {
		t.Error("the order of adding changes the archive")
	}
}

func TestArchive_Add(t *testing.T) {
	long := strings.Repeat("x", 4096)
	for name, c := range map[string]struct {
		entry kernel.Entry
		want  error
	}{
		"same file":          {kernel.Entry{Path: "//dir/file"}, fs.ErrExist},
		"file over dir":      {kernel.Entry{Path: "dir"}, fs.ErrExist},
		"dir over file":      {kernel.Entry{Path: "dir/file", Mode: fs.ModeDir}, fs.ErrExist},
		"dir over implied":   {kernel.Entry{Path: "dir", Mode: fs.ModeDir | 0o700}, nil},
		"below file":         {kernel.Entry{Path: "dir/file/x"}, fs.ErrInvalid},
		"no path":            {kernel.Entry{}, fs.ErrInvalid},
		"root":               {kernel.Entry{Path: "/", Mode: fs.ModeDir}, fs.ErrInvalid},
		"dot dot":            {kernel.Entry{Path: "a/../b"}, fs.ErrInvalid},
		"NUL":                {kernel.Entry{Path: "a\x00b"}, fs.ErrInvalid},
		"long path":          {kernel.Entry{Path: long}, fs.ErrInvalid},
		"trailer":            {kernel.Entry{Path: "TRAILER!!!"}, fs.ErrInvalid},
		"fifo":               {kernel.Entry{Path: "x", Mode: fs.ModeNamedPipe}, fs.ErrInvalid},
		"temporary":          {kernel.Entry{Path: "x", Mode: fs.ModeTemporary}, fs.ErrInvalid},
		"two types":          {kernel.Entry{Path: "x", Mode: fs.ModeDir | fs.ModeDevice}, fs.ErrInvalid},
		"numeric setuid":     {kernel.Entry{Path: "x", Mode: 0o4755}, fs.ErrInvalid},
		"char without dev":   {kernel.Entry{Path: "x", Mode: fs.ModeCharDevice}, fs.ErrInvalid},
		"two contents":       {kernel.Entry{Path: "x", Content: []byte("x"), HostPath: "/x"}, fs.ErrInvalid},
		"dir with content":   {kernel.Entry{Path: "x", Mode: fs.ModeDir, Content: []byte("x")}, fs.ErrInvalid},
		"link to nothing":    {kernel.Entry{Path: "x", Mode: fs.ModeSymlink}, fs.ErrInvalid},
		"link to NUL":        {kernel.Entry{Path: "x", Mode: fs.ModeSymlink, Target: "\x00"}, fs.ErrInvalid},
		"long link":          {kernel.Entry{Path: "x", Mode: fs.ModeSymlink, Target: long}, fs.ErrInvalid},
		"file with target":   {kernel.Entry{Path: "x", Target: "y"}, fs.ErrInvalid},
		"file with number":   {kernel.Entry{Path: "x", Minor: 1}, fs.ErrInvalid},
		"large major number": {kernel.Entry{Path: "x", Mode: fs.ModeDevice, Major: 1 << 12}, fs.ErrInvalid},
		"large minor number": {kernel.Entry{Path: "x", Mode: fs.ModeDevice, Minor: 1 << 20}, fs.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			var a kernel.Archive
			if err := a.Add(kernel.Entry{Path: "dir/file"}); err != nil {
				t.Fatal(err)
			}
			if err := a.Add(c.entry); !errors.Is(err, c.want) {
				t.Errorf("got error %v, want %v", err, c.want)
			}
			if c.want == nil {
				return
			}
			var b bytes.Buffer
			if err := a.Write(&b); err != nil {
				t.Fatal(err)
			}
			if got := len(list(t, b.Bytes())); got != 2 {
				t.Errorf("after a refusal the archive has %d entries, want 2", got)
			}
		})
	}
}

func TestArchive_hostFiles(t *testing.T) {
	dir := t.TempDir()
	fifo, large := filepath.Join(dir, "fifo"), filepath.Join(dir, "large")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(large, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, kernel.MaxSize+1); err != nil {
		t.Fatal(err)
	}
	for hostPath, want := range map[string]error{
		fifo: fs.ErrInvalid, dir: fs.ErrInvalid, large: kernel.ErrTooLarge, filepath.Join(dir, "missing"): fs.ErrNotExist,
	} {
		var a kernel.Archive
		if err := a.Add(kernel.Entry{Path: "x", HostPath: hostPath}); err != nil {
			t.Fatal(err)
		}
		if err := a.Write(io.Discard); !errors.Is(err, want) {
			t.Errorf("%s: got error %v, want %v", hostPath, err, want)
		}
	}
}

// truncating empties a file when it is written to.
type truncating string

func (path truncating) Write(p []byte) (int, error) {
	return len(p), os.Truncate(string(path), 0)
}

func TestArchive_hostFileShrinks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	var a kernel.Archive
	if err := a.Add(kernel.Entry{Path: "x", HostPath: path}); err != nil {
		t.Fatal(err)
	}
	if err := a.Write(truncating(path)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got error %v, want %v", err, io.ErrUnexpectedEOF)
	}
}

func TestArchive_brokenWriter(t *testing.T) {
	var a kernel.Archive
	if err := a.Write(brokenWriter{}); !errors.Is(err, errBroken) {
		t.Errorf("got error %v, want %v", err, errBroken)
	}
}

func ExampleArchive() {
	var a kernel.Archive
	for _, e := range []kernel.Entry{
		{Path: "/init", Mode: 0o755, Content: []byte("#!/bin/busybox sh\n")},
		{Path: "/dev/console", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Major: 5, Minor: 1},
	} {
		if err := a.Add(e); err != nil {
			log.Fatal(err)
		}
	}
	var file bytes.Buffer
	z := gzip.NewWriter(&file)
	if err := errors.Join(a.Write(z), z.Close()); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%x\n", file.Bytes()[:2])
	// Output: 1f8b
}
