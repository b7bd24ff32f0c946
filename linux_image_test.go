package smartvm_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/give"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// makeImages makes images of what other tools made, in a data directory.
func makeImages(t *testing.T, dir string) {
	t.Helper()
	h, err := smartvm.Open(smartvm.Options{RuntimeDir: filepath.Join(t.TempDir(), "runtime"), DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	minimal := testenv.Fixture(t, fixtures.Minimal)
	unpacked, layout := filepath.Join(work, "unpacked"), filepath.Join(work, "layout")
	if err := os.Mkdir(unpacked, 0o755); err != nil {
		t.Fatal(err)
	}
	umoci := testenv.Fixture(t, fixtures.Umoci)
	image1 := layout + ":v1"
	for _, command := range [][]string{
		{"tar", "-xf", minimal, "-C", unpacked},
		{umoci, "init", "--layout", layout},
		{umoci, "new", "--image", image1},
		{umoci, "insert", "--image", image1, unpacked, "/"},
		{umoci, "insert", "--image", image1, "--whiteout", "/mnt"},
		{
			umoci, "config", "--image", image1, "--config.entrypoint", "/bin/sh", "--config.entrypoint", "-c",
			"--config.cmd", "echo ran as $(id -un) in $PWD with $COLOUR", "--config.env", "COLOUR=blue",
			"--config.user", "nobody",
			"--config.workingdir", "/tmp",
		},
		{
			testenv.Fixture(t, fixtures.Skopeo), "copy", "-q", "--insecure-policy", "oci:" + image1,
			"docker-archive:" + work + "/v1.tar:app:v1",
		},
		{testenv.Fixture(t, fixtures.Mksquashfs), unpacked, work + "/minimal.squashfs", "-quiet", "-no-progress"},
	} {
		if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
	for name, o := range map[string]image.ImportOptions{
		image.DefaultKernel: {
			Kernel:  testenv.Fixture(t, fixtures.GuestKernel),
			Modules: testenv.Fixture(t, fixtures.GuestModules),
		},
		"minimal":  {Rootfs: minimal},
		"squashed": {Rootfs: work + "/minimal.squashfs"},
		"debian": {
			Rootfs:   testenv.Fixture(t, fixtures.Debian),
			BootArgs: image.QuietBootArgs + " systemd.show_status=1",
		},
		"openrc": {Rootfs: testenv.Fixture(t, fixtures.OpenRC)},
		"docker": {Rootfs: testenv.Fixture(t, fixtures.Docker)},
	} {
		o.Name = name
		if _, err := images.Import(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	umociImage, err := images.Pull(t.Context(), "oci:"+image1, "app")
	if err != nil {
		t.Fatal(err)
	}
	skopeoImage, err := images.Pull(t.Context(), "docker-archive:"+work+"/v1.tar", "app-archive")
	if err != nil {
		t.Fatal(err)
	}
	if umociImage.Root != skopeoImage.Root || umociImage.Root == "" {
		t.Errorf("the same layers from a layout and an archive are %q and %q", umociImage.Root, skopeoImage.Root)
	}
}

// imageHost is a host with those images.
func imageHost(t *testing.T, launcher smartvm.Launcher) *smartvm.Host {
	t.Helper()
	testenv.Require(t, testenv.KVM, testenv.LinuxGuest)
	opts := smartvm.Options{
		RuntimeDir: filepath.Join(t.TempDir(), "runtime"), DataDir: os.Getenv(testenv.DataVariable),
		FirecrackerBinary: testenv.Firecracker(t), Launcher: launcher,
	}
	if opts.DataDir == "" {
		opts.DataDir = filepath.Join(t.TempDir(), "data")
		makeImages(t, opts.DataDir)
	}
	if launcher == smartvm.LaunchJailed {
		testenv.Require(t, testenv.Root)
		opts.JailerBinary = testenv.Jailer(t)
	}
	testenv.NoLeaks(t, opts.RuntimeDir)
	h, err := smartvm.Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Of a test that failed.
		all, err := h.Machines(context.Background())
		for _, m := range all {
			_, stopErr := m.Stop(context.Background(), smartvm.StopOptions{})
			t.Logf("removing VM %s: %v, %v, %v", m.ID(), err, stopErr, m.Remove(context.Background()))
		}
		removeStrays(t, h)
		checkUsers(t, h)
		if err := errors.Join(h.Close(), os.RemoveAll(filepath.Dir(opts.RuntimeDir))); err != nil {
			t.Error(err)
		}
	})
	return h
}

// runImage runs a VM to its end and returns its console.
func runImage(t *testing.T, h *smartvm.Host, spec smartvm.Spec) string {
	t.Helper()
	spec.MachineConfig = linuxMachine(256)
	console := new(transcript)
	exit, err := h.Run(patient(t), spec, smartvm.RunOptions{Console: console})
	if err != nil {
		t.Fatalf("%v\n%s", err, console)
	}
	if exit.Outcome != smartvm.OutcomeExited || exit.Code != 0 {
		t.Errorf("ended %+v, want exited with 0\n%s", exit, console)
	}
	return console.String()
}

func wantText(t *testing.T, console string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(console, text) {
			t.Errorf("console lacks %q:\n%s", text, console)
		}
	}
}

// An image that other tools made runs what it says, or what it is told, as whom it says.
func TestLinuxImage_OCI(t *testing.T) {
	for _, tt := range []struct {
		launcher smartvm.Launcher
		spec     smartvm.Spec
		want     []string
	}{
		{smartvm.LaunchDirect, smartvm.Spec{Image: "app"}, []string{"ran as nobody in /tmp with blue"}},
		{smartvm.LaunchJailed, smartvm.Spec{
			Image: "app-archive", Name: "box",
			Command: []string{"echo I am $(id -un) on $(hostname), $COLOUR and $SIZE; ls -d /mnt; exit 3"},
			User:    "root", Env: []string{"SIZE=large", "COLOUR=red"},
		}, []string{"I am root on box, red and large", "/mnt: No such file", "exit code 3"}},
	} {
		t.Run(tt.spec.Image, func(t *testing.T) {
			wantText(t, runImage(t, imageHost(t, tt.launcher), tt.spec), tt.want...)
		})
	}
}

// What a guest writes is its own, and gone with it; with Keep it is there for the next. The image
// never changes.
func TestLinuxImage_Writes(t *testing.T) {
	h := imageHost(t, smartvm.LaunchJailed)
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	root := imageRoot(t, h, "minimal")
	before := digestFile(t, root)
	script := func(scratch *smartvm.Scratch) smartvm.Spec {
		return smartvm.Spec{Image: "minimal", Scratch: scratch, Command: []string{
			"/bin/sh", "-c", "cat /note || echo none; echo mine > /note; rm /etc/profile; sync",
		}}
	}
	for _, tt := range []struct {
		scratch *smartvm.Scratch
		want    string
	}{
		{nil, "none"},
		{nil, "none"},
		{&smartvm.Scratch{SizeMiB: 64, Keep: "kept"}, "none"},
		{&smartvm.Scratch{Keep: "kept"}, "mine"},
	} {
		wantText(t, runImage(t, h, script(tt.scratch)), tt.want)
	}
	if digestFile(t, root) != before {
		t.Error("the image has changed")
	}
	if err := images.Verify(t.Context(), "minimal"); err != nil {
		t.Error(err)
	}
	volumes, err := h.Volumes()
	if err != nil {
		t.Fatal(err)
	}
	if err := volumes.Remove("kept", volume.Options{}); err != nil {
		t.Error(err)
	}
}

func imageRoot(t *testing.T, h *smartvm.Host, name string) string {
	t.Helper()
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	b, err := images.Boot(t.Context(), name, image.BootOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Release(); err != nil {
		t.Fatal(err)
	}
	return b.Root
}

func digestFile(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(data)
}

// A distribution boots as on a machine of its own and has its secrets before its init begins.
// Programs run in it, also when the agent was killed, and it shuts down when asked. All of that in
// one guest, as none takes longer to boot.
func TestLinuxImage_Systemd(t *testing.T) {
	h := imageHost(t, smartvm.LaunchJailed)
	// It is process 1 though it is a command: systemd is none where it is not.
	spec := smartvm.Spec{
		Image: "debian", Name: "box", MachineConfig: linuxMachine(512),
		Command: []string{"/lib/systemd/systemd", "--log-target=journal"},
	}
	addSecrets(t, &spec)
	m := startGuest(t, h, spec)
	inGuest(t, m, smartvm.Cmd{Args: []string{"echo", "first"}}, 0, "first\n") // while it boots, which more would delay
	awaitLog(t, m, "Multi-User")
	awaitLog(t, m, "box login:")
	checkGuest(t, m, "root")
	checkSecrets(t, m, "cat /run/secrets/key; tr '\\0' '\\n' </proc/1/environ | grep -c 'PASSWORD="+secretValue+"'",
		secretValue+"\n1\n")
	log, err := os.ReadFile(m.ConsoleLog())
	if err != nil || bytes.Contains(log, []byte("FAILED")) {
		t.Errorf("a unit failed: %v\n%s", err, log)
	}
	// What exec has started is in systemd's own group, which cannot be frozen for a snapshot: it is
	// moved.
	told(t, m, "sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >/run/sleeper")
	sn, err := m.Snapshot(patient(t), smartvm.SnapshotOptions{})
	if err != nil || len(sn.Warnings) > 0 {
		t.Fatalf("%+v, %v", sn, err)
	}
	if err := h.RemoveSnapshot(t.Context(), sn.ID, false); err != nil {
		t.Error(err)
	}
	if group := told(t, m, "cat /proc/$(cat /run/sleeper)/cgroup"); group != "0::/smartvm" {
		t.Errorf("while the snapshot was made it was in %s", group)
	}
	checkRestart(t, m)
	askToEnd(t, m, smartvm.AgentStop)
	checkEnded(t, m)
}

// So does one with another init.
func TestLinuxImage_OpenRC(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	m := bootGuest(t, h, smartvm.Spec{Image: "openrc", Name: "rc", MachineConfig: linuxMachine(512)})
	if got := told(t, m,
		"until rc-status -r | grep default; do sleep 1; done; cat /proc/1/comm; hostname"); got != "default\ninit\nrc" {
		t.Errorf("got %q", got)
	}
	checkRestart(t, m)
	shutDown(t, m, smartvm.AgentStop)
}

// While a VM uses an image, it cannot be removed; once it is gone, it can.
func TestLinuxImage_InUse(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	m, err := h.Create(t.Context(),
		smartvm.Spec{Image: "squashed", MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}})
	if err != nil {
		t.Fatal(err)
	}
	var inUse *image.InUseError
	if _, err := images.Remove(t.Context(), "squashed", false); !errors.As(err, &inUse) || inUse.By[0] != m.RuntimeDir() {
		t.Errorf("remove: %v, want that %s uses it", err, m.RuntimeDir())
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	in, err := images.Inspect("squashed")
	if err != nil || len(in.UsedBy) > 0 {
		t.Errorf("%+v, %v", in, err)
	}
}

// wantModules has a guest of a kernel load a module that is not in its initramfs, and its kernel
// another by itself: the image's modprobe is not where the kernel looks for one.
func wantModules(t *testing.T, h *smartvm.Host, kernel string) {
	t.Helper()
	const script = `test -e /dev/net/tun || modprobe tun && tunctl -t tap9 && grep /lib/modules /proc/mounts
test -e /sbin/modprobe || ip link add auto9 type dummy && ip link show auto9
touch /lib/modules/$(uname -r)/x 2>/dev/null || echo not writable
modprobe nonesuch 2>/dev/null || echo no such one`
	wantText(t, runImage(t, h, smartvm.Spec{Image: "minimal", Kernel: kernel, Command: []string{"sh", "-c", script}}),
		"tap9", "auto9: <", "/lib/modules/", " ro,", "not writable", "no such one")
}

// Guests have all modules of a distribution's kernel whose package has just been unpacked, whose
// lists depmod has not made.
func TestLinuxImage_Modules(t *testing.T) {
	wantModules(t, imageHost(t, smartvm.LaunchDirect), "")
	wantText(t, runImage(t, imageHost(t, smartvm.LaunchJailed), smartvm.Spec{
		Image: "minimal", Command: []string{"sh", "-c", "modprobe tun && grep -w tun /proc/misc"},
	}), "tun")
}

// A guest runs containers: the kernel loads by itself what firewalls, bridges and overlays need,
// and groups can be made. The container has an address on a bridge, and its memory is limited. A VM
// becomes an image while it runs, and when it has ended; either has what was written, and is nobody
// in particular.
func TestLinuxCommit(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	m := startGuest(t, h,
		smartvm.Spec{
			Image: "minimal", Name: "builder", Command: sh("while :; do sleep 1; done"),
			MachineConfig: linuxMachine(256),
		})
	commit := func(name string) {
		t.Helper()
		line := `["sh", "-c", "echo got $(cat /opt/app/f).; ls /etc/os-release /lost+found 2>&1; true"]`
		made, err := give.Commit(t.Context(), images, give.CommitOptions{
			Image: "minimal", Root: m.Spec().Drives[0].PathOnHost, Name: name, Read: m.ReadScratch,
			Change: config.Change{Cmd: &line},
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if _, err := images.Remove(context.WithoutCancel(t.Context()), made.Name, false); err != nil {
				t.Error(err)
			}
		})
	}
	inGuest(t, m, asRoot("mkdir -p /opt/app; echo one >/opt/app/f; rm /etc/os-release"), 0, "")
	commit("committed:1")
	inGuest(t, m, asRoot("cat /opt/app/f; echo two >>/opt/app/f"), 0, "one\n") // it goes on
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{Timeout: time.Minute}); err != nil {
		t.Fatal(err)
	}
	commit("committed:2")
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	for name, want := range map[string]string{"committed:1": "got one.", "committed:2": "got one two."} {
		text := runImage(t, h, smartvm.Spec{Image: name, MachineConfig: linuxMachine(256)})
		wantText(t, text, want)
		wantText(t, text, "/etc/os-release: No such file")
		wantText(t, text, "/lost+found: No such file")
	}
}

func TestLinuxImage_Docker(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	volumes, err := h.Volumes()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := volumes.Volumes().Remove("containers", volume.Options{}); err != nil {
			t.Error(err)
		}
	})
	m := bootGuest(t, h, smartvm.Spec{
		Image: "docker", Command: sh(idle), MachineConfig: linuxMachine(512),
		// it lays overlays over no overlay
		NamedVolumes: []smartvm.NamedVolume{{Name: "containers", Target: "/var/lib/docker", SizeMiB: 128}},
	})
	if got := told(t, m,
		"grep -c '^nf_tables ' /proc/modules; iptables -t nat -L; grep -c '^nf_tables ' /proc/modules"); !strings.HasPrefix(
		got, "0\nChain PREROUTING") || !strings.HasSuffix(got, "\n1") {
		t.Errorf("the firewall is %q", got)
	}
	minimal, err := os.Open(testenv.Fixture(t, fixtures.Minimal))
	if err != nil {
		t.Fatal(err)
	}
	defer minimal.Close()
	// Docker gives a containerd that it starts itself 15 seconds.
	const script = `exec 2>&1
await() { until grep -q "$1" /log; do sleep 0.5; kill -0 $! || break; done; }
containerd >/log 2>&1 & await 'successfully booted'
dockerd --containerd /run/containerd/containerd.sock >>/log 2>&1 & await 'API listen'
docker import - tiny && docker run --rm --memory 32m tiny sh -c 'cat /sys/fs/cgroup/memory.max; ip addr show eth0' || cat /log`
	var out bytes.Buffer
	begun := time.Now()
	exit, err := m.Exec(patient(t), smartvm.Cmd{Args: sh(script), Stdin: minimal, Stdout: &out})
	t.Logf("a container ran after %v", time.Since(begun).Round(time.Second))
	if text := out.String(); err != nil || exit.Code != 0 || !strings.Contains(text, "\n33554432\n") ||
		!strings.Contains(text, "inet 172.") {
		t.Errorf("the container ended %+v, %v: %s", exit, err, text)
	}
	if driver := told(t, m, "docker info -f '{{.Driver}}'"); driver != "overlay2" {
		t.Errorf("its root is of %s", driver)
	}
	endGuest(t, m)
}

// This machine's own kernel boots guests, as the package has it. In the lab that is the
// distribution's generic one.
func TestLinuxImage_HostKernel(t *testing.T) {
	if !testenv.InLab() {
		t.Skip("needs: the lab, whose kernel is known")
	}
	h := imageHost(t, smartvm.LaunchDirect)
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimSpace(string(release))
	src, err := os.Open(testenv.Fixture(t, fixtures.LabKernel))
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create("/boot/vmlinux-" + name) // of the lab: nobody else sees it
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
	// Its modules are many: they are stored before any guest's patience counts.
	images, err := h.Images()
	if err != nil {
		t.Fatal(err)
	}
	b, err := images.Boot(t.Context(), "minimal", image.BootOptions{Kernel: image.HostKernel})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Release(); err != nil {
		t.Fatal(err)
	}
	console := runImage(t, h, smartvm.Spec{Image: "minimal", Kernel: image.HostKernel, Command: []string{"uname", "-r"}})
	if wantText(t, console, name); strings.Contains(console, "insert module") {
		t.Errorf("a module was not to be loaded:\n%s", console)
	}
	wantModules(t, h, image.HostKernel)
}
