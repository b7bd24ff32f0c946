package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/lab"
	"push.rocks/smartvm/internal/logfile"
)

// guestVerb runs the measurements of real guests, in the lab where this machine boots none.
const guestVerb = "measure-guests"

// guests measures what goes on in real guests.
func (b *bench) guests(ctx context.Context) error {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "bench: guests need root: skipped")
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// Not on the tmpfs of the others: the lab has one of its own there.
	dir, err := os.MkdirTemp("", "smartvm-bench-guests-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := b.guestImage(ctx, filepath.Join(dir, "data")); err != nil {
		return err
	}
	helper := filepath.Join(dir, "inguest")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", helper, "./inguest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build what runs in guests: %w\n%s", err, out)
	}
	command := []string{self, guestVerb, dir, b.firecracker, b.iperf3}
	mode, err := lab.Decide(lab.Mode(os.Getenv("SMARTVM_LAB")))
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		err := b.hearGuests(ctx, command, mode.Lab)
		if err == nil || try == guestTries || !mode.Lab || ctx.Err() != nil {
			return err
		}
		fmt.Fprintln(os.Stderr, "bench: once more in a new lab, as what it emulates may have failed:", err)
	}
}

// guestTries is how often the lab may fail: its guests die in one of three runs, by a copy that breaks off.
const guestTries = 3

// hearGuests runs the command there and takes what it measures.
func (b *bench) hearGuests(ctx context.Context, command []string, inLab bool) error {
	out, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := b.runGuests(ctx, command, inLab, w)
		ended <- err
		_ = w.CloseWithError(err)
	}()
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var s sample
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			return fmt.Errorf("%q: %w", lines.Text(), err)
		}
		b.report.add(s.Name, s.Unit, s.Value)
		b.report.lab[s.Name] = inLab
	}
	return <-ended
}

// runGuests runs the command there.
func (b *bench) runGuests(ctx context.Context, command []string, inLab bool, out io.Writer) error {
	if !inLab {
		cmd := exec.CommandContext(ctx, command[0], command[1:]...)
		cmd.Stdout, cmd.Stderr = out, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS}
		return cmd.Run()
	}
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return err
	}
	paths, err := cache.Ensure(ctx, fixtures.QEMU, fixtures.LabKernel, fixtures.LabModules, fixtures.Busybox)
	if err != nil {
		return err
	}
	status, err := lab.Run(ctx, lab.Config{
		QEMU: paths[0], Kernel: paths[1], Modules: paths[2], Busybox: paths[3], Command: command, Dir: "/",
		Env: []string{"PATH=" + os.Getenv("PATH")}, Stdout: out, Stderr: os.Stderr,
	})
	if err == nil && status != 0 {
		err = fmt.Errorf("in the lab: exit status %d", status)
	}
	return err
}

// guestImage makes the minimal image in a data directory.
func (b *bench) guestImage(ctx context.Context, dir string) error {
	cache, err := fixtures.FromEnv(os.Getenv)
	if err != nil {
		return err
	}
	paths, err := cache.Ensure(ctx, fixtures.GuestKernel, fixtures.GuestModules, fixtures.Minimal)
	if err != nil {
		return err
	}
	h, err := smartvm.Open(smartvm.Options{RuntimeDir: filepath.Join(b.dir, "image"), DataDir: dir})
	if err != nil {
		return err
	}
	defer h.Close()
	images, err := h.Images()
	if err != nil {
		return err
	}
	_, err = images.Import(ctx, image.ImportOptions{Name: guestImage, Kernel: paths[0], Modules: paths[1], Rootfs: paths[2]})
	return err
}

const guestImage = "minimal"

// guestPatience bounds a guest's start. Of a hundred in the lab one or two stop for the emulator's faults.
const guestPatience = 30 * time.Second

var errTryAgain = errors.New("the guest does not boot")

// How often what is measured in guests is done.
const (
	guestBoots = 5
	guestExecs = 60
	guestCopy  = 256 << 20 // bytes
	guestTimes = 2         // copies
)

// guestSite is a guest that is measured.
type guestSite struct {
	ctx    context.Context
	host   *smartvm.Host
	m      *smartvm.Machine
	client *agent.Client
	helper string // the program that is compared with, on the host
	iperf3 string // a program
	report func(name, unit string, value float64)
}

// guestHelper is where it is in the guest.
const guestHelper = "/inguest"

// measureGuests prints what it measures; args are a directory with an image and inguest, the VMM, and iperf3.
func measureGuests(args []string) (err error) {
	out := json.NewEncoder(os.Stdout)
	// Files that other machines share are slow: a guest is not to wait for them.
	local, err := os.MkdirTemp("/dev/shm", "smartvm-bench-guests-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(local)
	if out, err := exec.Command("cp", "-a", filepath.Join(args[0], "data"), local).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the image: %w\n%s", err, out)
	}
	s := &guestSite{ctx: context.Background(), helper: filepath.Join(args[0], "inguest"), iperf3: args[2], report: func(name, unit string, value float64) {
		_ = out.Encode(sample{name, unit, value})
	}}
	s.host, err = smartvm.Open(smartvm.Options{
		RuntimeDir: filepath.Join(local, "runtime"), DataDir: filepath.Join(local, "data"), FirecrackerBinary: args[1], Launcher: smartvm.LaunchDirect,
	})
	if err != nil {
		return err
	}
	defer s.host.Close()
	defer func() {
		if err != nil && s.m != nil {
			state, _ := s.m.State(s.ctx)
			err = fmt.Errorf("%w; the VM is %s, and its console ends with\n%s", err, state, logfile.Tail(s.m.ConsoleLog(), 2<<10))
		}
	}()
	for i := range guestBoots {
		if err := again(func() error { return s.boot(i == guestBoots-1) }); err != nil {
			return err
		}
	}
	for _, measure := range []func() error{s.execs, s.copies, s.memory, s.remove} {
		if err := measure(); err != nil {
			return err
		}
	}
	return errors.Join(again(s.network), s.remove())
}

// again does something that the lab may fail once more.
func again(do func() error) (err error) {
	for range 4 {
		if err = do(); !errors.Is(err, errTryAgain) {
			return err
		}
	}
	return err
}

func (s *guestSite) remove() error {
	_, err := s.m.Stop(s.ctx, smartvm.StopOptions{})
	return errors.Join(err, s.m.Remove(s.ctx))
}

// guestSpec is a guest of the minimal image that does nothing.
func guestSpec() smartvm.Spec {
	spec := smartvm.Spec{
		Image: guestImage, Command: []string{"/bin/sh", "-c", "while :; do sleep 1000; done"},
		MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 1024},
	}
	if os.Getenv(lab.InLabVariable) != "" {
		spec.MachineConfig.HugePages = lab.LargePages
	}
	return spec
}

// started starts a guest, and waits until its command runs.
func (s *guestSite) started(spec smartvm.Spec) (err error) {
	if s.m, err = s.host.Create(s.ctx, spec); err != nil {
		return err
	}
	if err := s.m.Start(s.ctx); err != nil {
		return err
	}
	soon, cancel := context.WithTimeout(s.ctx, guestPatience)
	defer cancel()
	if _, err := s.m.AwaitReady(soon); err != nil {
		fmt.Fprintln(os.Stderr, "bench: once more, as the lab may have failed:", err)
		return errors.Join(s.remove(), errTryAgain)
	}
	in, err := s.m.Inspect(s.ctx)
	if err != nil {
		return err
	}
	s.client = &agent.Client{Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", in.Vsock)
	}}
	return nil
}

// boot measures a guest's start. The last one stays.
func (s *guestSite) boot(stays bool) (err error) {
	if err := s.started(guestSpec()); err != nil {
		return err
	}
	var told agentproto.Event
	ctx, heard := context.WithCancel(s.ctx)
	defer heard()
	if err := s.client.Watch(ctx, func(e agentproto.Event) { told = e; heard() }); told.Phases == nil {
		return err
	}
	if err := s.m.CopyTo(s.ctx, s.helper, guestHelper, nil, smartvm.CopyOptions{}); err != nil {
		return err
	}
	numbers, err := s.ask("kernel")
	if err != nil {
		return err
	}
	if len(numbers) != 1 || told.Spent == nil {
		return fmt.Errorf("the guest does not tell how it came up: %v, %+v", numbers, told)
	}
	kernel := time.Duration(numbers[0])
	own := told.Phases[agentproto.PhaseCommand] - kernel - told.Spent.Modules - told.Spent.Mounts
	for name, d := range map[string]time.Duration{
		"guest-kernel": kernel, "guest-modules": told.Spent.Modules, "guest-mounts": told.Spent.Mounts,
		"agent-start": told.Phases[agentproto.PhaseAgent] - kernel, "agent-boot": own,
	} {
		s.report(name, "ms", float64(d.Microseconds())/1000)
	}
	s.report("agent-boot/kernel", "", 100*own.Seconds()/kernel.Seconds())
	if !stays {
		return s.remove()
	}
	return nil
}

// ask runs what is compared with in the guest, and returns the numbers that it prints.
func (s *guestSite) ask(args ...string) (numbers []float64, err error) {
	var out, errs bytes.Buffer
	exit, err := s.client.Exec(s.ctx, agent.Cmd{Args: append([]string{guestHelper}, args...), Stdout: &out, Stderr: &errs})
	if err == nil && exit.Code != 0 {
		err = fmt.Errorf("%v in the guest: %+v, %s", args, exit, &errs)
	}
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(out.String()) {
		n, err := strconv.ParseFloat(strings.TrimSpace(line), 64)
		if err != nil {
			return nil, err
		}
		numbers = append(numbers, n)
	}
	return numbers, nil
}

// execs measures the whole of an exec, and its parts.
func (s *guestSite) execs() error {
	up, w := io.Pipe()
	go func() {
		_, err := s.client.Exec(s.ctx, agent.Cmd{Args: []string{guestHelper, "serve"}, Stdout: w, Stderr: os.Stderr})
		_ = w.CloseWithError(err)
	}()
	if _, err := up.Read(make([]byte, 64)); err != nil {
		return err
	}
	for i := range guestExecs {
		begun := time.Now()
		c, err := s.client.Connect(s.ctx, 2000)
		if err != nil {
			return err
		}
		if _, err := c.Write([]byte{'x'}); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			return err
		}
		s.report("guest-connect", "ms", time.Since(begun).Seconds()*1000)
		_ = c.Close()
		begun = time.Now()
		exit, err := s.client.Exec(s.ctx, agent.Cmd{Args: []string{"true"}})
		if err != nil || exit.Code != 0 {
			return fmt.Errorf("%+v, %w", exit, err)
		}
		s.report("guest-exec", "ms", time.Since(begun).Seconds()*1000)
		if i%10 == 0 {
			numbers, err := s.ask("spawn", "11")
			if err != nil {
				return err
			}
			for _, n := range numbers[1:] {
				s.report("guest-spawn", "ms", n/1e6)
			}
		}
	}
	return nil
}

// copies measures copies to the guest's memory and back, and bare streams of as much.
func (s *guestSite) copies() error {
	from := filepath.Join("/dev/shm", "smartvm-bench-copy")
	defer os.Remove(from)
	if err := os.WriteFile(from, bytes.Repeat([]byte("0123456789abcdef"), guestCopy/16), 0o600); err != nil {
		return err
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	rate := func(name string, do func() error) error {
		begun := time.Now()
		err := do()
		s.report(name, "MiB/s", guestCopy/(1<<20)/time.Since(begun).Seconds())
		return err
	}
	for range guestTimes {
		for _, way := range []struct {
			name string
			do   func() error
		}{
			{"guest-stream-to", func() error {
				c, err := s.client.Connect(s.ctx, 2001)
				if err != nil {
					return err
				}
				defer c.Close()
				if _, err := c.Write(binary.BigEndian.AppendUint64(nil, guestCopy)); err != nil {
					return err
				}
				for b := data; len(b) > 0; b = b[256<<10:] {
					if _, err := c.Write(b[:256<<10]); err != nil {
						return err
					}
				}
				_, err = io.ReadFull(c, make([]byte, 1))
				return err
			}},
			{"guest-copy-to", func() error { return s.m.CopyTo(s.ctx, from, "/dev/shm/copy", nil, smartvm.CopyOptions{}) }},
			{"guest-stream-from", func() error {
				c, err := s.client.Connect(s.ctx, 2002)
				if err != nil {
					return err
				}
				defer c.Close()
				if _, err := c.Write(binary.BigEndian.AppendUint64(nil, guestCopy)); err != nil {
					return err
				}
				buf := make([]byte, 256<<10)
				for n := 0; n < guestCopy; {
					got, err := c.Read(buf)
					if n += got; err != nil {
						return err
					}
				}
				return nil
			}},
			{"guest-copy-from", func() error { return s.m.CopyFrom(s.ctx, "/dev/shm/copy", from+"-back", nil, smartvm.CopyOptions{}) }},
		} {
			if err := rate(way.name, way.do); err != nil {
				return fmt.Errorf("%s: %w", way.name, err)
			}
		}
		_ = os.Remove(from + "-back")
	}
	return nil
}

// memory measures the idle agent's.
func (s *guestSite) memory() error {
	var out bytes.Buffer
	if _, err := s.client.Exec(s.ctx, agent.Cmd{Args: []string{"sh", "-c", "sleep 10; cat /proc/1/status"}, Stdout: &out}); err != nil {
		return err
	}
	for line := range strings.Lines(out.String()) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, err := strconv.ParseFloat(f[1], 64)
			s.report("agent-rss", "MiB", kib/1024)
			return err
		}
	}
	return errors.New("the guest does not tell the agent's memory")
}
