package image_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/image/oci/ocitest"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/fixtures"
	kernelfile "push.rocks/smartvm/internal/kernel"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/killat"
	"push.rocks/smartvm/internal/tinyguest"
)

func TestMain(m *testing.M) {
	testenv.OthersOut()
	m.Run()
}

func open(t testing.TB, dir string, change ...func(*image.Options)) *image.Store {
	t.Helper()
	o := image.Options{Dir: dir, Agent: []byte("#!agent")}
	for _, c := range change {
		c(&o)
	}
	s, err := image.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// storeDir is a directory that a store takes: ours alone.
func storeDir(t testing.TB) string { return filepath.Join(t.TempDir(), "images") }

// sources makes a kernel and a root file system, and returns their paths.
func sources(t testing.TB) (kernel, rootfs string) {
	t.Helper()
	dir := t.TempDir()
	kernel, rootfs = filepath.Join(dir, "vmlinux"), filepath.Join(dir, "root")
	if err := errors.Join(
		os.WriteFile(kernel, tinyguest.Image(tinyguest.Guest{Then: tinyguest.Idle}), 0o644),
		os.MkdirAll(filepath.Join(rootfs, "etc"), 0o755),
		os.WriteFile(filepath.Join(rootfs, "etc/issue"), bytes.Repeat([]byte("tiny\n"), 1000), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	return kernel, rootfs
}

func importTiny(t testing.TB, s *image.Store, name string) *image.Image {
	t.Helper()
	kernel, rootfs := sources(t)
	i, err := s.Import(t.Context(), image.ImportOptions{Name: name, Kernel: kernel, Rootfs: rootfs})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// tree lists what is below a directory, by name.
func tree(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// wantSound fails the test where an image is not whole, or anything unfinished is there.
func wantSound(t testing.TB, s *image.Store, dir string) {
	t.Helper()
	all, err := s.List()
	if err != nil {
		t.Errorf("list: %v", err)
	}
	for _, i := range all {
		if err := s.Verify(context.Background(), i.Name); err != nil {
			t.Errorf("verify: %v", err)
		}
	}
	if _, err := s.Prune(context.Background(), image.PruneOptions{}); err != nil {
		t.Errorf("prune: %v", err)
	}
	if left := tree(t, filepath.Join(dir, "tmp")); len(left) > 0 {
		t.Errorf("left unfinished: %v", left)
	}
}

func TestImport(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	kernel, rootfs := sources(t)
	var got []*image.Image
	for _, name := range []string{"one", "two:1.0"} {
		i, err := s.Import(t.Context(), image.ImportOptions{Name: name, Kernel: kernel, Rootfs: rootfs})
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, i)
	}
	if got[0].Kernel != got[1].Kernel {
		t.Errorf("one kernel is stored as %s and %s", got[0].Kernel, got[1].Kernel)
	}
	all, err := s.List()
	if err != nil || len(all) != 2 || all[0].Name != "one" || all[1].Name != "two:1.0" {
		t.Fatalf("%v, %v", all, err)
	}
	in, err := s.Inspect("one")
	if err != nil || len(in.Objects) != 2 || in.Size == 0 {
		t.Errorf("%+v, %v", in, err)
	}
	wantSound(t, s, dir)
	// A VMM in a jail is another user.
	files, err := filepath.Glob(filepath.Join(dir, "objects/*/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		fi, err := os.Stat(f)
		base := filepath.Base(f)
		if err != nil || (base == "vmlinux" || base == "root.ext4") && fi.Mode().Perm() != 0o444 {
			t.Errorf("%s: %v, %v", f, fi.Mode(), err)
		}
	}
}

func TestImport_Refused(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	kernel, rootfs := sources(t)
	text := filepath.Join(rootfs, "etc/issue")
	for name, c := range map[string]struct {
		o    image.ImportOptions
		want error
	}{
		"no name":          {image.ImportOptions{Kernel: kernel}, fs.ErrInvalid},
		"capitals":         {image.ImportOptions{Name: "Name", Kernel: kernel}, fs.ErrInvalid},
		"path":             {image.ImportOptions{Name: "../x", Kernel: kernel}, fs.ErrInvalid},
		"long":             {image.ImportOptions{Name: strings.Repeat("a", 256), Kernel: kernel}, fs.ErrInvalid},
		"the host's":       {image.ImportOptions{Name: image.HostKernel, Kernel: kernel}, fs.ErrInvalid},
		"nothing":          {image.ImportOptions{Name: "x"}, fs.ErrInvalid},
		"no kernel":        {image.ImportOptions{Name: "x", Initrd: text}, fs.ErrInvalid},
		"modules alone":    {image.ImportOptions{Name: "x", Rootfs: rootfs, Modules: rootfs}, fs.ErrInvalid},
		"kernel is text":   {image.ImportOptions{Name: "x", Kernel: text}, kernelfile.ErrFormat},
		"kernel missing":   {image.ImportOptions{Name: "x", Kernel: kernel + "x"}, fs.ErrNotExist},
		"kernel directory": {image.ImportOptions{Name: "x", Kernel: rootfs}, fs.ErrInvalid},
		"rootfs is text":   {image.ImportOptions{Name: "x", Rootfs: text}, tar.ErrHeader},
		"rootfs is device": {image.ImportOptions{Name: "x", Rootfs: "/dev/null"}, fs.ErrInvalid},
		"rootfs missing":   {image.ImportOptions{Name: "x", Rootfs: rootfs + "x"}, fs.ErrNotExist},
		"modules missing":  {image.ImportOptions{Name: "x", Kernel: kernel, Modules: rootfs + "x"}, fs.ErrNotExist},
		"runs nothing":     {image.ImportOptions{Name: "x", Kernel: kernel, Runs: config.Change{User: "u"}}, fs.ErrInvalid},
		"no modules":       {image.ImportOptions{Name: "x", Kernel: kernel, Modules: rootfs}, fs.ErrInvalid},
	} {
		if i, err := s.Import(t.Context(), c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: %+v, %v, want %v", name, i, err, c.want)
		}
	}
	if left := append(tree(t, filepath.Join(dir, "names")), tree(t, filepath.Join(dir, "objects"))...); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	wantSound(t, s, dir)
}

// What an imported image runs is part of what it is.
func TestImport_Runs(t *testing.T) {
	s := open(t, storeDir(t))
	kernel, rootfs := sources(t)
	line := `["/bin/app", "-v"]`
	add := func(name string, runs config.Change) *image.Image {
		t.Helper()
		i, err := s.Import(t.Context(), image.ImportOptions{Name: name, Kernel: kernel, Rootfs: rootfs, Runs: runs})
		if err != nil {
			t.Fatal(err)
		}
		return i
	}
	plain, runs := add("plain", config.Change{}),
		add("runs", config.Change{Cmd: &line, Env: []string{"A=b"}, User: "5:6", WorkingDir: "/srv"})
	if plain.ID == runs.ID || plain.Root != runs.Root {
		t.Errorf("ids %s and %s, roots %s and %s", plain.ID, runs.ID, plain.Root, runs.Root)
	}
	found, err := s.Find(runs.ID[:12])
	if err != nil || found.Name != "runs" {
		t.Fatalf("by its id: %+v, %v", found, err)
	}
	b, err := s.Boot(t.Context(), "runs", image.BootOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Release()
	g := b.Guest
	if got, want := fmt.Sprintf("%s %s %s %s", g.Command, g.Env, g.User, g.WorkingDir),
		"[/bin/app -v] [A=b] 5:6 /srv"; got != want {
		t.Errorf("the guest runs %s, want %s", got, want)
	}
}

// An ext4 that was copied while it was mounted is not what it seems to whoever mounts it read-only,
// as all images are.
func TestImport_NeedsRecovery(t *testing.T) {
	testenv.Fixture(t, fixtures.MkfsExt4)
	s := open(t, storeDir(t))
	path := filepath.Join(t.TempDir(), "root.ext4")
	if err := volume.Blank(t.Context(), path, "ext4", 16<<20); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const features = 1024 + 0x60
	bits := make([]byte, 1)
	if _, err := f.ReadAt(bits, features); err != nil {
		t.Fatal(err)
	}
	for _, dirty := range []bool{true, false} {
		b := bits[0] &^ 4
		if dirty {
			b |= 4
		}
		if _, err := f.WriteAt([]byte{b}, features); err != nil {
			t.Fatal(err)
		}
		_, err := s.Import(t.Context(), image.ImportOptions{Name: "x", Rootfs: path})
		if dirty && (!errors.Is(err, fs.ErrInvalid) || !strings.Contains(err.Error(), "its journal is not replayed")) ||
			!dirty && err != nil {
			t.Errorf("dirty %v: %v", dirty, err)
		}
	}
}

// What is no tar, or half of one, is an error with advice, and the image that has the name stays.
func TestImport_NothingIsNoImage(t *testing.T) {
	s := open(t, storeDir(t))
	good := importTiny(t, s, "app")
	var whole bytes.Buffer
	w := tar.NewWriter(&whole)
	for _, name := range []string{"a", "a"} {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: 1})
		if _, werr := w.Write([]byte("x")); errors.Join(err, werr) != nil {
			t.Fatal(err, werr)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	iso := append(make([]byte, 32<<10), "\x01CD001\x01\x00"...)
	for name, content := range map[string][]byte{
		"empty": nil, "zeros": make([]byte, 1<<20), "iso": iso, "cut": whole.Bytes()[:1024],
		"text": []byte("no such command"), "lz4": []byte("\x04\x22\x4d\x18and more"),
	} {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		for from, o := range map[string]image.ImportOptions{
			"a pipe": {Name: "app", Rootfs: "-", Stdin: io.MultiReader(bytes.NewReader(content))},
			"a file": {Name: "app", Rootfs: path},
		} {
			_, err := s.Import(t.Context(), o)
			var advice interface{ Hint() string }
			if !errors.As(err, &advice) || advice.Hint() == "" {
				t.Errorf("%s from %s: %v, want an error with advice", name, from, err)
			}
			if now, err := s.Find("app"); err != nil || now.Root != good.Root || now.Kernel != good.Kernel {
				t.Fatalf("%s from %s: app is %+v now, %v", name, from, now, err)
			}
		}
	}
	_, err := s.Import(t.Context(), image.ImportOptions{Name: "app", Rootfs: t.TempDir()})
	if now, ferr := s.Find("app"); !errors.Is(err, flatten.ErrEmpty) || ferr != nil || now.Root != good.Root {
		t.Errorf("an empty directory: %v; app is %+v now, %v", err, now, ferr)
	}
	// The same tar, whole, with a name twice, takes its place.
	i, err := s.Import(t.Context(), image.ImportOptions{Name: "app", Rootfs: "-", Stdin: io.MultiReader(&whole)})
	if err != nil || i.Root == good.Root {
		t.Errorf("%+v, %v", i, err)
	}
}

// Limits are the caller's, and the error says which.
func TestImport_Limits(t *testing.T) {
	_, rootfs := sources(t)
	for _, c := range []struct {
		limits flatten.Limits
		option string
	}{{flatten.Limits{}, ""}, {flatten.Limits{MaxBytes: 1}, "MaxBytes"}, {flatten.Limits{MaxEntries: 1}, "MaxEntries"}} {
		s := open(t, storeDir(t), func(o *image.Options) { o.Limits = c.limits })
		_, err := s.Import(t.Context(), image.ImportOptions{Name: "app", Rootfs: rootfs})
		var over *flatten.LimitError
		switch {
		case c.option == "" && err != nil:
			t.Error(err)
		case c.option != "" &&
			(!errors.As(err, &over) || over.Option != c.option || !strings.Contains(over.Hint(), "--max-image-")):
			t.Errorf("%v, want the limit %s and its flag", err, c.option)
		}
	}
}

func TestOpen_Unsafe(t *testing.T) {
	dir := storeDir(t)
	if err := errors.Join(os.Mkdir(dir, 0o755), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	if _, err := image.Open(image.Options{Dir: dir}); err == nil {
		t.Error("a directory that others can read was taken")
	}
}

// A file that has changed is noticed before a VM gets it; one that was changed with its time put
// back, by Verify.
func TestUse_Corrupt(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	i := importTiny(t, s, "tiny")
	path := filepath.Join(dir, "objects", i.Root, "root.ext4")
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close(), os.Chtimes(path, fi.ModTime(), fi.ModTime())); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), "tiny"); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("verify: %v, want ErrCorrupt", err)
	}
	if err := os.Chtimes(path, fi.ModTime(), fi.ModTime().Add(1)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Boot(t.Context(), "tiny", image.BootOptions{}); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("boot: %v, want ErrCorrupt", err)
	}
	if err := os.Truncate(path, 10); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Boot(t.Context(), "tiny", image.BootOptions{}); !errors.Is(err, image.ErrCorrupt) {
		t.Errorf("boot of a shorter file: %v, want ErrCorrupt", err)
	}
}

func TestRemove(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	importTiny(t, s, "one")
	two, err := s.Find("one")
	if err != nil {
		t.Fatal(err)
	}
	kernel, _ := sources(t)
	if _, err := s.Import(t.Context(), image.ImportOptions{Name: "two", Kernel: kernel}); err != nil {
		t.Fatal(err)
	}
	// A VM says so by a link to its directory.
	vm := t.TempDir()
	users := filepath.Join(dir, "objects", two.Root, "users")
	if err := os.Symlink(vm, filepath.Join(users, "vm")); err != nil {
		t.Fatal(err)
	}
	var inUse *image.InUseError
	if _, err := s.Remove(t.Context(), "one", false); !errors.As(err, &inUse) || cmp.Diff([]string{vm}, inUse.By) != "" {
		t.Errorf("in use: %v", err)
	}
	if r, err := s.Prune(t.Context(), image.PruneOptions{All: true}); err != nil ||
		cmp.Diff([]string{"two"}, r.Images) != "" {
		t.Errorf("prune: %+v, %v", r, err)
	}
	if _, err := s.Remove(t.Context(), "one", true); err != nil {
		t.Errorf("with force: %v", err)
	}
	if _, err := s.Find("one"); !errors.Is(err, image.ErrNotFound) {
		t.Errorf("it is still there: %v", err)
	}
	if got := tree(t, filepath.Join(dir, "objects")); cmp.Diff([]string{two.Root}, got) != "" {
		t.Errorf("there are %v, want what the VM uses", got)
	}
	if err := os.Remove(vm); err != nil {
		t.Fatal(err)
	}
	// The VM is gone, however that happened: so is its claim.
	if r, err := s.Prune(t.Context(), image.PruneOptions{}); err != nil || r.Bytes == 0 {
		t.Errorf("prune: %+v, %v", r, err)
	}
	if got := tree(t, filepath.Join(dir, "objects")); len(got) > 0 {
		t.Errorf("there are %v", got)
	}
	if _, err := s.Remove(t.Context(), "one", false); !errors.Is(err, image.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

func TestBoot(t *testing.T) {
	dir := storeDir(t)
	s := open(t, dir)
	kernel, rootfs := sources(t)
	for _, o := range []image.ImportOptions{
		{Name: "whole", Kernel: kernel, Rootfs: rootfs},
		{Name: "root", Rootfs: rootfs},
		{Name: "lender", Kernel: kernel},
		{Name: "initrd", Kernel: kernel, Initrd: filepath.Join(rootfs, "etc/issue"), BootArgs: "quiet"},
	} {
		if _, err := s.Import(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	boot := func(s *image.Store, name string, o image.BootOptions) (*image.Boot, error) {
		b, err := s.Boot(t.Context(), name, o)
		if err == nil {
			err = b.Release()
		}
		return b, err
	}
	b, err := boot(s, "whole", image.BootOptions{Command: []string{"id"}, Env: []string{"A=b"}, Hostname: "box"})
	if err != nil {
		t.Fatal(err)
	}
	if b.Guest == nil || cmp.Diff([]string{"id"}, b.Guest.Command) != "" || b.Guest.Hostname != "box" ||
		b.RootType != "ext4" || b.CopyRoot || len(b.Users) != 3 {
		t.Errorf("%+v, guest %+v", b, b.Guest)
	}
	for _, path := range append([]string{b.Kernel, b.Initrd, b.Root}, b.Users...) {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	again, err := boot(s, "whole", image.BootOptions{})
	if err != nil || again.Initrd != b.Initrd || again.Guest.Command != nil {
		t.Errorf("again: %+v, %v, want the same initramfs and the image's own init", again, err)
	}
	if with, err := boot(s, "root", image.BootOptions{Kernel: "lender"}); err != nil || with.Kernel != b.Kernel {
		t.Errorf("with another's kernel: %+v, %v", with, err)
	}
	if own, err := boot(s, "initrd", image.BootOptions{}); err != nil || own.Guest != nil || own.BootArgs != "quiet" ||
		own.Initrd == "" {
		t.Errorf("with its own initramfs: %+v, %v", own, err)
	}
	if _, err := boot(s, "root", image.BootOptions{Kernel: "root"}); !errors.Is(err, image.ErrNoKernel) {
		t.Errorf("with the kernel of one without: %v", err)
	}
	if _, err := boot(s, "none", image.BootOptions{}); !errors.Is(err, image.ErrNotFound) {
		t.Errorf("no image: %v", err)
	}
	if _, err := boot(s, "whole", image.BootOptions{Command: []string{strings.Repeat("a", 1<<20)}}); err == nil {
		t.Error("a command of 1 MiB was taken")
	}
	without := open(t, dir, func(o *image.Options) { o.Agent = nil })
	if _, err := boot(without, "whole", image.BootOptions{}); err == nil ||
		!strings.Contains(err.Error(), "without its guest agent") {
		t.Errorf("without an agent: %v", err)
	}
	kernelImage, err := s.Import(t.Context(), image.ImportOptions{Name: image.DefaultKernel, Kernel: kernel})
	if err != nil {
		t.Fatal(err)
	}
	if with, err := boot(s, "root", image.BootOptions{}); err != nil ||
		!strings.Contains(with.Kernel, kernelImage.Kernel) {
		t.Errorf("with the default kernel: %+v, %v", with, err)
	}
}

// A base image of a manifest boots by itself from a copy, or where it cannot be written, like any
// other.
func TestBase(t *testing.T) {
	kernel, _ := sources(t)
	for kind, readOnly := range map[string]bool{"ext4": false, "squashfs": true} {
		t.Run(kind, func(t *testing.T) {
			dir := storeDir(t)
			work := t.TempDir()
			rootfs := filepath.Join(work, "rootfs")
			content := make([]byte, 4096)
			copy(content[map[string]int{"ext4": 1024 + 0x38}[kind]:],
				map[string]string{"ext4": "\x53\xef", "squashfs": "hsqs"}[kind])
			if err := os.WriteFile(rootfs, content, 0o644); err != nil {
				t.Fatal(err)
			}
			manifest := filepath.Join(work, "manifest.json")
			text := fmt.Sprintf(`{"schemaVersion": 1, "bundleId": "mine-1", "name": "mine", "arch": "x86_64", "firecrackerVersion": "v1.12.1",
				"rootfsType": %q, "rootfsIsReadOnly": %v, "bootArgs": "console=ttyS0 mine", "kernel": {"path": %q}, "rootfs": {"path": "rootfs"}}`, kind, readOnly, kernel)
			if err := os.WriteFile(manifest, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			bundles, err := base.Open(
				base.Options{Dir: filepath.Join(work, "bundles"), ManifestPath: manifest, Arch: "x86_64", InUse: image.InUse})
			if err != nil {
				t.Fatal(err)
			}
			s := open(t, dir, func(o *image.Options) { o.Base = bundles })
			i, err := s.Pull(t.Context(), "base:hosted", "")
			if err != nil || i.Name != "base:hosted" {
				t.Fatalf("%+v, %v", i, err)
			}
			b, err := s.Boot(t.Context(), "base:hosted", image.BootOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if b.CopyRoot == readOnly || (b.Guest != nil) != readOnly || b.RootType != kind ||
				b.BootArgs != "console=ttyS0 mine" || b.Kernel == "" || b.Root == "" {
				t.Errorf("%+v", b)
			}
			if err := os.Symlink(work, filepath.Join(b.Users[0], "vm")); err != nil { // a VM
				t.Fatal(err)
			}
			if err := b.Release(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Remove(t.Context(), "base:hosted", false); !errors.As(err, new(*image.InUseError)) {
				t.Errorf("in use: %v", err)
			}
			if err := os.Remove(filepath.Join(b.Users[0], "vm")); err != nil {
				t.Fatal(err)
			}
			if in, err := s.Inspect("base:hosted"); err != nil || in.Size == 0 || in.Bundle != "mine-1" {
				t.Errorf("%+v, %v", in, err)
			}
			wantSound(t, s, dir)
			if _, err := s.Remove(t.Context(), "base:hosted", false); err != nil {
				t.Error(err)
			}
			if all, err := bundles.List(); err != nil || len(all) > 0 {
				t.Errorf("its bundle is still there: %v, %v", all, err)
			}
			// Whose bundle has made room is as good as gone.
			if _, err := s.Pull(t.Context(), "base:hosted", "again"); err != nil {
				t.Fatal(err)
			}
			if err := bundles.Remove(t.Context(), "mine-1"); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Boot(t.Context(), "again", image.BootOptions{}); !errors.Is(err, image.ErrNotFound) {
				t.Errorf("boot without its bundle: %v", err)
			}
		})
	}
}

// testRegistry is a registry in this process that counts what is asked of it.
type testRegistry struct {
	host  string
	blobs atomic.Int64
}

func newRegistry(t *testing.T) *testRegistry {
	t.Helper()
	r := new(testRegistry)
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
			r.blobs.Add(1)
		}
		h.ServeHTTP(w, req)
	}))
	t.Cleanup(server.Close)
	r.host = strings.TrimPrefix(server.URL, "http://")
	return r
}

func (r *testRegistry) push(t *testing.T, ref string, img v1.Image) string {
	t.Helper()
	tag, err := name.NewTag(r.host + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(tag, img); err != nil {
		t.Fatal(err)
	}
	return tag.String()
}

func randomImage(t testing.TB, layers int64) v1.Image {
	t.Helper()
	img, err := random.Image(32<<10, layers)
	if err == nil {
		img, err = mutate.ConfigFile(img, func() *v1.ConfigFile {
			c, err := img.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			c.OS, c.Architecture = "linux", "amd64"
			c.Config.Entrypoint, c.Config.Cmd, c.Config.Env = []string{"/init"}, []string{"--help"}, []string{"A=a"}
			c.Config.ExposedPorts = map[string]struct{}{"8080/tcp": {}}
			return c
		}())
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// A second name of the same layers costs nothing; one that shares all but one costs that one.
func TestPull_Shared(t *testing.T) {
	r := newRegistry(t)
	dir := storeDir(t)
	s := open(t, dir)
	base := randomImage(t, 9)
	more, err := random.Layer(32<<10, "application/vnd.oci.image.layer.v1.tar+gzip")
	if err != nil {
		t.Fatal(err)
	}
	larger, err := mutate.AppendLayers(base, more)
	if err != nil {
		t.Fatal(err)
	}
	one, two, three := r.push(t, "app:1", base), r.push(t, "other:latest", base), r.push(t, "app:2", larger)
	first, err := s.Pull(t.Context(), one, "")
	if err != nil {
		t.Fatal(err)
	}
	blobs := r.blobs.Load()
	second, err := s.Pull(t.Context(), two, "mine")
	if err != nil {
		t.Fatal(err)
	}
	if second.Root != first.Root || second.Name != "mine" {
		t.Errorf("%+v, %+v", first, second)
	}
	if n := r.blobs.Load() - blobs; n > 1 { // its configuration
		t.Errorf("a second name took %d blobs", n)
	}
	blobs = r.blobs.Load()
	if _, err := s.Pull(t.Context(), three, ""); err != nil {
		t.Fatal(err)
	}
	if n := r.blobs.Load() - blobs; n > 2 { // and one layer
		t.Errorf("one more layer took %d blobs", n)
	}
	if got := len(tree(t, filepath.Join(dir, "objects"))); got != 2 {
		t.Errorf("%d objects, want 2", got)
	}
	in, err := s.Inspect("mine")
	if err != nil || cmp.Diff([]string{"/init"}, in.Config.Entrypoint) != "" ||
		cmp.Diff([]string{"8080/tcp"}, in.Config.ExposedPorts) != "" || len(in.Layers) != 9 {
		t.Errorf("%+v, %v", in, err)
	}
	wantSound(t, s, dir)
	if _, err := s.Remove(t.Context(), three, false); err != nil {
		t.Error(err)
	}
	if got := len(tree(t, filepath.Join(dir, "layers"))); got != 9+2 {
		t.Errorf("%d layers and documents are kept, want 9 and 2", got)
	}
	offline := open(t, dir, func(o *image.Options) { o.Offline = true })
	if _, err := offline.Pull(t.Context(), one, ""); !errors.Is(err, image.ErrOffline) {
		t.Errorf("offline: %v", err)
	}
}

// Whoever pulls, prunes and verifies at once, what is listed is whole.
func TestPull_AtOnce(t *testing.T) {
	r := newRegistry(t)
	dir := storeDir(t)
	refs := []string{r.push(t, "a:1", randomImage(t, 2)), r.push(t, "b:1", randomImage(t, 2))}
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			s := open(t, dir) // as another process would
			for range 5 {
				var err error
				if ref := refs[i%2]; i < 4 {
					_, err = s.Pull(t.Context(), ref, "")
				} else if i == 4 {
					_, err = s.Prune(t.Context(), image.PruneOptions{All: true})
				} else if _, err = s.Find(ref); err == nil {
					err = s.Verify(t.Context(), ref)
				}
				if err != nil && !errors.Is(err, image.ErrNotFound) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	wantSound(t, open(t, dir), dir)
}

func TestPull_Cancelled(t *testing.T) {
	dir := storeDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	s := open(t, dir, func(o *image.Options) { o.Progress = func(string, int64, int64) { cancel() } })
	r := newRegistry(t)
	if _, err := s.Pull(ctx, r.push(t, "a:1", randomImage(t, 3)), ""); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wantSound(t, s, dir)
}

// killVariable has a copy of this test binary make and remove images.
const killVariable = "SMARTVM_TEST_KILL"

// TestKilled kills whoever makes and removes images before each change that it makes to the file
// system: what is listed then is whole, nothing is left unfinished, and the next try gets through.
func TestKilled(t *testing.T) {
	if config := os.Getenv(killVariable); config != "" {
		makeImages(t, strings.Split(config, "\n"))
		return
	}
	work := t.TempDir()
	layout := layoutOf(t,
		map[string][]ocitest.Layer{"1": {files(map[string]string{"a": "a"}), files(map[string]string{"b": "b"})}})
	host := serve(t, layout, func(*http.Request) {})
	kernel, rootfs := sources(t)
	dir := filepath.Join(work, "images")
	config := strings.Join([]string{dir, "oci:" + layout, host + "/app:1", kernel, rootfs}, "\n")
	killed := 0
	for n := 1; ; n++ {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$") //nolint:noctx // killed or ended when it has been run
		cmd.Env = append(os.Environ(), killVariable+"="+config, "GORACE=atexit_sleep_ms=0")
		ended, err := killat.Run(cmd, n)
		if err != nil {
			t.Fatalf("change %d: ended %v, %v", n, ended, err)
		}
		s := open(t, dir)
		wantSound(t, s, dir)
		if ended {
			break
		}
		killed++
		// The next death is in a store that knows nothing, or in one that has what this left.
		if n%2 == 0 {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}
		if t.Failed() {
			t.Fatalf("killed before change %d", n)
		}
	}
	if killed < 50 {
		t.Errorf("there were %d changes only", killed)
	}
	t.Logf("killed before each of %d changes", killed)
	all, err := open(t, dir).List()
	if err != nil || len(all) != 2 {
		t.Errorf("in the end there are %v, %v", all, err)
	}
}

func makeImages(t *testing.T, config []string) {
	s := open(t, config[0])
	_, importErr := s.Import(t.Context(), image.ImportOptions{Name: "imported", Kernel: config[3], Rootfs: config[4]})
	_, layoutErr := s.Pull(t.Context(), config[1], "local")
	_, removeErr := s.Remove(t.Context(), "local", false)
	_, pullErr := s.Pull(t.Context(), config[2], "pulled")
	b, bootErr := s.Boot(t.Context(), "imported", image.BootOptions{})
	if bootErr == nil {
		bootErr = b.Release()
	}
	_, pruneErr := s.Prune(t.Context(), image.PruneOptions{Layers: true})
	if err := errors.Join(importErr, layoutErr, removeErr, pullErr, bootErr, pruneErr); err != nil {
		t.Fatal(err)
	}
}

func FuzzValidName(f *testing.F) {
	for _, s := range []string{"debian:12", "host/a@sha256:0", "A", "..", "a//b", "a/../b", "-"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		err := image.ValidName(s)
		if err == nil && (strings.Contains(s, "..") || strings.ContainsAny(s, " \x00\n") || strings.HasPrefix(s, "/")) {
			t.Errorf("%q is taken", s)
		}
		if err != nil && !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q: %v", s, err)
		}
	})
}
