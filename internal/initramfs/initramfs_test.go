package initramfs_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/initramfs"
	"push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/testenv"
)

// content lists the files of an initramfs that are no directories, and what they hold.
func content(t *testing.T, data []byte) map[string]string {
	t.Helper()
	files := map[string]string{}
	for r := cpio.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if !h.FileInfo().IsDir() {
			files[h.Name] = string(text)
		}
	}
}

func build(t *testing.T, o initramfs.Options) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := initramfs.Build(&b, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestBuild_Agent(t *testing.T) {
	got := content(t, build(t, initramfs.Options{Agent: []byte("program")}))
	if diff := cmp.Diff(map[string]string{"init": "program", "dev/console": "", "dev/null": ""}, got); diff != "" {
		t.Error(diff)
	}
}

// tree is a kernel's that has some modules, and others built in. With modules.dep, what modules
// hold is not looked at.
func tree(builtin string, dep string) fstest.MapFS {
	m := fstest.MapFS{"modules.builtin": {Data: []byte(builtin)}, "modules.dep": {Data: []byte(dep)}}
	for line := range strings.Lines(dep) {
		file, _, _ := strings.Cut(line, ":")
		m[file] = &fstest.MapFile{Data: []byte("\x7fELF " + file)}
	}
	return m
}

const dep = "k/virtio_mmio.ko: k/virtio_ring.ko k/virtio.ko\nk/virtio.ko:\nk/virtio_ring.ko: k/virtio.ko\nk/virtio_blk.ko: k/virtio.ko\n" +
	"k/virtio-rng.ko:\nk/other.ko:\nk/squashfs.ko: k/gone.ko\n"

func TestBuild_Modules(t *testing.T) {
	o := initramfs.Options{Modules: tree("kernel/fs/overlay.ko\nkernel/fs/ext4.ko\n", dep), Release: "6.1"}
	data := build(t, o)
	got := content(t, data)
	want := "/lib/modules/6.1/k/virtio.ko\n/lib/modules/6.1/k/virtio_ring.ko\n/lib/modules/6.1/k/virtio_mmio.ko\n" +
		"/lib/modules/6.1/k/virtio_blk.ko\n/lib/modules/6.1/k/virtio-rng.ko"
	if diff := cmp.Diff(want, got["modules"]); diff != "" {
		t.Error(diff)
	}
	if len(got) != 6 { // the list and what it lists
		t.Errorf("files: %v", got)
	}
	if again := build(t, o); !bytes.Equal(data, again) {
		t.Error("building again gives other bytes")
	}
}

// What is asked for by an alias alone is there before what asks: libcrc32c does not load without a
// crc32c.
func TestBuild_Alias(t *testing.T) {
	o := initramfs.Options{Release: "6.1", Modules: tree("kernel/fs/overlay.ko\nkernel/fs/ext4.ko\n",
		dep+"k/erofs.ko: k/libcrc32c.ko\nk/libcrc32c.ko:\nk/crc32c_generic.ko:\n")}
	got := content(t, build(t, o))["modules"]
	if want := "/k/crc32c_generic.ko\n/lib/modules/6.1/k/libcrc32c.ko\n/lib/modules/6.1/k/erofs.ko"; !strings.HasSuffix(
		got, want) {
		t.Errorf("got %q", got)
	}
}

func TestBuild_Missing(t *testing.T) {
	for name, builtin := range map[string]string{"overlay": "", "virtio_blk": "kernel/overlay.ko\n"} {
		o := initramfs.Options{Modules: tree(builtin, strings.ReplaceAll(dep, name, "x")), Release: "6.1"}
		err := initramfs.Build(io.Discard, o)
		missing, ok := errors.AsType[*kernel.MissingError](err)
		if !ok || missing.Module != name || !errors.Is(err, kernel.ErrNoModule) {
			t.Errorf("got error %v, want that %s is missing", err, name)
		}
	}
}

func TestBuild_BadTree(t *testing.T) {
	for name, c := range map[string]struct {
		modules fs.FS
		want    error
	}{
		"Empty": {fstest.MapFS{}, fs.ErrNotExist},
		"Gone":  {fstest.MapFS{"modules.dep": {Data: []byte(dep)}}, fs.ErrNotExist},
		"Dots":  {fstest.MapFS{"modules.dep": {Data: []byte("../../etc/x.ko:\n")}}, kernel.ErrCorrupt},
	} {
		if err := initramfs.Build(io.Discard, initramfs.Options{Modules: c.modules, Release: "6.1"}); !errors.Is(err,
			c.want) {
			t.Errorf("%s: got error %v, want %v", name, err, c.want)
		}
	}
}

// A distribution's kernel has all that is needed, each module behind its dependencies.
func TestBuild_Distribution(t *testing.T) {
	dir := testenv.Fixture(t, fixtures.GuestModules)
	got := content(t, build(t, initramfs.Options{Modules: os.DirFS(dir), Release: filepath.Base(dir)}))
	var names []string
	for p := range strings.SplitSeq(got["modules"], "\n") {
		if got[p[1:]] == "" {
			t.Errorf("%s is not in it", p)
		}
		names = append(names, strings.TrimSuffix(path.Base(p), ".ko"))
	}
	for _, pair := range [][2]string{
		{"virtio", "virtio_mmio"},
		{"virtio_ring", "virtio_blk"},
		{"net_failover", "virtio_net"},
		{"vsock", "vmw_vsock_virtio_transport"},
	} {
		if i, j := slices.Index(names, pair[0]), slices.Index(names, pair[1]); i < 0 || j < i {
			t.Errorf("%s must come before %s: %v", pair[0], pair[1], names)
		}
	}
	if !slices.Contains(names, "overlay") || !slices.Contains(names, "squashfs") {
		t.Errorf("modules: %v", names)
	}
}
