package image_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/internal/kernel/kerneltest"
	"push.rocks/smartvm/internal/tinyguest"
)

const (
	release = "6.1.0-57-amd64"
	other   = "6.1.0-58-amd64"
)

// vmlinux is a kernel that says of itself that it is of a release.
func vmlinux(release string) []byte {
	return append(tinyguest.Image(tinyguest.Guest{Then: tinyguest.Idle}), "Linux version "+release+" (x@y) (gcc)"...)
}

// write writes files below a directory, by name.
func write(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	for name, data := range files {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}

// moduleTree is what a package has in /lib/modules/RELEASE: some modules, others built in, and
// files that guests do without.
func moduleTree(release string) map[string][]byte {
	return map[string][]byte{
		"modules.builtin":     []byte("kernel/virtio_mmio.ko\nkernel/virtio_blk.ko\nkernel/overlay.ko\nkernel/ext4.ko\n"),
		"modules.dep":         []byte("kernel/net/tun.ko:\nkernel/net/vsock.ko:\n"),
		"modules.dep.bin":     []byte("\xb0\x07\xf4\x57"),
		"kernel/net/tun.ko":   kerneltest.Module("name=tun", "vermagic="+release+" SMP preempt mod_unload "),
		"kernel/net/vsock.ko": kerneltest.Module("name=vsock", "vermagic="+release+" SMP preempt mod_unload "),
		"System.map":          []byte("large"),
		"build/Makefile":      []byte("all:"),
	}
}

// fakeHost is a machine that runs a kernel of release, and a store that has an image without a
// kernel.
func fakeHost(t *testing.T) (s *image.Store, root string) {
	root = t.TempDir()
	write(t, root, map[string][]byte{"boot/vmlinuz-" + release: vmlinux(release)})
	write(t, filepath.Join(root, "lib/modules", release), moduleTree(release))
	s = open(t, storeDir(t))
	s.SetHost(root, release)
	_, rootfs := sources(t)
	if _, err := s.Import(t.Context(), image.ImportOptions{Name: "root", Rootfs: rootfs}); err != nil {
		t.Fatal(err)
	}
	return s, root
}

func bootHost(t *testing.T, s *image.Store) (*image.Boot, error) {
	t.Helper()
	b, err := s.Boot(t.Context(), "root", image.BootOptions{Kernel: image.HostKernel})
	if err == nil {
		err = b.Release()
	}
	return b, err
}

// The host's kernel is taken again when it, its modules or what is made of them have changed, and
// only then; what is stored serves where the host's files are gone.
func TestHostKernel_Current(t *testing.T) {
	s, root := fakeHost(t)
	first, err := bootHost(t, s)
	if err != nil {
		t.Fatal(err)
	}
	stored := func() (stamp string, kernel string) {
		t.Helper()
		i, err := s.Find(image.HostKernel)
		if err != nil {
			t.Fatal(err)
		}
		return i.Stamp, i.Kernel
	}
	stamp, kernel := stored()
	if again, err := bootHost(t, s); err != nil || again.Kernel != first.Kernel || again.Modules != first.Modules {
		t.Errorf("again: %+v, %v; want the same", again, err)
	}

	modules := filepath.Join(root, "lib/modules", release)
	write(t, modules, map[string][]byte{
		"modules.dep":        []byte("kernel/net/tun.ko:\nkernel/net/vsock.ko:\nkernel/squashfs.ko:\n"),
		"kernel/squashfs.ko": kerneltest.Module("name=squashfs"),
	})
	if b, err := bootHost(t, s); err != nil || b.Modules == first.Modules {
		t.Errorf("modules were installed: %+v, %v; want others than before", b, err)
	}
	changed, changedKernel := stored()
	if changed == stamp || changedKernel == kernel {
		t.Error("modules were installed, and the image is the same")
	}

	// A smartvm that takes other modules, or stores them in another way, has left this.
	i, err := s.Find(image.HostKernel)
	if err != nil {
		t.Fatal(err)
	}
	was := i.Stamp
	i.Stamp = i.Stamp[:strings.Index(i.Stamp, " modules ")]
	i.Kernel = kernel
	if err := s.Rename(t.Context(), i); err != nil {
		t.Fatal(err)
	}
	if _, err := bootHost(t, s); err != nil {
		t.Fatal(err)
	}
	if now, nowKernel := stored(); now != was || nowKernel != changedKernel {
		t.Errorf("an older smartvm's: got %s of %q, want it made anew: %s of %q", nowKernel, now, changedKernel, was)
	}

	for _, gone := range []string{modules, filepath.Join(root, "boot")} { // pacman's upgrade; apt autoremove
		if err := os.RemoveAll(gone); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := bootHost(t, s); err != nil || !strings.Contains(b.Kernel, changedKernel) {
		t.Errorf("the host's files are gone: %+v, %v; want what is stored", b, err)
	}
	if i, err := s.Import(t.Context(), image.ImportOptions{Name: "kernel", Kernel: image.HostKernel}); err != nil ||
		i.Kernel != changedKernel {
		t.Errorf("import: %+v, %v; want what is stored", i, err)
	}
	if _, err := s.Remove(t.Context(), image.HostKernel, true); err != nil {
		t.Fatal(err)
	}
	_, err = bootHost(t, s)
	if !errors.Is(err, image.ErrNoKernel) || !strings.Contains(hintOf(err), "smartvm image import --kernel") {
		t.Errorf("nothing is stored: %v, hint %q", err, hintOf(err))
	}
}

// Distributions call a kernel's file after its release, or not; one of another release than the
// kernel that runs does not count.
func TestHostKernel_Files(t *testing.T) {
	bz := func(release string) []byte { return kerneltest.BzImage(vmlinux(release), release) }
	for name, c := range map[string]struct {
		files map[string][]byte
		want  string
	}{
		"Debian": {
			map[string][]byte{"boot/vmlinuz-" + other: bz(other), "boot/vmlinuz-" + release: bz(release)},
			"boot/vmlinuz-" + release,
		},
		"Fedora": {
			map[string][]byte{"lib/modules/" + release + "/vmlinuz": bz(release)},
			"lib/modules/" + release + "/vmlinuz",
		},
		"Arch": {
			map[string][]byte{"boot/vmlinuz-linux-lts": bz(other), "boot/vmlinuz-linux": bz(release)},
			"boot/vmlinuz-linux",
		},
		"Alpine":  {map[string][]byte{"boot/vmlinuz-virt": bz(release)}, "boot/vmlinuz-virt"},
		"NixOS":   {map[string][]byte{"run/booted-system/kernel": bz(release)}, "run/booted-system/kernel"},
		"Upgrade": {map[string][]byte{"boot/vmlinuz-linux": bz(other)}, ""},
		"Text":    {map[string][]byte{"boot/vmlinuz-linux": []byte("no kernel")}, ""},
	} {
		root := t.TempDir()
		write(t, root, c.files)
		s := open(t, storeDir(t))
		s.SetHost(root, release)
		got, err := s.HostKernelFile()
		if c.want == "" {
			if !errors.Is(err, image.ErrNoKernel) {
				t.Errorf("%s: got %q, %v; want no kernel", name, got, err)
			}
		} else if got != filepath.Join(root, c.want) || err != nil {
			t.Errorf("%s: got %q, %v; want %s", name, got, err, c.want)
		}
	}
}

// Where only root may read the kernel, the error names the file and what to do.
func TestHostKernel_Unreadable(t *testing.T) {
	s, root := fakeHost(t)
	path := filepath.Join(root, "boot/vmlinuz-"+release)
	for _, dir := range []string{root, filepath.Dir(root)} {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if os.Getuid() == 0 { // to be another user as far as files go
		if err := unix.Setfsuid(65534); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Setfsuid(0) }()
	} else if err := os.Chmod(path, 0); err != nil {
		t.Fatal(err)
	}
	_, err := s.HostKernelFile()
	if !errors.Is(err, image.ErrNoKernel) || !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), path) ||
		!strings.Contains(hintOf(err), "sudo cat "+path+" >vmlinuz") ||
		!strings.Contains(hintOf(err), "--modules "+filepath.Join(root, "lib/modules", release)) {
		t.Errorf("got error %v, hint %q", err, hintOf(err))
	}
}

// Modules are those of the kernel, or the import is refused; the directory above serves where it is
// clear which are meant.
func TestImport_Modules(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string][]byte{
		"vmlinux": vmlinux(release), "bzImage": kerneltest.BzImage(vmlinux(release), release),
		"silent": tinyguest.Image(tinyguest.Guest{Then: tinyguest.Idle}),
	})
	for parent, releases := range map[string][]string{
		"one": {release}, "wrong": {other}, "two": {release, other},
		"others": {other, "6.1.0-59-amd64"},
	} {
		for _, r := range releases {
			write(t, filepath.Join(dir, parent, r), moduleTree(r))
		}
	}
	write(t, filepath.Join(dir, "unnamed"), moduleTree(release))
	write(t, filepath.Join(dir, "none"), map[string][]byte{"x/y": nil})
	for name, c := range map[string]struct {
		kernel, modules string
		refused         []string // what the error says; nil: it is taken
	}{
		"ItsOwn":         {"vmlinux", "one/" + release, nil},
		"BzImage":        {"bzImage", "one/" + release, nil},
		"Above":          {"vmlinux", "one", nil},
		"AboveTwo":       {"vmlinux", "two", nil},
		"Unnamed":        {"vmlinux", "unnamed", nil},
		"Silent":         {"silent", "one", nil},
		"OtherRelease":   {"vmlinux", "wrong/" + other, []string{other, release}},
		"OtherBzImage":   {"bzImage", "wrong/" + other, []string{other, release}},
		"OtherAbove":     {"vmlinux", "wrong", []string{other, release}},
		"SilentOfTwo":    {"silent", "two", []string{other, release}},
		"NeitherOfTwo":   {"vmlinux", "others", []string{other, "6.1.0-59-amd64"}},
		"NoModulesThere": {"vmlinux", "none", []string{"modules.dep"}},
	} {
		s := open(t, storeDir(t))
		i, err := s.Import(t.Context(),
			image.ImportOptions{Name: "k", Kernel: filepath.Join(dir, c.kernel), Modules: filepath.Join(dir, c.modules)})
		if c.refused == nil {
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if in, err := s.Inspect(i.Name); err != nil || in.Objects[0].Release != release || !in.Objects[0].Modules {
				t.Errorf("%s: %+v, %v; want release %s with modules", name, in, err, release)
			}
			continue
		}
		if !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%s: got error %v", name, err)
			continue
		}
		for _, text := range c.refused {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: the error does not name %s: %v", name, text, err)
			}
		}
	}
}

// Guests of a kernel with modules share a disk of all of them, which has what modprobe reads and
// nothing else.
func TestBoot_Modules(t *testing.T) {
	s, root := fakeHost(t)
	tree := filepath.Join(root, "lib/modules", release)
	secret := filepath.Join(t.TempDir(), "secret")
	write(t, filepath.Dir(secret), map[string][]byte{"secret": []byte("of the host")})
	if err := errors.Join(
		os.Symlink("../kernel/net/tun.ko", filepath.Join(tree, "build/tun.ko")),
		os.Symlink(secret, filepath.Join(tree, "kernel/out.ko")),
		os.Symlink(secret, filepath.Join(tree, "modules.out")), unix.Mkfifo(filepath.Join(tree, "kernel/pipe.ko"), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	b, err := bootHost(t, s)
	if err != nil {
		t.Fatal(err)
	}
	got := unpackExt4(t, b.Modules)
	want := map[string]string{}
	for name, data := range moduleTree(release) {
		if name != "System.map" && name != "build/Makefile" {
			want[name] = string(data)
		}
	}
	want["build/tun.ko"] = want["kernel/net/tun.ko"]
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("modules (-want +got):\n%s", diff)
	}
	// The initramfs has the few that a guest needs to boot.
	initrd, err := os.ReadFile(b.Initrd)
	if err != nil || !bytes.Contains(initrd, []byte("vsock.ko")) || bytes.Contains(initrd, []byte("tun.ko")) {
		t.Errorf("initramfs of %d bytes: %v; want vsock and not tun", len(initrd), err)
	}
	// The same modules are one disk wherever they are stored: a snapshot that was made elsewhere finds
	// it.
	elsewhere := open(t, storeDir(t))
	i, err := elsewhere.Import(t.Context(),
		image.ImportOptions{Name: "kernel", Kernel: filepath.Join(root, "boot/vmlinuz-"+release), Modules: tree})
	if err != nil || i.Modules != filepath.Base(filepath.Dir(b.Modules)) {
		t.Errorf("stored elsewhere: %+v, %v; want modules %s", i, err, b.Modules)
	}
	if _, err := s.Prune(t.Context(), image.PruneOptions{}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(b.Modules); err != nil {
		t.Errorf("after a prune: %v", err)
	}
	kernel, _ := sources(t)
	if b, err := s.Boot(t.Context(), image.HostKernel, image.BootOptions{}); err != nil || b.Modules != "" ||
		b.Release() != nil {
		t.Errorf("the kernel alone, without our agent: %+v, %v", b, err)
	}
	if _, err := s.Import(t.Context(), image.ImportOptions{Name: "plain", Kernel: kernel}); err != nil {
		t.Fatal(err)
	}
	plain, err := s.Boot(t.Context(), "root", image.BootOptions{Kernel: "plain"})
	if err != nil || plain.Modules != "" {
		t.Fatalf("a kernel without modules: %+v, %v", plain, err)
	}
	if err := plain.Release(); err != nil {
		t.Error(err)
	}
}

// hintOf returns the advice in an error.
func hintOf(err error) string {
	var hinted interface{ Hint() string }
	if !errors.As(err, &hinted) {
		return ""
	}
	return hinted.Hint()
}

// unpackExt4 returns the files of an ext4 image, by name.
func unpackExt4(t *testing.T, path string) map[string]string {
	t.Helper()
	dir := t.TempDir()
	tool := "/usr/sbin/debugfs"
	if found, err := exec.LookPath("debugfs"); err == nil {
		tool = found
	}
	cmd := exec.CommandContext(t.Context(), tool, "-R", "rdump / .", path)
	cmd.Dir = dir // its name may have blanks, which debugfs does not take
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	files := map[string]string{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(dir, name))
		files[name] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// A machine whose own kernel is not to be had gets that of the newest base image, once, if it may
// be fetched.
func TestFetchKernel(t *testing.T) {
	const key = "firecracker-ci/v1.16/x86_64/"
	objects := map[string][]byte{
		key + "vmlinux-6.1.141":       vmlinux("6.1.141"),
		key + "ubuntu-24.04.squashfs": []byte("hsqs and more"),
	}
	var mu sync.Mutex
	var fetched []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("prefix") {
			fmt.Fprint(w, `<ListBucketResult><IsTruncated>false</IsTruncated>`)
			for name, data := range objects {
				fmt.Fprintf(w, "<Contents><Key>%s</Key><ETag>&quot;%x&quot;</ETag><Size>%d</Size></Contents>", name,
					md5.Sum(data), len(data))
			}
			fmt.Fprint(w, `</ListBucketResult>`)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		fetched = append(fetched, path.Base(r.URL.Path))
		w.Header().Set("ETag", fmt.Sprintf("%q", fmt.Sprintf("%x", md5.Sum(objects[r.URL.Path[1:]]))))
		_, _ = w.Write(objects[r.URL.Path[1:]])
	}))
	defer server.Close()
	dir := storeDir(t)
	var told []string
	opened := func(offline, fetch bool) *image.Store {
		b, err := base.Open(base.Options{
			Dir: filepath.Join(filepath.Dir(dir), "base"), BucketURL: server.URL, Arch: "x86_64", Offline: offline,
			ReleaseLatest: func(context.Context) (string, error) { return "v1.16.1", nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		s := open(t, dir, func(o *image.Options) {
			o.Base, o.Offline, o.FetchKernel, o.Arch = b, offline, fetch, "amd64"
			o.Installed = func(what, path string) { told = append(told, what+": "+filepath.Base(path)) }
		})
		s.SetHost(t.TempDir(), release)
		return s
	}
	s := opened(false, true)
	_, rootfs := sources(t)
	if _, err := s.Import(t.Context(), image.ImportOptions{Name: "root", Rootfs: rootfs}); err != nil {
		t.Fatal(err)
	}
	boots := func(s *image.Store, o image.BootOptions) error {
		b, err := s.Boot(t.Context(), "root", o)
		if err == nil {
			err = b.Release()
		}
		return err
	}
	if err := boots(opened(false, false), image.BootOptions{}); !errors.Is(err, image.ErrNoKernel) {
		t.Errorf("it was not to be fetched: %v", err)
	}
	if err := boots(opened(true, true), image.BootOptions{}); !errors.Is(err, image.ErrNoKernel) ||
		!errors.Is(err, base.ErrOffline) {
		t.Errorf("offline: %v", err)
	}
	if err := boots(s, image.BootOptions{Kernel: image.HostKernel}); !errors.Is(err, image.ErrNoKernel) {
		t.Errorf("this machine's own was asked for: %v", err)
	}
	if err := errors.Join(boots(s, image.BootOptions{}), boots(s, image.BootOptions{}),
		boots(opened(true, false), image.BootOptions{})); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"vmlinux-6.1.141"}, fetched); diff != "" {
		t.Errorf("fetched, -want +got:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"vmlinux-6.1.141 of Firecracker's own images: vmlinux"}, told); diff != "" {
		t.Errorf("told, -want +got:\n%s", diff)
	}
}
