package lab

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// host is a running lab.
type host struct {
	process *os.Process
	exited  <-chan struct{} // closed when QEMU has been waited for
	marker  string
	begun   time.Time
	booted  func()
	lines   lines
	tail    tail

	write                  sync.Mutex // held while writing to any of the three
	stdout, stderr, output io.Writer
}

// lines are our ends of the lab's serial lines.
type lines struct {
	control, stdout, stderr, console, monitor *os.File
}

func (l lines) close() {
	for _, f := range []*os.File{l.control, l.stdout, l.stderr, l.console, l.monitor} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// launch starts QEMU. The caller must call wait.
func launch(ctx context.Context, c Config) (*host, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	h := &host{
		marker: rand.Text(), begun: time.Now(), booted: c.Booted, stdout: c.Stdout, stderr: c.Stderr,
		output: c.Console,
	}
	initramfs, err := c.initramfs(h.marker)
	if err != nil {
		return nil, err
	}
	theirs := []*os.File{initramfs}
	defer func() {
		for _, f := range theirs {
			_ = f.Close()
		}
	}()
	for _, ours := range []**os.File{
		&h.lines.control, &h.lines.stdout, &h.lines.stderr, &h.lines.console,
		&h.lines.monitor,
	} {
		near, far, err := socketPair()
		if err != nil {
			h.lines.close()
			return nil, err
		}
		*ours = near
		theirs = append(theirs, far)
	}
	cmd := exec.Command(c.QEMU, c.arguments()...) //nolint:noctx // wait kills it; its life must be tied to a thread
	cmd.ExtraFiles = theirs
	cmd.Dir = "/"
	cmd.Stderr = &h.tail
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := h.start(cmd); err != nil {
		h.lines.close()
		return nil, err
	}
	return h, nil
}

// start starts and waits for a program on a thread of its own: the kernel kills
// the program when the thread that started it ends.
func (h *host) start(cmd *exec.Cmd) error {
	exited := make(chan struct{})
	started := make(chan error, 1)
	go func() {
		defer close(exited)
		runtime.LockOSThread()
		err := cmd.Start()
		if err == nil {
			// Its threads inherit this. Where we may not, the lab is as others are.
			_ = unix.Setpriority(unix.PRIO_PROCESS, cmd.Process.Pid, Niceness)
		}
		started <- err
		if err == nil {
			// How it ended does not matter: it is killed, or its lines
			// break and the tail tells.
			_ = cmd.Wait()
		}
	}()
	h.exited = exited
	err := <-started
	h.process = cmd.Process
	return err
}

// File descriptors of QEMU, as launch passes them.
const (
	fdInitramfs = 3 + iota
	fdControl
	fdStdout
	fdStderr
	fdConsole
	fdMonitor
)

// arguments returns QEMU's.
func (c Config) arguments() []string {
	args := []string{
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot",
		// With nested paging a guest boots in two thirds of the time. Without AVX2 what looks for it (Go,
		// for one) copies memory six times as fast, and compares it ten times as fast. See docs/lab.md.
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,-avx2,check=off",
		"-smp", strconv.Itoa(c.CPUs), "-m", strconv.Itoa(c.MemoryMiB),
		"-kernel", c.Kernel, "-initrd", fmt.Sprintf("/proc/self/fd/%d", fdInitramfs),
		// Without timers of high resolution tests take half the time: QEMU takes a lock and wakes its
		// main thread each time that one is set. A tick that never stops repairs what an interrupt that
		// QEMU has lost would stop for ever: see docs/lab.md. On a busy machine the kernel does not see
		// its timer tick in the time that it gives it, and panics, unless it is not to check.
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off highres=off nohz=off no_timer_check",
		"-chardev", fmt.Sprintf("socket,id=console,fd=%d", fdConsole), "-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=monitor,fd=%d", fdMonitor), "-mon", "chardev=monitor",
		"-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
		"-virtfs", "local,path=/,mount_tag=root,security_model=none,readonly=on,multidevs=remap",
	}
	for fd, name := range map[int]string{fdControl: "control", fdStdout: "stdout", fdStderr: "stderr"} {
		args = append(args, "-chardev", fmt.Sprintf("socket,id=%s,fd=%d", name, fd),
			"-device", fmt.Sprintf("virtserialport,name=%s,chardev=%s", name, name))
	}
	for i, dir := range c.Share {
		args = append(args, "-virtfs",
			fmt.Sprintf("local,path=%s,mount_tag=share%d,security_model=none,multidevs=remap", dir, i))
	}
	return args
}

// errEnded means that a line broke, because QEMU ended.
var errEnded = errors.New("lab ended")

// failure is what the lab says when it cannot start the command.
type failure string

func (f failure) Error() string { return string(f) }

// wait returns the command's exit status. Nothing of the lab is left then.
func (h *host) wait(ctx context.Context) (int, error) {
	var status int
	alive := make(chan struct{}, 1)
	finished := make(chan error, 3)
	var console sync.WaitGroup
	console.Go(h.readConsole)
	go func() {
		var err error
		status, err = h.readControl(alive)
		finished <- err
	}()
	go func() { finished <- h.relay(h.stdout, h.lines.stdout) }()
	go func() { finished <- h.relay(h.stderr, h.lines.stderr) }()

	silence := BootTimeout
	patience := time.NewTimer(silence)
	defer patience.Stop()
	booted, ended := false, ctx.Done()
	var first error
	fail := func(err error) {
		if first == nil && err != nil {
			first = err
			_ = h.process.Kill()
		}
	}
	for pending := 3; pending > 0; {
		select {
		case <-alive:
			if !booted {
				booted = true
				silence = min(max(4*time.Since(h.begun), minSilence), maxSilence)
				if h.booted != nil {
					h.booted()
				}
			}
			patience.Reset(silence)
		case err := <-finished:
			pending--
			fail(err)
		case <-patience.C:
			if booted {
				h.askProcessors()
				fail(fmt.Errorf("%w: no sign of life for %v", ErrStalled, silence.Round(time.Second)))
			} else {
				fail(failure(fmt.Sprintf("nothing runs after %v", BootTimeout)))
			}
		case <-ended:
			fail(context.Cause(ctx))
			ended = nil
		}
	}
	_ = h.process.Kill()
	<-h.exited
	console.Wait()
	h.lines.close()
	if first == nil {
		return status, nil
	}
	return 0, h.explain(first, booted)
}

// askProcessors adds to the last messages where the processors are. It takes half a second.
func (h *host) askProcessors() {
	err := h.lines.monitor.SetDeadline(time.Now().Add(500 * time.Millisecond))
	if err == nil {
		_, err = io.WriteString(h.lines.monitor, "info registers -a\n")
	}
	if err != nil {
		return
	}
	registers, _ := io.ReadAll(io.LimitReader(h.lines.monitor, 64<<10)) // until the deadline: it has no end
	for line := range strings.Lines(string(registers)) {
		if strings.HasPrefix(line, "CPU#") || strings.HasPrefix(line, "RIP=") {
			_, _ = h.tail.Write([]byte(line))
		}
	}
}

func (h *host) explain(err error, booted bool) error {
	var said failure
	switch {
	case errors.As(err, &said):
		err = fmt.Errorf("%w: %w", ErrBoot, err)
	case errors.Is(err, errEnded) && booted:
		err = ErrDied
	case errors.Is(err, errEnded):
		err = ErrBoot
	case errors.Is(err, context.Canceled):
		// Nothing went wrong that the messages could explain.
		return err
	}
	return &ConsoleError{Err: err, Console: h.tail.String()}
}

// readControl reads what the lab says of itself: "ready", "alive" again and again,
// then "exit" with the command's status; or "fail" with a reason.
func (h *host) readControl(alive chan<- struct{}) (status int, err error) {
	s := bufio.NewScanner(h.lines.control) // its lines are bounded
	for s.Scan() {
		word, rest, _ := strings.Cut(s.Text(), " ")
		switch word {
		case "ready", "alive":
			select {
			case alive <- struct{}{}:
			default: // the one before has not been taken yet
			}
		case "exit":
			return strconv.Atoi(rest)
		case "fail":
			return 0, failure(rest)
		default:
			return 0, fmt.Errorf("lab says %.80q", s.Text())
		}
	}
	return 0, errEnded
}

// relay copies a line to w as far as the marker.
func (h *host) relay(w io.Writer, line io.Reader) error {
	m := untilMarker{marker: []byte("\x00" + h.marker)}
	buf := make([]byte, 64<<10)
	for {
		n, err := line.Read(buf)
		out, end := m.next(buf[:n])
		if err := h.print(w, out); err != nil {
			return err
		}
		if end {
			return nil
		}
		if err != nil {
			return errors.Join(errEnded, h.print(w, m.held))
		}
	}
}

// readConsole keeps the last messages until QEMU ends.
func (h *host) readConsole() {
	buf := make([]byte, 4<<10)
	for {
		n, err := h.lines.console.Read(buf)
		_, _ = h.tail.Write(buf[:n])
		// Messages are a courtesy: the lab goes on without them.
		_ = h.print(h.output, buf[:n])
		if err != nil {
			return
		}
	}
}

func (h *host) print(w io.Writer, data []byte) error {
	if w == nil || len(data) == 0 {
		return nil
	}
	h.write.Lock()
	defer h.write.Unlock()
	_, err := w.Write(data)
	return err
}

// socketPair returns two connected stream sockets, ours ready for deadlines
// and Close to interrupt it.
func socketPair() (near, far *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("create socket pair: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("set nonblocking: %w", err), unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return os.NewFile(uintptr(fds[0]), "lab line"), os.NewFile(uintptr(fds[1]), "lab line"), nil
}
