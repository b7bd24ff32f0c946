package guestagent_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"push.rocks/smartvm/guest"
)

// over is the usual Boot: a root and a scratch.
func over(rootType string, command ...string) guest.Boot {
	return guest.Boot{RootDevice: "/dev/vda", RootType: rootType, ScratchDevice: "/dev/vdb", Command: command}
}

// inOrder wants what a writable ext4 has whose journal is finished.
func inOrder(t *testing.T, path string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// s_feature_incompat of the superblock at 1024, and its flag of a journal to be played back.
	if binary.LittleEndian.Uint32(data[1024+0x60:])&4 != 0 {
		t.Error("the file system was not made read-only at the end")
	}
}

const report = `echo "user $(id -u) $(id -g) $(id -G)"
echo "env $A $HOME $TERM $PATH"
echo "cwd $(pwd)"
echo "host $(hostname) $(cat /etc/hostname)"
echo "tty $(tty)" >/dev/stdout
echo "kept $(cat kept 2>/dev/null)"
echo "mounts" $(grep -c . /proc/mounts) $(grep -E '^/dev/vd|^[^ ]+ /(lower|scratch)' /proc/mounts)
echo "root" $(ls /)
echo "parent $PPID"
echo "lo $(cat /sys/class/net/lo/flags)"
echo "cgroup $(grep -c ' /sys/fs/cgroup cgroup2 ' /proc/mounts)"
[ -e /dev/fd/0 ] && echo "descriptors"
[ $(id -u) = 0 ] && echo second >kept
exit 7
`

// A command is run as whom the configuration says. What one boot leaves in the scratch is there in
// the next. How a guest that is root's writes over a squashfs, the root package's TestLinuxGuest
// shows.
func TestLinuxGuest_Command(t *testing.T) {
	for name, c := range map[string]struct {
		makeRoot func(*testing.T) string
		listing  string
		users    []string // "" is root
	}{
		guest.Ext4:     {image{"report": report}.ext4, "bin dev etc home proc report run srv sys tmp", []string{"", "web"}},
		guest.Squashfs: {image{"report": report}.squashfs, "bin dev etc home proc report run srv sys tmp", []string{"web"}},
	} {
		t.Run(name, func(t *testing.T) {
			watch(t)
			root, upper := c.makeRoot(t), scratch(t)
			before, err := os.ReadFile(root)
			if err != nil {
				t.Fatal(err)
			}
			b := over(name, "sh", "/report")
			b.Hostname, b.WorkingDir = "web-1", "/srv/new"
			b.Env = []string{"A=0", "A=1", "TERM=vt100"}
			kept := ""
			for _, user := range c.users {
				who, home := "user 0 0 0", "/root"
				if user == "web" {
					who, home = "user 1000 1001 1001 1002", "/home/web"
				}
				b.User = user
				console := start(t, drive{path: root}, drive{upper, true}, drive{path: config(t, b)}).wait(t)
				has(t, console, who, "env 1 "+home+" vt100 /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
					"cwd /srv/new", "host web-1 web-1", "tty /dev/console", "kept "+kept, "parent 1", "lo 0x9", "cgroup 1",
					"descriptors",
					"root "+c.listing, "smartvm: command ended with exit code 7")
				kept = "second" // by root
				if !regexp.MustCompile(`(?m)^mounts \d+$`).MatchString(console) {
					t.Errorf("the image sees its layers:\n%s", console)
				}
			}
			inOrder(t, upper)
			if after, err := os.ReadFile(root); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the root changed: %v", err)
			}
		})
	}
}

// The order of drives does not matter, and the root may be the only one.
func TestLinuxGuest_NoScratch(t *testing.T) {
	const script = "echo new >/etc/new; echo wrote $(cat /etc/new) $(id -u):$(id -g); exit 0"
	for name, writable := range map[string]bool{"Writable": true, "ReadOnly": false} {
		t.Run(name, func(t *testing.T) {
			watch(t)
			root := image{}.ext4(t)
			b := guest.Boot{
				RootDevice: "/dev/vdb", RootType: guest.Ext4, Command: []string{"/bin/sh", "-c", script},
				User: "12:logs",
			}
			if writable {
				b.User = "" // the image is root's
			}
			console := start(t, drive{path: config(t, b)}, drive{root, writable}).wait(t)
			if writable {
				has(t, console, "wrote new 0:0")
				inOrder(t, root)
			} else {
				has(t, console, "wrote 12:1002")
			}
			if strings.Contains(console, "smartvm") {
				t.Errorf("the agent said something:\n%s", console)
			}
		})
	}
}

// Signals from within do not end process 1, nor does any of them leave zombies. All that a command
// writes comes out, also just before its end.
func TestLinuxGuest_SignalsAndOutput(t *testing.T) {
	watch(t)
	// An orphan that is gone was reaped by process 1, after the signals.
	script := "for s in HUP QUIT ABRT PIPE ALRM USR1 USR2 TTIN TTOU XCPU SYS TRAP; do kill -$s 1; done; (sleep 0.1 & echo $! >/tmp/orphan); " +
		"while [ -d /proc/$(cat /tmp/orphan) ]; do sleep 0.1; done; ps -o stat | grep -c Z; exec seq 10001 10200"
	console := start(t, drive{path: image{}.ext4(t)}, drive{scratch(t), true},
		drive{path: config(t, over(guest.Ext4, "sh", "-c", script))}).wait(t)
	has(t, console, "0")
	if strings.Contains(console, "panic") {
		t.Error(console)
	}
	for i := 10001; i <= 10200; i++ {
		if !strings.Contains(console, fmt.Sprint(i, "\n")) {
			t.Fatalf("%d is missing; the end is %q", i, console[max(0, len(console)-100):])
		}
	}
}

func TestLinuxGuest_CtrlAltDel(t *testing.T) {
	for name, c := range map[string]struct {
		script, signal string
		want           []string
	}{
		"Heeded": {
			"trap 'echo asked; exit 3' USR1", "SIGUSR1",
			[]string{"asked", "smartvm: command ended with exit code 3"},
		},
		"Default": {":", "", []string{"smartvm: command ended with exit code 143"}},
		"Ignored": {"trap '' TERM", "15", []string{"smartvm: command ended with exit code 137"}},
	} {
		t.Run(name, func(t *testing.T) {
			watch(t)
			// An orphan that nobody waits for, and one that outlives the command.
			script := c.script + "; (sleep 0 &); (setsid sleep 1000 &); echo ready; while :; do sleep 1; done"
			b, upper := over(guest.Ext4, "sh", "-c", script), scratch(t)
			b.StopSignal = c.signal
			v := start(t, drive{path: image{}.ext4(t)}, drive{upper, true}, drive{path: config(t, b)})
			v.await(t, "ready\n")
			v.pressKeys(t)
			has(t, v.wait(t), c.want...)
			inOrder(t, upper)
		})
	}
}

func TestLinuxGuest_Init(t *testing.T) {
	watch(t)
	root := image{
		"sbin/init":    "->../bin/busybox",
		"etc/inittab":  "::sysinit:/rc\n",
		"etc/hostname": "builder\n",
		"rc":           "#!/bin/sh\necho \"init $(cat /proc/1/comm) $PPID $A $(hostname) $(cat /etc/hostname)\"\ntty\n(reboot)\n",
	}.ext4(t)
	b := over(guest.Ext4)
	b.Env, b.Hostname = []string{"A=1"}, "guest"
	console := start(t, drive{path: root}, drive{scratch(t), true}, drive{path: config(t, b)}).wait(t)
	has(t, console, "init init 1 1 guest guest", "/dev/console")
}

// A command that is an init is process 1, with its arguments, and root.
func TestLinuxGuest_CommandIsInit(t *testing.T) {
	watch(t)
	root := image{
		"sbin/first": "#!/bin/sh\necho \"process $$ $(id -u) $# $1 $A $(pwd) $HOME\"; tty\nexec /bin/busybox reboot -f\n",
	}.ext4(t)
	b := over(guest.Ext4, "first", "an argument")
	b.Init, b.Env, b.WorkingDir, b.User, b.StopSignal = true, []string{"A=1"}, "/srv/new", "web", "SIGRTMIN+3"
	console := start(t, drive{path: root}, drive{scratch(t), true}, drive{path: config(t, b)}).wait(t)
	has(t, console, "process 1 0 1 an argument 1 /srv/new /", "/dev/console")
}

const runReport = `stat -c "%n %a %u %F" /run /run/app /run/app/pid /run/lock /run/systemd /var/run/app
grep -c ' /run tmpfs ' /proc/mounts
echo "volumes $(stat -c %a:%u:%F /data/db) $(cat /file)"
cat /run/app/pid
`

// What the image has in /run is there, below /var/run too, and its volumes. An init finds the
// directories alone.
func TestLinuxGuest_Run(t *testing.T) {
	for name, c := range map[string]struct {
		init bool
		want []string
	}{
		"Command": {false, []string{"/run/app/pid 640 999 regular file", "/run/systemd 755 0 directory", "pid 1"}},
		"Init":    {true, []string{"cat: can't open '/run/app/pid': No such file or directory"}},
	} {
		t.Run(name, func(t *testing.T) {
			watch(t)
			root := image{
				"run/app/pid": "pid 1\n", "run/lock/": "", "run/systemd/system/": "", "var/run": "->/run", "file": "a file",
				"report":     runReport,
				"sbin/first": "#!/bin/sh\n. /report\nexec /bin/busybox reboot -f\n",
			}.changed(t, func(dir string) error {
				return errors.Join(os.Chown(filepath.Join(dir, "run/app"), 999, 0),
					os.Chmod(filepath.Join(dir, "run/app"), 0o777|fs.ModeSticky),
					os.Chown(filepath.Join(dir, "run/app/pid"), 999, 0), os.Chmod(filepath.Join(dir, "run/app/pid"), 0o640))
			})
			b := over(guest.Ext4, "first")
			b.Init, b.Directories = c.init, []string{"/data/db", "/file"}
			console := start(t, drive{path: root}, drive{scratch(t), true}, drive{path: config(t, b)}).wait(t)
			has(t, console,
				append(c.want, "/run 755 0 directory", "/run/app 1777 999 directory", "/var/run/app 1777 999 directory",
					"/run/lock 755 0 directory", "1",
					"volumes 755:0:directory a file")...)
			if c.init == strings.Contains(console, "/run/systemd 755") {
				t.Errorf("/run/systemd is there only for a command:\n%s", console)
			}
		})
	}
}

// Whatever is wrong, the console says so and the VM ends.
func TestLinuxGuest_Faults(t *testing.T) {
	damaged := func(t *testing.T) string {
		return file(t, append([]byte("smartvm-boot 1 9\n{\"broken\""), make([]byte, 4096)...))
	}
	with := func(change func(*guest.Boot)) func(*testing.T) string {
		return func(t *testing.T) string {
			b := over(guest.Ext4, "sh", "-c", "exit 0")
			change(&b)
			return config(t, b)
		}
	}
	fine := with(func(*guest.Boot) {})
	for name, c := range map[string]struct {
		image  image
		config func(*testing.T) string
		want   []string
	}{
		"Damaged": {
			nil, damaged,
			[]string{"smartvm-agent: find the boot configuration: drive vdc: invalid boot configuration: .*"},
		},
		"NoScratch": {
			nil, with(func(b *guest.Boot) { b.ScratchDevice = "/dev/vdz" }),
			[]string{"smartvm-agent: wait for drive /dev/vdz: it did not appear"},
		},
		"NoExt4": {
			nil, with(func(b *guest.Boot) { b.RootType = guest.Squashfs }),
			[]string{"smartvm-agent: mount squashfs /dev/vda on /lower: invalid argument"},
		},
		"NoCommand": {
			nil, with(func(b *guest.Boot) { b.Command = []string{"nosuch"} }),
			[]string{`smartvm-agent: run "nosuch": file does not exist in PATH`, "smartvm: command ended with exit code 127"},
		},
		"NotExecutable": {
			nil, with(func(b *guest.Boot) { b.Command = []string{"/etc"} }),
			[]string{`smartvm-agent: run "/etc": permission denied`, "smartvm: command ended with exit code 126"},
		},
		"NoUser": {
			nil, with(func(b *guest.Boot) { b.User = "nobody" }),
			[]string{`smartvm-agent: find user "nobody": the image has no "nobody"`},
		},
		"HugePasswd": {
			image{"etc/passwd": huge},
			with(func(b *guest.Boot) { b.User = "web" }),
			[]string{`smartvm-agent: find user "web": read /etc/passwd: more than 67108864 bytes`},
		},
		"ProcElsewhere": {
			image{"proc": "->/../../nowhere"},
			fine,
			[]string{"smartvm-agent: mount proc on /proc: mkdir /proc: file exists"},
		},
		"NoSuchInit": {
			nil, with(func(b *guest.Boot) { b.Command, b.Init = []string{"/sbin/init"}, true }),
			[]string{"smartvm-agent: run /sbin/init: no such file or directory"},
		},
		"NoInit": {
			image{"bin/sh": "->nowhere"},
			with(func(b *guest.Boot) { b.Command = nil }),
			[]string{"smartvm-agent: run the image's init: it has none of /sbin/init, .*"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			watch(t)
			console := start(t, drive{path: c.image.ext4(t)}, drive{scratch(t), true}, drive{path: c.config(t)}).wait(t)
			for _, line := range c.want {
				if !regexp.MustCompile("(?m)^" + line + "$").MatchString(console) {
					t.Errorf("console lacks %q:\n%s", line, console)
				}
			}
			if strings.Contains(console, "Kernel panic") {
				t.Errorf("the kernel panicked:\n%s", console)
			}
		})
	}
}
