package main

import (
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
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/internal/agent"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/lab"
	"push.rocks/smartvm/internal/logfile"
)

// guestFiles makes what guests need.
func (b *bench) guestFiles(ctx context.Context) error {
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", b.helper(), "./inguest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build what runs in guests: %w\n%s", err, out)
	}
	return b.guestImage(ctx, b.guestData())
}

func (b *bench) helper() string    { return filepath.Join(b.Disk, "inguest") }
func (b *bench) guestData() string { return filepath.Join(b.Disk, "guests") }

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
	h, err := smartvm.Open(smartvm.Options{RuntimeDir: filepath.Join(b.Disk, "runtime"), DataDir: dir})
	if err != nil {
		return err
	}
	defer h.Close()
	images, err := h.Images()
	if err != nil {
		return err
	}
	_, err = images.Import(ctx,
		image.ImportOptions{Name: guestImage, Kernel: paths[0], Modules: paths[1], Rootfs: paths[2]})
	return err
}

const guestImage = "minimal"

// guestPatience bounds a guest's start, and its silence. Of a hundred in the lab one or two stop
// for the emulator's faults.
const guestPatience = 30 * time.Second

// How often what is measured in guests is done.
const (
	guestBoots = 5
	guestExecs = 60
	guestCopy  = 256 << 20 // bytes
	guestTimes = 2         // copies
)

// guestSite is a guest that is measured.
type guestSite struct {
	ctx     context.Context
	bench   *bench
	host    *smartvm.Host
	m       *smartvm.Machine // or none
	client  *agent.Client
	samples *samples
}

// guestHelper is where the program is in the guest that is compared with.
const guestHelper = "/inguest"

// inGuest is a phase in which guests run.
func inGuest(measure func(*guestSite) error) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) (err error) {
		// Files that other machines share are slow: a guest is not to wait for them.
		if out, err := exec.CommandContext(ctx, "cp", "-a", b.guestData(), b.dataDir()).CombinedOutput(); err != nil {
			return fmt.Errorf("copy the image: %w\n%s", err, out)
		}
		s := &guestSite{ctx: ctx, bench: b, samples: &b.samples}
		s.host, err = smartvm.Open(smartvm.Options{
			RuntimeDir: b.runtimeDir(), DataDir: b.dataDir(), FirecrackerBinary: b.Firecracker, Launcher: smartvm.LaunchDirect,
		})
		if err != nil {
			return err
		}
		defer s.host.Close()
		err = measure(s)
		if s.m == nil {
			return err
		}
		if err != nil {
			soon, cancel := context.WithTimeout(context.WithoutCancel(ctx), guestTimeout)
			defer cancel()
			state, _ := s.m.State(soon)
			return fmt.Errorf("%w; the VM is %s, and its console ends with\n%s", err, state,
				logfile.Tail(s.m.ConsoleLog(), 2<<10))
		}
		return s.remove()
	}
}

// patience is how long a guest may be silent at this machine's pace.
func (s *guestSite) patience() time.Duration {
	return time.Duration(s.bench.Pace * float64(guestPatience))
}

func (s *guestSite) remove() error {
	_, err := s.m.Stop(s.ctx, smartvm.StopOptions{})
	err = errors.Join(err, s.m.Remove(s.ctx))
	s.m = nil
	return err
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
	soon, cancel := context.WithTimeoutCause(s.ctx, s.patience(), late(s.patience()))
	defer cancel()
	if _, err := s.m.AwaitReady(soon); err != nil {
		return fmt.Errorf("start a guest: %w", because(soon, err))
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

// boots measures guests' starts.
func (s *guestSite) boots() error {
	for range guestBoots {
		if err := s.boot(); err != nil {
			return err
		}
		if err := errors.Join(s.remove(), s.run(), s.runParts()); err != nil {
			return err
		}
	}
	return nil
}

// trueSpec is a guest of the minimal image that ends at once.
func trueSpec() smartvm.Spec {
	spec := guestSpec()
	spec.Command = []string{"/bin/true"}
	return spec
}

// run measures the whole program, from its call to its exit.
func (s *guestSite) run() error {
	data, err := json.Marshal(trueSpec())
	if err != nil {
		return err
	}
	file := filepath.Join(s.bench.Dir, "true.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(s.ctx, s.patience(), late(s.patience()))
	defer cancel()
	cmd := s.bench.command(ctx, "run", "-f", file)
	begun := time.Now()
	if out, err := cmd.Output(); err != nil {
		return fmt.Errorf("smartvm run: %w: %s", because(ctx, err), out)
	}
	s.samples.time("run-minimal", time.Since(begun))
	return nil
}

// runParts measures the parts of the same, by the library: guest-* and agent-* are what they are
// within the guest's.
func (s *guestSite) runParts() (err error) {
	ctx, cancel := context.WithTimeoutCause(s.ctx, s.patience(), late(s.patience()))
	defer cancel()
	part := func(name string, do func() error) {
		if err != nil {
			return
		}
		begun := time.Now()
		if err = do(); err == nil {
			s.samples.time("run-"+name, time.Since(begun))
		}
	}
	part("create", func() error { s.m, err = s.host.Create(ctx, trueSpec()); return err })
	part("vmm", func() error { return s.m.Start(ctx) })
	part("guest", func() error { _, err := s.m.Wait(ctx); return err })
	part("end", func() error { return s.m.Remove(ctx) })
	if err == nil {
		s.m = nil
	}
	return because(ctx, err)
}

func (s *guestSite) boot() error {
	if err := s.started(guestSpec()); err != nil {
		return err
	}
	var told agentproto.Event
	ctx, heard := context.WithCancel(s.ctx)
	defer heard()
	if err := s.client.Watch(ctx, func(e agentproto.Event) { told = e; heard() }); told.Phases == nil {
		return err
	}
	if err := s.copyHelper(); err != nil {
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
		s.samples.add(name, "ms", float64(d.Microseconds())/1000)
	}
	s.samples.add("agent-boot/kernel", "", 100*own.Seconds()/kernel.Seconds())
	return nil
}

// agent measures what a guest's agent does, and what it takes after that.
func (s *guestSite) agent() error {
	if err := s.started(guestSpec()); err != nil {
		return err
	}
	if err := s.copyHelper(); err != nil {
		return err
	}
	for _, measure := range []func() error{s.execs, s.copies, s.memory} {
		if err := measure(); err != nil {
			return err
		}
	}
	return nil
}

func (s *guestSite) copyHelper() error {
	return s.m.CopyTo(s.ctx, s.bench.helper(), guestHelper, nil, smartvm.CopyOptions{})
}

// connect opens a stream to a port of the guest. It is closed when the measurement is ended.
func (s *guestSite) connect(port uint32) (net.Conn, error) {
	c, err := s.client.Connect(s.ctx, port)
	if err == nil {
		context.AfterFunc(s.ctx, func() { _ = c.Close() })
	}
	return c, err
}

// ask runs what is compared with in the guest, and returns the numbers that it prints.
func (s *guestSite) ask(args ...string) (numbers []float64, err error) {
	var out, errs bytes.Buffer
	exit, err := s.client.Exec(s.ctx, guest.Cmd{Args: append([]string{guestHelper}, args...), Stdout: &out, Stderr: &errs})
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
		_, err := s.client.Exec(s.ctx, guest.Cmd{Args: []string{guestHelper, "serve"}, Stdout: w, Stderr: os.Stderr})
		_ = w.CloseWithError(err)
	}()
	if _, err := up.Read(make([]byte, 64)); err != nil {
		return err
	}
	for i := range guestExecs {
		begun := time.Now()
		c, err := s.connect(2000)
		if err != nil {
			return err
		}
		if _, err := c.Write([]byte{'x'}); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			return err
		}
		s.samples.add("guest-connect", "ms", time.Since(begun).Seconds()*1000)
		_ = c.Close()
		begun = time.Now()
		exit, err := s.client.Exec(s.ctx, guest.Cmd{Args: []string{"true"}})
		if err != nil || exit.Code != 0 {
			return fmt.Errorf("%+v, %w", exit, err)
		}
		s.samples.add("guest-exec", "ms", time.Since(begun).Seconds()*1000)
		if i%10 == 0 {
			numbers, err := s.ask("spawn", "11")
			if err != nil {
				return err
			}
			for _, n := range numbers[1:] {
				s.samples.add("guest-spawn", "ms", n/1e6)
			}
		}
	}
	return nil
}

// copies measures copies to the guest's memory and back, and bare streams of as much.
func (s *guestSite) copies() error {
	from := filepath.Join(s.bench.Dir, "copy")
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
		s.samples.add(name, "MiB/s", guestCopy/(1<<20)/time.Since(begun).Seconds())
		return err
	}
	for range guestTimes {
		for _, way := range []struct {
			name string
			do   func() error
		}{
			{"guest-stream-to", func() error {
				c, err := s.connect(2001)
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
				c, err := s.connect(2002)
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
			{"guest-copy-from", func() error {
				return s.m.CopyFrom(s.ctx, "/dev/shm/copy", from+"-back", nil, smartvm.CopyOptions{})
			}},
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
	if _, err := s.client.Exec(s.ctx,
		guest.Cmd{Args: []string{"sh", "-c", "sleep 10; cat /proc/1/status"}, Stdout: &out}); err != nil {
		return err
	}
	for line := range strings.Lines(out.String()) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, err := strconv.ParseFloat(f[1], 64)
			s.samples.add("agent-rss", "MiB", kib/1024)
			return err
		}
	}
	return errors.New("the guest does not tell the agent's memory")
}
