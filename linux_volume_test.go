package smartvm_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/image/volume"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/spec"
)

// secretValue must be nowhere on the host but in the files that the user has it in.
const secretValue = "correct horse battery staple"

// addSecrets gives a guest secrets, which it has before its command, or the image's own init,
// begins.
func addSecrets(t *testing.T, s *smartvm.Spec) (key string) {
	t.Helper()
	dir := t.TempDir()
	key, env := filepath.Join(dir, "key"), filepath.Join(dir, "env")
	if err := errors.Join(os.WriteFile(key, []byte(secretValue+"\n"), 0o600),
		os.WriteFile(env, []byte("PASSWORD="+secretValue+"\nSHOWN=file\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	s.Env, s.EnvFiles = []string{"SHOWN=flag"}, []string{env}
	s.Secrets = []smartvm.Secret{{Name: "key", Path: key}, {Name: "other", Path: "/dev/null"}}
	return key
}

func asRoot(script string) smartvm.Cmd { return smartvm.Cmd{Args: sh(script), User: "root"} }

// checkSecrets wants a guest, and nobody else, to have the secrets. The script says in the guest
// what its first program had.
func checkSecrets(t *testing.T, m *smartvm.Machine, script, want string) {
	t.Helper()
	inGuest(t, m,
		asRoot("stat -c '%a %U %F' /run/secrets/key /run/secrets/other; touch /run/secrets/more 2>/dev/null || echo read-only; grep -c '/run/secrets tmpfs' /proc/mounts"),
		0, "400 root regular file\n400 root regular empty file\nread-only\n1\n")
	inGuest(t, m, asRoot("echo $PASSWORD $SHOWN"), 0, secretValue+" flag\n")
	inGuest(t, m, asRoot(script), 0, want)
	all, err := m.GuestProcesses(t.Context())
	if i := slices.IndexFunc(all, func(p smartvm.GuestProcess) bool {
		return p.PID == 1
	}); err != nil || i < 0 || all[i].User != "root" || all[i].Memory == 0 {
		t.Errorf("processes %+v, %v", all, err)
	}
	if out, err := exec.CommandContext(t.Context(), "grep", "-rlF", secretValue,
		m.RuntimeDir()).CombinedOutput(); err == nil {
		t.Errorf("the secret stands in %s", out)
	}
}

// Each start reads secrets anew. For a guest with an init of its own see TestLinuxImage_Systemd.
func TestLinuxSecrets(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	spec := smartvm.Spec{
		Image: "minimal", MachineConfig: linuxMachine(256),
		Command: sh("cat /run/secrets/key >/run/seen; echo $PASSWORD $SHOWN >>/run/seen; while :; do sleep 1; done"),
	}
	key := addSecrets(t, &spec)
	m := startGuest(t, h, spec)
	checkSecrets(t, m, "cat /run/seen", secretValue+"\n"+secretValue+" flag\n")
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
		t.Error(err)
	}
	// The next start: what is in the file by then, or an error.
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("start without a secret: %v", err)
	}
	if err := os.WriteFile(key, []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	inGuest(t, m, asRoot("cat /run/secrets/key"), 0, "another")
	endGuest(t, m)
}

// volumeSource makes a directory of the host for volumes.
func volumeSource(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "src")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "sub/gone"), 0o755), os.WriteFile(filepath.Join(dir, "keep"), []byte("keep"), 0o640),
		os.WriteFile(filepath.Join(dir, "run"), []byte("#!/bin/sh\necho ran\n"), 0o755),
		os.WriteFile(filepath.Join(dir, "sub/gone/f"), nil, 0o644),
		os.WriteFile(filepath.Join(dir, "both"), []byte("old"), 0o644),
		os.Link(filepath.Join(dir, "run"), filepath.Join(dir, "sub/run2")),
		os.Symlink("keep", filepath.Join(dir, "link")), os.WriteFile(filepath.Join(dir, "conf"), []byte("conf"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	return dir
}

func wantFiles(t *testing.T, dir string, want map[string]string) {
	t.Helper()
	for name, text := range want {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if text == "" && !errors.Is(err, fs.ErrNotExist) || text != "" && (err != nil || string(got) != text) {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, text)
		}
	}
}

// A guest has copies of the host's directories and files; what it changes comes back when that was
// asked for, whatever ended it.
func TestLinuxVolumes(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			h := imageHost(t, launcher)
			src, other := volumeSource(t), volumeSource(t)
			spec := smartvm.Spec{
				Image: "minimal", Command: sh("while :; do sleep 1; done"), MachineConfig: linuxMachine(256),
				Volumes: []smartvm.Volume{
					{Source: src, Target: "/work/src", Sync: true},
					{Source: other, Target: "/made/here", ReadOnly: true},
					{Source: src, Target: "/made/here/nested/deep"},
					{Source: filepath.Join(other, "conf"), Target: "/etc/app/conf", Sync: true},
				},
			}
			m := startGuest(t, h, spec)
			inGuest(t, m, asRoot("cd /work/src; cat keep link conf; ./run; stat -c '%a %h' keep run; readlink link"), 0,
				"keepkeepconfran\n640 1\n755 2\nkeep\n")
			inGuest(t, m,
				asRoot("cd /made/here; cat keep; (echo x >keep) 2>/dev/null || echo read-only; cat nested/deep/keep; echo mine >nested/deep/keep; cat nested/deep/keep"), 0,
				"keepread-only\nkeepmine\n")
			inGuest(t, m,
				asRoot("cat /etc/app/conf; echo guest >/etc/app/conf; ls -d /run/smartvm 2>/dev/null; grep -c ' /made/here' /proc/mounts"), 0, "conf2\n")
			// Both sides write.
			if err := errors.Join(os.WriteFile(filepath.Join(src, "both"), []byte("host"), 0o644),
				os.WriteFile(filepath.Join(src, "late"), []byte("host"), 0o644)); err != nil {
				t.Fatal(err)
			}
			inGuest(t, m,
				asRoot("cd /work/src; ls late 2>&1; echo guest >both; rm -r sub conf; mkdir sub; echo new >sub/new; chmod 600 keep; ln -sf /etc/passwd link; mkfifo pipe; mknod disk b 8 0; "+
					"cp /bin/busybox suid; chmod 4755 suid; mkdir -p a/b; echo deep >a/b/c; sync"), 0,
				"ls: late: No such file or directory\n")
			if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
				t.Fatal(err)
			}
			wantFiles(t, src, map[string]string{
				"both": "host", "late": "host", "both.guest-" + m.ID(): "guest\n", "sub/new": "new\n", "a/b/c": "deep\n",
				"sub/gone/f": "", "sub/run2": "", "conf": "", "pipe": "", "disk": "", "run": "#!/bin/sh\necho ran\n",
			})
			wantFiles(t, other, map[string]string{"conf": "guest\n", "keep": "keep"})
			for name, mode := range map[string]fs.FileMode{"suid": 0o755, "keep": 0o600} {
				if fi, err := os.Lstat(filepath.Join(src, name)); err != nil || fi.Mode() != mode {
					t.Errorf("%s: %v, %v", name, fi, err)
				}
			}
			if to, err := os.Readlink(filepath.Join(src, "link")); to != "/etc/passwd" {
				t.Errorf("link leads to %q, %v", to, err)
			}
			// The next start begins with what the host has by then, and nothing else.
			if err := m.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			inGuest(t, m, asRoot("cd /work/src; cat both late; ls suid; cat /made/here/nested/deep/keep"), 0,
				"hosthostsuid\nkeep")
			if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := m.Remove(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// The supervisor of a VM may be killed: what its guest has changed is there all the same, and comes
// back with the next who clears up.
func TestLinuxVolumes_Killed(t *testing.T) {
	h := imageHost(t, smartvm.LaunchJailed)
	src := volumeSource(t)
	s := &site{t: t, options: smartvm.Options{
		RuntimeDir: h.RuntimeDir(), DataDir: os.Getenv(testenv.DataVariable), FirecrackerBinary: testenv.Firecracker(t),
		JailerBinary: testenv.Jailer(t), Launcher: smartvm.LaunchJailed,
	}}
	keeper := s.remote()
	id := keeper.ask(request{Op: "create", Spec: smartvm.Spec{
		Image: "minimal", Command: sh("while :; do sleep 1; done"), MachineConfig: linuxMachine(256),
		Volumes: []smartvm.Volume{{Source: src, Target: "/src", Sync: true}},
	}}).ID
	keeper.ask(request{Op: "start", Ref: id})
	m, err := h.Machine(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	inGuest(t, m, asRoot("echo guest >/src/keep; sync"), 0, "")
	keeper.kill()
	in, err := m.Inspect(t.Context())
	if err != nil || len(in.PIDs) == 0 {
		t.Fatalf("%+v, %v", in, err)
	}
	// The VM is killed too, and nobody sees it.
	for _, pid := range in.PIDs {
		if p, err := os.FindProcess(pid); err != nil || p.Kill() != nil {
			t.Fatalf("kill %d: %v", pid, err)
		}
	}
	// While the directory is away nothing is lost: the VM cannot be removed.
	if err := os.Rename(src, src+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Stop(t.Context(), smartvm.StopOptions{}); err == nil {
		t.Error("copied back to nowhere")
	}
	if err := m.Remove(t.Context()); err == nil || !strings.Contains(smartvm.Hint(err), "--discard") {
		t.Errorf("removed with what is not copied back: %v, hint %q", err, smartvm.Hint(err))
	}
	if err := os.Rename(src+".away", src); err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, src, map[string]string{"keep": "guest\n", "both": "old"})
}

// So does what a VM has changed whose life was one call's: it is ended with that, but not before.
func TestLinuxVolumes_RunKilled(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	src := volumeSource(t)
	s := &site{t: t, options: smartvm.Options{
		RuntimeDir: h.RuntimeDir(), DataDir: os.Getenv(testenv.DataVariable), FirecrackerBinary: testenv.Firecracker(t),
		Launcher: smartvm.LaunchDirect,
	}}
	keeper := s.remote()
	keeper.send(request{Op: "run", Spec: smartvm.Spec{
		ID: "attached", Image: "minimal", Command: sh("echo guest >/src/keep; sync; echo written; while :; do sleep 1; done"),
		MachineConfig: linuxMachine(256),
		Volumes:       []smartvm.Volume{{Source: src, Target: "/src", Sync: true}},
	}})
	console := filepath.Join(h.RuntimeDir(), "attached", "console.log")
	for end := time.Now().Add(linuxPatience); ; time.Sleep(10 * time.Millisecond) {
		if text, err := os.ReadFile(console); err == nil && strings.Contains(string(text), "written") {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the guest has not written anything")
		}
	}
	keeper.kill()
	report, err := h.Recover(t.Context())
	if err != nil || !slices.Equal(report.Removed, []string{"attached"}) {
		t.Errorf("%+v, %v", report, err)
	}
	wantFiles(t, src, map[string]string{"keep": "guest\n", "both": "old"})
}

// A named volume gets what the image has in its place, outlives the VM, and is in a snapshot as it
// was then.
func TestLinuxNamedVolumes(t *testing.T) {
	for _, launcher := range []smartvm.Launcher{smartvm.LaunchDirect, smartvm.LaunchJailed} {
		t.Run(string(launcher), func(t *testing.T) {
			h := imageHost(t, launcher)
			name := "named-" + string(launcher)
			vm := func(readOnly bool) smartvm.Spec {
				return smartvm.Spec{
					Image: "minimal", Command: sh("while :; do sleep 1; done"), MachineConfig: linuxMachine(256),
					Volumes: []smartvm.Volume{{Source: volumeSource(t), Target: "/work", ReadOnly: true}},
					NamedVolumes: []smartvm.NamedVolume{
						{Name: name, Target: "/etc", SizeMiB: 64, ReadOnly: readOnly},
						{Name: name + "-empty", Target: "/work/deep/empty", SizeMiB: 64},
					},
				}
			}
			volumes, err := h.Volumes()
			if err != nil {
				t.Fatal(err)
			}
			removeVolumes := func() {
				for _, n := range []string{name, name + "-empty"} {
					if err := volumes.Volumes().Remove(n, volume.Options{}); err != nil && !errors.Is(err, fs.ErrNotExist) {
						t.Error(err)
					}
				}
			}
			t.Cleanup(removeVolumes)
			const look = "cd /etc; stat -c '%a %U' .; head -n 1 os-release; test -e lost+found || echo alone; cat /etc/mine /work/deep/empty/f 2>/dev/null; ls -d /run/smartvm 2>/dev/null; grep -c ' /etc ext4' /proc/mounts"
			m := startGuest(t, h, vm(false))
			inGuest(t, m, asRoot(look), 0, "755 root\nID=smartvm-minimal\nalone\n1\n")
			inGuest(t, m, asRoot("echo one >/etc/mine; echo two >/work/deep/empty/f; cat /work/keep; sync"), 0, "keep")
			endGuest(t, m)

			m = startGuest(t, h, vm(true))
			inGuest(t, m, asRoot(look), 0, "755 root\nID=smartvm-minimal\nalone\none\ntwo\n1\n")
			inGuest(t, m, asRoot("(echo x >/etc/mine) 2>/dev/null || echo read-only; echo three >>/work/deep/empty/f; sync"), 0,
				"read-only\n")
			sn, err := m.Snapshot(t.Context(), smartvm.SnapshotOptions{Name: name})
			if err != nil {
				t.Fatal(err)
			}
			inGuest(t, m, asRoot("echo four >>/work/deep/empty/f"), 0, "")
			restored, err := h.Restore(t.Context(), sn.ID, smartvm.RestoreOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if err := restored.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			inGuest(t, restored, asRoot("cat /work/deep/empty/f"), 0, "two\nthree\n")
			endGuest(t, restored)
			inGuest(t, m, asRoot("cat /work/deep/empty/f"), 0, "two\nthree\nfour\n")
			endGuest(t, m)
			if err := h.RemoveSnapshot(t.Context(), name, false); err != nil {
				t.Error(err)
			}
		})
	}
}

// What a guest deletes on its drives takes nothing on the host any more: at once where its VMM
// offers discard, else once the volume is trimmed.
func TestLinuxDiscard(t *testing.T) {
	h := imageHost(t, smartvm.LaunchDirect)
	const name, written, rest = "discarded", 64 << 20, 8 << 20
	volumes, err := h.Volumes()
	if err != nil {
		t.Fatal(err)
	}
	m := startGuest(t, h, smartvm.Spec{
		Image: "minimal", Command: sh("while :; do sleep 1; done"), MachineConfig: linuxMachine(256),
		NamedVolumes: []smartvm.NamedVolume{{Name: name, Target: "/data", SizeMiB: 256}},
	})
	t.Cleanup(func() {
		if err := volumes.Volumes().Remove(name, volume.Options{}); err != nil {
			t.Error(err)
		}
	})
	i, err := m.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	v, err := firecracker.ParseVersion(i.FirecrackerVersion)
	if err != nil {
		t.Fatal(err)
	}
	offered := v.AtLeast(firecracker.Version{Major: 1, Minor: 17})
	used := func() map[string]int64 {
		disk, err := volumes.Volumes().Find(name)
		scratch, statErr := os.Stat(i.Staged[spec.ScratchDrive].Path)
		if err := errors.Join(err, statErr); err != nil {
			t.Fatal(err)
		}
		return map[string]int64{"volume": disk.Used, "scratch": scratch.Sys().(*syscall.Stat_t).Blocks * 512}
	}
	empty := used()
	inGuest(t, m, asRoot("head -c 67108864 /dev/zero | tee /data/big >/big; sync"), 0, "")
	full := used()
	inGuest(t, m, asRoot("rm /data/big /big; echo kept >/data/kept; sync"), 0, "")
	for drive := range full {
		if full[drive] < empty[drive]+written {
			t.Errorf("%s: %d bytes were written, and it takes %d, before %d", drive, written, full[drive], empty[drive])
		}
		// the guest's kernel does it when the deletion is on the disk
		for ctx := patient(t); offered && used()[drive] > empty[drive]+rest; {
			if ctx.Err() != nil {
				t.Fatalf("%s: it takes %d bytes still, before %d", drive, used()[drive], empty[drive])
			}
			inGuest(t, m, asRoot("sync"), 0, "")
		}
	}
	deleted := used()
	t.Logf("Firecracker %s: empty %v, written %v, deleted %v", v, empty, full, deleted)
	if !offered && deleted["volume"] < full["volume"] {
		t.Errorf("without discard it takes %v, before %v", deleted, full)
	}
	inGuest(t, m, asRoot("fstrim /data 2>/dev/null && echo trimmed; cat /data/kept"), 0,
		map[bool]string{true: "trimmed\n"}[offered]+"kept\n")
	endGuest(t, m)
	disk, err := volumes.Volumes().Find(name)
	if err != nil {
		t.Fatal(err)
	}
	freed, err := volume.Trim(t.Context(), disk.Path, volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	after, err := volumes.Volumes().Find(name)
	t.Logf("trimmed: %d bytes, freed %d", after.Used, freed)
	if err != nil || after.Used > empty["volume"]+rest || after.Used+freed != disk.Used {
		t.Errorf("trimmed, it takes %d bytes, %v, before %d; freed %d", after.Used, err, disk.Used, freed)
	}
}
