package smartvm_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/tinyguest"
)

// A VM whose files are on another file system than the runtime directory, as those of most people
// are, and not for all to read: into a jail they come by mounts that only the VM sees, or by a
// copy.
func TestMachine_FilesElsewhere(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			elsewhere := t.TempDir()
			s := newSite(t, launcher)
			if deviceOf(t, elsewhere) == deviceOf(t, s.dir) {
				t.Skipf("%s and %s are on one file system", elsewhere, s.dir)
			}
			content := bytes.Repeat([]byte("precious"), 1<<13)
			for name, mode := range map[string]os.FileMode{
				"kernel": 0o644, "inplace": 0o600, "secret": 0o600, "public": 0o644,
				"copied": 0o600,
			} {
				data := content
				if name == "kernel" {
					data = tinyguest.Image(tinyguest.Guest{Message: "idle is up\n", Then: tinyguest.Idle})
				}
				if err := writeAs(filepath.Join(elsewhere, name), data, mode); err != nil {
					t.Fatal(err)
				}
			}
			before := mounts(t)
			h := s.open()
			spec := s.spec("idle")
			spec.BootSource.KernelImagePath = filepath.Join(elsewhere, "kernel")
			spec.Drives = []smartvm.Drive{
				{DriveID: "inplace", PathOnHost: filepath.Join(elsewhere, "inplace"), Ephemeral: new(bool)},
				{DriveID: "secret", PathOnHost: filepath.Join(elsewhere, "secret"), IsReadOnly: true},
				{DriveID: "public", PathOnHost: filepath.Join(elsewhere, "public"), IsReadOnly: true},
				{DriveID: "copied", PathOnHost: filepath.Join(elsewhere, "copied")},
			}
			m := s.started(h, spec)
			eventually(t, "the guest writes", func() bool { return strings.Contains(s.console.get(m.ID()), "idle is up\n") })
			config, err := m.VMConfig(t.Context())
			if err != nil || len(config.Drives) != len(spec.Drives) {
				t.Errorf("the VMM has %+v, %v", config.Drives, err)
			}
			if diff := cmp.Diff(before, mounts(t)); diff != "" {
				t.Errorf("the host's mounts changed:\n%s", diff)
			}
			if lent := ownerOf(t, filepath.Join(elsewhere, "inplace")) != 0; lent != (launcher == smartvm.LaunchJailed) {
				t.Errorf("the drive that is written in place is lent: %v", lent)
			}
			// The VMM reads the size of its file anew, by a name in its own root.
			for _, d := range spec.Drives {
				if err := m.UpdateDrive(t.Context(), d.DriveID, nil, true); err != nil {
					t.Error(err)
				}
			}
			s.stopAndRemove(m)
			for _, d := range spec.Drives {
				if got, err := os.ReadFile(d.PathOnHost); err != nil || !bytes.Equal(got, content) {
					t.Errorf("drive %s changed: %v", d.DriveID, err)
				}
				if owner := ownerOf(t, d.PathOnHost); owner != os.Getuid() {
					t.Errorf("drive %s belongs to %d afterwards", d.DriveID, owner)
				}
			}
		})
	}
}

// What is mounted for a jail is seen in the jail alone, also where mounts are shared as on hosts
// with systemd.
func TestMachine_MountsStayInTheJail(t *testing.T) {
	elsewhere := t.TempDir()
	s := newSite(t, smartvm.LaunchJailed)
	if deviceOf(t, elsewhere) == deviceOf(t, s.dir) {
		t.Skipf("%s and %s are on one file system", elsewhere, s.dir)
	}
	spec := s.spec("idle")
	kernel, err := os.ReadFile(spec.BootSource.KernelImagePath)
	spec.BootSource.KernelImagePath = filepath.Join(elsewhere, "kernel")
	if err := errors.Join(err, writeAs(spec.BootSource.KernelImagePath, kernel, 0o644)); err != nil {
		t.Fatal(err)
	}
	r := s.remoteWith(sharedMounts)
	before := r.ask(request{Op: "mounts"}).Text
	id := r.ask(request{Op: "create", Spec: spec}).ID
	r.ask(request{Op: "start", Ref: id})
	if diff := cmp.Diff(before, r.ask(request{Op: "mounts"}).Text); diff != "" {
		t.Errorf("the host's mounts changed:\n%s", diff)
	}
	r.ask(request{Op: "stop", Ref: id})
	r.ask(request{Op: "remove", Ref: id})
}

func deviceOf(t *testing.T, path string) uint64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Dev
}

func mounts(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A bzImage boots: its vmlinux is extracted when the VM is made, and goes with it.
func TestMachine_BzImage(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			s := newSite(t, launcher)
			s.write("bzImage", bzImage(t, tinyguest.Image(tinyguest.Guest{Message: "extracted\n", Then: tinyguest.Reboot})))
			h := s.open()
			m := s.started(h, s.spec("bzImage"))
			if exit, err := m.Wait(t.Context()); err != nil || exit.Outcome != smartvm.OutcomeExited {
				t.Errorf("it ended %+v, %v", exit, err)
			}
			if got := s.console.get(m.ID()); got != "extracted\n" {
				t.Errorf("console %q", got)
			}
			s.stopAndRemove(m)
			if err := os.Remove(s.path("bzImage")); err != nil {
				t.Error(err)
			}
		})
	}
}

// A name on the host that the VM is to have a link at, and that is somebody's, is left to him.
func TestMachine_VsockPathTaken(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := s.spec("idle")
	spec.Vsock = &smartvm.Vsock{GuestCID: 3, UDSPath: s.path("vsock")}
	s.write("vsock", []byte("foreign"))
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); !errors.Is(err, os.ErrExist) || !strings.Contains(err.Error(), s.path("vsock")) {
		t.Errorf("start: %v, want that %s exists", err, s.path("vsock"))
	}
	wantState(t, m, smartvm.Failed)
	if got, err := os.ReadFile(s.path("vsock")); err != nil || string(got) != "foreign" {
		t.Errorf("what was there is %q, %v", got, err)
	}
	if err := os.Remove(s.path("vsock")); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Errorf("start again: %v", err)
	}
	s.stopAndRemove(m)
}

// withTap runs test in a network namespace of its own, of which only its OS thread is part, with a
// TAP.
func withTap(t *testing.T, name string, test func(t *testing.T)) {
	t.Run("apart", func(t *testing.T) {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine, and the namespace with the thread
		if unix.Gettid() == os.Getpid() {
			// What /proc/self shows is the first thread's; another runs the test while this one is kept
			// busy.
			defer runtime.UnlockOSThread()
			withTap(t, name, test)
			return
		}
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Skipf("no network namespace can be made here: %v", err)
		}
		tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
		if err != nil {
			t.Skipf("no TAP can be made here: %v", err)
		}
		defer tun.Close()
		request, err := unix.NewIfreq(name)
		if err != nil {
			t.Fatal(err)
		}
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(int(tun.Fd()), unix.TUNSETIFF, request)
		if err == nil {
			err = unix.IoctlSetInt(int(tun.Fd()), unix.TUNSETPERSIST, 1)
		}
		if err != nil {
			t.Skipf("no TAP can be made here: %v", err)
		}
		if err := tun.Close(); err != nil { // the VMM is to have it
			t.Fatal(err)
		}
		test(t)
	})
}

func TestMachine_NetworkAndMetadata(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	if os.Getuid() != 0 {
		t.Skip("a network namespace takes root")
	}
	const tap = "smartvm-test0"
	h := s.open()
	spec := s.spec("idle")
	spec.NetworkInterfaces = []smartvm.NetworkInterface{{IfaceID: "eth0", HostDevName: tap, GuestMAC: "06:00:AC:10:00:02"}}
	spec.MMDS = &smartvm.MMDS{Version: "V2", NetworkInterfaces: []string{"eth0"}, IPv4Address: "169.254.169.254"}
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.SetMetadata(t.Context(), map[string]any{}); smartvm.Code(err) != "NO_CLIENT" {
		t.Errorf("metadata before the start: %v, want NO_CLIENT", err)
	}
	withTap(t, tap, func(t *testing.T) {
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantMetadata(t, m, `{}`)
		if err := m.SetMetadata(t.Context(), map[string]any{"a": map[string]any{"b": "1"}, "gone": "x"}); err != nil {
			t.Error(err)
		}
		if err := m.PatchMetadata(t.Context(), map[string]any{"a": map[string]any{"c": "2"}, "gone": nil}); err != nil {
			t.Error(err)
		}
		wantMetadata(t, m, `{"a":{"b":"1","c":"2"}}`)
		limit := &smartvm.RateLimiter{Bandwidth: &smartvm.TokenBucket{Size: 1 << 20, RefillTime: 100}}
		if err := m.UpdateNetworkInterface(t.Context(), "eth0", limit, nil); err != nil {
			t.Error(err)
		}
		config, err := m.VMConfig(t.Context())
		if err != nil || len(config.NetworkInterfaces) != 1 {
			t.Fatalf("the VMM has %+v, %v", config.NetworkInterfaces, err)
		}
		n := config.NetworkInterfaces[0]
		if n.HostDevName != tap || n.RxRateLimiter == nil || n.RxRateLimiter.Bandwidth.Size != 1<<20 ||
			n.TxRateLimiter != nil {
			t.Errorf("the VMM has %+v", n)
		}
		if err := m.UpdateNetworkInterface(t.Context(), "eth9", limit, nil); err == nil {
			t.Error("an interface that is not there was changed")
		}
	})
	s.stopAndRemove(m)
}

func wantMetadata(t *testing.T, m *smartvm.Machine, want string) {
	t.Helper()
	got, err := m.Metadata(t.Context())
	if err != nil {
		t.Error(err)
		return
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, got); err != nil || compact.String() != want {
		t.Errorf("metadata %s, %v, want %s", got, err, want)
	}
}

// A TAP that is not there is the VMM's to miss: the error says so, and the VM can be started once
// it is.
func TestMachine_NoTap(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := s.spec("idle")
	spec.NetworkInterfaces = []smartvm.NetworkInterface{{IfaceID: "eth0", HostDevName: "smartvm-none"}}
	m, err := h.Create(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	// Where the host lets the VMM make one it does; in a namespace of its own it goes with that.
	withTap(t, "smartvm-other", func(t *testing.T) {
		err := m.Start(t.Context())
		if err == nil {
			return
		}
		if me, ok := errors.AsType[*smartvm.MachineError](err); !ok || me.Stage != "PUT /network-interfaces/eth0" {
			t.Errorf("start: %v", err)
		}
		wantState(t, m, smartvm.Failed)
	})
	s.stopAndRemove(m)
}

// Statistics of a balloon whose driver the guest has not.
func TestMachine_BalloonStats(t *testing.T) {
	s := newSite(t, smartvm.LaunchDirect)
	h := s.open()
	spec := s.spec("idle")
	spec.Balloon = &smartvm.Balloon{AmountMiB: 8, StatsPollingIntervalS: 1}
	m := s.started(h, spec)
	stats, err := m.BalloonStats(t.Context())
	if err != nil || stats.TargetMiB != 8 {
		t.Errorf("statistics %+v, %v", stats, err)
	}
	if err := m.UpdateBalloonStats(t.Context(), 5); err != nil {
		t.Error(err)
	}
	config, err := m.VMConfig(t.Context())
	if err != nil || config.Balloon == nil || config.Balloon.StatsIntervalS != 5 {
		t.Errorf("the VMM has %+v, %v", config.Balloon, err)
	}
	s.stopAndRemove(m)
}
