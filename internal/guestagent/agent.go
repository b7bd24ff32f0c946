// Package guestagent is the whole of a guest's first program: it runs as process 1 of an initramfs,
// joins the image's read-only root with a writable drive by overlayfs, and there runs the image's
// own init in its place, or a command below itself. [push.rocks/smartvm/internal/agentproto] tells
// it what to do.
//
// It trusts the host and nothing in the image. Paths of the image are only used once the image is
// the root directory, so that its links lead nowhere else. Whatever goes wrong is a line on the
// console, and the end of the VM.
package guestagent

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/process"
	"push.rocks/smartvm/internal/guestagent/server"
	"push.rocks/smartvm/internal/guestagent/tune"
)

const (
	// devicePatience is how long drives may take to appear.
	devicePatience = 10 * time.Second
	// killPatience is how long killed processes may take to be gone, and the console to put out what
	// it has.
	killPatience = 2 * time.Second
	// interval is that of looking again.
	interval = time.Millisecond
)

// Signals come from package os/signal, whose channels need room for one.
type Signals struct {
	Stop  <-chan os.Signal // asks the command to end: SIGINT, as which the kernel passes Ctrl-Alt-Del on, and SIGTERM
	Child <-chan os.Signal // SIGCHLD
}

// system is what is known of the guest on its way up.
type system struct {
	signals  Signals
	writable []int  // descriptors of the file systems on drives that are written to
	farewell string // the last line on the console
	begun    time.Duration
	reaper   process.Reaper
	spent    agentproto.Spent     // on the way up, by the kernel
	patience func() time.Duration // how long a command may take to end when asked to
}

// Main is the life of the guest. It returns only where it is not process 1.
func Main(s Signals) error {
	if os.Getpid() != 1 {
		return errors.New("this is the first program of a guest, for its kernel to run")
	}
	g := &system{signals: s, begun: uptime()}
	tune.Immortal()
	tune.Frugal()
	defer g.end()
	defer func() {
		if r := recover(); r != nil {
			say("panic: %v", r)
		}
	}()
	if err := g.run(); err != nil {
		say("%v", err)
	}
	return nil
}

// say writes a line to the console.
func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "smartvm-agent: "+format+"\n", args...) }

// without says what the guest does without, if there is anything.
func without(err error) {
	if err != nil {
		say("%v", err)
	}
}

// run returns when the VM is to end.
func (g *system) run() error {
	if err := mount(filesystem{kind: "proc", target: "/proc"}); err != nil {
		return err
	}
	without(tune.Slacken(tune.BootSlack)) // it only takes longer
	// A kernel may have mounted the second one itself.
	if err := mount(filesystem{kind: "sysfs", target: "/sys"}); err != nil {
		return err
	}
	if err := mount(filesystem{kind: "devtmpfs", target: "/dev"}); err != nil {
		return err
	}
	mods, err := openModules()
	if err != nil {
		return err
	}
	first, rest := mods.split()
	took(&g.spent.Modules, func() { first.insert(nil) })
	b, err := awaitBoot("/sys/block", "/dev")
	if err != nil {
		return err
	}
	took(&g.spent.Modules, func() { rest.insert(unwanted(b, "/sys")) })
	took(&g.spent.Mounts, func() { err = g.mountRoot(b) })
	if err != nil {
		return err
	}
	if err := switchRoot(); err != nil {
		return err
	}
	if err := mountDefaults(b); err != nil {
		return err
	}
	without(tune.Slacken(tune.UsualSlack))
	for _, dir := range b.Directories {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			say("make the image's volume: %v", err) // what needs it will say so
		}
	}
	if err := g.mountVolumes(b); err != nil {
		return err
	}
	if b.HasInit() {
		return g.becomeInit(b)
	}
	go g.reaper.Run(g.signals.Child)
	srv := server.New(&g.reaper, b)
	srv.Identify = func(id *agentproto.Identity) []error { return identify(b, id) }
	srv.Reached(agentproto.PhaseAgent, g.begun)
	srv.Spent(g.spent)
	g.patience = srv.Patience
	srv.Secrets = func(files map[string][]byte) error { return storeSecrets(b, files) }
	err = listen(srv)
	switch {
	case err != nil && b.Secrets:
		return err // the host cannot tell them
	case err != nil:
		if !errors.Is(err, unix.EAFNOSUPPORT) { // a VM without such a device, whose modules are left out
			say("%v", err)
		}
		b.Attach = false // the host cannot ask for the command
	case b.Secrets:
		<-srv.Told() // until then Ctrl-Alt-Del is the kernel's
	}
	exit, err := g.runCommand(b, srv)
	if err != nil {
		exit = agentproto.Exit{Code: process.ExitNotExecutable, Error: err.Error()}
	}
	if err == nil && exit.Code != 0 {
		g.farewell = fmt.Sprintf("smartvm: command ended with exit code %d\n", exit.Code)
	}
	srv.Ended(exit)
	return err
}

// took adds to t how long f takes.
func took(t *time.Duration, f func()) {
	begun := uptime()
	f()
	*t += uptime() - begun
}

// end ends all processes and the VM.
func (g *system) end() {
	_ = unix.Kill(-1, unix.SIGKILL)
	for deadline := time.Now().Add(killPatience); time.Now().Before(deadline); {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil) // beside the reaper, if there is one
		if errors.Is(err, unix.ECHILD) {
			break
		}
		if pid == 0 {
			time.Sleep(interval)
		}
	}
	unix.Sync()
	for _, fd := range g.writable {
		if err := makeReadOnly(fd); err != nil {
			say("%v", err)
		}
	}
	fmt.Fprint(os.Stderr, g.farewell)
	drain()
	say("reboot: %v", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
}

// drain waits for the console to put out what it has taken. Someone may have stopped it.
func drain() {
	for deadline := time.Now().Add(killPatience); time.Now().Before(deadline); time.Sleep(interval) {
		if left, err := unix.IoctlGetInt(int(os.Stderr.Fd()), unix.TIOCOUTQ); err != nil || left == 0 {
			return
		}
	}
}

// await polls until done says so, until devicePatience is over. It returns the last error.
func await(done func() error) error {
	for deadline := time.Now().Add(devicePatience); ; time.Sleep(interval) {
		err := done()
		if err == nil || !errors.Is(err, errNotYet) || time.Now().After(deadline) {
			return err
		}
	}
}

// errNotYet is what may be otherwise soon.
var errNotYet = errors.New("it did not appear")

// awaitDevice waits for a drive.
func awaitDevice(path string) error {
	err := await(func() error {
		if _, err := os.Stat(path); err != nil {
			return errNotYet
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("wait for drive %s: %w", path, err)
	}
	return nil
}

// awaitBoot waits for the drive that tells us what to do. sys lists drives, dev has them.
func awaitBoot(sys, dev string) (b *guest.Boot, err error) {
	err = await(func() error {
		b, err = findBoot(sys, dev)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("find the boot configuration: %w", err)
	}
	return b, nil
}
