package kernel_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/kernel/kerneltest"
)

func ko(fields ...string) []byte { return kerneltest.Module(fields...) }

// modules is a tree of which base depends on core, and top on both.
func modules() fstest.MapFS {
	return fstest.MapFS{
		"modules.builtin":          {Data: []byte("kernel/fs/ext4/ext4.ko\nkernel/crypto/crc-x.ko\n")},
		"modules.order":            {Data: []byte("kernel/core.ko\nkernel/base-x.ko\nkernel/top.ko\nkernel/alone.ko\n")},
		"kernel/core.ko":           {Data: ko("license=GPL", "depends=")},
		"kernel/base-x.ko":         {Data: ko("depends=core,crc_x", "name=base_x")},
		"kernel/top.ko":            {Data: ko("name=top", "depends=base-x,core")},
		"kernel/alone.ko":          {Data: ko("name=alone")},
		"kernel/not-listed.ko":     {Data: ko("name=not_listed")},
		"kernel/loose/readme.text": {Data: []byte("nothing")},
	}
}

const dep = `kernel/core.ko:
kernel/base-x.ko: kernel/core.ko
kernel/top.ko: kernel/base-x.ko kernel/core.ko
kernel/alone.ko:
`

func TestArchive_AddModules(t *testing.T) {
	const dir = "/lib/modules/6.1.0/kernel/"
	for name, c := range map[string]struct {
		names []string
		want  []string
	}{
		"none":         {nil, nil},
		"alone":        {[]string{"alone"}, []string{dir + "alone.ko"}},
		"dependencies": {[]string{"top"}, []string{dir + "core.ko", dir + "base-x.ko", dir + "top.ko"}},
		"spelling":     {[]string{"base_x"}, []string{dir + "core.ko", dir + "base-x.ko"}},
		"as asked": {
			[]string{"alone", "top", "base-x", "alone"},
			[]string{dir + "alone.ko", dir + "core.ko", dir + "base-x.ko", dir + "top.ko"},
		},
		"built in": {[]string{"ext4", "alone", "crc-x"}, []string{dir + "alone.ko"}},
	} {
		for list, tree := range map[string]fstest.MapFS{"order": modules(), "dep": modules(), "old dep": modules()} {
			t.Run(name+"/"+list, func(t *testing.T) {
				switch list {
				case "dep":
					tree["modules.dep"] = &fstest.MapFile{Data: []byte(dep)}
				case "old dep":
					tree["modules.dep"] = &fstest.MapFile{Data: []byte(strings.ReplaceAll(dep, "kernel/", dir))}
				}
				var a kernel.Archive
				got, err := a.AddModules(tree, "6.1.0", c.names...)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(c.want, got); diff != "" {
					t.Errorf("order (-want +got):\n%s", diff)
				}
				for _, path := range got {
					if err := a.Add(kernel.Entry{Path: path}); !errors.Is(err, fs.ErrExist) {
						t.Errorf("%s is not in the archive", path)
					}
				}
			})
		}
	}
}

// A module that replaces one of the kernel's own is listed before it.
func TestArchive_AddModules_update(t *testing.T) {
	tree := fstest.MapFS{
		"modules.dep":   {Data: []byte("updates/m.ko:\nkernel/m.ko:\n")},
		"updates/m.ko":  {Data: ko("name=m")},
		"kernel/m.ko":   {Data: ko("name=m")},
		"modules.order": {Data: []byte("kernel/m.ko\n")},
	}
	got, err := new(kernel.Archive).AddModules(tree, "6.1", "m")
	if want := []string{"/lib/modules/6.1/updates/m.ko"}; err != nil || !cmp.Equal(want, got) {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

func TestArchive_AddModules_compressed(t *testing.T) {
	content := ko("name=m", "depends=")
	var gz, zst bytes.Buffer
	g := gzip.NewWriter(&gz)
	z, err := zstd.NewWriter(&zst)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{write(g, content), write(z, content)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	xz, err := os.ReadFile("testdata/vmlinux.xz")
	if err != nil {
		t.Fatal(err)
	}
	for suffix, c := range map[string]struct{ data, want []byte }{
		"":     {content, content},
		".gz":  {gz.Bytes(), content},
		".zst": {zst.Bytes(), content},
		".xz":  {xz, vmlinux()},
	} {
		for list, text := range map[string]string{
			"modules.dep":   "kernel/m.ko" + suffix + ":\n",
			"modules.order": "kernel/m.ko\n",
		} {
			if list == "modules.order" && suffix == ".xz" {
				continue // vmlinux has no .modinfo
			}
			t.Run(list+suffix, func(t *testing.T) {
				tree := fstest.MapFS{list: {Data: []byte(text)}, "kernel/m.ko" + suffix: {Data: c.data}}
				var a kernel.Archive
				paths, err := a.AddModules(tree, "6.1", "m")
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff([]string{"/lib/modules/6.1/kernel/m.ko"}, paths); diff != "" {
					t.Errorf("paths (-want +got):\n%s", diff)
				}
				var b bytes.Buffer
				if err := a.Write(&b); err != nil {
					t.Fatal(err)
				}
				if !bytes.Contains(b.Bytes(), c.want) {
					t.Error("the archive does not hold the decompressed module")
				}
			})
		}
	}
}

func TestArchive_AddModules_refuses(t *testing.T) {
	for name, c := range map[string]struct {
		release string
		files   fstest.MapFS // over those of modules(); no data: removed
		want    error
	}{
		"release":            {release: "../6.1", want: fs.ErrInvalid},
		"no release":         {release: "", want: fs.ErrInvalid},
		"no lists":           {files: fstest.MapFS{"modules.order": {}}, want: fs.ErrNotExist},
		"not listed":         {files: listed("modules.dep", "kernel/core.ko:\n"), want: kernel.ErrNoModule},
		"unknown dependency": {files: listed("modules.dep", "kernel/top.ko: kernel/gone.ko\n"), want: kernel.ErrNoModule},
		"cycle": {
			files: listed("modules.dep", "kernel/top.ko: kernel/core.ko\nkernel/core.ko: kernel/top.ko\n"),
			want:  kernel.ErrCorrupt,
		},
		"itself":    {files: listed("modules.dep", "kernel/top.ko: kernel/top.ko\n"), want: kernel.ErrCorrupt},
		"file gone": {files: fstest.MapFS{"kernel/top.ko": {}}, want: fs.ErrNotExist},
		"escape":    {files: listed("modules.dep", "../../top.ko:\n"), want: kernel.ErrCorrupt},
		"absolute":  {files: listed("modules.dep", "/etc/top.ko:\n"), want: kernel.ErrCorrupt},
		"no module": {files: listed("modules.dep", "kernel/top.text:\n"), want: kernel.ErrCorrupt},
		"no colon":  {files: listed("modules.dep", "kernel/top.ko\n"), want: kernel.ErrCorrupt},
		"colon":     {files: listed("modules.order", "kernel/top.ko:\n"), want: kernel.ErrCorrupt},
		"list a directory": {
			files: fstest.MapFS{"modules.dep": {Mode: fs.ModeDir, Data: []byte{0}}},
			want:  kernel.ErrCorrupt,
		},
		"list too large": {files: listed("modules.dep", strings.Repeat("\n", 16<<20+1)), want: kernel.ErrTooLarge},
		"no ELF":         {files: listed("kernel/top.ko", "\x7fELF, or not"), want: kernel.ErrCorrupt},
		"no modinfo": {files: listed("kernel/top.ko",
			string(bytes.ReplaceAll(ko(), []byte(".modinfo"), []byte(".whatnot")))), want: kernel.ErrCorrupt},
		"garbage":  {files: listed("kernel/top.ko", "garbage"), want: &kernel.CompressionError{Name: "unknown"}},
		"bad gzip": {files: listed("kernel/top.ko", "\x1f\x8b????????????"), want: kernel.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			tree := modules()
			for path, file := range c.files {
				tree[path] = file
				if file.Data == nil {
					delete(tree, path)
				}
			}
			release := "6.1.0"
			if c.files == nil {
				release = c.release
			}
			paths, err := new(kernel.Archive).AddModules(tree, release, "top")
			checkError(t, "AddModules", err, c.want)
			if paths != nil {
				t.Errorf("got paths %q", paths)
			}
		})
	}
}

// listed is a tree of one file.
func listed(path, text string) fstest.MapFS {
	return fstest.MapFS{path: {Data: []byte(text)}}
}

// A tree on disk is kept to by os.Root, whatever links it holds.
func TestArchive_AddModules_root(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(t.TempDir(), "outside.ko")
	for path, data := range map[string][]byte{
		outside:                           ko("name=outside"),
		filepath.Join(dir, "modules.dep"): []byte("in.ko:\nout.ko:\n"),
		filepath.Join(dir, "in.ko"):       ko("name=in"),
	} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(dir, "out.ko")); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var a kernel.Archive
	if _, err := a.AddModules(root.FS(), "6.1", "in"); err != nil {
		t.Error(err)
	}
	if _, err := a.AddModules(root.FS(), "6.1", "out"); err == nil {
		t.Error("followed a link out of the tree")
	}
}

func FuzzArchive_AddModules(f *testing.F) {
	f.Add(dep, "", ko("depends=core"))
	f.Add("", "kernel/core.ko\nkernel/top.ko\n", ko("depends=core"))
	f.Add("kernel/top.ko: kernel/top.ko", "", ko())
	f.Add("", "# top\nkernel/top.ko\n", ko("depends=core,,top"))
	f.Fuzz(func(t *testing.T, dep, order string, top []byte) {
		tree := modules()
		tree["kernel/top.ko"] = &fstest.MapFile{Data: top}
		if dep != "" {
			tree["modules.dep"] = &fstest.MapFile{Data: []byte(dep)}
		}
		tree["modules.order"] = &fstest.MapFile{Data: []byte(order)}
		var a kernel.Archive
		paths, err := a.AddModules(tree, "6.1", "top", "core")
		for _, path := range paths {
			if !strings.HasPrefix(path, "/lib/modules/6.1/") || !strings.HasSuffix(path, ".ko") ||
				strings.Contains(path, "/../") {
				t.Errorf("path %q", path)
			}
		}
		if err == nil && len(paths) == 0 {
			t.Error("found neither module, and no error")
		}
	})
}

// opened counts how often each file is opened.
type opened struct {
	fs.FS
	times map[string]int
}

func (o opened) Open(name string) (fs.File, error) {
	o.times[name]++
	return o.FS.Open(name)
}

func (o opened) Stat(name string) (fs.FileInfo, error) { return fs.Stat(o.FS, name) }

// What the kernel lacks, or has without its dependencies, is left out and leaves nothing of it
// behind; the tree is read once.
func TestArchive_AddModulesThere(t *testing.T) {
	tree := modules()
	tree["modules.dep"] = &fstest.MapFile{Data: []byte("kernel/core.ko:\nkernel/base-x.ko: kernel/core.ko\n" +
		"kernel/top.ko: kernel/base-x.ko kernel/gone.ko\nkernel/alone.ko:\n")}
	asked := []string{"nowhere", "top", "alone", "core", "ext4", "top"}
	of := func(needed string) func(string) bool { return func(name string) bool { return name == needed } }
	files := opened{tree, map[string]int{}}
	got, err := new(kernel.Archive).AddModulesThere(files, "6.1.0", of("core"), asked...)
	const dir = "/lib/modules/6.1.0/kernel/"
	if diff := cmp.Diff([]string{dir + "alone.ko", dir + "core.ko"}, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	for _, list := range []string{"modules.dep", "modules.builtin", "kernel/alone.ko"} {
		if n := files.times[list]; n != 1 {
			t.Errorf("%s was read %d times", list, n)
		}
	}
	for _, name := range []string{"nowhere", "top"} {
		_, err := new(kernel.Archive).AddModulesThere(tree, "6.1.0", of(name), asked...)
		missing, ok := errors.AsType[*kernel.MissingError](err)
		if !ok || missing.Module != name || missing.Release != "6.1.0" || !errors.Is(err, kernel.ErrNoModule) {
			t.Errorf("%s is needed: got error %v", name, err)
		}
	}
}
