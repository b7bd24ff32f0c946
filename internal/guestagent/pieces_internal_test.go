package guestagent

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/testenv"
)

func TestMain_NotFirst(t *testing.T) {
	if err := Main(Signals{}); err == nil {
		t.Error("it took this for a guest")
	}
}

func TestReadModuleList(t *testing.T) {
	got, err := readModuleList(strings.NewReader("/lib/a.ko\n\n/lib/b.ko"))
	if diff := cmp.Diff(modules{"/lib/a.ko", "/lib/b.ko"}, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	for name, text := range map[string]string{
		"relative": "lib/a.ko", "dots": "/lib/../a.ko", "NUL": "/lib/\x00", "long line": "/" + strings.Repeat("a", 1<<20),
		"long": strings.Repeat("/lib/a.ko\n", 1<<17),
	} {
		if got, err := readModuleList(strings.NewReader(text)); err == nil {
			t.Errorf("%s: got %.3q", name, got)
		}
	}
}

// A guest gets the modules of what it has: first those of drives, then those of its other devices
// and of the file systems that may be on its drives.
func TestModules(t *testing.T) {
	all := modules{
		"/m/virtio_ring.ko", "/m/virtio.ko", "/m/virtio_mmio.ko", "/m/virtio_blk.ko", "/m/failover.ko", "/m/net_failover.ko",
		"/m/virtio_net.ko",
		"/m/vsock.ko", "/m/vmw_vsock_virtio_transport_common.ko", "/m/vmw_vsock_virtio_transport.ko", "/m/rng-core.ko.xz",
		"/m/virtio-rng.ko.xz", "/m/virtio_balloon.ko",
		"/m/squashfs.ko", "/m/libcrc32c.ko", "/m/erofs.ko", "/m/overlay.ko", "/m/ext4.ko",
	}
	first, rest := all.split()
	if diff := cmp.Diff(all[:4], first); diff != "" || len(first)+len(rest) != len(all) {
		t.Error(diff, rest)
	}
	if first, rest := all[4:].split(); len(first) != 0 || len(rest) != len(all)-4 {
		t.Errorf("with drives built in: %q and %q", first, rest)
	}
	for name, tt := range map[string]struct {
		boot   guest.Boot
		kinds  []int
		drives int
		want   string
	}{
		"least": {guest.Boot{RootType: guest.Ext4}, []int{2}, 2, "libcrc32c ext4"},
		"usual": {
			guest.Boot{RootType: guest.Ext4, ScratchDevice: "/dev/vdb"},
			[]int{2, 2, 2, 19},
			3,
			"vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport libcrc32c overlay ext4",
		},
		"network": {
			guest.Boot{RootType: guest.Squashfs},
			[]int{1, 4},
			2,
			"failover net_failover virtio_net rng_core virtio_rng squashfs libcrc32c ext4",
		},
		"balloon":    {guest.Boot{RootType: guest.Ext4}, []int{5}, 2, "virtio_balloon libcrc32c ext4"},
		"erofs":      {guest.Boot{RootType: guest.Erofs}, nil, 2, "libcrc32c erofs ext4"},
		"modules":    {guest.Boot{RootType: guest.Ext4, ModulesDevice: "/dev/vdc"}, nil, 3, "libcrc32c ext4"},
		"more there": {guest.Boot{RootType: guest.Ext4}, nil, 3, "squashfs libcrc32c erofs ext4"},
	} {
		sys := t.TempDir()
		for i := range tt.drives {
			if err := os.MkdirAll(filepath.Join(sys, "block", fmt.Sprintf("vd%c", 'a'+i)), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		for i, kind := range tt.kinds {
			dir := filepath.Join(sys, "bus/virtio/devices", fmt.Sprintf("virtio%d", i))
			if err := errors.Join(os.MkdirAll(dir, 0o700),
				os.WriteFile(filepath.Join(dir, "device"), fmt.Appendf(nil, "0x%04x\n", kind), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		unwanted := unwanted(&tt.boot, sys)
		for _, file := range rest {
			if m := moduleName(file); !unwanted[m] {
				got = append(got, m)
			}
		}
		if diff := cmp.Diff(tt.want, strings.Join(got, " ")); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func FuzzModuleList(f *testing.F) {
	f.Add([]byte("/lib/modules/6.1/a.ko\n/lib/modules/6.1/b.ko\n"))
	f.Add([]byte("../x\n\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		paths, err := readModuleList(bytes.NewReader(data))
		for _, p := range paths {
			if err != nil || !filepath.IsAbs(p) || filepath.Clean(p) != p || strings.ContainsAny(p, "\x00\n") {
				t.Errorf("%q: %q, %v", data, p, err)
			}
		}
	})
}

// drives makes a machine's drives by name.
func drives(t *testing.T, contents map[string][]byte) (sys, dev string) {
	t.Helper()
	sys, dev = t.TempDir(), t.TempDir()
	for name, content := range contents {
		if err := errors.Join(
			os.Mkdir(filepath.Join(sys, name), 0o700),
			os.WriteFile(filepath.Join(sys, name, "size"), fmt.Appendln(nil, len(content)/sectorSize), 0o600),
			os.WriteFile(filepath.Join(dev, name), content, 0o600),
		); err != nil {
			t.Fatal(err)
		}
	}
	return sys, dev
}

func TestFindBoot(t *testing.T) {
	want := &guest.Boot{RootDevice: "/dev/vdb", RootType: guest.Ext4}
	block, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	large := append(bytes.Clone(block), make([]byte, guest.MaxSize)...)
	damaged := bytes.Replace(block, []byte("ext4"), []byte("ext5"), 1)
	for name, c := range map[string]struct {
		drives map[string][]byte
		want   error
		text   string
	}{
		"First":     {map[string][]byte{"vda": block, "vdb": large, "vdc": make([]byte, 4096)}, nil, ""},
		"Last":      {map[string][]byte{"vda": make([]byte, 512), "vdb": large, "vdzz": block}, nil, ""},
		"None":      {map[string][]byte{"vda": make([]byte, 4096), "vdb": nil}, errNotYet, ""},
		"OnlyLarge": {map[string][]byte{"vda": large}, guest.ErrNoBoot, ""},
		"OtherKind": {map[string][]byte{"sda": block}, errNotYet, ""},
		"Damaged":   {map[string][]byte{"vda": damaged}, guest.ErrInvalid, "drive vda"},
		"Two":       {map[string][]byte{"vda": block, "vdc": block}, nil, "drives vda and vdc both have one"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := findBoot(drives(t, c.drives))
			if c.want == nil && c.text == "" {
				if diff := cmp.Diff(want, got); err != nil || diff != "" {
					t.Error(err, diff)
				}
				return
			}
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v, %q", err, c.want, c.text)
			}
		})
	}
	sys, dev := drives(t, map[string][]byte{"vda": block})
	if err := os.Remove(filepath.Join(dev, "vda")); err != nil {
		t.Fatal(err)
	}
	if _, err := findBoot(sys, dev); !errors.Is(err, errNotYet) {
		t.Errorf("without its node: %v", err)
	}
}

// What a volume goes over is of its kind, or not there.
func TestFits(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink(dir, filepath.Join(dir, "link")),
		os.Symlink("nowhere", filepath.Join(dir, "dangling"))); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		target string
		isFile bool
		want   string
	}{
		{file, true, ""},
		{dir, false, ""},
		{filepath.Join(dir, "link"), false, ""},
		{filepath.Join(dir, "none"), false, ""},
		{filepath.Join(dir, "none"), true, ""},
		{filepath.Join(dir, "dangling"), true, ""},
		{os.DevNull, true, ""},
		{dir, true, "it is a file of the host, and the image has a directory there"},
		{filepath.Join(dir, "link"), true, "it is a file of the host, and the image has a directory there"},
		{file, false, "it is a directory of the host, and the image has a file there"},
	} {
		got := ""
		if err := fits(guest.Volume{Target: tt.target, IsFile: tt.isFile}); err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%s, a file %v: got %q, want %q", tt.target, tt.isFile, got, tt.want)
		}
	}
}

// An image may have anything where the secrets go: what it has stays, but for what has the name of
// one, and no link is followed.
func TestStoreSecrets(t *testing.T) {
	testenv.Require(t, testenv.Root)
	runtime.LockOSThread() // for good: the thread has mounts of its own, and ends with the test
	for _, err := range []error{
		unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, prepare := range map[string]func() error{
		"Nothing": func() error { return nil },
		"Directory": func() error {
			return errors.Join(os.Mkdir("/run/secrets", 0o700), os.Chown("/run/secrets", 7, 7),
				os.Symlink("/run/victim", "/run/secrets/key"),
				os.WriteFile("/run/secrets/own", []byte("the image's"), 0o644))
		},
		"Link": func() error { return os.Symlink("/run/victim", "/run/secrets") },
		"File": func() error { return os.WriteFile("/run/secrets", nil, 0o600) },
	} {
		// No subtest: that would be another goroutine, and another thread.
		if err := errors.Join(os.RemoveAll("/run/secrets"), os.WriteFile("/run/victim", []byte("victim"), 0o600),
			prepare()); err != nil {
			t.Fatal(err)
		}
		if err := storeSecrets(new(guest.Boot), map[string][]byte{"key": []byte("value")}); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		dir, err := os.Stat("/run/secrets")
		if err != nil || dir.Mode().Perm() != 0o755 || dir.Sys().(*syscall.Stat_t).Uid != 0 {
			t.Errorf("%s: %v, %v", name, dir, err)
		}
		info, err := os.Lstat("/run/secrets/key")
		if err != nil || info.Mode() != 0o400 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
		own, victim := "", ""
		for path, to := range map[string]*string{"/run/secrets/own": &own, "/run/victim": &victim} {
			data, _ := os.ReadFile(path)
			*to = string(data)
		}
		if value, err := os.ReadFile("/run/secrets/key"); err != nil || string(value) != "value" || victim != "victim" ||
			(own != "") != (name == "Directory") {
			t.Errorf("%s: key %q, %v, own %q, victim %q", name, value, err, own, victim)
		}
		if err := os.WriteFile("/run/secrets/more", nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: writing there: %v", name, err)
		}
		if err := unix.Unmount("/run/secrets", 0); err != nil {
			t.Fatal(err)
		}
	}
}
